// Package faultnet is a TCP proxy that knows where iSCSI PDUs begin and end
// (RFC 7143 11.2, without digests), and breaks the path it stands for: at a
// PDU boundary or inside one, loudly or in silence.
package faultnet

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Direction is which way bytes flow through the proxy.
type Direction int

const (
	// ToTarget is from the initiator to the target.
	ToTarget Direction = iota
	// ToInitiator is from the target to the initiator.
	ToInitiator
)

// Then is what a cut does to the connection.
type Then int

const (
	// ThenReset sends RST to both sides.
	ThenReset Then = iota
	// ThenClose sends FIN to both sides.
	ThenClose
	// ThenBlackhole lets nothing more through on any connection.
	ThenBlackhole
)

// Cut names a point in the stream of one direction, counted from Arm on over
// all connections together.
type Cut struct {
	Direction Direction
	PDUs      int // whole PDUs that still pass
	Offset    int // bytes that pass of the next PDU longer than that; 0 cuts between PDUs
	Then      Then
}

// Count is what passed in one direction.
type Count struct{ Bytes, PDUs uint64 }

const dialTimeout = 5 * time.Second

// Proxy is one path from a listening address to one upstream address. All
// methods may be called from any goroutine.
type Proxy struct {
	upstream string
	addr     string
	dialing  sync.WaitGroup // all goroutines

	bytes, pdus [2]atomic.Uint64
	delay       atomic.Int64
	gap         atomic.Int64

	mu      sync.Mutex
	changed *sync.Cond // stalled, hole or closed changed
	ln      net.Listener
	links   map[*link]struct{}
	last    *link // accepted last
	stalled [2]bool
	hole    bool
	closed  bool
	cut     *Cut
	corrupt [2]int // offset of the byte to flip in a coming PDU, or -1
	armed   atomic.Bool
}

// New listens at listenAddr ("127.0.0.1:0" picks a port) and forwards every
// connection to upstreamAddr, which need not be reachable yet.
func New(listenAddr, upstreamAddr string) (*Proxy, error) {
	p := &Proxy{upstream: upstreamAddr, addr: listenAddr, links: map[*link]struct{}{}, corrupt: [2]int{-1, -1}}
	p.changed = sync.NewCond(&p.mu)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.listen(); err != nil {
		return nil, err
	}
	return p, nil
}

// listen is called with p.mu held.
func (p *Proxy) listen() error {
	ln, err := net.Listen("tcp", p.addr)
	if err != nil {
		return fmt.Errorf("faultnet: listen on %s: %w", p.addr, err)
	}
	p.ln, p.addr = ln, ln.Addr().String()
	p.dialing.Add(1)
	go p.accept(ln)
	return nil
}

// Addr is the address to connect to, as host:port. It never changes.
func (p *Proxy) Addr() string { return p.addr }

// Count is what passed in a direction since New. Swallowed bytes count too.
func (p *Proxy) Count(d Direction) Count {
	return Count{p.bytes[d].Load(), p.pdus[d].Load()}
}

// Connections is how many connections stand.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.links)
}

// RoundTrips is how many times the initiator waited for an answer before it spoke
// again, its first words included, on the connection that was accepted last. The
// figure does not depend on time if Delay keeps answers back for longer than it
// takes to send what goes together.
func (p *Proxy) RoundTrips() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.last == nil {
		return 0
	}
	return int(p.last.turns.Load())
}

// Reset sends RST to both sides of every connection. New ones are accepted.
func (p *Proxy) Reset() {
	for _, l := range p.list() {
		l.close(true)
	}
}

// Blackhole swallows every byte in both directions, of old and new
// connections; new ones are accepted, and neither FIN nor RST passes.
func (p *Proxy) Blackhole() { p.set(func() { p.hole = true }) }

// Stall stops one direction without losing anything: the sender meets a full
// window, as behind a receiver that does not read.
func (p *Proxy) Stall(d Direction) { p.set(func() { p.stalled[d] = true }) }

// Delay holds every byte back for d, in both directions.
func (p *Proxy) Delay(d time.Duration) { p.delay.Store(int64(d)) }

// Trickle lets one byte at a time through, gap apart, in each direction.
func (p *Proxy) Trickle(gap time.Duration) { p.gap.Store(int64(gap)) }

// Refuse makes new connections fail with ECONNREFUSED. Old ones stay.
func (p *Proxy) Refuse() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ln != nil {
		_ = p.ln.Close()
		p.ln = nil
	}
}

// Corrupt flips all bits of one byte, at offset in the next PDU of the
// direction that is long enough.
func (p *Proxy) Corrupt(d Direction, offset int) {
	p.set(func() { p.corrupt[d] = max(offset, 0) })
}

// CutAtPDU resets the connection after n more whole PDUs of a direction.
func (p *Proxy) CutAtPDU(d Direction, n int) { p.Arm(Cut{Direction: d, PDUs: n}) }

// CutInsidePDU resets it after n more whole PDUs and offset bytes of the next.
func (p *Proxy) CutInsidePDU(d Direction, n, offset int) {
	p.Arm(Cut{Direction: d, PDUs: n, Offset: offset})
}

// Arm sets a cut that happens once; it replaces one that did not happen yet.
func (p *Proxy) Arm(c Cut) { p.set(func() { p.cut = &c }) }

// Heal ends every fault. Connections that lost bytes are reset, since their
// streams have holes; the others go on.
func (p *Proxy) Heal() error {
	p.delay.Store(0)
	p.gap.Store(0)
	p.set(func() {
		p.hole, p.stalled, p.cut, p.corrupt = false, [2]bool{}, nil, [2]int{-1, -1}
		for l := range p.links {
			if l.lost.Load() {
				l.close(true)
			}
		}
	})
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ln != nil || p.closed {
		return nil
	}
	return p.listen()
}

// Close ends the proxy with RST on all connections and waits for its
// goroutines.
func (p *Proxy) Close() error {
	p.Refuse()
	p.set(func() { p.closed = true })
	p.Reset()
	p.dialing.Wait()
	return nil
}

func (p *Proxy) set(f func()) {
	p.mu.Lock()
	f()
	p.armed.Store(p.cut != nil || p.corrupt != [2]int{-1, -1})
	p.mu.Unlock()
	p.changed.Broadcast()
}

func (p *Proxy) list() []*link {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := make([]*link, 0, len(p.links))
	for k := range p.links {
		l = append(l, k)
	}
	return l
}

func (p *Proxy) accept(ln net.Listener) {
	defer p.dialing.Done()
	for {
		nc, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		l := newLink(p, nc.(*net.TCPConn))
		p.mu.Lock()
		ok := !p.closed
		if ok {
			p.links[l], p.last = struct{}{}, l
			p.dialing.Add(1)
		}
		p.mu.Unlock()
		if !ok {
			_ = nc.Close()
			continue
		}
		go l.run()
	}
}
