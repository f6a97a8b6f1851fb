package initiator

// Listed is how many PDUs wait to be sent, for tests of floods.
func (s *Session) Listed() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.urgent.len() + s.commands.len() + len(s.cur)
}

// MaxAnswers bounds what waits to be sent of the answers to a target.
const MaxAnswers = maxAnswers
