//go:build race

package sys

import "syscall"

// read goes through package syscall, which tells the race detector that what
// was written to a socket happened before it is read. That package has no readv.
func (r *Reader) read(fd uintptr) (int, syscall.Errno) {
	n, err := syscall.Read(int(fd), r.into[0])
	e, _ := err.(syscall.Errno)
	return n, e
}
