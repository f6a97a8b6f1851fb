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
	cn.answer(uint16(r.Tag), errno(r.Err), p)
}

func (cn *conn) answer(idx uint16, e proto.Errno, p *block.Plug) {
	sl := &cn.slots[idx]
	if e != proto.OK {
		sl.data = false
	}
	proto.PutReply(sl.hdr[:], e, sl.cookie)
	cn.mu.Lock()
	if cn.dead {
		cn.mu.Unlock()
		cn.drop(idx)
		return
	}
	cn.pend = append(cn.pend, idx)
	cn.mu.Unlock()
	p.Add(cn)
}

// drop gives a slot and its buffer back without a reply.
func (cn *conn) drop(idx uint16) {
	sl := &cn.slots[idx]
	if b := sl.req.Data; b != nil {
		sl.req.Data = nil
		cn.s.arena.Put(b)
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
	if sl.data {
		return proto.ReplyLen + len(sl.req.Data)
	}
	return proto.ReplyLen
}

func (cn *conn) gather() {
	iov := cn.iov[:0]
	for _, idx := range cn.cur {
		if len(iov)+2 > iovecs {
			break
		}
		sl := &cn.slots[idx]
		at := sl.sent
		if at < proto.ReplyLen {
			iov = append(iov, sl.hdr[at:])
			at = proto.ReplyLen
		}
		if sl.data {
			iov = append(iov, sl.req.Data[at-proto.ReplyLen:])
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
	done := 0
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
			cn.s.arena.Put(b)
		}
		done++
	}
	cn.mu.Lock()
	wake := len(cn.free) == 0 || cn.dead
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
			cn.send(true)
		case <-stop:
			return
		}
	}
}
