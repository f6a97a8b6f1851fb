package initiator

import (
	"context"
	"fmt"

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

// LUReset asks for LOGICAL UNIT RESET and waits until the target answers
// (RFC 7143 11.5.1, SAM-5 7.7): every command in the unit's task set has then
// ended. The error is ctx's, the session's, or a *TaskError. One reset per
// session is in flight at a time.
func (s *Session) LUReset(ctx context.Context, lun [8]byte) error {
	answer := make(chan uint8, 1)
	s.mu.Lock()
	if s.closed || s.tmf != nil {
		s.mu.Unlock()
		return fmt.Errorf("LOGICAL UNIT RESET: %w", ErrAborted)
	}
	s.tmfSeq = (s.tmfSeq + 1) & 0xffff
	s.tmf = answer
	it := s.list(nil, -1)
	it.hdr[0], it.hdr[1] = uint8(pdu.OpTaskMgmtReq)|pdu.Immediate, pdu.Final|pdu.TMFLUReset
	it.hdr.SetLUN(lun)
	it.hdr.SetITT(tmfITT | s.tmfSeq)
	it.hdr.SetTTT(pdu.NoTag) // Referenced Task Tag: none
	it.hdr.SetCmdSN(s.cmdSN)
	it.hdr.SetExpStatSN(s.expStatSN.Load())
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.tmf = nil
		s.mu.Unlock()
	}()
	s.Kick()
	select {
	case r := <-answer:
		if r != pdu.TMFComplete {
			return &TaskError{pdu.TMFLUReset, r}
		}
		return nil
	case <-s.dying:
		return fmt.Errorf("LOGICAL UNIT RESET: %w: %w", ErrSessionLost, s.err)
	case <-ctx.Done():
		return fmt.Errorf("LOGICAL UNIT RESET: no answer: %w", ctx.Err())
	}
}

// taskMgmt takes the answer to a task management request (RFC 7143 11.6).
func (rc *receiver) taskMgmt(h *pdu.Header) error {
	if err := rc.status(h); err != nil {
		return err
	}
	s := rc.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if h.ITT() != tmfITT|s.tmfSeq {
		return breach("answer to a task management request that was not sent, tag %#08x", h.ITT())
	}
	if s.tmf != nil { // else nobody waits any more
		select {
		case s.tmf <- h.Response():
		default:
			return breach("second answer to a task management request")
		}
	}
	return nil
}
