package faultnet

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	pieceSize = 64 << 10
	// queueLen pieces can be held back by Delay in each direction.
	queueLen = 64
	// headerLen is an iSCSI basic header segment.
	headerLen = 48
)

// link is one proxied connection: for each direction a goroutine that reads
// and one that writes, so that a delay holds back bytes and not throughput.
type link struct {
	p      *Proxy
	mu     sync.Mutex
	ends   [2]*net.TCPConn // 0: the initiator's, 1: the target's; set under mu
	lost   atomic.Bool     // bytes were swallowed
	spoken atomic.Bool     // the initiator has, since it last heard from the target
	turns  atomic.Int64    // times that it began to speak
	once   sync.Once
	ctx    context.Context
	cancel context.CancelFunc
}

// piece is bytes on their way.
type piece struct {
	b    []byte
	read time.Time
	fin  bool // the sender closed its direction
}

func newLink(p *Proxy, nc *net.TCPConn) *link {
	l := &link{p: p}
	l.ends[0] = nc
	l.ctx, l.cancel = context.WithCancel(context.Background())
	context.AfterFunc(l.ctx, func() { // wake what waits in passing
		p.mu.Lock()
		defer p.mu.Unlock()
		p.changed.Broadcast()
	})
	return l
}

// close ends both sides. It may be called with p.mu held.
func (l *link) close(reset bool) {
	l.once.Do(func() {
		l.cancel()
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, c := range l.ends {
			if c != nil {
				if reset {
					_ = c.SetLinger(0)
				}
				_ = c.Close()
			}
		}
	})
}

func (l *link) run() {
	p := l.p
	defer p.dialing.Done()
	defer func() {
		l.close(false)
		p.mu.Lock()
		delete(p.links, l)
		p.mu.Unlock()
		p.changed.Broadcast()
	}()
	if !l.connect() {
		return
	}
	var wg sync.WaitGroup
	for d := range 2 {
		ch := make(chan piece, queueLen)
		free := make(chan []byte, queueLen+2)
		wg.Go(func() { l.read(Direction(d), ch, free) })
		wg.Go(func() { l.write(Direction(d), ch, free) })
	}
	wg.Wait()
}

// connect dials the target, or waits while nothing may pass.
func (l *link) connect() bool {
	p := l.p
	for {
		p.mu.Lock()
		hole := p.hole
		p.mu.Unlock()
		if !hole {
			break
		}
		// What the initiator sends meanwhile is lost. Its FIN is ignored.
		l.lost.Store(true)
		buf := make([]byte, 4096)
		n, err := l.ends[0].Read(buf)
		p.bytes[ToTarget].Add(uint64(n))
		if err != nil {
			<-l.ctx.Done() // Heal or Close
			return false
		}
	}
	if l.lost.Load() {
		l.close(true)
		return false
	}
	d := net.Dialer{Timeout: dialTimeout}
	up, err := d.DialContext(l.ctx, "tcp", p.upstream)
	if err != nil {
		l.close(true) // the nearest thing to a refusal after an accept
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		_ = up.Close()
		return false
	}
	l.ends[1] = up.(*net.TCPConn)
	return true
}

// passing blocks while d is stalled; swallow tells that its bytes are to be
// lost, ok that the link goes on.
func (l *link) passing(d Direction) (swallow, ok bool) {
	p := l.p
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.stalled[d] && !p.hole && !p.closed && l.ctx.Err() == nil {
		p.changed.Wait()
	}
	return p.hole, !p.closed && l.ctx.Err() == nil
}

func (l *link) read(d Direction, ch chan<- piece, free chan []byte) {
	defer close(ch)
	src := l.ends[d]
	for {
		var buf []byte
		select {
		case buf = <-free:
		default:
			buf = make([]byte, pieceSize)
		}
		if _, ok := l.passing(d); !ok {
			return
		}
		n, err := src.Read(buf)
		l.p.bytes[d].Add(uint64(n))
		if d == ToTarget && n > 0 && !l.spoken.Swap(true) {
			l.turns.Add(1)
		}
		if n > 0 {
			select {
			case ch <- piece{b: buf[:n], read: time.Now()}:
			case <-l.ctx.Done():
				return
			}
		}
		if err == nil {
			continue
		}
		if swallow, ok := l.passing(d); !ok || swallow {
			l.lost.Store(true)
			return // neither FIN nor RST passes; the link stays until Heal
		}
		if errors.Is(err, io.EOF) {
			select {
			case ch <- piece{fin: true, read: time.Now()}:
			case <-l.ctx.Done():
			}
			return
		}
		l.close(errors.Is(err, syscall.ECONNRESET))
		return
	}
}

