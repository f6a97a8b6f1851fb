package attach

import (
	"context"
	"net"
	"os"
	"time"

	"github.com/mpathd/mpathd/internal/sys"
)

// A connection that the kernel gives up, because a reply was wrong or, with
// several connections, late, is replaced. The kernel tells of it twice: it shuts
// the socket down and multicasts NBD_CMD_LINK_DEAD. The former cannot get lost and
// says which connection it is, so that is what is listened to.

// Between two connections that fail at once, so that a kernel that wants none
// keeps nobody busy.
const (
	firstPause = 50 * time.Millisecond
	maxPause   = 5 * time.Second
)

// keeper keeps the connections of one device served.
type keeper struct {
	o      Options
	ctx    context.Context
	cancel context.CancelFunc
	opened []net.Conn
	known  chan struct{} // closed by is

	// What is there once the device is known.
	device    string
	reconnect func(kernel *os.File) error
	there     func() bool // the device is still ours
}

func newKeeper(o Options) *keeper {
	k := &keeper{o: o, known: make(chan struct{})}
	k.ctx, k.cancel = context.WithCancel(o.Ctx)
	return k
}

// is names the device; until then no connection is replaced.
func (k *keeper) is(d *Device) {
	k.device = d.Path()
	k.reconnect = func(kernel *os.File) error { return d.reconnect(k.o.DeadTimeout, kernel) }
	k.there = func() bool {
		ours := d.ours("/")
		if !ours {
			d.lock.Release()
		}
		return ours
	}
	close(k.known)
}

// open begins to serve n connections and returns the kernel's ends.
func (k *keeper) open(n int) (kernel []*os.File, err error) {
	for range n {
		f, c, err := sys.SocketPair()
		if err != nil {
			k.abandon()
			closeAll(kernel)
			return nil, err
		}
		kernel, k.opened = append(kernel, f), append(k.opened, c)
		go k.keep(c)
	}
	return kernel, nil
}

// abandon ends what open began: the kernel did not take it.
func (k *keeper) abandon() {
	k.cancel()
	for _, c := range k.opened {
		c.Close()
	}
}

// keep serves a connection, and the next one whenever the kernel gave one up. The
// next one begins when no request of the last is in flight: what the kernel then
// sends anew cannot meet its own past, and a backend that hangs for long does not
// cost a connection each time that the kernel loses patience.
func (k *keeper) keep(conn net.Conn) {
	pause := firstPause
	for {
		began := time.Now()
		err := k.o.Serve(conn)
		if err == nil || k.ctx.Err() != nil {
			return
		}
		select {
		case <-k.ctx.Done():
			return
		case <-k.known:
		}
		k.o.Logger.Warn("the kernel gave up a connection of the device, it gets another", "device", k.device, "cause", err)
		if time.Since(began) > maxPause {
			pause = firstPause
		}
		for conn = nil; conn == nil; pause = min(2*pause, maxPause) {
			select {
			case <-k.ctx.Done():
				return
			case <-time.After(pause):
			}
			if !k.there() {
				return
			}
			kernel, ours, err := sys.SocketPair()
			if err == nil {
				if err = k.reconnect(kernel); err == nil {
					conn = ours
				} else {
					ours.Close()
				}
				kernel.Close()
			}
			if err != nil {
				k.o.Logger.Warn("no new connection for the device yet", "device", k.device, "cause", err)
			}
		}
	}
}

func closeAll(fs []*os.File) {
	for _, f := range fs {
		f.Close()
	}
}
