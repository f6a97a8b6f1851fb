package paths

import (
	"math"
	"slices"
	"sync"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// A hedge is a read that is late on one path and issued once more on another:
// the first good answer wins. The loser may write into its buffer for as long
// as its session likes, so the second read has a buffer of its own, and what
// the request does not take along stays with the loser.

const (
	captured    = math.MinInt64 // attempt.open: in a duel
	hedgeBurst  = 16            // hedges that may be saved up
	hedgeLeast  = time.Millisecond
	hedgeMost   = 25 * time.Millisecond // between two looks
	hedgeSample = 50                    // I/Os from which lateness is learnt
)

// duel is a read in flight on two paths.
type duel struct {
	mu      sync.Mutex
	r       *block.Request // not touched once settled
	arena   *block.Arena
	spare   []byte // the buffer that is not the request's; goes back with the last attempt
	left    int    // attempts in flight
	settled bool
	last    verdict // of the attempt that failed
}

// verdict is what became of an attempt.
type verdict struct {
	act  Action
	path *Path
}

// leave ends one attempt. True: the request is the caller's, to be completed
// with the data of this attempt, or, where none of the two won, to be concluded
// with d.last.
func (d *duel) leave(won, second bool, v verdict) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.left--
	mine := !d.settled && (won || d.left == 0)
	if !won && v.path != nil {
		d.last = v
	}
	if mine {
		d.settled = true
		if won && second {
			d.r.Data, d.spare = d.spare, d.r.Data
		}
	}
	if d.left == 0 && d.spare != nil {
		d.arena.Put(d.spare)
		d.spare = nil
	}
	return mine
}

// raced takes an attempt back that is part of a duel.
func (a *attempt) raced(c *initiator.Command, p *block.Plug) {
	pt, g, d, second, size := a.path, a.path.g, a.duel, a.second, a.size
	act := pt.judge(c)
	if act.Verb == Done {
		pt.succeeded(a, block.Read)
	} else {
		pt.errors.Add(1)
	}
	won := act.Verb == Done
	mine := d.leave(won, second, verdict{act, pt}) // the hedger is done with a
	a.req, a.duel, c.Data = nil, nil, nil
	a.open.Store(0)
	if act.Verb == FailPath {
		pt.failIO(&c.Result)
	}
	if act.Full {
		pt.full(a.start, c.Result.Status)
	}
	pt.give(a, won)
	if mine {
		switch {
		case won && second:
			g.hedgesWon.Add(1)
			fallthrough
		case won:
			g.advance(d.r, size, false, p)
		default:
			g.concludeHedge(d, p)
		}
	}
	g.releaseBehind(p)
	if g.waiting.Load() > 0 {
		g.drain(p)
	}
}

// concludeHedge goes on with a request whose attempts have all failed.
func (g *Group) concludeHedge(d *duel, p *block.Plug) {
	act, pt := d.last.act, d.last.path
	switch act.Verb {
	case FailUp:
		g.finish(d.r, act.Err, p)
	case RetryHere:
		g.retryHere(d.r, act, pt, p)
	case Unsupported: // comes again, and is dealt with, without a hedge
		g.retry(d.r, Action{}, nil, p)
	default:
		g.retry(d.r, act, pt, p)
	}
}

// hedger looks for late reads. Used by its own goroutine only.
type hedger struct {
	g      *Group
	tokens float64
	ios    int64
	late   time.Duration // 0: not known yet
	usual  time.Duration // what learn found
	seen   map[*Path]*[len(histogram{}.n)]uint32
	learnt time.Time
}

// routineHedge runs while the policy asks for hedges.
func (g *Group) routineHedge() {
	defer g.routines.Done()
	h := hedger{g: g, tokens: 1, seen: map[*Path]*[len(histogram{}.n)]uint32{}}
	t := time.NewTimer(hedgeMost)
	defer t.Stop()
	for {
		select {
		case <-g.stop:
			return
		case <-t.C:
		}
		c := g.cfg()
		if c.HedgeReads <= 0 {
			g.mu.Lock()
			g.hedging = g.cfg().HedgeReads > 0 // it may have come back just now
			on := g.hedging
			g.mu.Unlock()
			if !on {
				return
			}
		}
		h.refill(float64(c.HedgeReads) / 100)
		h.late = c.HedgeAfter
		if h.late == 0 {
			h.learn()
			h.late = h.usual
		}
		pause := hedgeMost
		if h.late > 0 {
			pause = min(max(h.late/4, hedgeLeast), hedgeMost)
		}
		if h.late > 0 && h.tokens >= 1 {
			h.look()
		}
		t.Reset(pause)
	}
}

// hedge starts the hedger if the policy wants one. Caller holds mu.
func (g *Group) hedge() {
	if g.cfg().HedgeReads > 0 && !g.hedging && !g.closed {
		g.hedging = true
		g.routines.Add(1)
		go g.routineHedge()
	}
}

// refill grants hedges for the I/Os done since.
func (h *hedger) refill(share float64) {
	ios := int64(0)
	for _, p := range *h.g.everyPath.Load() {
		ios += p.ios.Load()
	}
	h.tokens = min(h.tokens+share*float64(max(ios-h.ios, 0)), hedgeBurst)
	h.ios = ios
}

