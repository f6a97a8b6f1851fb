package paths

import (
	"context"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// unflushed tells whether the unit may hold acknowledged writes of this path in
// its cache.
func (p *Path) unflushed() bool { return p.dirty.Load() || p.flushing.Load() > 0 }

// flushed ends a flush that was issued on the path.
func (p *Path) flushed(a *attempt, ok bool) {
	if !a.wasDirty {
		return
	}
	if !ok {
		p.soil(a.wasSince)
	}
	p.flushing.Add(-1)
}

// soil notes that the server holds writes that were submitted at since or later.
func (p *Path) soil(since int64) {
	for {
		old := p.since.Load()
		if p.dirty.Load() && old <= since || p.since.CompareAndSwap(old, since) {
			p.dirty.Store(true)
			return
		}
	}
}

// passDirt makes a live path to the same target answer for what this dead one
// left in the target's cache: not one whose unit said that it lost its power
// after those writes were submitted, because a flush through it would succeed
// whatever became of them.
func (p *Path) passDirt() {
	if !p.dirty.Load() {
		return
	}
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	for _, q := range p.g.table.Load().all {
		if q != p && p.shares(q) && (q.powered.Load() < p.since.Load() || p.g.ledger.omit&RuleLoss != 0) {
			q.soil(p.since.Load())
			p.dirty.Store(false)
			return
		}
	}
}

// shares tells whether a flush through q reaches what was written through p.
// Caller holds Group.mu.
func (p *Path) shares(q *Path) bool {
	tried, ok := p.via[q]
	return p.Target == q.Target && (tried || !ok) || p.g.cfg().Replicated
}

// flushFence flushes the cache of the server whose old session s has ended, if
// what that session wrote may be there and nowhere else. Failing that, its path
// counts as dirty (closeEpoch).
func (g *Group) flushFence(ctx context.Context, s Session, e *epoch, lun [8]byte) {
	if !g.lu().WriteCache || !e.caches && !e.whole {
		return
	}
	for _, use16 := range []bool{g.lu().Use16, g.lu().Use16, false} { // the reset may have left a unit attention
		c := &initiator.Command{LUN: lun}
		scsi.SyncCache(&c.CDB, 0, 0, use16)
		if err := s.Do(ctx, c); err == nil && c.Result.Status == scsi.StatusGood {
			e.flushed.Store(true)
			return
		}
	}
}

// leftDirty lets flushes go to the path of an old session whose server was not
// flushed since.
func (g *Group) leftDirty(e *epoch) {
	for _, p := range *g.everyPath.Load() {
		if p.Name != e.name {
			continue
		}
		p.soil(now())
		if p.current.Load() == nil {
			p.passDirt()
		}
	}
}

// learnCache takes over what a path's server says of its cache. One that has a
// volatile cache makes flushes necessary, one that does not know FUA makes FUA
// useless, whatever the others say.
func (g *Group) learnCache(info *initiator.LUInfo) {
	g.resizing.Lock()
	l := *g.lu()
	if cache, fua := l.WriteCache || info.WriteCache, l.DPOFUA && info.DPOFUA; cache != l.WriteCache || fua != l.DPOFUA {
		l.WriteCache, l.DPOFUA = cache, fua
		g.info.Store(&l)
		g.log.Warn("a path's server says otherwise of its cache than those before it: the more careful way holds for all", "write_cache", cache, "fua", fua)
	}
	g.resizing.Unlock()
	g.mu.Lock()
	g.decideThrough()
	g.mu.Unlock()
}

// separateCaches tells whether servers have caches that a flush through another
// server does not reach. Caller holds mu.
func (g *Group) separateCaches() bool {
	return g.servers() > 1 && g.lu().WriteCache && !g.cfg().Replicated
}

// decideThrough sends writes with FUA where servers have caches that a flush
// through another server cannot reach. Caller holds mu.
func (g *Group) decideThrough() {
	through := g.separateCaches() && g.lu().DPOFUA
	if g.through.Swap(through) != through && through {
		g.log.Info("the servers have caches of their own: writes are sent with FUA", "unless", "--replicated")
	}
}

// servers counts the target names of the paths. Caller holds mu.
func (g *Group) servers() int {
	names := map[string]bool{}
	for _, p := range g.paths {
		names[p.Target] = true
	}
	return len(names)
}
