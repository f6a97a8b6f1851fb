package initiator

// Ping sends a ping now, for tests that want its answer in a known place.
func (s *Session) Ping() { s.sendPing() }

// StartAt makes sn the CmdSN of the first command, before there is one: a login
// of ours always begins at 0.
func (s *Session) StartAt(sn uint32) {
	s.mu.Lock()
	s.cmdSN = sn
	s.wireSN.Store(sn)
	s.mu.Unlock()
}

// Pinging tells whether a ping waits for its answer.
func (s *Session) Pinging() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ping != 0
}
