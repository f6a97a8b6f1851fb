package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/u-root/iscsinl"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// watched is a kernel session of this process.
type watched struct {
	mu        sync.Mutex
	s         *Session // nil during the hand-over
	err       error    // what went wrong meanwhile
	loggedOut chan struct{}
	once      sync.Once
}

// fail ends the session because of what the kernel reported.
func (w *watched) fail(err error) {
	w.mu.Lock()
	if w.err == nil {
		w.err = err
	}
	s := w.s
	w.mu.Unlock()
	if s != nil {
		s.fail(err)
	}
}

// attach gives the events to s, which may have failed already.
func (w *watched) attach(s *Session) {
	w.mu.Lock()
	w.s = s
	err := w.err
	w.mu.Unlock()
	if err != nil {
		s.fail(err)
	}
}

// hub reads the events of the kernel's initiator, those of other processes'
// sessions too, and passes on those of ours.
type hub struct {
	mu   sync.Mutex
	ours map[uint32]*watched // by kernel session
	conn *netlink.Conn       // while there are any
}

var events = hub{ours: map[uint32]*watched{}}

// add watches a session from now on.
func (h *hub) add(sid uint32) (*watched, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.conn == nil {
		c, err := netlink.Dial(netlinkISCSI, &netlink.Config{Groups: 1})
		if err != nil {
			return nil, fmt.Errorf("events of the kernel's iSCSI initiator: %w", err)
		}
		h.conn = c
		go h.routine(c)
	}
	w := &watched{loggedOut: make(chan struct{})}
	h.ours[sid] = w
	return w, nil
}

// remove ends watching a session.
func (h *hub) remove(sid uint32) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.ours, sid)
	if len(h.ours) == 0 && h.conn != nil {
		h.conn.Close()
		h.conn = nil
	}
}

// Settle waits until the kernel has no session of this process any more, or ctx
// ends: those that end by themselves do so in the background.
func Settle(ctx context.Context) error {
	for {
		events.mu.Lock()
		n := len(events.ours)
		events.mu.Unlock()
		if n == 0 {
			return nil
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%d kernel sessions are left behind: the next run removes them: %w", n, ctx.Err())
		}
	}
}

func (h *hub) owns(sid uint32) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ours[sid] != nil
}

func (h *hub) routine(c *netlink.Conn) {
	for {
		msgs, err := c.Receive()
		for _, m := range msgs {
			h.take(m.Data)
		}
		switch {
		case err == nil:
		case errors.Is(err, syscall.ENOBUFS):
			h.resync()
		case errors.Is(err, os.ErrClosed), errors.Is(err, net.ErrClosed), errors.Is(err, syscall.EBADF):
			return
		default: // one bad message; the watchdogs see what it might have said
			h.mu.Lock()
			over := h.conn != c
			h.mu.Unlock()
			if over {
				return
			}
		}
	}
}

// resync looks at the sessions themselves after events were lost.
func (h *hub) resync() {
	h.mu.Lock()
	list := map[uint32]*watched{}
	for sid, w := range h.ours {
		list[sid] = w
	}
	h.mu.Unlock()
	for sid, w := range list {
		if st := attribute("class/iscsi_session", fmt.Sprintf("session%d", sid), "state"); st != "LOGGED_IN" && w.attached() {
			w.fail(fmt.Errorf("kernel session %d is %s", sid, st))
		}
	}
}

func (w *watched) attached() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.s != nil
}

// Layout of struct iscsi_uevent (linux/include/scsi/iscsi_if.h): type, error,
// transport handle, then unions of 24 bytes for requests and 16 for answers.
const (
	eventAnswer  = 40
	eventLen     = 56
	eventRecvPDU = iscsinl.ISCSI_KEVENT_RECV_PDU
	eventError   = iscsinl.ISCSI_KEVENT_CONN_ERROR
	eventGone    = iscsinl.KEVENT_BASE + 4 // the session was destroyed, by whomever
)

// take handles one event; whatever does not look like one of ours is dropped.
func (h *hub) take(b []byte) {
	if len(b) < eventLen {
		return
	}
	ne := binary.NativeEndian
	a, c := ne.Uint32(b[eventAnswer:]), ne.Uint32(b[eventAnswer+4:])
	kind, sid := ne.Uint32(b), a
	if kind == eventGone {
		sid = c
	}
	h.mu.Lock()
	w := h.ours[sid]
	h.mu.Unlock()
	if w == nil {
		return
	}
	switch kind {
	case eventError:
		w.fail(fmt.Errorf("the kernel reports a connection error: %w", connectionError(ne.Uint32(b[eventAnswer+8:]))))
	case eventGone:
		w.fail(errors.New("the kernel session was ended by somebody else"))
	case eventRecvPDU:
		if len(b) < eventLen+pdu.HeaderLen {
			return
		}
		var hdr pdu.Header
		copy(hdr[:], b[eventLen:])
		switch hdr.Opcode() {
		case pdu.OpLogoutResp:
			w.once.Do(func() { close(w.loggedOut) })
		case pdu.OpAsync:
			switch hdr[36] {
			case pdu.AsyncLogoutRequest, pdu.AsyncRenegotiate:
				w.fail(errors.New("the target asked us to log out"))
			case pdu.AsyncDropConnection, pdu.AsyncDropSession:
				w.fail(errors.New("the target announced that it drops the session"))
			}
		case pdu.OpReject:
			w.fail(fmt.Errorf("the target rejected a PDU of the kernel, reason %#02x", hdr.Response()))
		}
	}
}

// errPeerClosed is how iscsi_tcp tells that the target's end closed the connection
// (iscsi_sw_tcp_conn_recv_ready and its state change callback).
var errPeerClosed = fmt.Errorf("the connection was closed: %w", syscall.ECONNRESET)

// connectionError puts the usual codes of the kernel in plain words.
func connectionError(code uint32) error {
	switch e := iscsinl.IscsiErr(code); e {
	case iscsinl.ISCSI_ERR_TCP_CONN_CLOSE:
		return errPeerClosed
	case iscsinl.ISCSI_ERR_NOP_TIMEDOUT:
		return errors.New("no answer to a ping")
	case iscsinl.ISCSI_ERR_CONN_FAILED, iscsinl.ISCSI_ERR_XMIT_FAILED:
		return errors.New("the connection failed")
	case iscsinl.ISCSI_ERR_HDR_DGST, iscsinl.ISCSI_ERR_DATA_DGST:
		return errors.New("digest error: the network or the target corrupts data")
	default:
		return errors.New(e.String())
	}
}
