package sys

import (
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// PeerUID is the user at the other end of a unix socket (SO_PEERCRED of
// unix(7)).
func PeerUID(c *net.UnixConn) (uint32, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var e error
	if err := rc.Control(func(fd uintptr) { cred, e = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if e != nil {
		return 0, os.NewSyscallError("getsockopt", e)
	}
	return cred.Uid, nil
}

// HungUp tells whether the other end of a stream socket sends nothing more
// (POLLRDHUP of poll(2)), although there may be more to read, or this end is closed.
func HungUp(rc syscall.RawConn) (over bool) {
	err := rc.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		over = err == nil && n > 0
	})
	return over || err != nil
}
