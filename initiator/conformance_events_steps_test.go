package initiator_test

import (
	"context"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
)

// async sends an Asynchronous Message with Parameter1 to 3.
func (r *raw) async(event uint8, p ...uint16) {
	r.asyncData(event, [8]byte{}, nil, p...)
}

func (r *raw) asyncData(event uint8, lun [8]byte, data []byte, p ...uint16) {
	var h pdu.Header
	h[0], h[1] = uint8(pdu.OpAsync), pdu.Final
	h.SetLUN(lun)
	h.SetITT(pdu.NoTag)
	h[36] = event
	for i, v := range p {
		h.SetU16(38+2*i, v)
	}
	r.send(h, data, true)
}

// next waits for a PDU with this opcode; pings are answered and everything
// else is kept in seen.
func (r *raw) next(op pdu.Opcode, seen *[]pdu.Header) (pdu.Header, []byte, bool) {
	for {
		h, data, ok := r.read()
		switch {
		case !ok || h.Opcode() == op && (op != pdu.OpNopOut || h.ITT() == pdu.NoTag):
			return h, data, ok
		case h.Opcode() == pdu.OpNopOut && h.ITT() != pdu.NoTag:
			r.pong(h)
		case seen != nil:
			*seen = append(*seen, h)
		}
	}
}

// answerAll answers pings, and a logout with this response and Time2Wait, until
// the initiator leaves; it returns what else came.
func (r *raw) answerAll(response uint8, time2Wait uint16) (seen []pdu.Header) {
	for {
		h, _, ok := r.next(pdu.OpLogoutReq, &seen)
		if !ok {
			return seen
		}
		seen = append(seen, h)
		r.logoutResponse(h, response, time2Wait)
	}
}

func (r *raw) logoutResponse(rq pdu.Header, response uint8, time2Wait uint16) {
	var a pdu.Header
	a[0], a[1] = uint8(pdu.OpLogoutResp), pdu.Final
	a.SetResponse(response)
	a.SetITT(rq.ITT())
	a.SetU16(40, time2Wait)
	r.send(a, nil, true)
}

func (r *raw) tmfResponse(rq pdu.Header, response uint8) {
	var a pdu.Header
	a[0], a[1] = uint8(pdu.OpTaskMgmtResp), pdu.Final
	a.SetResponse(response)
	a.SetITT(rq.ITT())
	r.send(a, nil, true)
}

func (r *raw) rejectPDU(reason uint8, bad pdu.Header) {
	var h pdu.Header
	h[0], h[1] = uint8(pdu.OpReject), pdu.Final
	h.SetResponse(reason)
	h.SetITT(pdu.NoTag)
	r.send(h, bad[:], true)
}

func (r *raw) check(itt uint32, sense ...byte) {
	var h pdu.Header
	h[0], h[1] = uint8(pdu.OpSCSIResponse), pdu.Final
	h.SetITT(itt)
	h.SetStatus(2)
	r.send(h, append([]byte{0, byte(len(sense))}, sense...), true)
}

func fixedSense(key, asc, ascq byte) []byte {
	return []byte{0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, asc, ascq, 0, 0, 0, 0}
}

// watched is a session that notes what it hears.
type watched struct {
	*initiator.Session
	mu      sync.Mutex
	states  []initiator.State
	notices []initiator.Notice
}

func (w *watched) saw(st initiator.State) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, x := range w.states {
		if x == st {
			return true
		}
	}
	return false
}

func (w *watched) heard() []initiator.Notice {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]initiator.Notice(nil), w.notices...)
}

// watches opens a session on a script, with a configuration changed by with.
func watches(t *testing.T, with func(*initiator.Config), script func(r *raw)) *watched {
	t.Helper()
	w := &watched{}
	c := scripted(t, func(_ int, r *raw) { script(r) })
	c.OnState = func(st initiator.State, _ error) {
		w.mu.Lock()
		w.states = append(w.states, st)
		w.mu.Unlock()
	}
	if with != nil {
		with(&c)
	}
	s, err := initiator.Open(context.Background(), c)
	require.NoError(t, err)
	s.OnNotice(func(n initiator.Notice) {
		w.mu.Lock()
		w.notices = append(w.notices, n)
		w.mu.Unlock()
	})
	w.Session = s
	t.Cleanup(func() { s.Abort(io.EOF); <-s.Done() })
	return w
}

// unhurried gives a busy machine time for many bytes.
func unhurried(c *initiator.Config) { c.FailoverTime, c.LoginTimeout = patience, patience }

// impatient makes commands hang after a second.
func impatient(c *initiator.Config) { c.CommandTimeout = time.Second }

func ends(t *testing.T, s *watched) error {
	t.Helper()
	select {
	case <-s.Done():
	case <-time.After(9 * time.Second):
		t.Fatal("the session lives on")
	}
	return s.Err()
}
