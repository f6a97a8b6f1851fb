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

func (e *TaskError) Error() string {
	what := map[uint8]string{pdu.TMFNoTask: "no such task", pdu.TMFNoLUN: "no such LUN", pdu.TMFNotSupported: "not supported by the target",
		pdu.TMFRejected: "rejected by the target"}[e.Response]
	if what == "" {
		what = fmt.Sprintf("response %d", e.Response)
	}
	return fmt.Sprintf("task management function %d: %s", e.Function, what)
}

// tmfITT marks the tags of task management requests.
const tmfITT uint32 = 0xa0000000

// tmf is the one task management request in flight. The reader ends the tasks
// that its answer disposes of, so that no answer of theirs can be in between.
type tmf struct {
	function uint8
	lun      [8]byte
	itt      uint32 // referenced task, for ABORT TASK
	answer   chan uint8
}

// LUReset asks for LOGICAL UNIT RESET and waits until the target answers
// (RFC 7143 11.5.1, SAM-5 7.7): every command in the unit's task set has then
// ended; this session's come back with ErrAborted. The error is ctx's, the
// session's, or a *TaskError. One request per session is in flight at a time.
func (s *Session) LUReset(ctx context.Context, lun [8]byte) error {
	return s.manage(ctx, &tmf{function: pdu.TMFLUReset, lun: lun, itt: pdu.NoTag}, 0)
}

// manage sends a task management request and waits for its answer.
func (s *Session) manage(ctx context.Context, t *tmf, refCmdSN uint32) error {
	name := map[uint8]string{pdu.TMFAbortTask: "ABORT TASK", pdu.TMFLUReset: "LOGICAL UNIT RESET"}[t.function]
	t.answer = make(chan uint8, 1)
	s.mu.Lock()
	if s.closed || s.tmf != nil {
		s.mu.Unlock()
		return fmt.Errorf("%s: %w", name, ErrAborted)
	}
	s.tmfSeq = (s.tmfSeq + 1) & 0xffff
	s.tmf = t
	it := s.list(nil, -1)
	it.hdr[0], it.hdr[1] = uint8(pdu.OpTaskMgmtReq)|pdu.Immediate, pdu.Final|t.function
	it.hdr.SetLUN(t.lun)
	it.hdr.SetITT(tmfITT | s.tmfSeq)
	it.hdr.SetTTT(t.itt) // Referenced Task Tag
	it.hdr.SetCmdSN(s.cmdSN)
	it.hdr.SetExpStatSN(s.expStatSN.Load())
	it.hdr.SetU32(32, refCmdSN)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.tmf = nil
		s.mu.Unlock()
	}()
	s.Kick()
	select {
	case r := <-t.answer:
		if r != pdu.TMFComplete {
			return &TaskError{t.function, r}
		}
		return nil
	case <-s.dying:
		return fmt.Errorf("%s: %w: %w", name, ErrSessionLost, s.err)
	case <-ctx.Done():
		return fmt.Errorf("%s: no answer: %w", name, ctx.Err())
	}
}

// taskMgmt takes the answer to a task management request (RFC 7143 11.6).
func (rc *receiver) taskMgmt(h *pdu.Header) error {
	if err := rc.status(h); err != nil {
		return err
	}
	s := rc.s
	s.mu.Lock()
	if h.ITT() != tmfITT|s.tmfSeq {
		s.mu.Unlock()
		return breach("answer to a task management request that was not sent, tag %#08x", h.ITT())
	}
	t := s.tmf
	if t == nil { // nobody waits any more
		s.mu.Unlock()
		return nil
	}
	var ended []uint16
	if r := h.Response(); r == pdu.TMFComplete || r == pdu.TMFNoTask && t.function == pdu.TMFAbortTask {
		for i := range s.slots {
			sl := &s.slots[i]
			if sl.cmd == nil || sl.finished {
				continue
			}
			// "No such task" is believed of reads only: tgt says so of a write that
			// waits for its data, and executes it when the data comes.
			own := t.function == pdu.TMFAbortTask && t.itt == uint32(sl.gen)<<16|uint32(i) && (r == pdu.TMFComplete || sl.cmd.Dir != DataOut)
			if own || t.function == pdu.TMFLUReset && sl.cmd.LUN == t.lun {
				sl.cmd.Result.Err = ErrAborted
				if own {
					sl.cmd.Result.Err = ErrTimeout
				}
				ended = append(ended, uint16(i))
			}
		}
	}
	s.mu.Unlock()
	for _, i := range ended {
		rc.finish(i, &s.slots[i])
	}
	select {
	case t.answer <- h.Response():
	default:
		return breach("second answer to a task management request")
	}
	return nil
}

// escalate ends a command that hangs although the target answers pings: ABORT
// TASK, then LOGICAL UNIT RESET, then the session.
func (s *Session) escalate(idx uint16, gen uint16) {
	defer s.alive.Done()
	defer s.escalating.Store(false)
	s.mu.Lock()
	sl := &s.slots[idx]
	if sl.cmd == nil || sl.finished || sl.gen != gen {
		s.mu.Unlock()
		return
	}
	lun, cmdSN := sl.cmd.LUN, sl.cmdSN
	s.mu.Unlock()
	gone := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return sl.cmd == nil || sl.gen != gen
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stop := context.AfterFunc(dyingContext{s.dying}, cancel)
	defer stop()
	for _, t := range []*tmf{{function: pdu.TMFAbortTask, lun: lun, itt: uint32(gen)<<16 | uint32(idx)}, {function: pdu.TMFLUReset, lun: lun, itt: pdu.NoTag}} {
		wait, end := context.WithTimeout(ctx, tmfTime)
		err := s.manage(wait, t, cmdSN)
		end()
		if gone() || s.Err() != nil {
			return
		}
		var refused *TaskError
		if err != nil && !errors.As(err, &refused) {
			break // no answer: the target hangs altogether
		}
	}
	s.fail(fmt.Errorf("%w: no answer in %v, and the target could not abort it", ErrTimeout, s.cfg.CommandTimeout))
}

const tmfTime = 3 * time.Second

// dyingContext is a context that ends with the session.
type dyingContext struct{ c <-chan struct{} }

func (d dyingContext) Deadline() (time.Time, bool) { return time.Time{}, false }
func (d dyingContext) Done() <-chan struct{}       { return d.c }
func (d dyingContext) Value(any) any               { return nil }
func (d dyingContext) Err() error {
	select {
	case <-d.c:
		return context.Canceled
	default:
		return nil
	}
}
