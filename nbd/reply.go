package nbd

import (
	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/nbd/proto"
)

// errno maps error kinds to what NBD clients know (proto.md, "Error values").
func errno(err error) proto.Errno {
	switch err {
	case nil:
		return proto.OK
	case block.ErrNoSpace:
		return proto.ENOSPC
	case block.ErrReadOnly, block.ErrReservation:
		return proto.EPERM
	case block.ErrInvalid, block.ErrOutOfRange:
		return proto.EINVAL
	case block.ErrNotSup:
		return proto.ENOTSUP
	case block.ErrShutdown:
		return proto.ESHUTDOWN
	}
	return proto.EIO
}

// Complete takes a finished request back and lists its reply.
func (cn *conn) Complete(r *block.Request, p *block.Plug) {
	if changes(r.Op) {
		cn.x.align.leave(span{r.Off, r.Off + r.Len}, cn.slots[r.Tag].tracked)
	}
	cn.answer(uint16(r.Tag), errno(r.Err), p)
}

func (cn *conn) answer(idx uint16, e proto.Errno, p *block.Plug) {
	sl := &cn.slots[idx]
	if e != proto.OK {
		sl.data = false
	}
	n := proto.ReplyLen
	switch {
	case !cn.agreed.structured:
		proto.PutReply(sl.hdr[:], e, sl.cookie)
	case e != proto.OK:
		sl.tail = errorTails[e]
		if sl.tail == nil {
			sl.tail = errorTails[proto.EIO]
		}
		n = cn.chunk(sl, proto.ChunkError, len(sl.tail))
	case sl.data:
		n = cn.chunk(sl, proto.ChunkOffsetData, 8+len(sl.req.Data))
		be.PutUint64(sl.hdr[n:], sl.offset)
		n += 8
	default:
		n = cn.chunk(sl, proto.ChunkNone, 0)
	}
	cn.list(idx, n, p)
}

// chunk writes the header of a slot's only chunk and returns its length.
func (cn *conn) chunk(sl *slot, typ uint16, n int) int {
	if cn.agreed.extended {
		proto.PutExtendedChunk(sl.hdr[:], typ, sl.cookie, sl.offset, n)
		return proto.ExtendedLen
	}
	proto.PutChunk(sl.hdr[:], typ, sl.cookie, n)
	return proto.ChunkLen
}

// errorTails are the bodies of error chunks: number and text.
var errorTails = func() map[proto.Errno][]byte {
	m := map[proto.Errno][]byte{}
	for e, text := range map[proto.Errno]string{
		proto.EPERM: "not permitted: read-only, or reserved by another host", proto.EIO: "input/output error of the unit, or no path is left and the policy says fail",
		proto.ENOMEM: "out of memory", proto.EINVAL: "invalid request: alignment, flags or end of the device", proto.ENOSPC: "no space left: beyond the end, or a thin pool is full",
		proto.EOVERFLOW: "request longer than the maximum payload", proto.ENOTSUP: "not faster than writing zeroes", proto.ESHUTDOWN: "the server is shutting down"} {
		b := be.AppendUint32(nil, uint32(e))
		b = be.AppendUint16(b, uint16(len(text)))
		m[e] = append(b, text...)
	}
	return m
}()

// list queues the reply of a slot whose header is n bytes of hdr.
func (cn *conn) list(idx uint16, n int, p *block.Plug) {
	sl := &cn.slots[idx]
	sl.head = n
	cn.mu.Lock()
	last, dead := cn.ended(sl), cn.dead
	if !dead {
		cn.pend = append(cn.pend, idx)
	}
	cn.mu.Unlock()
	if last {
		cn.x.orphans.ended(cn)
	}
	if dead {
		cn.giveBack(idx)
		return
	}
	p.Add(cn)
}

// ended counts a change that the device holds no more, and tells whether it was
// the last one of an orphan. Caller holds mu.
func (cn *conn) ended(sl *slot) (last bool) {
	if !sl.begun {
		return false
	}
	cn.changing--
	return cn.changing == 0 && cn.orphan
}