// learn finds how long a read may take before it is late: twice what nine tenths
// of the I/Os of the fastest path took in the last second or so.
func (h *hedger) learn() {
	if time.Since(h.learnt) < time.Second {
		return
	}
	h.learnt = time.Now()
	best := int64(0)
	every := *h.g.everyPath.Load()
	for p := range h.seen {
		if !slices.Contains(every, p) {
			delete(h.seen, p)
		}
	}
	for _, p := range every {
		old := h.seen[p]
		if old == nil {
			old = new([len(histogram{}.n)]uint32)
			h.seen[p] = old
		}
		var fresh histogram
		sum := uint32(0)
		for i := range fresh.n {
			n := p.latency.n[i].Load()
			fresh.n[i].Store(n - old[i])
			sum += n - old[i]
		}
		if sum < hedgeSample {
			continue
		}
		for i := range fresh.n {
			old[i] += fresh.n[i].Load()
		}
		if us := fresh.percentile(90); best == 0 || us < best {
			best = us
		}
	}
	if best > 0 {
		h.usual = max(2*time.Duration(best)*time.Microsecond, hedgeLeast)
	}
}

// look issues late reads again, as far as the budget goes.
func (h *hedger) look() {
	g := h.g
	t := g.table.Load()
	if g.ledger.shadow.used.Load() > 0 { // the unit alone does not know what is true
		return
	}
	var plug block.Plug
	for _, pt := range t.paths {
		if pt.load.InFlight.Load() == 0 {
			continue
		}
		var q *Path
		for a := range pt.attempts() {
			since := a.open.Load()
			if since == 0 || since == captured || now()-since < int64(h.late) {
				continue
			}
			if q == nil {
				if q = g.second(pt, t); q == nil {
					break
				}
			}
			if h.tokens < 1 {
				plug.Flush()
				return
			}
			if g.issueAgain(a, since, q, &plug) {
				h.tokens--
			}
		}
	}
	plug.Flush()
}

// second is the path for reads that are late on pt: the least busy one of those
// that share its I/O; else one of another group that is as near to the unit, and
// of the same target or of servers that hold the same.
func (g *Group) second(pt *Path, t *table) (q *Path) {
	g.mu.Lock()
	defer g.mu.Unlock()
	better := func(x *Path) bool {
		return x != pt && !x.suspect && x.held == 0 && (q == nil || x.load.InFlight.Load() < q.load.InFlight.Load())
	}
	for _, x := range t.paths {
		if better(x) {
			q = x
		}
	}
	if q != nil {
		return q
	}
	c := g.cfg()
	for _, x := range t.able {
		if x.access == pt.access && (x.Target == pt.Target || c.Replicated || c.MultibusServers) && better(x) {
			q = x
		}
	}
	return q
}

// issueAgain makes a duel of a read in flight and begins its second attempt on q.
func (g *Group) issueAgain(a *attempt, since int64, q *Path, p *block.Plug) bool {
	b, s := q.take(false)
	if b == nil {
		return false
	}
	d := &duel{left: 1}
	d.mu.Lock()
	a.duel, a.second = d, false
	if !a.open.CompareAndSwap(since, captured) { // it was answered meanwhile
		d.mu.Unlock()
		q.give(b, false)
		return false
	}
	r := a.req
	d.r, d.arena = r, r.Arena
	r.Route.State |= stateHedged
	if d.spare = r.Arena.TryGet(len(r.Data)); d.spare == nil {
		d.mu.Unlock()
		q.give(b, false)
		return false
	}
	l := g.lu()
	bs := int64(l.BlockSize)
	c := &b.cmd
	c.LUN, c.Dir, c.Data, c.ShortOK = q.LUN, initiator.DataIn, d.spare, false
	scsi.Read(&c.CDB, uint64(r.Off/bs), uint32(r.Len/bs), l.Use16 && !q.use10.Load())
	b.req, b.size, b.start, b.duel, b.second = r, r.Len, now(), d, true
	b.unsupported, b.wasDirty, b.dirties = nil, false, false
	b.open.Store(captured)
	d.left = 2
	d.mu.Unlock()
	q.load.InFlight.Add(1)
	q.load.Bytes.Add(b.size)
	if s.Submit(c, p) {
		g.hedges.Add(1)
		return true
	}
	q.load.InFlight.Add(-1)
	q.load.Bytes.Add(-b.size)
	b.req, b.duel, c.Data = nil, nil, nil
	b.open.Store(0)
	q.give(b, false)
	if d.leave(false, true, verdict{}) {
		g.concludeHedge(d, p)
	}
	return false
}

// unopened takes back an attempt that its session refused; true if the hedger
// had it already, and the request goes its own way.
func (a *attempt) unopened(p *block.Plug) bool {
	if o := a.open.Load(); o == 0 || o != captured && a.open.CompareAndSwap(o, 0) {
		return false
	}
	g, d := a.path.g, a.duel
	mine := d.leave(false, false, verdict{Action{Verb: RetryElsewhere}, a.path})
	a.req, a.duel, a.cmd.Data = nil, nil, nil
	a.open.Store(0)
	a.path.give(a, false)
	if mine {
		g.concludeHedge(d, p)
	}
	return true
}
