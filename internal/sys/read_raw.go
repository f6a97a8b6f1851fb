//go:build !race

package sys

import (
	"syscall"
	"unsafe"
)

// read is read(2) or readv(2) of a socket that does not block.
func (r *Reader) read(fd uintptr) (int, syscall.Errno) {
	b, ahead := r.into[0], r.into[1]
	if len(ahead) == 0 {
		n, _, e := syscall.RawSyscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		return int(n), e
	}
	r.iov[0].Base, r.iov[1].Base = &b[0], &ahead[0]
	r.iov[0].SetLen(len(b))
	r.iov[1].SetLen(len(ahead))
	n, _, e := syscall.RawSyscall(syscall.SYS_READV, fd, uintptr(unsafe.Pointer(&r.iov[0])), uintptr(len(r.iov)))
	r.iov = [2]syscall.Iovec{}
	return int(n), e
}
