package initiator

import (
	"context"
	"fmt"

	"github.com/mpathd/mpathd/initiator/pdu"
)

const (
	maxTextPDU  = 64 << 10 // bytes of one Text Response: what discovery declares
	maxList     = 1 << 20  // bytes of a whole SendTargets answer
	maxTextPDUs = 4096     // of one answer
)

// textITT marks the tags of Text Requests.
const textITT uint32 = 0x90000000

// text is a text negotiation in flight (RFC 7143 11.10, 11.11). The reader
// alone uses data and pdus.
type text struct {
	itt    uint32
	data   []byte // joined so far
	pdus   int
	answer chan error // nil: data is whole
}

// SendTargets asks for the targets behind this session's portal (RFC 7143
// appendix C): "All", which only a discovery session may ask, a target name,
// or "" for the target logged in to. One request per session is in flight at a
// time. The error is ctx's, the session's, or a breach by the target.
func (s *Session) SendTargets(ctx context.Context, which string) (Discovered, error) {
	data, err := s.negotiate(ctx, pdu.AppendKey(nil, "SendTargets", which))
	if err != nil {
		return Discovered{}, fmt.Errorf("SendTargets: %w", err)
	}
	return parseTargets(data, s.cfg.Address)
}

// negotiate sends a Text Request and returns the joined answer.
func (s *Session) negotiate(ctx context.Context, ask []byte) ([]byte, error) {
	t := &text{answer: make(chan error, 1)}
	s.mu.Lock()
	if s.closed || s.text != nil {
		s.mu.Unlock()
		return nil, fmt.Errorf("another text negotiation is in flight, or the session ends: %w", ErrAborted)
	}
	s.textSeq = (s.textSeq + 1) & 0xffff
	t.itt = textITT | s.textSeq
	s.text = t
	s.listText(t.itt, pdu.NoTag, ask)
	s.mu.Unlock()
	s.Kick()
	select {
	case err := <-t.answer:
		return t.data, err
	case <-s.dying:
		return nil, fmt.Errorf("%w: %w", ErrSessionLost, s.err)
	case <-ctx.Done(): // the tag stays taken: the answer may still come
		return nil, fmt.Errorf("no answer: %w", ctx.Err())
	}
}

// listText lists a Text Request. It is immediate: it takes no CmdSN and waits
// for no window. Caller holds mu.
func (s *Session) listText(itt, ttt uint32, data []byte) {
	it := s.list(data, -1)
	it.hdr[0], it.hdr[1] = uint8(pdu.OpTextReq)|pdu.Immediate, pdu.Final
	it.hdr.SetITT(itt)
	it.hdr.SetTTT(ttt)
}

// textResponse joins what the target says and asks for the rest with empty
// requests that carry its tag.
func (rc *receiver) textResponse(h *pdu.Header, data []byte) error {
	s := rc.s
	s.mu.Lock()
	t := s.text
	s.mu.Unlock()
	if t == nil || h.ITT() != t.itt {
		return breach("unexpected opcode %#02x", h.Opcode())
	}
	if err := rc.status(h); err != nil {
		return err
	}
	if t.pdus++; len(t.data)+len(data) > maxList || t.pdus > maxTextPDUs {
		return breach("more than %d bytes or %d PDUs of text", maxList, maxTextPDUs)
	}
	t.data = append(t.data, data...)
	switch more := h.Flags()&pdu.Continue != 0; {
	case h.IsFinal() && more:
		return breach("text response both final and continued")
	case h.IsFinal():
		rc.endText(t, nil)
	case h.TTT() == pdu.NoTag:
		return breach("text response that is not final and has no tag to go on with")
	default:
		s.mu.Lock()
		s.listText(t.itt, h.TTT(), nil)
		s.mu.Unlock()
		rc.plug.Add(s)
	}
	return nil
}

func (rc *receiver) endText(t *text, err error) {
	rc.s.mu.Lock()
	rc.s.text = nil
	rc.s.mu.Unlock()
	t.answer <- err
}

// rejectText ends the text negotiation whose request the target rejected. It
// reports whether there was one with this tag.
func (rc *receiver) rejectText(itt uint32, reason uint8, why string) bool {
	rc.s.mu.Lock()
	t := rc.s.text
	rc.s.mu.Unlock()
	if t == nil || t.itt != itt {
		return false
	}
	rc.endText(t, fmt.Errorf("the target rejects the request, reason %#02x: %s", reason, why))
	return true
}
