package simulate

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// mode is what the network does in one direction of a link.
type mode uint8

const (
	pass mode = iota // delivers after a delay
	drop             // delivers nothing: TCP keeps its bytes and sends them again
	hold             // takes everything and keeps it, whoever has gone meanwhile
)

func (m mode) String() string { return [...]string{"passes", "drops", "holds"}[m] }

// link is the way from the host to one portal.
type link struct {
	address  string
	srv      *server
	up, down mode // towards the target, towards the host
	conns    []*conn
	dials    []*dial // that got no answer yet
	n        uint64  // connections so far
	index    int
}

// network carries bytes between host and portals.
type network struct {
	w     *world
	links []*link
	used  *link // that last brought a mutation to a target

	mu      sync.Mutex
	dialing []*dial // not yet seen by collect
}

type dial struct {
	proc   *process
	link   *link
	done   chan struct{} // closed when conn or err is set
	conn   *conn
	err    error
	mu     sync.Mutex
	gaveUp bool
}

// dial is initiator.Config.Dial of a process.
func (n *network) dial(ctx context.Context, p *process, address string) (net.Conn, error) {
	i := slices.IndexFunc(n.links, func(l *link) bool { return l.address == address })
	d := &dial{proc: p, link: n.links[i], done: make(chan struct{})}
	n.mu.Lock()
	n.dialing = append(n.dialing, d)
	n.mu.Unlock()
	n.w.nudge()
	select {
	case <-d.done:
	case <-ctx.Done():
		d.mu.Lock()
		d.gaveUp = true
		c := d.conn
		d.mu.Unlock()
		if c == nil {
			return nil, ctx.Err()
		}
	}
	if d.err != nil {
		return nil, d.err
	}
	return d.conn, nil
}

// collect takes what the product handed to its kernel since the last call.
func (n *network) collect() {
	n.mu.Lock()
	ds := n.dialing
	n.dialing = nil
	n.mu.Unlock()
	slices.SortStableFunc(ds, func(a, b *dial) int { return a.link.index - b.link.index })
	for _, d := range ds {
		d.link.dials = append(d.link.dials, d)
		n.w.after(200*time.Microsecond, func() { n.connect(d.link) })
	}
	for _, l := range n.links {
		for _, c := range l.conns {
			c.transmit()
		}
		l.conns = slices.DeleteFunc(l.conns, (*conn).gone)
	}
}

