package paths

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/mpathd/mpathd/initiator"
)

// How an epoch ended.
const (
	fenceProven   = "proven"   // the session was reinstated, the unit reset: nothing of it is left
	fenceUnproven = "unproven" // a login succeeded, but this target does not end old sessions, or does not drain
	fenceTimed    = "timed"    // the configured quarantine is over
	fenceCommand  = "command"  // the operator's fence command succeeded
	fenceDeclared = "declared" // the operator said so
)

// Trust is what the self-test at bring-up found about a target.
type Trust string

// The classes of targets.
const (
	Untested   Trust = ""           // no second login was possible
	Reinstates Trust = "reinstates" // a login with the same ISID ends the old session
	Untrusted  Trust = "untrusted"  // it does not
)

const (
	reinstateTime = time.Second // in which a reinstated session must be gone
	fenceBackoff  = 100 * time.Millisecond
	fenceBackoffs = time.Second
	commandAfter  = 2 * time.Second // fencing over iSCSI comes first
)

// OpenerAt logs in at another portal of the same target, with the ISID of the
// path: where the target allows it, that ends the path's old session.
type OpenerAt func(ctx context.Context, portal string) (Session, error)

// resetter is a Session that can reset a logical unit.
type resetter interface {
	LUReset(ctx context.Context, lun [8]byte) error
}

// selfTest logs in a second time with the path's ISID and looks whether the
// first session ends: through the portals of sibling paths, which can then
// fence this path and be fenced through it, and through the path's own. It
// takes s and returns the session to use.
func (p *Path) selfTest(ctx context.Context, s Session) (Session, error) {
	for _, q := range p.siblings() {
		f, err := p.OpenAt(ctx, q.Portal)
		if err != nil {
			continue
		}
		ended := within(s, reinstateTime)
		p.set(func() { p.via[q], q.via[p] = ended, ended })
		if !ended {
			p.g.log.Warn("this target name is served by two servers that know nothing of each other: neither can end the other's sessions",
				"target", p.Target, "path", p.Name, "other", q.Name)
			f.Abort(errSelfTest)
			<-f.Done()
			continue
		}
		s = f // opened with the path's ISID: the next login reinstates it
	}
	again, err := p.Open(ctx, p.onState, p.onRoom)
	if err != nil {
		s.Abort(errSelfTest)
		<-s.Done()
		return nil, err
	}
	trust := Reinstates
	if !within(s, reinstateTime) {
		trust = Untrusted
		s.Abort(errSelfTest)
		<-s.Done()
		p.g.log.Warn("the target does not end a session when its initiator logs in anew: late writes cannot be ruled out by fencing", "path", p.Name, "target", p.Target)
	}
	p.set(func() { p.trust = trust })
	return again, nil
}

var errSelfTest = errors.New("end of the fence self-test")

func within(s Session, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-s.Done():
		return true
	case <-t.C:
		return false
	}
}

// siblings are the other paths to the same target name that are up.
func (p *Path) siblings() (out []*Path) {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	for _, q := range p.g.paths {
		if q != p && q.Target == p.Target && q.Portal != p.Portal && q.up {
			out = append(out, q)
		}
	}
	return out
}

// routineFence watches over an open epoch: it runs the operator's command, ends
// the quarantine, and complains. Fencing over iSCSI is fenceVia's and the
// path's own next login's (Path.serve).
func (g *Group) routineFence(e *epoch) {
	defer g.routines.Done()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	defer context.AfterFunc(stopContext{g.stop}, cancel)()
	var wg sync.WaitGroup
	defer wg.Wait()
	var quarantine, command <-chan time.Time
	if q := g.cfg().Quarantine; q > 0 {
		quarantine = time.After(q)
	}
	if g.cfg().FenceCommand != nil {
		command = time.After(commandAfter)
	}
	late := time.After(g.cfg().FenceWait)
	for {
		select {
		case <-e.fenced:
			cancel()
			return
		case <-g.stop:
			return
		case <-quarantine:
			g.closeEpoch(e, fenceTimed)
		case <-command:
			wg.Go(func() {
				if err := g.cfg().FenceCommand(ctx, e.name); err == nil {
					g.closeEpoch(e, fenceCommand)
				} else if ctx.Err() == nil {
					g.log.Error("fence command failed", "path", e.name, "cause", err)
				}
			})
		case <-late:
			g.log.Error("old session still not fenced: writes that overlap what it may still write are held", "path", e.name,
				"for", g.cfg().FenceWait, "writes_at_risk", len(e.extents), "held", g.ledger.heldNow(), "do", "bring the path back, or set a quarantine or a fence command")
		}
	}
}

