package sys

import (
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What TuneTCP and SYNRetries set beside timeouts (tcp(7)).
const (
	notSentLow   = 128 << 10 // bytes that the kernel takes ahead of what it can send
	keepaliveTry = 3
	synRetries   = 2 // after 1 s and 2 s more
)

// TuneTCP sets what a storage session wants: no delay; an end of a connection
// whose data is not acknowledged for failoverTime (TCP_USER_TIMEOUT); keepalive
// probes of an idle one, once per failoverTime in whole seconds; and a short
// unsent queue (TCP_NOTSENT_LOWAT), so that pings wait for little and few bytes
// can arrive late.
func TuneTCP(c *net.TCPConn, failoverTime time.Duration) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	probe := int(max(1, (failoverTime+time.Second-1)/time.Second))
	var first error
	set := func(level, opt, v int, fd uintptr) {
		if e := unix.SetsockoptInt(int(fd), level, opt, v); e != nil && first == nil {
			first = os.NewSyscallError("setsockopt", e)
		}
	}
	err = rc.Control(func(fd uintptr) {
		set(unix.IPPROTO_TCP, unix.TCP_NODELAY, 1, fd)
		set(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(failoverTime/time.Millisecond), fd)
		set(unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1, fd)
		set(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, probe, fd)
		set(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, probe, fd)
		set(unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepaliveTry, fd)
		set(unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, notSentLow, fd)
	})
	if err != nil {
		return err
	}
	return first
}

// UserTimeout ends a connection whose data is not acknowledged, or meets a window
// of zero, for longer than d (TCP_USER_TIMEOUT). The kernel counts a closed
// window even while bytes come from the peer.
func UserTimeout(c *net.TCPConn, d time.Duration) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var e error
	if err := rc.Control(func(fd uintptr) {
		e = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(d/time.Millisecond))
	}); err != nil {
		return err
	}
	return os.NewSyscallError("setsockopt", e)
}

// SendBuffer asks for room for n bytes that the peer has not taken yet
// (SO_SNDBUF), beyond net.core.wmem_max where this process may (CAP_NET_ADMIN).
func SendBuffer(c net.Conn, n int) {
	rc, err := RawConn(c)
	if err != nil {
		return
	}
	rc.Control(func(fd uintptr) { sendBuffer(int(fd), n) })
}

func sendBuffer(fd, n int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, n) != nil {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, n)
	}
}

// Unsent is how many bytes the kernel holds for the peer of a stream connection
// to take (SIOCOUTQ), for local ones with its bookkeeping; 0 if it does not tell.
func Unsent(c net.Conn) (n int) {
	rc, err := RawConn(c)
	if err != nil {
		return 0
	}
	rc.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return n
}

// SYNRetries bounds the tries to connect; it is for net.Dialer.Control.
func SYNRetries(_, _ string, rc syscall.RawConn) error {
	var e error
	err := rc.Control(func(fd uintptr) { e = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_SYNCNT, synRetries) })
	if err != nil {
		return err
	}
	return os.NewSyscallError("setsockopt", e)
}

// kernelBuffer is how many bytes of requests the kernel's end of a SocketPair
// takes before they are read: a large write in one piece, without a wake-up for
// each fifth of it.
const kernelBuffer = 2 << 20

// SocketPair returns two connected unix stream sockets: a file for the kernel
// and a connection for this process. The caller closes both.
func SocketPair() (*os.File, net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	sendBuffer(fds[0], kernelBuffer)
	kernel := os.NewFile(uintptr(fds[0]), "nbd-kernel")
	f := os.NewFile(uintptr(fds[1]), "nbd-server")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		kernel.Close()
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	return kernel, c, nil
}

// RawConn returns the raw side of a stream connection, or an error when the
// connection has none (a net.Pipe, say).
func RawConn(c net.Conn) (syscall.RawConn, error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil, fmt.Errorf("%T has no file descriptor", c)
	}
	return sc.SyscallConn()
}

// Map returns n bytes of zeroed memory outside the Go heap.
func Map(n int) ([]byte, error) {
	return unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
}

// Unmap gives memory of Map back.
func Unmap(b []byte) error { return unix.Munmap(b) }

// Timeval is d as the kernel counts it, for sockets of other packages.
func Timeval(d time.Duration) *unix.Timeval {
	tv := unix.NsecToTimeval(int64(d))
	return &tv
}