// gone tells whether nothing of a connection is left.
func (c *conn) gone() bool {
	if !c.up.ended || !c.down.ended || len(c.up.queue)+len(c.down.queue) > 0 {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// connect answers the connection requests of a link that it lets through.
func (n *network) connect(l *link) {
	if l.up != pass || l.down != pass || !l.srv.power {
		return // asked again when that changes
	}
	ds := l.dials
	l.dials = nil
	for _, d := range ds {
		d.mu.Lock()
		switch {
		case d.gaveUp || d.proc.dead.Load():
		case !l.srv.running:
			d.err = &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
			close(d.done)
		default:
			d.conn = newConn(n.w, d.proc, l)
			close(d.done)
		}
		d.mu.Unlock()
	}
}

// setModes changes what a link does, and delivers what that lets go.
func (n *network) setModes(l *link, up, down mode) {
	l.up, l.down = up, down
	for _, c := range slices.Clone(l.conns) {
		c.transmit()
		n.w.after(0, func() { c.pump(&c.up) })
		n.w.after(0, func() { c.pump(&c.down) })
	}
	n.w.after(time.Millisecond, func() { n.connect(l) })
}

// reset breaks the connections of a link: both ends hear of it if the link
// lets them.
func (n *network) reset(l *link) {
	for _, c := range slices.Clone(l.conns) {
		c.push(&c.up, chunk{end: true})
		c.push(&c.down, chunk{end: true, reset: true})
	}
}

// chunk is a piece of a stream on its way.
type chunk struct {
	at    time.Time
	data  []byte
	tells bool // of a power cut
	end   bool // the sender's end of the connection closed after this
	reset bool
}

// stream is one direction of a connection.
type stream struct {
	queue   []chunk
	pumping bool
	ended   bool
	last    time.Time
}

// conn is a TCP connection. The host's end is a net.Conn; what it takes from
// Write counts as taken by the kernel: sent, as far as anybody can tell.
type conn struct {
	w    *world
	proc *process
	link *link
	r    *rand.Rand
	up   stream
	down stream
	far  *tconn

	tells    bool // what the target sends now tells of a power cut
	mu       sync.Mutex
	cond     sync.Cond
	out      []byte // taken by the kernel, not on the network
	room     int    // bytes that the kernel takes
	in       []byte
	inErr    error
	closed   bool // by the product, or its process died
	linger0  bool // close resets
	finished bool // the end was passed to the network
	rude     bool // a process that dies resets it
	killed   bool // the process died: what its code still does has no effect
	deadline [2]time.Time
	timers   [2]*time.Timer
}

func newConn(w *world, p *process, l *link) *conn {
	c := &conn{w: w, proc: p, link: l, r: w.rand(1, uint64(l.index)<<16|l.n)}
	c.rude = w.rand(4, uint64(l.index)<<16|l.n).IntN(3) == 0
	l.n++
	c.cond.L = &c.mu
	c.room = []int{700, 4 << 10, 64 << 10}[c.r.IntN(3)]
	l.conns = append(l.conns, c)
	c.far = l.srv.accept(c)
	p.enter(c)
	return c
}

var errReset = &net.OpError{Op: "read", Err: syscall.ECONNRESET}

func (c *conn) wait(dir int) error {
	if d := c.deadline[dir]; !d.IsZero() && !time.Now().Before(d) {
		return os.ErrDeadlineExceeded
	}
	c.cond.Wait()
	return nil
}

// Read and the other methods make the host's end (net.Conn).
func (c *conn) Read(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, net.ErrClosed
		case len(c.in) > 0:
			n := copy(b, c.in)
			c.in = c.in[n:]
			return n, nil
		case c.inErr != nil:
			return 0, c.inErr
		}
		if err := c.wait(0); err != nil {
			return 0, err
		}
	}
}

func (c *conn) Write(b []byte) (n int, err error) {
	c.proc.point()
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.closed:
			return n, net.ErrClosed
		case c.inErr != nil && c.inErr != io.EOF:
			return n, c.inErr
		}
		k := min(len(b), max(0, c.room-len(c.out)))
		c.out = append(c.out, b[:k]...)
		b = b[k:]
		if n += k; k > 0 {
			c.w.nudge()
		}
		if len(b) == 0 {
			return n, nil
		}
		if err := c.wait(1); err != nil {
			return n, err
		}
	}
}

func (c *conn) SetLinger(sec int) error {
	c.mu.Lock()
	c.linger0 = c.linger0 || sec == 0 && !c.killed
	c.mu.Unlock()
	return nil
}

func (c *conn) Close() error {
	c.mu.Lock()
	c.closed = true
	if c.linger0 && !c.killed {
		c.out = nil
	}
	for _, t := range c.timers {
		if t != nil {
			t.Stop()
		}
	}
	c.mu.Unlock()
	c.cond.Broadcast()
	c.w.nudge()
	return nil
}

// isClosed tells whether the host's end is.
func (c *conn) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

type addr string

func (a addr) Network() string { return "tcp" }
func (a addr) String() string  { return string(a) }

func (c *conn) LocalAddr() net.Addr  { return addr("host") }
func (c *conn) RemoteAddr() net.Addr { return addr(c.link.address) }

func (c *conn) SetDeadline(t time.Time) error {
	c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}
func (c *conn) SetReadDeadline(t time.Time) error  { return c.setDeadline(0, t) }
func (c *conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(1, t) }

func (c *conn) setDeadline(dir int, t time.Time) error {
	c.mu.Lock()
	c.deadline[dir] = t
	if c.timers[dir] != nil {
		c.timers[dir].Stop()
		c.timers[dir] = nil
	}
	if d := time.Until(t); !t.IsZero() && d > 0 {
		c.timers[dir] = time.AfterFunc(d, c.cond.Broadcast)
	}
	c.mu.Unlock()
	c.cond.Broadcast()
	return nil
}

