// Package sys is the only importer of golang.org/x/sys/unix: non-blocking
// vector writes, socket options and off-heap memory.
package sys

import (
	"errors"
	"net"
	"syscall"
	"unsafe"
)

// MaxIovecs is the most buffers that one writev takes (IOV_MAX).
const MaxIovecs = 1024

// ErrWouldBlock is returned by VecWriter.Write when the socket takes no more now.
var ErrWouldBlock = errors.New("socket buffer is full")

// VecWriter writes many buffers with one system call and no allocation. It is
// for one goroutine at a time.
type VecWriter struct {
	rc   syscall.RawConn
	iov  []syscall.Iovec
	n    int // bytes taken by the last call
	errn syscall.Errno
	park bool
	once func(fd uintptr) bool // bound once, so that no closure is made per call
}

// NewVecWriter returns a writer on the connection behind rc.
func NewVecWriter(rc syscall.RawConn) *VecWriter {
	w := &VecWriter{rc: rc}
	w.once = w.call
	return w
}

func (w *VecWriter) call(fd uintptr) bool {
	for {
		n, _, e := syscall.RawSyscall(syscall.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&w.iov[0])), uintptr(len(w.iov)))
		if e == syscall.EINTR {
			continue
		}
		if e != 0 {
			w.n, w.errn = 0, e
			return !(w.park && e == syscall.EAGAIN)
		}
		w.n, w.errn = int(n), 0
		return true
	}
}

// Write hands bufs (at most MaxIovecs are looked at) to the kernel and reports
// how many bytes it took. With park false it never waits: a full socket is
// ErrWouldBlock. With park true it waits until some bytes are taken.
func (w *VecWriter) Write(bufs [][]byte, park bool) (int, error) {
	w.iov = w.iov[:0]
	for _, b := range bufs {
		if len(b) == 0 {
			continue
		}
		if len(w.iov) == MaxIovecs {
			break
		}
		v := syscall.Iovec{Base: &b[0]}
		v.SetLen(len(b))
		w.iov = append(w.iov, v)
	}
	if len(w.iov) == 0 {
		return 0, nil
	}
	w.park = park
	err := w.rc.Write(w.once)
	clear(w.iov)
	if err != nil {
		return 0, err
	}
	if w.errn == syscall.EAGAIN {
		return 0, ErrWouldBlock
	}
	if w.errn != 0 {
		return 0, w.errn
	}
	return w.n, nil
}

// Writer is what a connection writes with: a VecWriter, or a ParkedWriter where
// the connection has no file descriptor of its own.
type Writer interface {
	Write(bufs [][]byte, park bool) (int, error)
}

// ParkedWriter writes to connections that the kernel does not take buffers of,
// TLS above all: nothing is ever taken without waiting.
type ParkedWriter struct{ net.Conn }

// Write hands over the first of bufs that is not empty; see VecWriter.Write.
func (w ParkedWriter) Write(bufs [][]byte, park bool) (int, error) {
	if !park {
		return 0, ErrWouldBlock
	}
	for _, b := range bufs {
		if len(b) > 0 {
			return w.Conn.Write(b)
		}
	}
	return 0, nil
}
