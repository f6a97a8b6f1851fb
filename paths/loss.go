package paths

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// loss is whether acknowledged writes are lost: by a deferred error (SPC-4
// 4.5.7), or in a volatile cache when its server lost its power. Flushes fail
// from then on until lossTold after one that was submitted since: the answer to
// a single one may get lost with its connection or with this process, and the
// client would send it again and be told that all is well.
type loss struct {
	is    atomic.Bool
	since atomic.Int64 // when it was learned
	mu    sync.Mutex
	over  *time.Timer // set when a flush failed that was submitted since
	save  sync.Mutex  // held while Config.OnLoss is told
	saved bool        // guarded by save
}

const lossTold = 30 * time.Second

func (l *loss) lose(at int64, omit Rule) {
	if omit&RuleLoss != 0 {
		return
	}
	l.mu.Lock()
	l.since.Store(at)
	l.is.Store(true)
	if l.over != nil {
		l.over.Stop()
		l.over = nil
	}
	l.mu.Unlock()
}

// told notes that flush r fails for what is lost.
func (g *Group) told(r *block.Request) {
	l := &g.loss
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over == nil && r.Route.Start >= l.since.Load() {
		l.over = time.AfterFunc(lossTold, g.settleLoss)
	}
}

// settleLoss ends a loss that was told; one that was not is for the next run.
func (g *Group) settleLoss() {
	l := &g.loss
	l.mu.Lock()
	if l.over != nil {
		l.over.Stop()
		l.over = nil
		l.is.Store(false)
	}
	l.mu.Unlock()
	g.saveLoss()
}

// saveLoss has it remembered, in case that the process ends before a flush
// failed, whether there is a loss to tell.
func (g *Group) saveLoss() {
	g.loss.save.Lock()
	defer g.loss.save.Unlock()
	if is := g.loss.is.Load(); is != g.loss.saved {
		g.loss.saved = is
		if g.cfg().OnLoss != nil {
			g.cfg().OnLoss(is)
		}
	}
}

// background runs f beside the data path, unless the group is closing: then it
// runs here.
func (g *Group) background(f func()) {
	g.mu.Lock()
	closed := g.closed
	if !closed {
		g.routines.Add(1)
	}
	g.mu.Unlock()
	if closed {
		f()
		return
	}
	go func() { defer g.routines.Done(); f() }()
}

// poweredOn tells whether a unit attention says that power was lost: POWER ON
// OCCURRED (SPC-4 table 56). 29/00 says that too, but also that the unit was
// reset, and some targets say it at every login.
func poweredOn(s scsi.Sense) bool {
	return s.Valid && s.Key == scsi.KeyUnitAttention && s.ASC == 0x29 && s.ASCQ == 0x01
}

// hear listens on a session of a path's nexus that does not serve (yet), for
// the one thing that counts there too: the unit says only once that it lost its power.
func hear(s Session, lun [8]byte, f func()) {
	if n, ok := s.(noticer); ok {
		n.OnNotice(func(n initiator.Notice) {
			if n.LUN == lun && poweredOn(n.Sense) {
				f()
			}
		})
	}
}

// hearFence listens on a fence session of e: it is of the dead path's nexus, and
// what the unit tells it the path will not hear.
func (g *Group) hearFence(s Session, e *epoch, lun [8]byte) {
	for _, p := range *g.everyPath.Load() {
		if p == e.path || p.Name == e.name {
			hear(s, lun, p.lostPower)
			return
		}
	}
	hear(s, lun, func() { // of the run before, and not configured yet
		if g.lu().WriteCache {
			g.powerLoss(e.name, now())
		}
	})
}

// powerLoss notes that what a server held in its cache is gone, at once: the unit
// does not say it again if this process crashes.
func (g *Group) powerLoss(path string, at int64) {
	g.loss.lose(at, g.ledger.omit)
	g.background(func() {
		g.log.Error("a server lost its power, and acknowledged writes that were not flushed with it: the next flush fails", "path", path, "do", "check the file system or database on the map")
		g.saveLoss()
	})
}

// lostPower: the path's unit says that it lost its power since it last answered
// on this nexus. What it held unflushed of this path is gone, unless another
// server has it too. What it held of other paths they find out themselves: until
// then this path does not answer for them (passDirt). It never waits.
func (p *Path) lostPower() {
	if at := now(); p.loses(at) {
		p.g.powerLoss(p.Name, at)
	}
}

// loses tells whether a loss of power at the path's server loses anything.
func (p *Path) loses(at int64) bool {
	g := p.g
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.saysPower {
		return false
	}
	since, dirty := p.since.Load(), p.unflushed()
	p.powered.Store(at)
	if !dirty || !g.lu().WriteCache {
		return false
	}
	for _, q := range g.table.Load().all {
		if g.cfg().Replicated && q.Target != p.Target && q.powered.Load() < since {
			q.soil(since)
			return false
		}
	}
	return true
}

// retractLoss: the unit says that it lost its power at every login, and so it
// means nothing.
func (p *Path) retractLoss() {
	p.g.mu.Lock()
	before := p.powered.Swap(math.MinInt64)
	p.saysPower = true
	p.g.mu.Unlock()
	l := &p.g.loss
	l.mu.Lock()
	if l.since.Load() == before {
		l.is.Store(false)
	}
	l.mu.Unlock()
	p.g.saveLoss()
}