// transmit gives the network what the kernel holds. A reset leaves the kernel
// nothing to send again: what the network has not taken never arrives.
func (c *conn) transmit() {
	c.mu.Lock()
	var data []byte
	if c.link.up != drop {
		data, c.out = c.out, nil
	}
	end := c.closed && !c.finished && (c.linger0 || len(c.out) == 0)
	reset := c.linger0 || len(c.in) > 0
	c.finished = c.finished || end
	c.mu.Unlock()
	if len(data) > 0 {
		c.cond.Broadcast()
		for len(data) > 0 { // segments
			n := len(data)
			if n > 48 && c.r.IntN(4) == 0 {
				n = 1 + c.r.IntN(n)
			}
			c.push(&c.up, chunk{data: data[:n:n]})
			data = data[n:]
		}
	}
	if !end {
		return
	}
	if reset && c.link.up == drop {
		c.up.queue = nil
	}
	// A reset is one packet: a network that holds or drops may well lose it.
	if reset && c.link.up != pass && c.r.IntN(3) > 0 {
		return
	}
	c.push(&c.up, chunk{end: true, reset: reset})
}

// push puts a chunk on its way.
func (c *conn) push(s *stream, k chunk) {
	if s.ended {
		return
	}
	s.ended = k.end
	d := 20*time.Microsecond + time.Duration(c.r.Int64N(int64(c.w.set.Jitter)))
	if c.r.IntN(c.w.set.Loss) == 0 { // lost once or twice, sent again
		d += time.Duration(1+c.r.IntN(2)) * 200 * time.Millisecond
	}
	k.at = time.Now().Add(d)
	if k.at.Before(s.last) {
		k.at = s.last
	}
	s.last = k.at
	s.queue = append(s.queue, k)
	c.pump(s)
}

// pump delivers what is due and lets itself be called for the rest.
func (c *conn) pump(s *stream) {
	if s.pumping {
		return
	}
	for len(s.queue) > 0 {
		m := c.link.down
		if s == &c.up {
			m = c.link.up
		}
		if m != pass {
			return // setModes calls again
		}
		if wait := time.Until(s.queue[0].at); wait > 0 {
			s.pumping = true
			c.w.after(wait, func() { s.pumping = false; c.pump(s) })
			return
		}
		k := s.queue[0]
		s.queue = s.queue[1:]
		s.pumping = true // what a delivery sends comes after it
		if s == &c.up {
			c.arrive(k)
		} else {
			c.land(k)
		}
		s.pumping = false
	}
}

// arrive is a chunk at the target.
func (c *conn) arrive(k chunk) {
	if c.far.dead { // a closed socket answers with a reset
		if len(k.data) > 0 && c.link.srv.power {
			c.push(&c.down, chunk{end: true, reset: true})
		}
		return
	}
	if len(k.data) > 0 {
		c.far.receive(k.data)
	}
	if k.end {
		c.far.hungUp()
	}
}

// land is a chunk at the host.
func (c *conn) land(k chunk) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		if len(k.data) > 0 && !c.up.ended {
			c.w.after(0, func() { c.push(&c.up, chunk{end: true, reset: true}) })
		}
		return
	}
	c.in = append(c.in, k.data...)
	if k.tells {
		c.w.guest.tells(-1)
	}
	switch {
	case k.reset:
		c.inErr = errReset
		c.in = nil
	case k.end:
		c.inErr = io.EOF
	}
	c.cond.Broadcast()
}

// send is the target's write.
func (c *conn) send(data []byte) { c.push(&c.down, chunk{data: data, tells: c.tells}) }

// kill is what the kernel does with the sockets of a process that died.
func (c *conn) kill() {
	c.mu.Lock()
	if c.rude {
		c.linger0 = true
		c.out = nil
	}
	c.closed, c.killed = true, true
	c.mu.Unlock()
	c.cond.Broadcast()
}
