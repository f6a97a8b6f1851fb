package sys

import (
	"io"
	"os"
	"syscall"
)

// Reader reads a non-blocking socket. It is for one goroutine at a time. Unlike
// net.Conn it does not tell Go's scheduler of the system call, which never
// blocks: that would wake the runtime's monitor thread, and its naps of 20 us
// cost as much as the I/O.
type Reader struct {
	rc   syscall.RawConn
	into [2][]byte
	iov  [2]syscall.Iovec
	n    int // bytes read by the last call
	errn syscall.Errno
	once func(fd uintptr) bool // bound once, so that no closure is made per call
}

// NewReader returns a reader of the connection behind rc.
func NewReader(rc syscall.RawConn) *Reader {
	r := &Reader{rc: rc}
	r.once = r.call
	return r
}

func (r *Reader) call(fd uintptr) bool {
	for {
		n, e := r.read(fd)
		switch e {
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
			return false
		case 0:
			r.n, r.errn = n, 0
		default:
			r.n, r.errn = 0, e
		}
		return true
	}
}

// Read waits until there is something to read, the connection's read deadline
// has passed or the connection is closed. It is an io.Reader.
func (r *Reader) Read(b []byte) (int, error) { return r.ReadAhead(b, nil) }

// ReadAhead is Read into b and, once that is full, into ahead: what came behind
// the wanted bytes costs no system call of its own. It may leave ahead empty
// though there is more.
func (r *Reader) ReadAhead(b, ahead []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	r.into, r.n = [2][]byte{b, ahead}, 0
	err := r.rc.Read(r.once)
	r.into = [2][]byte{}
	switch {
	case err != nil:
		return 0, err
	case r.errn != 0:
		return 0, os.NewSyscallError("read", r.errn)
	case r.n == 0:
		return 0, io.EOF
	}
	return r.n, nil
}
