package sys

import (
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TCPInfo is what the kernel knows of a connection's sending side (TCP_INFO,
// tcp(7)).
type TCPInfo struct {
	Retransmits int           // of the oldest unacknowledged segment, by timeout
	Unacked     int           // segments in flight
	LastAck     time.Duration // since the last acknowledgement arrived
	Acked       uint64        // bytes acknowledged since the connection began
	Pending     bool          // some bytes are not acknowledged, or not even sent
	Closed      bool          // aborted, or closed by both sides; a peer's FIN alone is not
}

// TCPInfoReader samples one connection without allocating. It is for one
// goroutine at a time.
type TCPInfoReader struct {
	rc   syscall.RawConn
	buf  unix.TCPInfo
	errn syscall.Errno
	once func(fd uintptr)
}

// NewTCPInfoReader returns a reader of the TCP connection behind rc.
func NewTCPInfoReader(rc syscall.RawConn) *TCPInfoReader {
	r := &TCPInfoReader{rc: rc}
	r.once = r.call
	return r
}

func (r *TCPInfoReader) call(fd uintptr) {
	n := uint32(unsafe.Sizeof(r.buf))
	_, _, r.errn = syscall.RawSyscall6(syscall.SYS_GETSOCKOPT, fd, unix.IPPROTO_TCP, unix.TCP_INFO, uintptr(unsafe.Pointer(&r.buf)), uintptr(unsafe.Pointer(&n)), 0)
}

// Read samples the connection; ok is false when it is closed on this side or no
// TCP, and of a nil reader.
func (r *TCPInfoReader) Read() (in TCPInfo, ok bool) {
	if r == nil {
		return in, false
	}
	if err := r.rc.Control(r.once); err != nil || r.errn != 0 {
		return in, false
	}
	b := &r.buf
	return TCPInfo{Retransmits: int(b.Retransmits), Unacked: int(b.Unacked), LastAck: time.Duration(b.Last_ack_recv) * time.Millisecond,
		Acked: b.Bytes_acked, Pending: b.Unacked > 0 || b.Notsent_bytes > 0, Closed: b.State == unix.BPF_TCP_CLOSE}, true
}
