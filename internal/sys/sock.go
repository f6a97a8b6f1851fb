package sys

import (
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// TuneTCP sets what a storage session wants: no delay, an early end of a
// connection whose data is not acknowledged (TCP_USER_TIMEOUT), keepalive, and
// a short unsent queue, so that pings overtake nothing old.
func TuneTCP(c *net.TCPConn, userTimeout time.Duration) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var first error
	set := func(level, opt, v int, fd uintptr) {
		if e := unix.SetsockoptInt(int(fd), level, opt, v); e != nil && first == nil {
			first = os.NewSyscallError("setsockopt", e)
		}
	}
	err = rc.Control(func(fd uintptr) {
		set(unix.IPPROTO_TCP, unix.TCP_NODELAY, 1, fd)
		set(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout/time.Millisecond), fd)
		set(unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1, fd)
		set(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 1, fd)
		set(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 1, fd)
		set(unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3, fd)
	})
	if err != nil {
		return err
	}
	return first
}

// SocketPair returns two connected unix stream sockets: a file for the kernel
// and a connection for this process. The caller closes both.
func SocketPair() (*os.File, net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
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
