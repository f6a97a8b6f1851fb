package paths

import (
	"context"
	"sync"
	"time"
)

// How an epoch ended.
const (
	fenceProven   = "proven"   // the session was reinstated, the unit reset: nothing of it is left
	fenceUnproven = "unproven" // a login succeeded, but this target does not end old sessions, or does not drain
	fenceTimed    = "timed"    // the configured quarantine is over
	fenceCommand  = "command"  // the operator's fence command succeeded
	fenceDeclared = "declared" // the operator said so
)

// FenceKinds are all the ways in which an old session is found to be over.
var FenceKinds = []string{fenceProven, fenceUnproven, fenceTimed, fenceCommand, fenceDeclared}

const (
	commandAfter   = 2 * time.Second // fencing over iSCSI comes first
	commandBackoff = 30 * time.Second
)

// FenceRequest tells an operator's command what to fence.
type FenceRequest struct {
	Map, WWID, Path, Target, Portal string // Target and Portal are empty for a path of the run before
}

// routineFence watches over an open epoch: it runs the operator's command, ends
// the quarantine, complains, and gives up where the map does not queue. Fencing
// over iSCSI is fenceVia's and the path's own next login's (Path.serve).
func (g *Group) routineFence(e *epoch) {
	defer g.routines.Done()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	defer context.AfterFunc(stopContext{g.stop}, cancel)()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel() // before the wait
	var c *policy
	var quarantine, command, giveUp <-chan time.Time
	after := func(d time.Duration) <-chan time.Time { return time.After(time.Until(e.since.Add(d))) }
	ran, running := make(chan error, 1), false
	follow := func() { // what the log advises may come with the next configuration
		c = g.cfg()
		quarantine, giveUp = nil, nil
		if c.Quarantine > 0 {
			quarantine = after(c.Quarantine)
		}
		if !running {
			command = after(commandAfter)
		}
		g.mu.Lock()
		forEver := g.queuesForEver()
		g.mu.Unlock()
		if forEver {
			g.ledger.hope(e)
		} else {
			giveUp = after(max(c.FenceWait, c.retryTime()))
		}
	}
	follow()
	backoff := commandAfter
	late := after(c.FenceWait)
	for {
		select {
		case <-e.fenced:
			return
		case <-g.stop:
			return
		case <-c.replaced:
			follow()
		case <-quarantine:
			g.closeEpoch(e, fenceTimed, "quarantine")
		case <-command:
			if c.FenceCommand == nil {
				continue
			}
			running = true
			run, wait := c.FenceCommand, c.FenceWait
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(ctx, wait)
				defer cancel()
				ran <- run(ctx, g.fenceRequest(e))
			})
		case err := <-ran:
			running = false
			if err == nil {
				g.closeEpoch(e, fenceCommand, "command")
				continue
			}
			backoff = min(2*backoff, commandBackoff)
			command = time.After(backoff)
			g.log.Error("fence command failed", "path", e.name, "cause", err, "again_in", backoff)
		case <-late:
			g.ledger.late.Add(1)
			g.log.Error("old session still not fenced: writes that overlap what it may still write are held", "path", e.name,
				"for", c.FenceWait, "writes_at_risk", len(e.extents), "held", g.ledger.heldNow(), "do", "bring the path back, or set a quarantine or a fence command, or say `mpathd fence` when its server is certainly off")
		case <-giveUp:
			g.despair(e)
		}
	}
}

func (g *Group) fenceRequest(e *epoch) FenceRequest {
	r := FenceRequest{Map: g.cfg().Alias, WWID: g.lu().WWID, Path: e.name}
	if e.path != nil {
		r.Target, r.Portal = e.path.Target, e.path.Portal
	}
	return r
}

// despair fails the requests that wait for e, and from now on those that would
// have to: the map is one that does not queue for ever.
func (g *Group) despair(e *epoch) {
	g.mu.Lock()
	forEver, retry := g.queuesForEver(), g.retryText() // as it is now
	g.mu.Unlock()
	if forEver {
		return
	}
	g.ledger.mu.Lock()
	before := e.hopeless
	e.hopeless = true
	g.ledger.mu.Unlock()
	if before {
		return
	}
	g.log.Error("old session not fenced in time: writes that overlap what it may still write fail", "path", e.name, "no_path_retry", retry)
	g.failHeld(nil) // those of e find it hopeless
}

// hope lets requests wait for e again.
func (l *ledger) hope(e *epoch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.hopeless = false
}

// targetOf is the target of an epoch's path, which may have been removed since; of
// the run before it may not be configured any more.
func (g *Group) targetOf(e *epoch) string {
	if e.path != nil {
		return e.path.Target
	}
	if p := g.pathOf(e); p != nil {
		return p.Target
	}
	return e.target
}

// pathOf is the path that e was of, or now goes by its name; nil without one.
func (g *Group) pathOf(e *epoch) *Path {
	for _, p := range *g.everyPath.Load() {
		if p == e.path || p.Name == e.name {
			return p
		}
	}
	return nil
}
