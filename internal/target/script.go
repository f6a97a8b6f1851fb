package target

import "time"

// deferred is a command that a script made late. Whoever takes it out of
// srv.late, under srv.mu, decides about it.
type deferred struct {
	c     *conn
	nexus nexus
	r     request
	data  []byte
	act   Action
	timer *time.Timer
}

// script does to a command, whose data is complete, what its hook wanted.
func (c *conn) script(r *request, data []byte, act *Action) bool {
	if act.Reset {
		c.close(true)
		return false
	}
	if act.Delay > 0 {
		d := &deferred{c: c, nexus: c.nexus, r: *r, data: append([]byte(nil), data...), act: *act}
		c.srv.mu.Lock()
		c.srv.late[d] = struct{}{}
		d.timer = time.AfterFunc(act.Delay, d.due)
		c.srv.mu.Unlock()
		return true
	}
	if act.Orphan || (!act.Silent && act.Status == 0 && act.Response == 0) {
		r.store(data)
	}
	c.answer(r, data, act)
	return true
}

// store puts the data of a WRITE on the disk.
func (r *request) store(data []byte) {
	if r.block && r.isWrite() && r.sense == noSense {
		r.lu.write(data[:min(uint64(len(data)), r.n)], r.off)
	}
}

// answer answers a scripted command, whose effect took place.
func (c *conn) answer(r *request, data []byte, act *Action) {
	c.putBytes(act.Inject)
	switch {
	case act.Silent:
	case act.Response != 0:
		c.response(r, 0, r.n).SetResponse(act.Response)
	case act.Status != 0 && act.SenseData != nil:
		c.respondSense(r, act.Status, act.SenseData, 0)
	case act.Status != 0:
		c.respond(r, act.Status, act.Sense, 0)
	case act.Data != nil && r.wantsData():
		c.dataIn(r, nil, act.Data, uint64(len(act.Data)), 0)
	default:
		c.finish(r, data, act.ShortBy)
	}
}

// due runs when the delay is over.
func (d *deferred) due() {
	s := d.c.srv
	if d.act.Orphan {
		// Under the lock, so that whoever cancels knows that nothing of the
		// command happens afterwards.
		s.mu.Lock()
		if _, ok := s.late[d]; ok {
			d.r.store(d.data)
		}
		s.mu.Unlock()
	}
	d.c.post(func() {
		s.mu.Lock()
		_, ok := s.late[d]
		delete(s.late, d)
		s.mu.Unlock()
		if !ok {
			return
		}
		if !d.act.Orphan && !d.act.Silent && d.act.Status == 0 && d.act.Response == 0 {
			d.r.store(d.data)
		}
		d.c.answer(&d.r, d.data, &d.act)
	})
}

// cancelLate forgets the late commands that match and tells how many.
func (s *Server) cancelLate(match func(*deferred) bool) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for d := range s.late {
		if match(d) {
			delete(s.late, d)
			d.timer.Stop()
			n++
		}
	}
	return n
}
