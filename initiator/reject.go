package initiator

import (
	"fmt"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
)

const (
	resendAfter = 50 * time.Millisecond // doubled for each further try
	maxResends  = 5
	maxRejects  = 128 // in one FailoverTime
)

var rejectTexts = map[uint8]string{
	pdu.RejectDataDigest: "data digest error: the network corrupts what we send", pdu.RejectSNACK: "SNACK", pdu.RejectProtocol: "protocol error",
	pdu.RejectNotSupported: "command not supported", pdu.RejectTooManyImm: "too many immediate commands", pdu.RejectTaskInProgress: "task in progress",
	pdu.RejectInvalidDataAck: "invalid data acknowledgement", pdu.RejectInvalidField: "invalid PDU field", pdu.RejectResources: "out of resources", pdu.RejectWaitLogout: "waiting for a logout",
}

// reject takes a Reject (RFC 7143 11.17). The PDU that it means is the one whose
// header it carries. What may be sent again is; a target that waits for our
// logout gets it; any other reason says that the two ends do not agree on the
// protocol, and ends the connection.
func (rc *receiver) reject(h *pdu.Header, data []byte) error {
	if err := rc.status(h); err != nil {
		return err
	}
	s := rc.s
	if now := s.ticks.Load(); now-rc.rejectTick >= ticksDead {
		rc.rejectTick, rc.rejects = now, 0
	}
	if rc.rejects++; rc.rejects > maxRejects {
		return breach("more than %d rejects within %v", maxRejects, s.cfg.FailoverTime)
	}
	reason := h.Response()
	text := rejectTexts[reason]
	if text == "" {
		text = "unknown"
	}
	if len(data) < pdu.HeaderLen {
		return breach("it rejected a PDU (reason %#02x, %s) and does not show which", reason, text)
	}
	bad := pdu.Header(data[:pdu.HeaderLen])
	if bad.Opcode() == pdu.OpTextReq && rc.rejectText(bad.ITT(), reason, text) {
		return nil
	}
	switch reason {
	case pdu.RejectTooManyImm:
		if bad.IsImmediate() && rc.resend(&bad) {
			return nil
		}
	case pdu.RejectResources:
		if bad.Opcode() == pdu.OpSCSICommand {
			// A command that got no CmdSN at the target leaves a gap that
			// nothing else can close.
			if idx, sl, err := rc.task(bad.ITT()); err == nil && pdu.SerialLess(sl.cmdSN, s.expCmdSN.Load()) {
				sl.cmd.Result.Err = ErrAborted
				rc.finish(idx, sl)
				return nil
			}
		}
	case pdu.RejectWaitLogout:
		if bad.Opcode() == pdu.OpSCSICommand {
			if idx, sl, err := rc.task(bad.ITT()); err == nil {
				sl.cmd.Result.Err = ErrAborted
				rc.finish(idx, sl)
			}
		}
		s.leave(fmt.Errorf("%w: it rejects PDUs until then", errAskedToLeave), maxDrain)
		return nil
	}
	return breach("it rejected a PDU, opcode %#02x tag %#08x, reason %#02x: %s", uint8(bad.Opcode()), bad.ITT(), reason, text)
}

// resend sends a rejected ping or task management request again, after a
// while. False: it is neither.
func (rc *receiver) resend(bad *pdu.Header) bool {
	s := rc.s
	s.mu.Lock()
	defer s.mu.Unlock()
	itt := bad.ITT()
	switch {
	case bad.Opcode() == pdu.OpNopOut && s.ping != 0 && itt == s.ping:
		if s.repings++; s.repings > maxResends {
			s.ping, s.repings = 0, 0 // the reject is a sign of life too
			return true
		}
		time.AfterFunc(resendAfter<<s.repings, func() {
			s.mu.Lock()
			again := s.ping == itt && !s.closed
			if again {
				s.listPing()
			}
			s.mu.Unlock()
			if again {
				s.Kick()
			}
		})
		return true
	case bad.Opcode() == pdu.OpTaskMgmtReq && s.tmf != nil && itt == s.tmf.tag:
		t := s.tmf
		if t.resends++; t.resends > maxResends {
			s.tmf = nil
			s.endTMF(t, pdu.TMFRejected)
			return true
		}
		time.AfterFunc(resendAfter<<t.resends, func() {
			s.mu.Lock()
			again := s.tmf == t && !s.closed
			if again {
				s.listTMF(t)
			}
			s.mu.Unlock()
			if again {
				s.Kick()
			}
		})
		return true
	}
	return false
}
