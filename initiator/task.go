package initiator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// TaskError is a task management function that the target did not complete.
type TaskError struct {
	Function, Response uint8 // RFC 7143 11.5.1 and 11.6.1
}

var tmfNames = map[uint8]string{pdu.TMFAbortTask: "ABORT TASK", pdu.TMFClearACA: "CLEAR ACA", pdu.TMFLUReset: "LOGICAL UNIT RESET"}

func (e *TaskError) Error() string {
	what := map[uint8]string{pdu.TMFNoTask: "no such task", pdu.TMFNoLUN: "no such LUN", pdu.TMFAllegiant: "the task is still allegiant",
		pdu.TMFNotSupported: "not supported by the target", pdu.TMFNotAllowed: "not allowed by the target", pdu.TMFRejected: "rejected by the target"}[e.Response]
	if what == "" {
		what = fmt.Sprintf("response %d", e.Response)
	}
	return tmfNames[e.Function] + ": " + what
}

// tmfITT marks the tags of task management requests.
const tmfITT uint32 = 0xa0000000

// resetPatience is how long a target may be silent while it resets a unit:
// istgt answers nothing for over a second, while it ends other sessions.
const resetPatience = 5 * time.Second

const (
	tmfTime   = 3 * time.Second // for the answer to one of our own
	abortTime = 5 * time.Second // for ABORT TASK of one command after the other
)

// tmf is the one task management request in flight. The reader ends the tasks
// that its answer disposes of, so that no answer of theirs can be in between.
type tmf struct {
	function uint8
	lun      [8]byte
	itt      uint32 // referenced task, for ABORT TASK
	refCmdSN uint32
	tag      uint32 // its own ITT
	cmdSN    uint32 // when it was sent: it acts on commands before that
	resends  int    // after rejects
	patient  bool   // silence before the answer is no death, see resetPatience
	answer   chan uint8
}

// LUReset asks for LOGICAL UNIT RESET and waits until the target answers
// (RFC 7143 11.5.1, SAM-5 7.7): every command in the unit's task set has then
// ended; this session's come back with ErrAborted. The error is ctx's, the
// session's, or a *TaskError. One request per session is in flight at a time.
func (s *Session) LUReset(ctx context.Context, lun [8]byte) error {
	return s.manage(ctx, &tmf{function: pdu.TMFLUReset, lun: lun, itt: pdu.NoTag, patient: true})
}

// ClearACA ends an auto contingent allegiance of the unit (SAM-5 5.9), which
// answers every other command with ACA ACTIVE. Errors as LUReset.
func (s *Session) ClearACA(ctx context.Context, lun [8]byte) error {
	return s.manage(ctx, &tmf{function: pdu.TMFClearACA, lun: lun, itt: pdu.NoTag})
}

// manage sends a task management request and waits for its answer.
func (s *Session) manage(ctx context.Context, t *tmf) error {
	name := tmfNames[t.function]
	select {
	case s.tmfTurn <- struct{}{}:
	case <-s.dying:
		return fmt.Errorf("%s: %w: %w", name, ErrSessionLost, s.err)
	case <-ctx.Done():
		return fmt.Errorf("%s: an earlier request is still not answered: %w", name, ctx.Err())
	}
	t.answer = make(chan uint8, 1)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		<-s.tmfTurn
		return fmt.Errorf("%s: %w", name, ErrAborted)
	}
	s.tmfSeq = (s.tmfSeq + 1) & 0xffff
	t.tag = tmfITT | s.tmfSeq
	s.tmf = t
	s.listTMF(t)
	s.mu.Unlock()
	s.Kick()
	select {
	case r := <-t.answer:
		if r != pdu.TMFComplete {
			return &TaskError{t.function, r}
		}
		if t.function == pdu.TMFLUReset {
			s.notice(Notice{LUN: t.lun, Reset: true})
		}
		return nil
	case <-s.dying:
		return fmt.Errorf("%s: %w: %w", name, ErrSessionLost, s.err)
	case <-ctx.Done():
		return fmt.Errorf("%s: no answer: %w", name, ctx.Err())
	}
}

// listTMF lists a request, and stops the data of the tasks that it names: a
// target may execute a write whose last data comes after the answer. Caller
// holds mu.
func (s *Session) listTMF(t *tmf) {
	t.cmdSN = s.cmdSN
	it := s.list(nil, -1)
	it.hdr[0], it.hdr[1] = uint8(pdu.OpTaskMgmtReq)|pdu.Immediate, pdu.Final|t.function
	it.hdr.SetLUN(t.lun)
	it.hdr.SetITT(t.tag)
	it.hdr.SetTTT(t.itt) // Referenced Task Tag
	it.hdr.SetU32(32, t.refCmdSN)
	for i := range s.slots {
		if sl := &s.slots[i]; sl.cmd != nil && (t.names(i, sl) || t.resets(sl) && !s.cfg.KeepDataOut) {
			s.starve(uint16(i))
		}
	}
}

// starve stops the data of a task, but for what is on its way and what goes out
// with the command itself. Caller holds mu.
func (s *Session) starve(idx uint16) {
	sl := &s.slots[idx]
	sl.aborting = true
	if !sl.unsent {
		sl.starved = sl.starved || sl.bursting || sl.first != 0
		s.forget(idx)
	}
}

// names tells whether t aborts this very task.
func (t *tmf) names(i int, sl *slot) bool {
	return t.function == pdu.TMFAbortTask && t.itt == uint32(sl.gen)<<16|uint32(i)
}

