package nbd

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/nbd/proto"
)

// aligner serves requests that are no whole blocks (nbd proto.md, "Block size
// constraints": a client that did not ask for them may send such) by reading a
// block, changing it and writing it back. No other mutation of that block may
// come in between, from any connection of the export.
//
// Until the first such request all that this costs a mutation is a counter.
type aligner struct {
	armed     atomic.Bool  // an unaligned mutation came: all are tracked from now on
	untracked atomic.Int64 // mutations in flight that are not in ranges

	mu     sync.Mutex
	change *sync.Cond
	ranges []span  // tracked mutations in flight
	locked []int64 // offsets of the blocks that are being changed
}

// span is a run of bytes.
type span struct{ off, end int64 }

func newAligner() *aligner {
	a := &aligner{}
	a.change = sync.NewCond(&a.mu)
	return a
}

// enter admits a mutation of whole blocks. It may wait, after flush. It reports
// whether the mutation is tracked, which leave must be told.
func (a *aligner) enter(s span, blockSize int64, flush func()) (tracked bool) {
	a.untracked.Add(1)
	if !a.armed.Load() {
		return false
	}
	a.leave(s, false)
	overlaps := func(off int64) bool { return off < s.end && off+blockSize > s.off }
	a.mu.Lock()
	if slices.ContainsFunc(a.locked, overlaps) {
		a.mu.Unlock()
		flush() // what waits in the caller's plug may be what the block waits for
		a.mu.Lock()
		for slices.ContainsFunc(a.locked, overlaps) {
			a.change.Wait()
		}
	}
	a.ranges = append(a.ranges, s)
	a.mu.Unlock()
	return true
}

// leave ends what enter admitted. It never waits for I/O.
func (a *aligner) leave(s span, tracked bool) {
	if !tracked {
		if a.untracked.Add(-1) == 0 && a.armed.Load() {
			a.mu.Lock()
			a.change.Broadcast()
			a.mu.Unlock()
		}
		return
	}
	a.mu.Lock()
	if i := slices.Index(a.ranges, s); i >= 0 {
		a.ranges = slices.Delete(a.ranges, i, i+1)
	}
	a.change.Broadcast()
	a.mu.Unlock()
}

// lock waits until nothing else changes the block at off and keeps it so.
func (a *aligner) lock(off, blockSize int64) {
	a.armed.Store(true)
	a.mu.Lock()
	defer a.mu.Unlock()
	for slices.Contains(a.locked, off) {
		a.change.Wait()
	}
	a.locked = append(a.locked, off)
	for a.untracked.Load() > 0 || slices.ContainsFunc(a.ranges, func(s span) bool { return off < s.end && off+blockSize > s.off }) {
		a.change.Wait()
	}
}

func (a *aligner) unlock(off int64) {
	a.mu.Lock()
	a.locked = slices.DeleteFunc(a.locked, func(o int64) bool { return o == off })
	a.change.Broadcast()
	a.mu.Unlock()
}

// onDevice runs one request and waits for its end.
func (x *export) onDevice(op block.Op, flags block.Flags, off int64, n int, data []byte) error {
	w := make(ended, 1)
	var p block.Plug
	r := &block.Request{Op: op, Flags: flags, Off: off, Len: int64(n), Data: data, Owner: w}
	x.Device.Submit(r, &p)
	p.Flush()
	<-w
	return r.Err
}

type ended chan struct{}

func (e ended) Complete(*block.Request, *block.Plug) { e <- struct{}{} }

// unaligned serves the READ, WRITE or WRITE_ZEROES of a slot piece by piece: a
// part of a block, whole blocks, a part of a block. It runs in a goroutine of
// its own; the slot bounds how many there are.
func (cn *conn) unaligned(idx uint16, bs int64) {
	sl := &cn.slots[idx]
	x, op, flags, data := cn.x, sl.req.Op, sl.req.Flags, sl.req.Data
	var one []byte
	var err error
	for off, end := sl.req.Off, sl.req.Off+sl.req.Len; off < end && err == nil; {
		start := off / bs * bs
		n := min(start+bs, end) - off
		var piece []byte
		if whole := (end - off) / bs * bs; off == start && whole > 0 {
			n = whole
			if data != nil {
				piece, data = data[:n], data[n:]
			}
			if op == block.Read {
				err = x.onDevice(op, flags, off, int(n), piece)
			} else {
				s := span{off, off + n}
				tracked := x.align.enter(s, bs, func() {})
				err = x.onDevice(op, flags, off, int(n), piece)
				x.align.leave(s, tracked)
			}
			off += n
			continue
		}
		if one == nil {
			one = make([]byte, bs)
		}
		if op != block.Read {
			x.align.lock(start, bs)
		}
		err = x.onDevice(block.Read, 0, start, int(bs), one)
		part := one[off-start:][:n]
		if data != nil {
			piece, data = data[:n], data[n:]
		}
		switch {
		case err != nil:
		case op == block.Read:
			copy(piece, part)
		case op == block.Write:
			copy(part, piece)
		default:
			clear(part)
		}
		if op != block.Read {
			if err == nil {
				err = x.onDevice(block.Write, flags&block.FUA, start, int(bs), one)
			}
			x.align.unlock(start)
		}
		off += n
	}
	var p block.Plug
	cn.answer(idx, errno(err), &p)
	p.Flush()
}

// changes tells whether an operation alters the disk.
func changes(op block.Op) bool { return op != block.Read && op != block.Flush }

// isUnaligned tells whether a request needs unaligned.
func isUnaligned(rq proto.Request, bs int64) bool {
	switch rq.Type {
	case proto.CmdRead, proto.CmdWrite, proto.CmdWriteZeroes:
		return (rq.Offset|rq.Length)&uint64(bs-1) != 0
	}
	return false
}
