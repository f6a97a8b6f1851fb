package paths

import (
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// zeroes is the source of written zeroes for all groups, never modified.
var zeroes [256 << 10]byte

// Bits of Route.State.
const (
	stateSynced  uint32 = 1 << 31 // a write with FUA: the write is done, the flush is due
	stateRewrite uint32 = 1 << 30 // writes the shadow back: never held
	stateHedged  uint32 = 1 << 29 // a read that was issued twice: not again
	// For Flush the low bits are the paths that were asked.
)

var started = time.Now()

func now() int64 { return int64(time.Since(started)) }

// Submit takes a request (block.Device). A request has one command in flight
// at a time; larger ones go in steps.
func (g *Group) Submit(r *block.Request, p *block.Plug) {
	r.Err = nil
	r.Route = block.Route{Start: now()}
	g.requests.taken[r.Op].Add(1)
	if g.waiting.Load() == 0 && g.start(r, nil, p) {
		return
	}
	g.enqueue(r)
	g.drain(p)
}

// start issues the request's next command on the path that the selector picks,
// not on avoid if there is another. False: no path took it.
func (g *Group) start(r *block.Request, avoid *Path, p *block.Plug) bool {
	switch {
	case r.Op == block.Trim && r.Route.State&stateSynced == 0 && (g.noUnmap.Load() || !g.lu().Unmap || !alignTrim(g.lu(), r)):
		g.moved(r, p)
		return true
	case r.Op == block.Flush && !g.lu().WriteCache:
		g.endFlush(r, p)
		return true
	}
	if r.Flags&block.FastZero != 0 && r.Op == block.WriteZeroes && (g.noSame.Load() || !g.lu().UnmapSame || !g.lu().Zeroes || r.Flags&block.NoUnmap != 0) {
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
	size := min(r.Len-r.Route.Pos, g.maxIO.Load())
	if r.Op == block.Read && g.ledger.shadow.used.Load() > 0 && g.ledger.omit&RuleShadowRead == 0 {
		if size = g.ledger.readShadow(r, size, int64(g.lu().BlockSize)); size == 0 {
			g.finish(r, nil, p)
			return true
		}
	}
	if avoid != nil {
		for _, pt := range t.able {
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

// startFlush sends SYNCHRONIZE CACHE to each path that took writes since its
// last one, in turn: behind different target names there may be different
// caches. A path counts whether I/O would go there or not: one that is suspect
// or that its checker took out holds writes as any other. What a dead path may
// hold is flushed through a path to the same target; if there is none, the
// flush is parked until the path is back.
func (g *Group) startFlush(r *block.Request, t *table, p *block.Plug) bool {
	if len(t.all) == 0 {
		return false
	}
	absent := g.ledger.unflushable()
	for _, pt := range *g.everyPath.Load() {
		if r.Route.State&(1<<pt.index) != 0 || !pt.unflushed() || g.ledger.omit&RuleFlushAll != 0 {
			continue
		}
		switch {
		case g.issue(r, pt, 0, p):
			return true
		case pt.current.Load() != nil || pt.doubted.Load():
			return false // no room just now, or about to prove itself
		}
		absent = true
	}
	if absent {
		return g.park(r, p)
	}
	if r.Route.State&^(stateSynced|stateRewrite) != 0 { // all that were dirty are clean
		if r.Route.State&stateSynced != 0 && g.losses.Load() != r.Route.Losses {
			// A server that lost its power between the write and the flush had
			// nothing left to flush: write again.
			r.Route.State &= stateRewrite
			r.Route.Pos = 0
			r.Route.Tries++
			return g.start(r, nil, p)
		}
		g.endFlush(r, p)
		return true
	}
	for _, pt := range t.paths {
		if g.issue(r, pt, 0, p) {
			return true
		}
	}
	return false
}

// endFlush ends a flush, or a mutation with FUA, whose caches are clean. A write
// that was acknowledged and is lost since must be told: a flush fails.
func (g *Group) endFlush(r *block.Request, p *block.Plug) {
	if r.Op == block.Flush && g.loss.is.Load() && r.Route.State&stateRewrite == 0 {
		g.told(r)
		g.finish(r, block.ErrIO, p)
		return
	}
	g.finish(r, nil, p)
}

// issue builds the command for r's next size bytes and submits it on pt.
func (g *Group) issue(r *block.Request, pt *Path, size int64, p *block.Plug) bool {
	flush := r.Op == block.Flush || r.Route.State&stateSynced != 0
	a, s := pt.take(flush)
	if a == nil {
		return false
	}
	c := &a.cmd
	c.LUN = pt.LUN
	c.Dir, c.Data = initiator.NoData, nil
	// One look for all: a server that does not know FUA may just turn up.
	l := g.lu()
	through := g.through.Load() && l.DPOFUA
	fua := (r.Flags&block.FUA != 0 || through) && l.DPOFUA
	// GOOD is the word on UNMAP and WRITE SAME: tgt 1.0.85 answers UNMAP with a
	// residual as long as its parameter list.
	a.dirties = r.Op != block.Read && r.Op != block.Flush && l.WriteCache
	if through && r.Op != block.WriteZeroes { // nothing stays in a cache: a trim need not last
		a.dirties = false
	}
	c.ShortOK = r.Op == block.Trim || r.Op == block.WriteZeroes && !g.noSame.Load()
	bs := int64(l.BlockSize)
	lba := uint64((r.Off + r.Route.Pos) / bs)
	use16 := l.Use16 && !pt.use10.Load()
	a.unsupported = nil
	switch {
	case flush:
		r.Route.State |= 1 << pt.index
		pt.flushing.Add(1) // before: another flush must not find the path clean
		a.wasSince = pt.since.Load()
		if a.wasDirty = pt.dirty.Swap(false); !a.wasDirty {
			pt.flushing.Add(-1)
		}
		scsi.SyncCache(&c.CDB, 0, 0, use16 && !pt.sync10.Load())
	case r.Op == block.Read:
		c.Dir, c.Data = initiator.DataIn, r.Data[r.Route.Pos:r.Route.Pos+size]
		scsi.Read(&c.CDB, lba, uint32(size/bs), use16)
	case r.Op == block.Write:
		c.Dir, c.Data = initiator.DataOut, r.Data[r.Route.Pos:r.Route.Pos+size]
		scsi.Write(&c.CDB, lba, uint32(size/bs), fua, use16)
	case r.Op == block.Trim:
		size = trimStep(l, r)
		scsi.Unmap(&c.CDB, a.list[:], lba, uint32(size/bs))
		c.Dir, c.Data = initiator.DataOut, a.list[:]
		a.unsupported = &g.noUnmap
	case !g.noSame.Load():
		size = min(r.Len-r.Route.Pos, 32<<20)
		if l.MaxWriteSame > 0 {
			size = min(size, int64(l.MaxWriteSame)*bs)
		}
		scsi.WriteSame16(&c.CDB, lba, uint32(size/bs), r.Flags&block.NoUnmap == 0 && l.UnmapSame && l.Zeroes)
		c.Dir, c.Data = initiator.DataOut, zeroes[:bs:bs]
		a.unsupported = &g.noSame
		if through { // WRITE SAME knows no FUA
			r.Flags |= block.FUA
		}
	default:
		size = min(r.Len-r.Route.Pos, int64(len(zeroes)), g.maxIO.Load()) &^ (bs - 1)
		c.Dir, c.Data = initiator.DataOut, zeroes[:size:size]
		a.dirties = a.dirties && !through
		scsi.Write(&c.CDB, lba, uint32(size/bs), fua, use16)
	}
	a.size = size
	if r.Flags&block.FUA != 0 && !flush && r.Route.Pos == 0 { // it may have become one with FUA just now
		r.Route.Losses = g.losses.Load()
	}
	if !flush && r.Op != block.Read {
		blocks := uint64(size / bs)
		a.span.Store(span(lba, lba+blocks))
		if g.ledger.open.Load() > 0 {
			if held, err := g.hold(r, a, lba, lba+blocks); held || err != nil {
				a.span.Store(0)
				c.Data = nil
				pt.give(a, false)
				if err != nil {
					g.finish(r, err, p)
				}
				return true
			}
		}
	}
	a.req, a.start = r, now()
	if r.Op == block.Read && size == r.Len && r.Arena != nil && g.cfg().HedgeReads > 0 && r.Route.State&stateHedged == 0 {
		a.open.Store(a.start | 1) // neither 0 nor captured
	}
	pt.load.InFlight.Add(1)
	pt.load.Bytes.Add(size)
	if s.Submit(c, p) {
		return true
	}
	pt.load.InFlight.Add(-1)
	pt.load.Bytes.Add(-size)
	if a.unopened(p) {
		return true
	}
	if a.span.Load() != 0 {
		a.span.Store(0)
	}
	if flush {
		r.Route.State &^= 1 << pt.index
		pt.flushed(a, false)
	}
	pt.give(a, false)
	return false
}
