package paths

import "github.com/mpathd/mpathd/block"

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

// pop takes the oldest request. Caller holds mu.
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
	g.waiting.Add(-1)
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
		ok := true
		if err != nil {
			g.finish(r, err, p)
		} else if ok = g.start(r, nil, p); !ok {
			g.enqueue(r)
		}
		g.mu.Lock()
		if !ok && !g.again {
			break
		}
	}
	g.draining = false
	g.mu.Unlock()
}
