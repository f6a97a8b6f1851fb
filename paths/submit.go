package paths

import (
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// Bits of Route.State.
const (
	stateSynced uint32 = 1 << 31 // a write with FUA: the write is done, the flush is due
	// For Flush the low bits are the paths that were asked.
)

var started = time.Now()

func now() int64 { return int64(time.Since(started)) }

// Submit takes a request (block.Device). A request has one command in flight
// at a time; larger ones go in steps.
func (g *Group) Submit(r *block.Request, p *block.Plug) {
	r.Err = nil
	r.Route = block.Route{Start: now()}
	if g.waiting.Load() == 0 && g.start(r, nil, p) {
		return
	}
	g.enqueue(r)
	g.drain(p)
}

// start issues the request's next command on the path that the selector picks,
// not on avoid if there is another. False: no path took it.
func (g *Group) start(r *block.Request, avoid *Path, p *block.Plug) bool {
	if r.Op == block.Trim && (g.noUnmap.Load() || !g.lu().Unmap) || r.Op == block.Flush && !g.lu().WriteCache {
		g.finish(r, nil, p)
		return true
	}
	if r.Flags&block.FastZero != 0 && r.Op == block.WriteZeroes && (g.noSame.Load() || !g.lu().Unmap || !g.lu().Zeroes || r.Flags&block.NoUnmap != 0) {
		g.finish(r, block.ErrNotSup, p)
		return true
	}
	t := g.table.Load()
	if r.Op == block.Flush || r.Route.State&stateSynced != 0 {
		return g.startFlush(r, t, p)
	}
	if len(t.paths) == 0 {
		return false
	}
	size := min(r.Len-r.Route.Pos, g.maxIO)
	if avoid != nil {
		for _, pt := range t.all {
			if pt != avoid && g.issue(r, pt, size, p) {
				return true
			}
		}
	}
	first := 0
	if len(t.paths) > 1 {
		first = t.selector.Pick(t.loads, int(size))
	}
	for i := range t.paths {
		if g.issue(r, t.paths[(first+i)%len(t.paths)], size, p) {
			return true
		}
	}
	return false
}

// startFlush sends SYNCHRONIZE CACHE to each serving path that took writes
// since its last one, in turn: behind different target names there may be
// different caches. What a dead path may hold is flushed through a path to the
// same target; if there is none, the flush is parked until the path is back.
func (g *Group) startFlush(r *block.Request, t *table, p *block.Plug) bool {
	for _, pt := range t.all {
		bit := uint32(1) << pt.index
		if r.Route.State&bit == 0 && pt.dirty.Load() {
			if !g.issue(r, pt, 0, p) {
				return false
			}
			return true
		}
	}
	if len(t.all) == 0 {
		return false
	}
	for _, pt := range *g.everyPath.Load() {
		if pt.dirty.Load() && pt.current.Load() == nil {
			return g.park(r, p)
		}
	}
	if r.Route.State&^stateSynced != 0 { // all that were dirty are clean
		r.Owner.Complete(r, p)
		return true
	}
	for _, pt := range t.paths {
		if g.issue(r, pt, 0, p) {
			return true
		}
	}
	return false
}

// issue builds the command for r's next size bytes and submits it on pt.
func (g *Group) issue(r *block.Request, pt *Path, size int64, p *block.Plug) bool {
	a, s := pt.take()
	if a == nil {
		return false
	}
	c := &a.cmd
	c.LUN = pt.LUN
	c.Dir, c.Data = initiator.NoData, nil
	// GOOD is the word on UNMAP and WRITE SAME: tgt 1.0.85 answers UNMAP with a
	// residual as long as its parameter list.
	a.dirties = r.Op != block.Read && r.Op != block.Flush && g.lu().WriteCache
	if g.through.Load() && r.Op != block.WriteZeroes { // nothing stays in a cache: a trim need not last
		a.dirties = false
	}
	c.ShortOK = r.Op == block.Trim || r.Op == block.WriteZeroes && !g.noSame.Load()
	bs := int64(g.lu().BlockSize)
	lba := uint64((r.Off + r.Route.Pos) / bs)
	use16 := g.lu().Use16
	a.unsupported = nil
	flush := r.Op == block.Flush || r.Route.State&stateSynced != 0
	switch {
	case flush:
		r.Route.State |= 1 << pt.index
		a.wasDirty = pt.dirty.Swap(false)
		scsi.SyncCache(&c.CDB, 0, 0, use16 && !pt.sync10.Load())
	case r.Op == block.Read:
		c.Dir, c.Data = initiator.DataIn, r.Data[r.Route.Pos:r.Route.Pos+size]
		scsi.Read(&c.CDB, lba, uint32(size/bs), use16)
	case r.Op == block.Write:
		c.Dir, c.Data = initiator.DataOut, r.Data[r.Route.Pos:r.Route.Pos+size]
		scsi.Write(&c.CDB, lba, uint32(size/bs), (r.Flags&block.FUA != 0 || g.through.Load()) && g.lu().DPOFUA, use16)
	case r.Op == block.Trim:
		size = min(r.Len-r.Route.Pos, 1<<30)
		if g.lu().MaxUnmap > 0 {
			size = min(size, int64(g.lu().MaxUnmap)*bs)
		}
		scsi.Unmap(&c.CDB, a.list[:], lba, uint32(size/bs))
		c.Dir, c.Data = initiator.DataOut, a.list[:]
		a.unsupported = &g.noUnmap
	case !g.noSame.Load():
		size = min(r.Len-r.Route.Pos, 32<<20)
		if g.lu().MaxWriteSame > 0 {
			size = min(size, int64(g.lu().MaxWriteSame)*bs)
		}
		scsi.WriteSame16(&c.CDB, lba, uint32(size/bs), r.Flags&block.NoUnmap == 0 && g.lu().Unmap && g.lu().Zeroes)
		c.Dir, c.Data = initiator.DataOut, g.zeroes[:bs]
		a.unsupported = &g.noSame
		if g.through.Load() { // WRITE SAME knows no FUA
			r.Flags |= block.FUA
		}
	default:
		size = min(r.Len-r.Route.Pos, int64(len(g.zeroes)))
		c.Dir, c.Data = initiator.DataOut, g.zeroes[:size]
		a.dirties = a.dirties && !g.through.Load()
		scsi.Write(&c.CDB, lba, uint32(size/bs), (r.Flags&block.FUA != 0 || g.through.Load()) && g.lu().DPOFUA, use16)
	}
	a.size = size
	if !flush && r.Op != block.Read && g.cfg().Protection != Off {
		blocks := uint64(size / bs)
		a.span.Store(span(lba, lba+blocks))
		if g.ledger.open.Load() > 0 && g.hold(r, a, lba, lba+blocks) {
			a.span.Store(0)
			c.Data = nil
			pt.give(a)
			return true
		}
	}
	a.req, a.start = r, now()
	pt.load.InFlight.Add(1)
	pt.load.Bytes.Add(size)
	if s.Submit(c, p) {
		return true
	}
	pt.load.InFlight.Add(-1)
	pt.load.Bytes.Add(-size)
	if a.span.Load() != 0 {
		a.span.Store(0)
	}
	if flush {
		r.Route.State &^= 1 << pt.index
		if a.wasDirty {
			pt.dirty.Store(true)
		}
	}
	pt.give(a)
	return false
}