func (l *link) write(d Direction, ch <-chan piece, free chan<- []byte) {
	dst := l.ends[1-d]
	var f framer
	for pc := range ch {
		if !l.hold(pc.read) {
			break
		}
		swallow, ok := l.passing(d)
		if !ok {
			break
		}
		if swallow {
			l.lost.Store(true)
			continue
		}
		if pc.fin {
			_ = dst.CloseWrite()
			continue
		}
		n, then, cut := l.inspect(d, &f, pc.b)
		if then == ThenBlackhole && cut {
			l.lost.Store(l.lost.Load() || n < len(pc.b))
		}
		if d == ToInitiator && n > 0 {
			l.spoken.Store(false)
		}
		if err := l.pass(dst, pc.b[:n]); err != nil {
			// Close both sides, unless nothing may be seen of it.
			if swallow, _ := l.passing(d); !swallow {
				l.close(errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE))
			}
			break
		}
		if cut {
			switch then {
			case ThenBlackhole:
				l.p.Blackhole()
			default:
				l.close(then == ThenReset)
			}
		}
		select {
		case free <- pc.b[:pieceSize]:
		default:
		}
	}
	for range ch { // let the reader end
	}
	if swallow, ok := l.passing(d); ok && swallow {
		<-l.ctx.Done()
	}
}

// pass hands b on, byte by byte while Trickle is on.
func (l *link) pass(dst *net.TCPConn, b []byte) error {
	for len(b) > 0 {
		n, gap := len(b), time.Duration(l.p.gap.Load())
		if gap > 0 {
			n = 1
			select {
			case <-time.After(gap):
			case <-l.ctx.Done():
				return net.ErrClosed
			}
		}
		if _, err := dst.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// hold waits until Delay allows a piece read at t to go on.
func (l *link) hold(t time.Time) bool {
	d := time.Duration(l.p.delay.Load()) - time.Since(t)
	if d <= 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-l.ctx.Done():
		return false
	}
}

// inspect follows the PDUs through b, corrupts a byte if one is due, and
// tells how much of b passes.
func (l *link) inspect(d Direction, f *framer, b []byte) (n int, then Then, cut bool) {
	p := l.p
	if !p.armed.Load() {
		p.pdus[d].Add(f.skip(b))
		return len(b), 0, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for n < len(b) {
		if c := p.cut; c != nil && c.Direction == d && c.PDUs <= 0 && f.at == c.Offset {
			p.cut = nil
			return n, c.Then, true
		}
		if off := p.corrupt[d]; off >= 0 && f.at == off {
			b[n] = ^b[n]
			p.corrupt[d] = -1
		}
		end := f.step(b[n])
		n++
		if !end {
			continue
		}
		p.pdus[d].Add(1)
		if c := p.cut; c != nil && c.Direction == d {
			if c.PDUs--; c.PDUs <= 0 && c.Offset == 0 {
				p.cut = nil
				return n, c.Then, true
			}
		}
	}
	return n, 0, false
}

// framer finds PDU boundaries in a stream.
type framer struct {
	at, total int // bytes of this PDU seen, and its length once known
	head      [8]byte
}

// step takes one byte and tells whether it ends a PDU.
func (f *framer) step(c byte) bool {
	if f.at < len(f.head) {
		f.head[f.at] = c
	}
	f.at++
	if f.at < headerLen {
		return false
	}
	if f.at == headerLen {
		data := int(f.head[5])<<16 | int(f.head[6])<<8 | int(f.head[7])
		f.total = headerLen + 4*int(f.head[4]) + (data+3)&^3
	}
	if f.at < f.total {
		return false
	}
	f.at = 0
	return true
}

// skip takes many bytes and tells how many PDUs ended in them.
func (f *framer) skip(b []byte) (ended uint64) {
	for len(b) > 0 {
		if f.at >= headerLen { // inside the data segment
			n := min(f.total-f.at, len(b))
			f.at += n
			b = b[n:]
			if f.at == f.total {
				f.at = 0
				ended++
			}
			continue
		}
		if f.step(b[0]) {
			ended++
		}
		b = b[1:]
	}
	return ended
}
