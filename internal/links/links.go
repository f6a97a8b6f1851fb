// Package links tells connections that the kernel took away what they stand
// on: their network interface, their local address, the route to their peer.
// One netlink socket (rtnetlink(7)) serves the whole process; it exists while
// somebody watches.
package links

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"github.com/mdlayher/netlink"
)

// Event is what happened to a connection's ground.
type Event struct {
	// Lost: the interface is down or without carrier, the local address is
	// gone, or no route leads to the peer any more. Else a route to the peer
	// went away and another one is there, which may serve.
	Lost  bool
	Cause error
}

type watcher struct {
	local, peer netip.Addr
	tell        func(Event)
}

var all struct {
	sync.Mutex
	conn     *netlink.Conn
	watchers map[*watcher]struct{}
}

// Groups of rtnetlink (linux/rtnetlink.h).
const (
	groupLink     = 0x1
	groupIPv4Addr = 0x10
	groupIPv4Rout = 0x40
	groupIPv6Addr = 0x100
	groupIPv6Rout = 0x400
)

// Watch calls tell, which must not wait, for what happens to a TCP connection
// until stop is called. Connections within the host have no link to lose.
func Watch(c *net.TCPConn, tell func(Event)) (stop func(), err error) {
	local, peer := address(c.LocalAddr()), address(c.RemoteAddr())
	if !local.IsValid() || local.IsLoopback() || local == peer {
		return func() {}, nil
	}
	w := &watcher{local, peer, tell}
	all.Lock()
	defer all.Unlock()
	if all.conn == nil {
		conn, err := netlink.Dial(syscall.NETLINK_ROUTE, &netlink.Config{Groups: groupLink | groupIPv4Addr | groupIPv4Rout | groupIPv6Addr | groupIPv6Rout})
		if err != nil {
			return func() {}, fmt.Errorf("watch links: %w", err)
		}
		all.conn, all.watchers = conn, map[*watcher]struct{}{}
		go receive(conn)
	}
	all.watchers[w] = struct{}{}
	return func() {
		all.Lock()
		defer all.Unlock()
		if _, ok := all.watchers[w]; !ok {
			return
		}
		if delete(all.watchers, w); len(all.watchers) == 0 {
			all.conn.Close()
			all.conn = nil
		}
	}, nil
}

func address(a net.Addr) netip.Addr {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	return t.AddrPort().Addr().Unmap().WithZone("")
}

func receive(conn *netlink.Conn) {
	for {
		msgs, err := conn.Receive()
		if err != nil {
			if errors.Is(err, syscall.ENOBUFS) { // events were lost: let everybody look
				tell(func(*watcher) *Event { return &Event{Cause: errors.New("events of the network were lost")} })
				continue
			}
			if !errors.Is(err, os.ErrClosed) && !errors.Is(err, net.ErrClosed) {
				all.Lock()
				if all.conn == conn { // the next Watch tries again
					all.conn = nil
					conn.Close()
				}
				all.Unlock()
			}
			return
		}
		for _, m := range msgs {
			if judge := parse(m); judge != nil {
				tell(judge)
			}
		}
	}
}

// tell asks judge for each watcher and calls those concerned, without a lock.
func tell(judge func(*watcher) *Event) {
	type call struct {
		w *watcher
		e Event
	}
	var calls []call
	all.Lock()
	for w := range all.watchers {
		if e := judge(w); e != nil {
			calls = append(calls, call{w, *e})
		}
	}
	all.Unlock()
	for _, c := range calls {
		c.w.tell(c.e)
	}
}

// parse makes of a message the question whom it concerns; nil is nobody.
func parse(m netlink.Message) func(*watcher) *Event {
	switch m.Header.Type {
	case syscall.RTM_NEWLINK, syscall.RTM_DELLINK:
		return parseLink(m)
	case syscall.RTM_DELADDR:
		if len(m.Data) < syscall.SizeofIfAddrmsg {
			return nil
		}
		gone := attribute(m.Data[syscall.SizeofIfAddrmsg:], syscall.IFA_LOCAL, syscall.IFA_ADDRESS)
		if !gone.IsValid() {
			return nil
		}
		cause := fmt.Errorf("address %s was removed from this host", gone)
		return func(w *watcher) *Event {
			if w.local != gone {
				return nil
			}
			return &Event{Lost: true, Cause: cause}
		}
	case syscall.RTM_DELROUTE:
		if len(m.Data) < syscall.SizeofRtMsg {
			return nil
		}
		dst, bits := attribute(m.Data[syscall.SizeofRtMsg:], syscall.RTA_DST), int(m.Data[1])
		v6 := m.Data[0] == syscall.AF_INET6
		return func(w *watcher) *Event {
			if bits > 0 && !netip.PrefixFrom(dst, bits).Contains(w.peer) || w.peer.Is6() != v6 {
				return nil
			}
			if unreachable(w.local, w.peer) {
				return &Event{Lost: true, Cause: fmt.Errorf("no route from %s to %s any more", w.local, w.peer)}
			}
			return &Event{Cause: fmt.Errorf("a route to %s was removed", w.peer)}
		}
	}
	return nil
}

// unreachable asks the kernel for a route by connecting a UDP socket, which
// sends nothing.
func unreachable(local, peer netip.Addr) bool {
	c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(local, 0)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(peer, 9)))
	if err != nil {
		return errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.EHOSTUNREACH)
	}
	c.Close()
	return false
}

// parseLink judges a link that changed: ifi_flags say whether it carries.
func parseLink(m netlink.Message) func(*watcher) *Event {
	if len(m.Data) < syscall.SizeofIfInfomsg {
		return nil
	}
	index, flags := int(int32(binary.NativeEndian.Uint32(m.Data[4:]))), binary.NativeEndian.Uint32(m.Data[8:])
	what := "has no carrier"
	switch {
	case m.Header.Type == syscall.RTM_DELLINK:
		what = "was removed"
	case flags&syscall.IFF_UP == 0:
		what = "is down"
	case flags&syscall.IFF_RUNNING != 0:
		return nil
	}
	i, err := net.InterfaceByIndex(index)
	if err != nil {
		return nil // gone already; its addresses are told apart
	}
	addrs, err := i.Addrs()
	if err != nil {
		return nil
	}
	cause := fmt.Errorf("network interface %s %s", i.Name, what)
	return func(w *watcher) *Event {
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok {
				if have, ok := netip.AddrFromSlice(n.IP); ok && have.Unmap() == w.local {
					return &Event{Lost: true, Cause: cause}
				}
			}
		}
		return nil
	}
}

// attribute is the address in the first of the attributes that is there.
func attribute(b []byte, want ...uint16) netip.Addr {
	d, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return netip.Addr{}
	}
	found := make([]netip.Addr, len(want))
	for d.Next() {
		for i, w := range want {
			if d.Type() == w {
				if a, ok := netip.AddrFromSlice(d.Bytes()); ok {
					found[i] = a.Unmap()
				}
			}
		}
	}
	for _, a := range found {
		if a.IsValid() {
			return a
		}
	}
	return netip.Addr{}
}
