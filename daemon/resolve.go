package daemon

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/mpathd/mpathd/internal/sys"
)

// names turns host names of portals into addresses once, so that no path waits
// for a name server when it reconnects. When none of the known addresses answers,
// the name is looked up again beside the tries, which never wait for it.
type names struct {
	lookup  func(ctx context.Context, host string) ([]netip.Addr, error)
	connect func(ctx context.Context, network, address string) (net.Conn, error)

	mu    sync.Mutex
	known map[string][]netip.Addr
	busy  map[string]bool // lookups under way in the background
}

func newNames() *names {
	d := net.Dialer{KeepAlive: -1, Control: sys.SYNRetries}
	return &names{connect: d.DialContext, known: map[string][]netip.Addr{}, busy: map[string]bool{},
		lookup: func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}}
}

// dial connects to host:port; it is an initiator.Config.Dial.
func (n *names) dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return n.connect(ctx, network, address)
	}
	n.mu.Lock()
	addrs := n.known[host]
	n.mu.Unlock()
	if addrs == nil {
		if addrs, err = n.lookup(ctx, host); err != nil {
			return nil, err
		}
		n.mu.Lock()
		n.remember(host, addrs)
		n.mu.Unlock()
	}
	for i, a := range addrs {
		one, cancel := ctx, context.CancelFunc(func() {})
		if end, ok := ctx.Deadline(); ok { // an equal part of what is left for each
			one, cancel = context.WithTimeout(ctx, time.Until(end)/time.Duration(len(addrs)-i))
		}
		var c net.Conn
		c, err = n.connect(one, network, net.JoinHostPort(a.Unmap().String(), port))
		cancel()
		if err == nil {
			return c, nil
		}
	}
	n.again(host)
	return nil, err
}

// maxNames is how many names are known at a time: a target may redirect each
// login to another one.
const maxNames = 1024

// remember keeps the addresses of a name, if there is room. Caller holds mu.
func (n *names) remember(host string, addrs []netip.Addr) {
	if n.known[host] != nil || len(n.known) < maxNames {
		n.known[host] = addrs
	}
}

// lookupTime bounds a lookup that nobody waits for.
const lookupTime = 10 * time.Second

// again looks a name up in the background.
func (n *names) again(host string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.busy[host] {
		return
	}
	n.busy[host] = true
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), lookupTime)
		defer cancel()
		addrs, err := n.lookup(ctx, host)
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.busy, host)
		if err == nil && len(addrs) > 0 {
			n.remember(host, addrs)
		}
	}()
}
