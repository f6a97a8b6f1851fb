package paths

import (
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

const (
	boundedTries = 5
	retryPause   = 100 * time.Millisecond
)

// attempt is one command of a request on one path. Attempts are made with
// their path and reused.
type attempt struct {
	cmd         initiator.Command
	path        *Path
	req         *block.Request
	size        int64
	start       int64
	wasDirty    bool
	dirties     bool          // leaves data in a cache
	span        atomic.Uint64 // blocks of the mutation in flight, see span
	unsupported *atomic.Bool  // set when the unit does not know the command
	list        [scsi.UnmapListLen]byte
	next        *attempt
}

// Done takes a command back from its session (initiator.Doner).
func (a *attempt) Done(c *initiator.Command, p *block.Plug) {
	pt, r, g := a.path, a.req, a.path.g
	pt.load.InFlight.Add(-1)
	pt.load.Bytes.Add(-a.size)
	if a.span.Load() != 0 {
		a.span.Store(0)
	}
	if c.Result.Err == initiator.ErrSessionLost && g.cfg().Protection != Off && mutation(r) {
		pt.errors.Add(1)
		pt.lose(a, r, c.Result.Delivery)
		a.req, c.Data = nil, nil
		pt.give(a)
		return
	}
	act := classify(&c.Result)
	if act.Verify {
		pt.doubt()
	}
	if act.Rank {
		pt.askRank()
	}
	flush := r.Op == block.Flush || r.Route.State&stateSynced != 0
	switch {
	case act.Verb == Done:
		pt.ios.Add(1)
		switch {
		case flush:
		case r.Op == block.Read:
			pt.read.Add(a.size)
		case r.Op == block.Write:
			pt.written.Add(a.size)
		}
		end := now()
		pt.latency.add(end - a.start)
		if o := g.table.Load().observer; o != nil {
			o.Observe(&pt.load, end-a.start, end)
		}
		if !flush && a.dirties && !pt.dirty.Load() {
			pt.dirty.Store(true)
		}
	default:
		pt.errors.Add(1)
		if flush {
			r.Route.State &^= 1 << pt.index
			if a.wasDirty {
				pt.dirty.Store(true)
			}
		}
	}
	size, unsupported := a.size, a.unsupported
	a.req = nil
	c.Data = nil
	if act.Verb == FailPath {
		pt.failIO(&c.Result)
	}
	pt.give(a)
	switch act.Verb {
	case Done:
		g.advance(r, size, flush, p)
	case RetryElsewhere, FailPath:
		g.retry(r, act, pt, p)
	case RetryHere:
		g.retry(r, act, nil, p)
	case Unsupported:
		switch {
		case unsupported != nil:
			unsupported.Store(true)
			g.retry(r, Action{}, nil, p)
		case flush && !pt.sync10.Load():
			pt.sync10.Store(true)
			g.retry(r, Action{}, nil, p)
		default:
			g.finish(r, act.Err, p)
		}
	case FailUp:
		g.finish(r, act.Err, p)
	}
	if g.waiting.Load() > 0 {
		g.drain(p)
	}
}

// advance books size bytes as done and goes on with the request or ends it.
func (g *Group) advance(r *block.Request, size int64, flush bool, p *block.Plug) {
	if !flush {
		r.Route.Pos += size
		if r.Route.Pos < r.Len {
			g.proceed(r, nil, p)
			return
		}
		fua := r.Flags&block.FUA != 0 && r.Op != block.Read
		if fua && g.lu().WriteCache && (r.Op != block.Write || !g.lu().DPOFUA) {
			r.Route.State = stateSynced
			g.proceed(r, nil, p)
			return
		}
		g.finish(r, nil, p)
		return
	}
	g.proceed(r, nil, p) // the next dirty cache, or the end
}

func (g *Group) finish(r *block.Request, err error, p *block.Plug) {
	if g.ledger.open.Load() > 0 {
		g.ledger.forget(r)
	}
	if r.Route.Tries > 0 {
		g.retried.add(now() - r.Route.Start)
	}
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

func (g *Group) retry(r *block.Request, act Action, avoid *Path, p *block.Plug) {
	if r.Route.Tries++; act.Bounded && r.Route.Tries > boundedTries {
		g.finish(r, act.Err, p)
		return
	}
	if act.Pause {
		time.AfterFunc(retryPause, func() { // off the fast path: the target asked for patience
			var p block.Plug
			g.proceed(r, avoid, &p)
			p.Flush()
		})
		return
	}
	g.proceed(r, avoid, p)
}
