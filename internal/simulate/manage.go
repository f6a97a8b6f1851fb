package simulate

import (
	"slices"

	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/scsi"
)

// waiter runs f when all tasks have ended.
type waiter struct {
	tasks []*task
	f     func()
}

// wait runs f when the tasks have ended.
func (s *server) wait(ts []*task, f func()) {
	s.waiters = append(s.waiters, waiter{ts, f})
	s.settle()
}

func (s *server) settle() {
	for i := 0; i < len(s.waiters); i++ {
		w := s.waiters[i]
		if !slices.ContainsFunc(w.tasks, func(t *task) bool { return !t.ended }) {
			s.waiters = slices.Delete(s.waiters, i, i+1)
			w.f()
			i = -1
		}
	}
}

// manage is task management.
func (tc *tconn) manage(h pdu.Header) {
	s := tc.s
	answer := func(r uint8) func() {
		return func() {
			var a pdu.Header
			a[0], a[1] = uint8(pdu.OpTaskMgmtResp), pdu.Final
			a.SetITT(h.ITT())
			a.SetResponse(r)
			tc.send(&a, nil, true)
		}
	}
	switch h.Flags() &^ pdu.Final {
	case pdu.TMFAbortTask:
		i := slices.IndexFunc(tc.tasks, func(t *task) bool { return t.h.ITT() == h.TTT() })
		if s.ignoresLUR || i < 0 || !tc.tasks[i].ready() && !s.resetAborts {
			answer(pdu.TMFNoTask)()
			return
		}
		t := tc.tasks[i]
		t.mute, t.aborted = true, true
		if !t.inWork {
			s.end(t)
		}
		s.wait([]*task{t}, answer(pdu.TMFComplete))
	case pdu.TMFLUReset:
		if s.ignoresLUR {
			answer(pdu.TMFComplete)()
			return
		}
		if s.resetEnds {
			for _, o := range slices.Clone(s.conns) {
				if o != tc && o.full {
					o.kill()
				}
			}
		}
		s.wait(s.resetLU(tc), func() { s.w.after(s.resetTakes, answer(pdu.TMFComplete)) })
	default:
		answer(pdu.TMFNotSupported)()
	}
}

// resetLU aborts what the target knows of the unit, and returns what it has to
// wait for.
func (s *server) resetLU(by *tconn) []*task {
	left := slices.Clone(s.work)
	for _, o := range s.conns {
		if o != by && o.full {
			o.ua = append(o.ua, sense{6, 0x29, 3})
		}
		if !s.resetAborts {
			continue
		}
		for _, t := range o.tasks { // those that wait for data included: it waits for the data
			t.aborted = true
			t.mute = o == by || s.w.set.SilentAborts
			if !slices.Contains(left, t) {
				left = append(left, t)
			}
		}
	}
	if s.serial {
		for i, t := range slices.Clone(s.queue) {
			if i == 0 {
				left = append(left, t)
				continue
			}
			s.end(t)
			if t.tc != by {
				t.tc.respond(&t.h, scsi.StatusTaskAborted, noSense, 0)
			}
		}
	}
	return left
}