// fenceWay is a login that ends the old session of a path.
type fenceWay struct {
	name string
	open func(ctx context.Context) (Session, error)
}

// ways are the portals that proved able to end this path's session.
func (p *Path) ways() (out []fenceWay) {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	for q, ok := range p.via {
		if ok {
			out = append(out, fenceWay{q.Name, func(ctx context.Context) (Session, error) { return p.OpenAt(ctx, q.Portal) }})
		}
	}
	return out
}

// portals are those of ways.
func (p *Path) portals() (out []string) {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	for q, ok := range p.via {
		if ok {
			out = append(out, q.Portal)
		}
	}
	return out
}

// startVia begins to fence e through other portals.
func (g *Group) startVia(e *epoch, lun [8]byte, ways []fenceWay) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(ways) == 0 || g.closed || e.stopVia != nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	e.stopVia = func() { cancel(); <-done }
	g.routines.Add(1)
	go func() {
		defer g.routines.Done()
		defer close(done)
		defer cancel()
		defer context.AfterFunc(stopContext{g.stop}, cancel)()
		g.fenceVia(ctx, e, lun, ways)
	}()
}

// endVia stops fencing through other portals and waits: a fence login after
// the path's own would end the new session.
func (p *Path) endVia() {
	for _, e := range p.g.ledger.of(p.Name) {
		p.g.mu.Lock()
		stop := e.stopVia
		e.stopVia = nil
		p.g.mu.Unlock()
		if stop != nil {
			stop()
		}
	}
}

// fenceVia tries all ways in parallel until one of them fenced e.
func (g *Group) fenceVia(ctx context.Context, e *epoch, lun [8]byte, ways []fenceWay) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	backoff := fenceBackoff
	for ctx.Err() == nil {
		var wg sync.WaitGroup
		for _, w := range ways {
			wg.Go(func() {
				s, err := w.open(ctx)
				if err == nil {
					if err = g.drainUnit(ctx, s, e, lun, Reinstates); err != nil {
						s.Abort(err)
					} else {
						cancel()
					}
					end, stop := context.WithTimeout(context.Background(), time.Second)
					s.Close(end)
					stop()
				}
				if err != nil && ctx.Err() == nil {
					g.log.Warn("fence attempt failed", "path", e.name, "through", w.name, "cause", err)
				}
			})
		}
		wg.Wait()
		select {
		case <-e.fenced:
			return
		case <-ctx.Done():
			return
		case <-time.After(backoff):
			backoff = min(2*backoff, fenceBackoffs)
		}
	}
}

// drainUnit completes the fence on a session that was logged in with the ISID
// of the dead one: unit attentions are taken, then LOGICAL UNIT RESET waits
// for what the backend still does (tgt answers a login before that).
func (g *Group) drainUnit(ctx context.Context, s Session, e *epoch, lun [8]byte, trust Trust) error {
	ctx, cancel := context.WithTimeout(ctx, g.cfg().FenceWait)
	defer cancel()
	if err := initiator.TestUnitReady(ctx, s, lun); err != nil {
		var refused *initiator.StatusError
		if !errors.As(err, &refused) {
			return err
		}
	}
	kind := fenceProven
	if trust == Untrusted {
		kind = fenceUnproven
	}
	if r, ok := s.(resetter); ok {
		var te *initiator.TaskError
		switch err := r.LUReset(ctx, lun); {
		case errors.As(err, &te):
			kind = fenceUnproven
			g.log.Warn("the target does not reset its unit: what its backend still does cannot be awaited", "path", e.name, "cause", err)
		case err != nil:
			return fmt.Errorf("fence: %w", err)
		}
	}
	g.closeEpoch(e, kind)
	return nil
}

// fenceOwn ends the path's epochs on its own new session, before it serves.
func (p *Path) fenceOwn(ctx context.Context, s Session) error {
	p.g.mu.Lock()
	trust := p.trust
	p.g.mu.Unlock()
	for _, e := range p.g.ledger.of(p.Name) {
		if err := p.g.drainUnit(ctx, s, e, p.LUN, trust); err != nil {
			return err
		}
	}
	return nil
}
