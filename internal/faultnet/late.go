package faultnet

import (
	"net"
	"sync"
)

// Late is a proxy for one path that falls silent without losing what the
// initiator had sent: Deliver hands those bytes to the target when the
// initiator has long given up, as a network that recovers does. Between Silence
// and Heal neither side learns that the other closed.
type Late struct {
	upstream string
	ln       net.Listener
	all      sync.WaitGroup

	mu     sync.Mutex
	silent bool   // nothing passes to the initiator
	from   Silent // what is held on its way to the target
	links  map[*lateLink]bool
	isids  map[[6]byte]bool // of logins since ISIDs was asked
	closed bool
}

// Silent tells which bytes to the target a silence holds back.
type Silent int

const (
	// HoldAll holds everything.
	HoldAll Silent = iota
	// HoldData lets everything through until a SCSI Data-Out PDU begins: that
	// and what follows is held, and answers are lost from then on.
	HoldData
	// HoldNothing lets everything through: only answers are lost.
	HoldNothing
)

type lateLink struct {
	p        *Late
	down, up *net.TCPConn
	held     []byte
	f        framer
	data     bool   // a Data-Out PDU began
	first    []byte // the beginning of the first PDU
}

// NewLate listens on a free port of 127.0.0.1 and forwards to upstream.
func NewLate(upstream string) (*Late, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Late{upstream: upstream, ln: ln, links: map[*lateLink]bool{}, isids: map[[6]byte]bool{}}
	p.all.Go(p.accept)
	return p, nil
}

// Addr is where the initiator connects.
func (p *Late) Addr() string { return p.ln.Addr().String() }

func (p *Late) accept() {
	for {
		c, err := p.ln.Accept()
		if err != nil {
			return
		}
		l := &lateLink{p: p, down: c.(*net.TCPConn)}
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			c.Close()
			return
		}
		p.links[l] = true
		silent := p.silent
		p.mu.Unlock()
		if silent {
			continue // stays open and unanswered until Heal
		}
		up, err := net.Dial("tcp", p.upstream)
		if err != nil {
			l.close()
			continue
		}
		p.mu.Lock()
		l.up = up.(*net.TCPConn)
		p.mu.Unlock()
		p.all.Go(l.toTarget)
		p.all.Go(l.toInitiator)
	}
}

func (l *lateLink) close() {
	l.p.mu.Lock()
	defer l.p.mu.Unlock()
	delete(l.p.links, l)
	l.down.Close()
	if l.up != nil {
		l.up.Close()
	}
}

func (l *lateLink) toTarget() {
	buf := make([]byte, 64<<10)
	for {
		n, err := l.down.Read(buf)
		l.p.mu.Lock()
		silent := l.p.silent
		l.identify(buf[:n])
		if pass := l.split(buf[:n]); pass > 0 {
			l.up.Write(buf[:pass])
		}
		l.p.mu.Unlock()
		if err != nil {
			if !silent {
				l.close()
			}
			return
		}
	}
}

// identify notes the ISID of the first PDU, a Login Request (RFC 7143 11.12).
func (l *lateLink) identify(b []byte) {
	const end = 14
	if len(l.first) == end {
		return
	}
	if l.first = append(l.first, b[:min(len(b), end-len(l.first))]...); len(l.first) == end {
		l.p.isids[[6]byte(l.first[8:])] = true
	}
}

// split follows the PDUs and tells how much of b passes; the rest is kept.
func (l *lateLink) split(b []byte) int {
	pass := 0
	for i, c := range b {
		if l.p.silent && l.f.at == 0 && c&0x3f == 0x05 {
			l.data = true
		}
		hold := l.p.silent && (l.p.from == HoldAll || l.p.from == HoldData && l.data)
		l.f.step(c)
		if hold || len(l.held) > 0 {
			l.held = append(l.held, c)
		} else {
			pass = i + 1
		}
	}
	return pass
}

func (l *lateLink) toInitiator() {
	buf := make([]byte, 64<<10)
	for {
		n, err := l.up.Read(buf)
		l.p.mu.Lock()
		silent := l.p.silent
		if !silent || l.p.from == HoldData && !l.data { // R2T asks for the data that is then held
			l.down.Write(buf[:n])
		}
		l.p.mu.Unlock()
		if err != nil {
			if !silent {
				l.close()
			}
			return
		}
	}
}

// ISIDs are those of the logins since the last call.
func (p *Late) ISIDs() map[[6]byte]bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := p.isids
	p.isids = map[[6]byte]bool{}
	return was
}

// Silence begins to hold bytes back.
func (p *Late) Silence(from Silent) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.silent, p.from = true, from
}

// Held is how many bytes would be delivered.
func (p *Late) Held() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		n += len(l.held)
	}
	return n
}

// Deliver sends the target what was held. The target may have closed the
// connection: then nobody hears it.
func (p *Late) Deliver() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		if l.up != nil && len(l.held) > 0 {
			l.up.Write(l.held)
			l.held = nil
		}
	}
	p.from = HoldNothing
}

// Heal ends all old connections and lets new ones through.
func (p *Late) Heal() {
	p.mu.Lock()
	p.silent = false
	links := p.links
	p.links = map[*lateLink]bool{}
	p.mu.Unlock()
	for l := range links {
		l.close()
	}
}

// Close ends everything and waits.
func (p *Late) Close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.ln.Close()
	p.Heal()
	p.all.Wait()
}
