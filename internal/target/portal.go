package target

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// maxConns bounds the connections of one portal.
const maxConns = 1024

// Portal is one listening address. Its faults act on it alone, so that one
// server can be a healthy and a sick path at once.
type Portal struct {
	srv     *Server
	targets []string
	index   uint16 // relative target port
	group   uint16 // target portal group tag

	hung   atomic.Pointer[chan struct{}] // closed by Resume; nil when not hung
	reject atomic.Uint32                 // class<<8 | detail

	mu    sync.Mutex
	addr  string
	ln    net.Listener
	conns map[*conn]struct{}
}

// Addr is the address listened on, as host:port. It stays the same over Stop
// and Start.
func (p *Portal) Addr() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.addr
}

// URL is the portal's first target at this LUN, as iscsi://host:port/name/lun.
func (p *Portal) URL(lun int) string {
	return fmt.Sprintf("iscsi://%s/%s/%d", p.Addr(), p.targets[0], lun)
}

// TargetName is the name of the portal's first target.
func (p *Portal) TargetName() string { return p.targets[0] }

// SetGroup sets the target portal group tag, 1 by default. Call it before the
// first login: it is part of a session's identity.
func (p *Portal) SetGroup(tag uint16) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.group = tag
}

// Start listens, again if the portal was stopped, on the same address.
func (p *Portal) Start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ln != nil {
		return nil
	}
	ln, err := net.Listen("tcp", p.addr)
	if err != nil {
		return fmt.Errorf("target: listen on portal %s: %w", p.addr, err)
	}
	p.ln, p.addr = ln, ln.Addr().String()
	p.srv.wg.Add(1)
	go p.accept(ln)
	return nil
}

// Stop closes the listener and every connection and lets hung ones end. It
// does not wait for their goroutines; Server.Kill does.
func (p *Portal) Stop() {
	p.mu.Lock()
	if p.ln != nil {
		_ = p.ln.Close()
		p.ln = nil
	}
	p.mu.Unlock()
	for _, c := range p.list() {
		c.close(false)
	}
}

// Hang stops reading and answering; connections stay open and new ones are
// accepted by the kernel but get no answer.
func (p *Portal) Hang() {
	ch := make(chan struct{})
	p.hung.CompareAndSwap(nil, &ch)
}

// Resume ends Hang.
func (p *Portal) Resume() {
	ch := p.hung.Swap(nil)
	if ch == nil {
		return
	}
	close(*ch)
	for _, c := range p.list() {
		c.drainAsync()
	}
}

// Drop resets (RST) every connection of the portal.
func (p *Portal) Drop() {
	for _, c := range p.list() {
		c.close(true)
	}
}

// RejectLogin makes logins at this portal end with a status; class 0 accepts
// them again.
func (p *Portal) RejectLogin(class, detail uint8) {
	p.reject.Store(uint32(class)<<8 | uint32(detail))
}

// Inject sends raw bytes on each logged-in connection, between two PDUs. b is
// copied.
func (p *Portal) Inject(b []byte) {
	b = append([]byte(nil), b...)
	for _, c := range p.list() {
		c.post(func() {
			if c.full {
				c.putBytes(b)
			}
		})
	}
}

// Ping sends a NOP-In that asks for an answer on each logged-in connection.
func (p *Portal) Ping() {
	for _, c := range p.list() {
		c.post(func() {
			if c.full {
				c.nopIn()
			}
		})
	}
}

// Async sends an Asynchronous Message on each logged-in connection, with its
// event, parameters and data segment (RFC 7143 11.9).
func (p *Portal) Async(event uint8, lun [8]byte, p1, p2, p3 uint16, data []byte) {
	data = append([]byte(nil), data...)
	for _, c := range p.list() {
		c.post(func() {
			if !c.full {
				return
			}
			a := c.header(pdu.OpAsync)
			a.SetLUN(lun)
			a.SetITT(pdu.NoTag)
			a[36] = event
			a.SetU16(38, p1)
			a.SetU16(40, p2)
			a.SetU16(42, p3)
			a.SetDataLen(len(data))
			c.status(a)
			c.payload(data)
		})
	}
}

// Connections is how many TCP connections the portal has.
func (p *Portal) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.conns)
}

func (p *Portal) list() []*conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := make([]*conn, 0, len(p.conns))
	for c := range p.conns {
		l = append(l, c)
	}
	return l
}

func (p *Portal) accept(ln net.Listener) {
	defer p.srv.wg.Done()
	for {
		nc, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // such as no free descriptor: wait for one
			p.srv.cfg.Logger.Warn("accept on portal", "portal", ln.Addr(), "err", err)
			time.Sleep(20 * time.Millisecond)
			continue
		}
		c := newConn(p, nc.(*net.TCPConn))
		p.mu.Lock()
		ok := p.ln == ln && len(p.conns) < maxConns
		if ok {
			p.conns[c] = struct{}{}
			p.srv.wg.Add(1)
		}
		p.mu.Unlock()
		if !ok {
			_ = nc.Close()
			continue
		}
		p.srv.stats.connections.Add(1)
		go c.serve()
	}
}

// offers gives the TargetAddress of a target behind this portal, as seen by a
// client that reached us at local.
func (p *Portal) offers(target string, local net.Addr) (string, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ln == nil || !slices.Contains(p.targets, target) {
		return "", false
	}
	addr := p.addr
	if wildcard(p.ln.Addr()) {
		host, _, _ := net.SplitHostPort(local.String())
		_, port, _ := net.SplitHostPort(addr)
		addr = net.JoinHostPort(host, port)
	}
	return fmt.Sprintf("%s,%d", addr, p.group), true
}
