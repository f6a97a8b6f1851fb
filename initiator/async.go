package initiator

import (
	"errors"
	"fmt"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/scsi"
)

// Notice is something that a session learned of a logical unit beside the
// results of commands: a unit attention or a deferred error, whichever command
// it came with, an asynchronous event, or a reset.
type Notice struct {
	LUN [8]byte // raw
	// Sense is what the unit reported; not Valid for the events below.
	Sense scsi.Sense
	// Reset: this session has reset the unit. Commands of other sessions to it
	// may be gone without an answer: see Session.Doubt.
	Reset bool
	// Event is an asynchronous event that asks for nothing (RFC 7143 11.9.1),
	// 0 if it is none.
	Event uint8
}

// OnNotice sets who is told of notices: f runs on the session's reader and must
// not block, allocate much or log.
func (s *Session) OnNotice(f func(Notice)) { s.onNotice.Store(&f) }

func (s *Session) notice(n Notice) {
	if f := s.onNotice.Load(); f != nil {
		(*f)(n)
	}
}

// errAskedToLeave begins the cause of a session that ended as the target asked.
var errAskedToLeave = errors.New("the target asked us to log out")

// async takes an Asynchronous Message (RFC 7143 11.9).
func (rc *receiver) async(h *pdu.Header, data []byte) error {
	if err := rc.status(h); err != nil {
		return err
	}
	if err := rc.idle(); err != nil {
		return err
	}
	s := rc.s
	p1, p2, p3 := h.EventParams()
	switch e := h.Event(); e {
	case pdu.AsyncSCSI:
		var sense scsi.Sense
		if len(data) >= 2 {
			n := int(data[0])<<8 | int(data[1])
			sense = scsi.ParseSense(data[2 : 2+min(n, len(data)-2)])
		}
		if !sense.Valid {
			s.notice(Notice{LUN: h.LUN(), Event: pdu.AsyncSCSI})
			return nil
		}
		s.mu.Lock()
		next := s.cmdSN
		s.mu.Unlock()
		rc.attention(h.LUN(), next, sense)
	case pdu.AsyncLogoutRequest:
		s.leave(errAskedToLeave, time.Duration(p3)*time.Second)
	case pdu.AsyncRenegotiate: // a new login negotiates everything
		s.leave(fmt.Errorf("%w, to negotiate anew", errAskedToLeave), time.Duration(p3)*time.Second)
	case pdu.AsyncDropConnection:
		if p1 != 0 { // a connection that we do not have
			s.notice(Notice{Event: e})
			return nil
		}
		s.announceWait(p2)
		return fmt.Errorf("%w connection and wants %d s of rest", errDropped, p2)
	case pdu.AsyncDropSession:
		s.announceWait(p2)
		return fmt.Errorf("%w session and wants %d s of rest", errDropped, p2)
	case pdu.AsyncTasksEnd:
		if err := rc.tasksEnd(h.LUN()); err != nil {
			return err
		}
		s.notice(Notice{LUN: h.LUN(), Event: e})
	default:
		s.notice(Notice{LUN: h.LUN(), Event: e})
	}
	return nil
}

// tasksEnd answers event 5: all tasks of a unit are being terminated. Their data
// stops, a NOP-Out that is no ping acknowledges the message (RFC 7143 11.9.1),
// and what gets no answer is resolved like after a reset.
func (rc *receiver) tasksEnd(lun [8]byte) error {
	s := rc.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	if s.commands.len() >= len(s.slots)+maxAnswers {
		return breach("%d events whose acknowledgements it does not take", maxAnswers)
	}
	for i := range s.slots {
		if sl := &s.slots[i]; sl.cmd != nil && sl.cmd.LUN == lun {
			s.starve(uint16(i))
		}
	}
	s.doubtBefore(lun, s.cmdSN)
	it := s.list(nil, -1)
	it.hdr[0], it.hdr[1] = uint8(pdu.OpNopOut)|pdu.Immediate, pdu.Final
	it.hdr.SetLUN(lun)
	it.hdr.SetITT(pdu.NoTag)
	it.hdr.SetTTT(pdu.NoTag)
	rc.plug.Add(s)
	return nil
}

// attention passes on what a unit reported with the command that has cmdSN. After
// a reset or a clear by someone else, commands before that one may be gone
// without an answer (SAM-5 5.14, control mode page TAS 0).
func (rc *receiver) attention(lun [8]byte, cmdSN uint32, sense scsi.Sense) {
	if sense.Key != scsi.KeyUnitAttention && !sense.Deferred {
		return
	}
	if sense.Key == scsi.KeyUnitAttention && (sense.ASC == 0x29 || sense.ASC == 0x2f) {
		s := rc.s
		s.mu.Lock()
		s.doubtBefore(lun, cmdSN)
		s.mu.Unlock()
	}
	rc.s.notice(Notice{LUN: lun, Sense: sense})
}