// resets tells whether t ends this task with all others of its unit. Commands
// that were sent after the request are not affected (RFC 7143 11.5.1).
func (t *tmf) resets(sl *slot) bool {
	return t.function == pdu.TMFLUReset && sl.cmd.LUN == t.lun && pdu.SerialLess(sl.cmdSN, t.cmdSN)
}

// endTMF hands the answer to whoever waits and lets the next request go. The
// reader calls it, and has taken t out of s.tmf.
func (s *Session) endTMF(t *tmf, response uint8) {
	t.answer <- response // buffered, and each request ends once
	<-s.tmfTurn
}

// taskMgmt takes the answer to a task management request (RFC 7143 11.6).
func (rc *receiver) taskMgmt(h *pdu.Header) error {
	if err := rc.status(h); err != nil {
		return err
	}
	s := rc.s
	s.mu.Lock()
	t := s.tmf
	if t == nil || h.ITT() != t.tag {
		s.mu.Unlock()
		return breach("answer to a task management request that was not sent, tag %#08x", h.ITT())
	}
	var ended []uint16
	if r := h.Response(); r == pdu.TMFComplete || r == pdu.TMFNoTask && t.function == pdu.TMFAbortTask {
		for i := range s.slots {
			sl := &s.slots[i]
			if sl.cmd == nil || sl.finished {
				continue
			}
			// "No such task" is believed of reads, and of what a reset has ended
			// anyway: tgt says so of a write that waits for its data.
			own := t.names(i, sl) && (r == pdu.TMFComplete || sl.cmd.Dir != DataOut || sl.doubted)
			if own || t.resets(sl) {
				sl.cmd.Result.Err = ErrAborted
				if own && !sl.doubted {
					sl.cmd.Result.Err = ErrTimeout
				}
				ended = append(ended, uint16(i))
			}
		}
	}
	s.tmf = nil
	s.mu.Unlock()
	for _, i := range ended {
		rc.finish(i, &s.slots[i])
	}
	s.endTMF(t, h.Response()) // last: whoever waits looks at what has ended
	return nil
}

// Doubt says that a unit was reset, or its commands cleared, by someone else:
// what is in flight there now and stays unanswered for FailoverTime is aborted
// and comes back with ErrAborted.
func (s *Session) Doubt(lun [8]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.doubtBefore(lun, s.cmdSN)
}

// doubtBefore marks the commands to a unit that came before cmdSN. Caller holds mu.
func (s *Session) doubtBefore(lun [8]byte, cmdSN uint32) {
	due := s.ticks.Load() + ticksDead
	for i := range s.slots {
		sl := &s.slots[i]
		if sl.cmd != nil && !sl.finished && !sl.doubted && sl.cmd.LUN == lun && pdu.SerialLess(sl.cmdSN, cmdSN) {
			sl.doubted = true
			if pdu.SerialLess(due, sl.due) {
				sl.due = due
			}
		}
	}
}

// overdue finds the command that has hung for longest.
func (s *Session) overdue() (idx, gen uint16, found bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.free) == len(s.slots) || s.closed {
		return 0, 0, false
	}
	now := s.ticks.Load()
	for i := range s.slots {
		sl := &s.slots[i]
		if sl.cmd != nil && !sl.finished && pdu.SerialLess(sl.due, now) && (!found || pdu.SerialLess(sl.due, s.slots[idx].due)) {
			idx, gen, found = uint16(i), sl.gen, true
		}
	}
	return idx, gen, found
}

// routineEscalate ends the commands that hang, one after the other. A target that
// takes its time for each ABORT TASK is not asked for a queue full of them: after
// abortTime the rest ends with the unit's reset.
func (s *Session) routineEscalate() {
	defer s.alive.Done()
	defer s.escalating.Store(false)
	enough := s.ticks.Load() + max(1, uint32(abortTime/s.tickTime()))
	for {
		idx, gen, found := s.overdue()
		if !found || !s.escalate(idx, gen, pdu.SerialLess(s.ticks.Load(), enough)) {
			return
		}
	}
}

// escalate ends a command that hangs although the target answers pings: ABORT
// TASK, if there is time, then LOGICAL UNIT RESET, then the session. A unit that
// was reset just now is not reset once more: two initiators would keep each other
// at it. False: the session is over.
func (s *Session) escalate(idx, gen uint16, abort bool) bool {
	s.mu.Lock()
	sl := &s.slots[idx]
	if sl.cmd == nil || sl.finished || sl.gen != gen {
		s.mu.Unlock()
		return true
	}
	lun, cmdSN, doubted := sl.cmd.LUN, sl.cmdSN, sl.doubted
	s.mu.Unlock()
	gone := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return sl.cmd == nil || sl.finished || sl.gen != gen
	}
	var steps []*tmf
	if abort {
		steps = append(steps, &tmf{function: pdu.TMFAbortTask, lun: lun, itt: uint32(gen)<<16 | uint32(idx), refCmdSN: cmdSN})
	}
	if !doubted {
		steps = append(steps, &tmf{function: pdu.TMFLUReset, lun: lun, itt: pdu.NoTag})
	}
	for _, t := range steps {
		wait, end := context.WithTimeout(context.Background(), tmfTime)
		err := s.manage(wait, t)
		end()
		if s.Err() != nil {
			return false
		}
		if gone() {
			return true
		}
		var refused *TaskError
		if err != nil && !errors.As(err, &refused) {
			break // no answer: the target hangs altogether
		}
	}
	s.fail(fmt.Errorf("%w: no answer in %v, and the target could not abort it", ErrTimeout, s.cfg.CommandTimeout))
	return false
}
