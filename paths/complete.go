package paths

import (
	"slices"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// attempt is one command of a request on one path. Attempts are made with
// their path and reused.
type attempt struct {
	cmd         initiator.Command
	path        *Path
	req         *block.Request
	size        int64
	start       int64
	wasDirty    bool          // a flush that found the path dirty: counted in Path.flushing
	wasSince    int64         // and since when
	dirties     bool          // leaves data in a cache
	span        atomic.Uint64 // blocks of the mutation in flight, see span
	unsupported *atomic.Bool  // set when the unit does not know the command
	open        atomic.Int64  // start of a read that may be hedged; captured: it is; else 0
	duel        *duel         // of a captured one
	second      bool          // of the duel
	list        [scsi.UnmapListLen]byte
	next        *attempt
}

// Done takes a command back from its session (initiator.Doner).
func (a *attempt) Done(c *initiator.Command, p *block.Plug) {
	pt, g := a.path, a.path.g
	pt.load.InFlight.Add(-1)
	pt.load.Bytes.Add(-a.size)
	if o := a.open.Load(); o != 0 && (o == captured || !a.open.CompareAndSwap(o, 0)) {
		a.raced(c, p)
		return
	}
	r := a.req
	if a.span.Load() != 0 {
		a.span.Store(0)
	}
	if c.Result.Err == initiator.ErrSessionLost && g.cfg().Protection != Off && mutation(r) {
		pt.errors.Add(1)
		pt.events.errors[classLost].Add(1)
		pt.lose(a, r, c.Result.Delivery)
		a.req, c.Data = nil, nil
		pt.give(a, false)
		return
	}
	act := pt.judge(c)
	flush := r.Op == block.Flush || r.Route.State&stateSynced != 0
	switch {
	case act.Verb == Done:
		op := r.Op
		if flush {
			op = block.Flush
		}
		pt.succeeded(a, op)
		if flush {
			pt.flushed(a, true)
		} else if a.dirties && (!pt.dirty.Load() || a.start < pt.since.Load()) {
			pt.soil(a.start)
		}
	default:
		pt.errors.Add(1)
		class := act.Verb
		if c.Result.Err == initiator.ErrSessionLost {
			class = classLost
		}
		pt.events.errors[class].Add(1)
		if flush {
			r.Route.State &^= 1 << pt.index
			pt.flushed(a, false)
		}
	}
	size, unsupported, unknown := a.size, a.unsupported, act.Verb == Unsupported && scsi.ParseSense(c.Result.SenseData()).ASC == 0x20
	a.req = nil
	c.Data = nil
	if act.Verb == FailPath {
		pt.failIO(&c.Result)
	}
	if act.Full && !flush {
		pt.full(a.start, c.Result.Status)
	}
	pt.give(a, act.Verb == Done)
	switch act.Verb {
	case Done:
		g.advance(r, size, flush, p)
	case RetryElsewhere, FailPath:
		g.retry(r, act, pt, p)
	case RetryHere:
		g.retryHere(r, act, pt, p)
	case Unsupported:
		switch {
		case unsupported != nil:
			unsupported.Store(true)
			g.retry(r, Action{}, nil, p)
		case flush && !pt.sync10.Load():
			pt.sync10.Store(true)
			g.retry(r, Action{}, nil, p)
		case unknown && !flush && g.lu().Use16 && g.lu().Blocks <= 1<<32 && !pt.use10.Swap(true):
			g.retryHere(r, Action{}, pt, p)
		default:
			g.finish(r, act.Err, p)
		}
	case FailUp:
		g.finish(r, act.Err, p)
	}
	g.releaseBehind(p)
	if g.waiting.Load() > 0 {
		g.drain(p)
	}
}

// judge is the verdict on a command, and its effects on the path.
func (pt *Path) judge(c *initiator.Command) Action {
	act := classify(&c.Result)
	if c.Result.Status == scsi.StatusReservationConflict && pt.g.cfg().FenceBy == ByPreempt {
		act = pt.conflict()
	}
	if act.Verb == Done && c.Result.Status == scsi.StatusCheckCondition && !complete(c) {
		act = Action{Verb: FailPath} // recovered, it says, but not all of it
	}
	if act.Deferred {
		pt.g.loss.lose(now(), pt.g.ledger.omit)
		act.Ask |= askDeferred
	}
	if act.Foreign {
		pt.suspectForeign()
	} else if act.Doubt {
		pt.doubt()
	}
	if act.Ask != 0 {
		pt.ask(act.Ask)
	}
	if pt.foreign.Load() && (act.Verb == Done || act.Verb == FailUp || act.Verb == Unsupported) { // whose answer is this?
		act = Action{Verb: RetryElsewhere}
	}
	return act
}

// succeeded counts a command that did its work.
func (pt *Path) succeeded(a *attempt, op block.Op) {
	pt.ios.Add(1)
	switch op {
	case block.Read:
		pt.read.Add(a.size)
	case block.Write:
		pt.written.Add(a.size)
	}
	end := now()
	pt.latency.add(end - a.start)
	if o := pt.g.table.Load().observer; o != nil {
		o.Observe(&pt.load, end-a.start, end)
	}
}

// advance books size bytes as done and goes on with the request or ends it.
func (g *Group) advance(r *block.Request, size int64, flush bool, p *block.Plug) {
	if !flush {
		if r.Route.Pos += size; r.Route.Pos >= r.Len {
			g.moved(r, p)
			return
		}
	}
	g.proceed(r, nil, p) // the next step, the next dirty cache, or the end
}

// moved ends a request that has nothing more to move, after a flush if it is a
// mutation with FUA that no command carried out as such.
func (g *Group) moved(r *block.Request, p *block.Plug) {
	fua := r.Flags&block.FUA != 0 && r.Op != block.Read
	if fua && g.lu().WriteCache && (r.Op != block.Write || !g.lu().DPOFUA) {
		r.Route.State = stateSynced
		g.proceed(r, nil, p)
		return
	}
	g.finish(r, nil, p)
}

func (g *Group) finish(r *block.Request, err error, p *block.Plug) {
	if g.ledger.open.Load() > 0 {
		g.ledger.forget(r)
	}
	end := now()
	if r.Route.Tries > 0 {
		g.retried.add(end - r.Route.Start)
	}
	g.requests.finish(r, err, end)
	if err != nil {
		g.failedUp.Add(1)
	}
	r.Err = err
	r.Owner.Complete(r, p)
}

// proceed starts the next command, or queues the request.
func (g *Group) proceed(r *block.Request, avoid *Path, p *block.Plug) {
	if !g.start(r, avoid, p) {
		g.enqueue(r)
		g.drain(p)
	}
}

// complete tells whether a command without error moved all its data.
func complete(c *initiator.Command) bool {
	return c.ShortOK || c.Result.Residual == 0 && (c.Dir != initiator.DataIn || int(c.Result.Received) == len(c.Data))
}

// retry starts the request anew, not on avoid if there is another path, or ends
// it when the verdict's limit or the map's time for retries is used up.
func (g *Group) retry(r *block.Request, act Action, avoid *Path, p *block.Plug) {
	if g.hopeless(r, &act) {
		g.finish(r, act.Err, p)
		return
	}
	if act.Pause > 0 {
		time.AfterFunc(act.Pause, func() { // off the fast path: the target asked for patience
			var p block.Plug
			g.proceed(r, avoid, &p)
			p.Flush()
		})
		return
	}
	g.proceed(r, avoid, p)
}

// retryHere is retry on the same path, for as long as that seems to help.
func (g *Group) retryHere(r *block.Request, act Action, pt *Path, p *block.Plug) {
	if act.Full && r.Op != block.Flush && r.Route.State&stateSynced == 0 {
		g.retryFull(r, act, pt, p)
		return
	}
	if now()-r.Route.Start > int64(stubborn) {
		g.retry(r, act, pt, p)
		return
	}
	if g.hopeless(r, &act) {
		g.finish(r, act.Err, p)
		return
	}
	again := func(p *block.Plug) {
		plain := r.Op <= block.Write && r.Route.State&stateSynced == 0 && g.ledger.shadow.used.Load() == 0
		if !plain || !slices.Contains(g.table.Load().paths, pt) || !g.issue(r, pt, min(r.Len-r.Route.Pos, g.maxIO.Load()), p) {
			g.proceed(r, nil, p)
		}
	}
	if act.Pause > 0 {
		time.AfterFunc(act.Pause, func() {
			var p block.Plug
			again(&p)
			p.Flush()
		})
		return
	}
	again(p)
}

// retryFull starts a request anew that its target was too busy for: when the
// path's pause is over, or on another path of the group.
func (g *Group) retryFull(r *block.Request, act Action, pt *Path, p *block.Plug) {
	switch {
	case g.hopeless(r, &act):
		g.finish(r, act.Err, p)
	case now()-r.Route.Start > int64(stubborn):
		g.proceed(r, pt, p)
	default:
		g.proceed(r, nil, p)
	}
}

// stubborn is how long a request keeps to a path that is busy.
const stubborn = 3 * time.Second

// hopeless counts a retry and tells whether it was one too many. A target that
// says the same again and again gets its answers slower.
func (g *Group) hopeless(r *block.Request, act *Action) bool {
	r.Route.Tries++
	if act.Limit > 0 {
		r.Route.Refused++
	}
	if act.Err == nil {
		return false
	}
	if r.Route.PutOff == 0 { // until then it may have waited for a path
		r.Route.PutOff = now()
	}
	if act.Pause == 0 && r.Route.Tries > retriesHere {
		act.Pause = pauseBusy
	}
	if act.Limit > 0 && r.Route.Refused > act.Limit {
		return true
	}
	most := g.unitTime()
	return most > 0 && now()-r.Route.PutOff > int64(most)
}

// unitTime is how long a request may go on with a unit that answers but does
// not do it; 0 is for ever. It is never shorter than arrays need to move a unit.
func (g *Group) unitTime() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.queuesForEver() {
		return 0
	}
	return max(leastRetryTime, g.cfg().retryTime())
}

const leastRetryTime = time.Minute
