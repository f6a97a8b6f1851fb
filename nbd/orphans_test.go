package nbd

import (
	"bytes"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/nbd/proto"
)

func (p *peer) write(cookie uint64, b byte) {
	p.ask(proto.CmdWrite, 0, cookie, 0, 512, bytes.Repeat([]byte{b}, 512))
}

// holdAll makes the device keep what comes until release.
func (d *ram) holdAll() {
	d.mu.Lock()
	d.hold = true
	d.mu.Unlock()
}

// written is the first byte of each write that the device was given, in order.
func (d *ram) written() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return string(d.sent)
}

// began waits until the nth connection has begun.
func began(t *testing.T, s *Server, nth uint64) {
	t.Helper()
	o := &s.find("disk").orphans
	require.Eventually(t, func() bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		return o.last == nth
	}, 5*time.Second, time.Millisecond)
}

// gone waits until n connections are left that read requests.
func gone(t *testing.T, s *Server, n int) {
	t.Helper()
	o := &s.find("disk").orphans
	require.Eventually(t, func() bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		return len(o.conns) == n
	}, 5*time.Second, time.Millisecond)
}

// alone waits until one connection is left.
func alone(t *testing.T, s *Server) {
	t.Helper()
	require.Eventually(t, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.conns) == 1
	}, 5*time.Second, time.Millisecond)
}

func (p *peer) answered(cookie uint64) {
	p.t.Helper()
	e, got := p.answer()
	require.Equal(p.t, proto.OK, e)
	require.Equal(p.t, cookie, got)
}

// abandoned is a server whose first client has sent some writes and gone; the
// device keeps the first of them until release.
func abandoned(t *testing.T, c Config, writes string) (s *Server, d *ram, dial func() *peer) {
	t.Helper()
	s, d, dial = newServer(t, c)
	d.holdAll()
	a := dial().enter()
	for i, b := range []byte(writes) {
		a.write(uint64(i+1), b)
	}
	require.Eventually(t, func() bool { return d.written() == writes[:1] }, 5*time.Second, time.Millisecond)
	a.Close()
	return s, d, dial
}

// The outage that taught it: a client connected again twice while no path was
// there. What the second connection had waiting was sent once a path came back,
// after the third one's writes of the same blocks.
func TestWritesThatWaitAreNotSentOnceTheirClientHasConnectedAgain(t *testing.T) {
	s, d, dial := abandoned(t, Config{}, "a")
	b := dial().enter()
	for i := range uint64(8) { // the first waits for a's, the others are behind it
		b.write(i, 'b')
	}
	b.Close()
	c := dial().enter()
	began(t, s, 3)
	c.write(1, 'c')
	d.release()
	c.answered(1)
	alone(t, s)
	require.Equal(t, "ac", d.written())
}

// What a connection has no slot for is not even read when its client goes.
func TestWritesThatWaitForASlotAreNotSentOnceTheirClientHasConnectedAgain(t *testing.T) {
	s, d, dial := abandoned(t, Config{MaxRequests: 1}, "ab")
	b := dial().enter()
	began(t, s, 2)
	b.write(1, 'c')
	d.release()
	b.answered(1)
	alone(t, s)
	require.Equal(t, "ac", d.written())
}

// A client that sends no more and reads no replies holds up nobody's writes.
func TestRepliesThatNobodyReadsHoldUpNoWrites(t *testing.T) {
	_, d, dial := newServer(t, Config{})
	a := dial().enter()
	const size, n = 1 << 20, 8 // more than a socket takes
	for i := range uint64(n) {
		a.ask(proto.CmdRead, 0, i, 0, size, nil)
	}
	require.Eventually(t, func() bool { return len(d.requests()) == n }, 5*time.Second, time.Millisecond)
	require.NoError(t, a.Conn.(interface{ CloseWrite() error }).CloseWrite())
	b := dial().enter()
	b.write(1, 'b')
	b.answered(1)
}

// Clients that come, read and go, one before the other has its data, are no reason
// for anybody's writes to wait.
func TestReadsThatOutliveTheirClientHoldUpNoWrites(t *testing.T) {
	s, d, dial := newServer(t, Config{})
	d.holdAll()
	a := dial().enter()
	a.ask(proto.CmdRead, 0, 1, 0, 4096, nil)
	require.Eventually(t, func() bool { return len(d.requests()) == 1 }, 5*time.Second, time.Millisecond)
	a.Close()
	b := dial().enter()
	gone(t, s, 1)
	d.mu.Lock()
	d.hold = false
	d.mu.Unlock()
	b.write(1, 'b')
	b.answered(1)
}

// Nor is a client that goes while it waits for memory that others do not give back.
func TestAClientThatGoesWhileItWaitsForMemoryHoldsUpNoWrites(t *testing.T) {
	s, dial := twoExports(t, Config{MaxBytes: 8 << 20, stuck: time.Hour})
	for range 2 {
		dial("disk").ask(proto.CmdWrite, 0, 1, 0, 4<<20, []byte("x"))
	}
	clients := &s.exports["disk"].clients
	require.Eventually(t, func() bool {
		clients.mu.Lock()
		defer clients.mu.Unlock()
		return clients.arena != nil && clients.arena.Out() == s.cfg.MaxBytes
	}, 5*time.Second, time.Millisecond)
	a := dial("disk")
	a.ask(proto.CmdWrite, 0, 1, 0, 1<<20, []byte("x"))
	time.Sleep(100 * time.Millisecond) // it waits
	a.Close()
	b := dial("disk")
	b.SetDeadline(time.Now().Add(10 * time.Second))
	b.write(1, 'b')
	b.answered(1)
}

// A write waits for those who are gone when it comes, not for all who go after it.
func TestAWriteWaitsForNoClientThatGoesLater(t *testing.T) {
	s, d, dial := newServer(t, Config{})
	d.holdAll()
	a, b, c := dial().enter(), dial().enter(), dial().enter()
	a.write(1, 'a')
	require.Eventually(t, func() bool { return d.written() == "a" }, 5*time.Second, time.Millisecond)
	b.write(1, 'b')
	require.Eventually(t, func() bool { return d.written() == "ab" }, 5*time.Second, time.Millisecond)
	a.Close()
	gone(t, s, 2)
	c.write(1, 'c')
	time.Sleep(100 * time.Millisecond) // it waits
	b.Close()
	gone(t, s, 1)
	require.Equal(t, "ab", d.written())
	d.mu.Lock()
	first := d.held[0]
	d.held, d.hold = d.held[1:], false
	d.mu.Unlock()
	var p block.Plug
	first.Owner.Complete(first, &p)
	p.Flush()
	c.answered(1)
	require.Equal(t, "abc", d.written())
}