// giveBack frees a slot and its buffer without a reply.
func (cn *conn) giveBack(idx uint16) {
	sl := &cn.slots[idx]
	if b := sl.req.Data; b != nil {
		sl.req.Data = nil
		cn.release(b)
	}
	cn.mu.Lock()
	cn.free = append(cn.free, idx)
	cn.mu.Unlock()
	cn.room.Broadcast()
}

// Kick sends the listed replies without waiting: one sender at a time, and the
// parked writer goroutine takes over when the socket is full.
func (cn *conn) Kick() {
	cn.mu.Lock()
	if cn.sending || len(cn.pend) == 0 {
		cn.mu.Unlock()
		return
	}
	cn.sending = true
	cn.cur, cn.pend = cn.pend, cn.cur[:0]
	cn.mu.Unlock()
	if !cn.send(false) {
		cn.takeOver <- struct{}{} // buffered, and only the one sender sends
	}
}

// send writes until nothing is listed. False: the socket is full, the caller
// is still the sender.
func (cn *conn) send(park bool) bool {
	for {
		for len(cn.cur) > 0 {
			cn.gather()
			n, err := cn.vec.Write(cn.iov, park)
			clear(cn.iov)
			if err == sys.ErrWouldBlock {
				return false
			}
			cn.account(n, err != nil)
		}
		cn.mu.Lock()
		if len(cn.pend) == 0 {
			cn.sending = false
			cn.mu.Unlock()
			cn.room.Broadcast()
			return true
		}
		cn.cur, cn.pend = cn.pend, cn.cur[:0]
		cn.mu.Unlock()
	}
}

func (sl *slot) size() int {
	n := sl.head + len(sl.tail)
	if sl.data {
		n += len(sl.req.Data)
	}
	return n
}

func (cn *conn) gather() {
	iov := cn.iov[:0]
	for _, idx := range cn.cur {
		if len(iov)+3 > iovecs {
			break
		}
		sl := &cn.slots[idx]
		at := sl.sent
		if at < sl.head {
			iov = append(iov, sl.hdr[at:sl.head])
			at = sl.head
		}
		at -= sl.head
		if sl.data {
			if at < len(sl.req.Data) {
				iov = append(iov, sl.req.Data[at:])
				at = len(sl.req.Data)
			}
			at -= len(sl.req.Data)
		}
		if at < len(sl.tail) {
			iov = append(iov, sl.tail[at:])
		}
	}
	cn.iov = iov
}

// account books n more bytes of cur as sent; finished slots and buffers go
// back. After a write error the client is gone and all replies are dropped.
func (cn *conn) account(n int, failed bool) {
	if failed {
		cn.mu.Lock()
		cn.dead = true
		cn.cur = append(cn.cur, cn.pend...) // one sender: nobody else looks at cur
		cn.pend = cn.pend[:0]
		cn.mu.Unlock()
		cn.c.Close()
	}
	cn.moved.Add(int64(n))
	done, released := 0, false
	for _, idx := range cn.cur {
		sl := &cn.slots[idx]
		step := min(n, sl.size()-sl.sent)
		sl.sent += step
		n -= step
		if sl.sent < sl.size() && !failed {
			break
		}
		if b := sl.req.Data; b != nil {
			sl.req.Data = nil
			sl.data = false
			cn.release(b)
			released = true
		}
		done++
	}
	cn.mu.Lock()
	wake := len(cn.free) == 0 || cn.dead || released && cn.starved
	cn.free = append(cn.free, cn.cur[:done]...)
	cn.mu.Unlock()
	cn.cur = cn.cur[:copy(cn.cur, cn.cur[done:])]
	if wake {
		cn.room.Broadcast()
	}
}

// routineReply is the parked writer.
func (cn *conn) routineReply(stop <-chan struct{}) {
	for {
		select {
		case <-cn.takeOver:
			cn.awaits.Add(1)
			cn.send(true)
			cn.awaits.Add(-1)
		case <-stop:
			return
		}
	}
}
