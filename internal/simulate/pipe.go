package simulate

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// pipe is one end of a buffered connection between guest and product: a unix
// socket.
type pipe struct {
	*half       // what this end reads
	peer  *half // what the other end reads
	point func()
}

type half struct {
	mu     sync.Mutex
	cond   sync.Cond
	buf    []byte
	closed bool // no more comes
	gone   bool // the reader left
	late   bool // its read deadline is over
}

func newPipe() (a, b *pipe) {
	x, y := &half{}, &half{}
	x.cond.L, y.cond.L = &x.mu, &y.mu
	return &pipe{half: x, peer: y}, &pipe{half: y, peer: x}
}

func (p *pipe) Read(b []byte) (int, error) {
	h := p.half
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.gone:
			return 0, net.ErrClosed
		case h.late:
			return 0, os.ErrDeadlineExceeded
		case len(h.buf) > 0:
			n := copy(b, h.buf)
			h.buf = h.buf[n:]
			return n, nil
		case h.closed:
			return 0, io.EOF
		}
		h.cond.Wait()
	}
}

func (p *pipe) Write(b []byte) (int, error) {
	if p.point != nil {
		p.point()
	}
	h := p.peer
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.gone || h.closed {
		return 0, io.ErrClosedPipe
	}
	h.buf = append(h.buf, b...)
	h.cond.Broadcast()
	return len(b), nil
}

func (p *pipe) Close() error {
	for _, h := range []*half{p.half, p.peer} {
		h.mu.Lock()
		h.closed = true
		h.gone = h.gone || h == p.half
		h.cond.Broadcast()
		h.mu.Unlock()
	}
	return nil
}

// HungUp tells whether an end is closed.
func (p *pipe) HungUp() bool {
	p.half.mu.Lock()
	defer p.half.mu.Unlock()
	return p.half.closed
}

func (p *pipe) LocalAddr() net.Addr  { return addr("nbd") }
func (p *pipe) RemoteAddr() net.Addr { return addr("nbd") }

func (p *pipe) SetDeadline(t time.Time) error { return p.SetReadDeadline(t) }

// SetReadDeadline knows two times: past, and never.
func (p *pipe) SetReadDeadline(t time.Time) error {
	p.half.mu.Lock()
	p.half.late = !t.IsZero() && !time.Now().Before(t)
	p.half.cond.Broadcast()
	p.half.mu.Unlock()
	return nil
}
func (p *pipe) SetWriteDeadline(time.Time) error { return nil }
