package nbd

import (
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/mpathd/mpathd/internal/sys"
)

// orphans are the connections of an export whose clients have gone. A client
// whose connection broke connects again, sends anew what was not answered, and
// then overwrites those blocks. The first copies must not come after that,
// whether they are in flight or not even read yet: once the next connection
// begins, an orphan starts no change of the export, and until those in flight have
// ended the ones that come wait.
//
// They wait for nothing else: an orphan that reads, or waits for memory, holds up
// nobody, and neither do clients that come and go while a change waits.
type orphans struct {
	n     atomic.Int64 // of busy
	mu    sync.Mutex
	cond  *sync.Cond
	conns []*conn // in transmission
	busy  []*conn // orphans with changes in flight
	last  uint64  // conn.nth of the youngest that began
}

var errOrphan = errors.New("the client is gone")

// arrive enters a connection before its first request is read, and finds those
// that its client left behind.
func (o *orphans) arrive(cn *conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cond == nil {
		o.cond = sync.NewCond(&o.mu)
	}
	for _, old := range o.conns {
		if hungUp(old.c) {
			o.begin(old)
		}
	}
	o.conns = append(o.conns, cn)
	if o.last > cn.nth && hungUp(cn.c) { // the next one was faster
		o.begin(cn)
	}
	o.last = max(o.last, cn.nth)
}

// disown makes a connection an orphan that the server itself closes.
func (o *orphans) disown(cn *conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.begin(cn)
}

// begin makes a connection an orphan. Caller holds mu.
func (o *orphans) begin(cn *conn) {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	if cn.orphan {
		return
	}
	cn.orphan = true
	if cn.changing > 0 {
		o.busy = append(o.busy, cn)
		o.n.Add(1)
	}
	cn.room.Broadcast() // its reader waits for nothing any more
	o.cond.Broadcast()
}

// leave ends a connection whose reader has ended. Requests may still be in flight.
func (o *orphans) leave(cn *conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.begin(cn)
	o.conns = slices.DeleteFunc(o.conns, func(c *conn) bool { return c == cn })
}

// ended tells that the last change of an orphan is no longer in flight.
func (o *orphans) ended(cn *conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.busy = slices.DeleteFunc(o.busy, func(c *conn) bool { return c == cn })
	o.n.Add(-1)
	o.cond.Broadcast()
}

// wait returns when those that are orphans now have no changes in flight, or when
// cn is an orphan itself.
func (o *orphans) wait(cn *conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := slices.Clone(o.busy)
	for !cn.orphan && slices.ContainsFunc(now, func(c *conn) bool { return slices.Contains(o.busy, c) }) {
		o.cond.Wait()
	}
}

// hungUp tells whether the client's end of a connection is closed, or this one
// is, although there may be more to read.
func hungUp(c net.Conn) bool {
	if h, ok := c.(interface{ HungUp() bool }); ok {
		return h.HungUp()
	}
	rc, err := sys.RawConn(c)
	return err == nil && sys.HungUp(rc)
}
