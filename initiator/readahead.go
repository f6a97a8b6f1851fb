package initiator

import (
	"io"
	"net"
	"sync"

	"github.com/mpathd/mpathd/internal/sys"
)

// Sizes of the buffer of what is received besides Data-In, which goes to its
// destination.
const (
	smallBuffer = 4 << 10
	largeBuffer = 128 << 10
	largeTicks  = 5 * ticksDead // without a command in flight, after which a large one goes back

	// After a data segment this long the next one is expected to be long too. What
	// is read ahead of it has to be copied: that costs more than a system call.
	bulk      = 32 << 10
	bulkAhead = 4 << 10
)

// largeBuffers are shared: a session that is idle has none.
var largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}

// readAhead is the buffer of the goroutine that reads the connection.
type readAhead struct {
	buf  []byte // small, or large
	r, w int    // unread bytes are buf[r:w]

	small    []byte
	large    *[largeBuffer]byte // of largeBuffers, or nil
	workedAt uint32             // tick at which a command was last in flight
	bulk     bool               // the last Data-In was long: see bulkAhead
}

func newReadAhead() readAhead {
	b := make([]byte, smallBuffer)
	return readAhead{buf: b, small: b}
}

// grow moves what is unread to a large buffer.
func (ra *readAhead) grow() {
	ra.large = largeBuffers.Get().(*[largeBuffer]byte)
	ra.w = copy(ra.large[:], ra.buf[ra.r:ra.w])
	ra.r, ra.buf = 0, ra.large[:]
}

// shrink gives a large buffer back; nothing is unread.
func (ra *readAhead) shrink() {
	if ra.large != nil {
		largeBuffers.Put(ra.large)
		ra.large, ra.buf = nil, ra.small
	}
}

// fill reads once, into dst and, if that gets full, ahead. Everything plugged
// goes out first: this may wait.
func (rc *receiver) fill(dst, ahead []byte) (int, error) {
	inFlight := rc.flush()
	if inFlight >= yieldDepth {
		sys.Yield()
	}
	if inFlight > 0 {
		rc.workedAt = rc.s.ticks.Load()
	}
	n, err := rc.in.ReadAhead(dst, ahead)
	if n > 0 {
		rc.s.rx.Add(1)
		return n, nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return 0, err
}

// need makes n bytes available in buf[r:]; n is at most
// largeBuffer.
func (rc *receiver) need(n int) error {
	if rc.w-rc.r >= n {
		return nil
	}
	switch {
	case n > len(rc.buf):
		rc.grow()
	case rc.r == rc.w:
		rc.r, rc.w = 0, 0
		if rc.large != nil && rc.s.ticks.Load()-rc.workedAt > largeTicks {
			rc.shrink()
		}
	case rc.r > 0 && len(rc.buf)-rc.r < max(n, min(8<<10, len(rc.buf))):
		copy(rc.buf, rc.buf[rc.r:rc.w])
		rc.w -= rc.r
		rc.r = 0
	}
	for rc.w-rc.r < n {
		k, err := rc.fill(rc.room(n-(rc.w-rc.r)), nil)
		if err != nil {
			return err
		}
		rc.filled(k)
	}
	return nil
}

// room is where to read ahead, at least n bytes.
func (rc *receiver) room(n int) []byte {
	b := rc.buf[rc.w:]
	if rc.bulk {
		b = b[:min(len(b), max(n, bulkAhead))]
	}
	return b
}

// filled books n bytes that were read into room.
func (rc *receiver) filled(n int) {
	if rc.w += n; rc.w == len(rc.buf) && rc.large == nil && !rc.bulk { // and more to come
		rc.grow()
	}
}

// readInto fills dst: what is buffered first, the rest straight from the socket,
// with what follows it. The digest of dst is computed as its bytes come, while
// the cache holds them.
func (rc *receiver) readInto(dst []byte) (sum uint32, err error) {
	rc.bulk = len(dst) >= bulk
	n := copy(dst, rc.buf[rc.r:rc.w])
	rc.r += n
	sum = rc.sum(0, dst[:n])
	for n < len(dst) {
		rc.r, rc.w = 0, 0
		rest := dst[n:]
		k, err := rc.fill(rest, rc.room(0))
		if err != nil {
			return 0, err
		}
		if k > len(rest) {
			rc.filled(k - len(rest))
			k = len(rest)
		}
		sum = rc.sum(sum, rest[:k])
		n += k
	}
	return sum, nil
}

// plainReader reads a connection without a file descriptor.
type plainReader struct{ net.Conn }

func (r plainReader) ReadAhead(b, _ []byte) (int, error) { return r.Read(b) }
