package paths

import (
	"time"

	"github.com/mpathd/mpathd/block"
)

// enqueue lets a request wait, oldest first: requests that come back from a
// dead path are older than those that came since.
func (g *Group) enqueue(r *block.Request) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.waiting.Add(1)
	at := &g.head
	if g.tail != nil && g.tail.Route.Start <= r.Route.Start {
		at = &g.tail.Route.Next
	}
	for *at != nil && (*at).Route.Start <= r.Route.Start {
		at = &(*at).Route.Next
	}
	r.Route.Next = *at
	*at = r
	if r.Route.Next == nil {
		g.tail = r
	}
}

// pop takes the oldest request, which counts as waiting until the caller has
// started it: room that appears meanwhile must not be missed. Caller holds mu.
func (g *Group) pop() *block.Request {
	r := g.head
	if r == nil {
		return nil
	}
	g.head = r.Route.Next
	if g.head == nil {
		g.tail = nil
	}
	r.Route.Next = nil
	return r
}

// drain starts waiting requests, in order, until one finds no room. One
// drainer works at a time; a call meanwhile makes it look once more, so that
// room which appears while a request is refused is not missed.
func (g *Group) drain(p *block.Plug) {
	g.mu.Lock()
	if g.draining {
		g.again = true
		g.mu.Unlock()
		return
	}
	g.draining = true
	for {
		g.again = false
		r := g.pop()
		if r == nil {
			break
		}
		var err error
		if len(g.table.Load().all) == 0 {
			switch {
			case g.closed:
				err = block.ErrShutdown
			case !g.queueing():
				err = block.ErrNoPath
			}
		}
		g.mu.Unlock()
		since := r.Route.Start // it may end in start
		ok := true
		if err != nil {
			g.finish(r, err, p)
		} else if ok = g.start(r, nil, p); !ok {
			g.enqueue(r)
		} else {
			g.requests.queue.add(now() - since)
		}
		g.waiting.Add(-1)
		g.mu.Lock()
		if !ok && !g.again {
			break
		}
	}
	g.draining = false
	g.mu.Unlock()
}

// restart gives everything that waits another try.
func (g *Group) restart() {
	var p block.Plug
	g.unpark(nil, &p)
	g.drain(&p)
	p.Flush()
}

// park puts a flush aside until the path that it needs is back: other requests
// go on meanwhile. It reports whether it kept or ended r; false means that the
// path came back just now.
func (g *Group) park(r *block.Request, p *block.Plug) bool {
	g.mu.Lock()
	missing := g.ledger.unflushable()
	var down []string
	for _, pt := range *g.everyPath.Load() {
		if r.Route.State&(1<<pt.index) == 0 && pt.unflushed() && pt.current.Load() == nil {
			missing, down = true, append(down, pt.Name)
		}
	}
	wait := missing && !g.closed && g.queueing()
	if wait {
		r.Route.Next = g.parked
		g.parked = r
		if r.Route.Parked == 0 {
			r.Route.Parked = now()
		}
		g.timeParked()
	}
	g.mu.Unlock()
	switch {
	case wait:
		if len(down) > 0 {
			g.log.Warn("a flush waits for a server that holds unflushed writes and is not reachable", "paths", down, "do", "bring a path to it back: `mpathd show paths` has what keeps them down")
		} else {
			g.log.Warn("a flush waits for the fence of an old session", "do", "see `mpathd show maps`")
		}
	case missing:
		g.finish(r, block.ErrIO, p) // never a false success
	default:
		return false
	}
	return true
}

// timeParked sets the timer that ends the wait of the parked flush that waits for
// longest. Caller holds mu.
func (g *Group) timeParked() {
	stopTimer(&g.giveUpFlush)
	most, limited := g.retryLimit()
	if g.parked == nil || !limited || g.closed {
		return
	}
	first := g.parked.Route.Parked
	for r := g.parked; r != nil; r = r.Route.Next {
		first = min(first, r.Route.Parked)
	}
	g.giveUpFlush = time.AfterFunc(most-time.Duration(now()-first), g.failParked)
}

// failParked fails the parked flushes that have waited for long enough.
func (g *Group) failParked() {
	var plug block.Plug
	var over *block.Request
	g.mu.Lock()
	most, limited := g.retryLimit()
	for at := &g.parked; limited && *at != nil; {
		if r := *at; now()-r.Route.Parked < int64(most) {
			at = &r.Route.Next
		} else {
			*at, r.Route.Next, over = r.Route.Next, over, r
		}
	}
	g.timeParked()
	g.mu.Unlock()
	for over != nil {
		r := over
		over, r.Route.Next = r.Route.Next, nil
		g.finish(r, block.ErrIO, &plug)
	}
	plug.Flush()
}

// unpark starts the parked flushes anew, or fails them.
func (g *Group) unpark(err error, p *block.Plug) {
	g.mu.Lock()
	r := g.parked
	g.parked = nil
	g.mu.Unlock()
	for r != nil {
		next := r.Route.Next
		r.Route.Next = nil
		if err != nil {
			g.finish(r, err, p)
		} else {
			g.proceed(r, nil, p)
		}
		r = next
	}
}
