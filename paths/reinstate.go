package paths

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/mpathd/mpathd/initiator"
)

const (
	fenceBackoff  = 100 * time.Millisecond
	fenceBackoffs = time.Second
	stepTime      = 5 * time.Second // istgt forgets commands that wait behind a write whose data do not come: ask again
)

// OpenerAt logs in at another portal of the same target, with the ISID of the
// path: where the target allows it, that ends the path's old session.
type OpenerAt func(ctx context.Context, portal string) (Session, error)

// resetter is a Session that can reset a logical unit.
type resetter interface {
	LUReset(ctx context.Context, lun [8]byte) error
}

// fenceWay is a login that ends the old session of a path.
type fenceWay struct {
	name, portal string
	nexus        string // where that login ended when it was tested, see nexusOf; empty: not known
	open         func(ctx context.Context) (Session, error)
}

// login logs in where the path leads.
func (p *Path) login(ctx context.Context) (Session, error) {
	p.loginsBegun.Add(1)
	defer p.loginsEnded.Add(1)
	return p.Open(ctx, p.onState, p.onRoom)
}

// loginAt logs in at another portal with the path's identity.
func (p *Path) loginAt(ctx context.Context, portal string) (Session, error) {
	p.loginsBegun.Add(1)
	defer p.loginsEnded.Add(1)
	return p.OpenAt(ctx, portal)
}

// ways are the portals that proved able to end this path's session.
func (p *Path) ways() (out []fenceWay) {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	for q, ok := range p.via {
		if ok {
			out = append(out, fenceWay{q.Name, q.Portal, q.nexus, func(ctx context.Context) (Session, error) { return p.loginAt(ctx, q.Portal) }})
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

// startVia begins to fence e through other portals: ways, or if there are none those
// of the last time, which may be what the run before found out.
func (g *Group) startVia(e *epoch, lun [8]byte, ways []fenceWay) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(ways) == 0 {
		ways = e.ways
	}
	e.ways = ways
	if len(ways) == 0 && e.key == 0 || g.closed || e.stopVia != nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	e.stopVia = func() { cancel(); <-done }
	g.routines.Add(1)
	go func() {
		defer g.routines.Done()
		defer close(done)
		defer e.askedAll()
		defer cancel()
		defer context.AfterFunc(stopContext{g.stop}, cancel)()
		if e.key != 0 && g.cfg().FenceBy == ByPreempt && g.fencePreempt(ctx, e, len(ways) > 0) {
			return
		}
		if len(ways) > 0 {
			g.fenceVia(ctx, e, lun, ways)
		}
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

// resumeVia begins again what endVia stopped, for a session that did not come to serve.
func (p *Path) resumeVia() {
	for _, e := range p.g.ledger.of(p.Name) {
		p.g.startVia(e, p.LUN, p.ways())
	}
}

// fenceVia tries all ways until one of them fenced e: in parallel, or where a
// login or a reset ends the sessions of others one after the other.
func (g *Group) fenceVia(ctx context.Context, e *epoch, lun [8]byte, ways []fenceWay) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	try := func(opening context.Context, opened func(), w fenceWay, t *turn) {
		err := g.fenceThrough(ctx, opening, opened, e, lun, w, t)
		if err == nil || errors.Is(err, errUnproven) { // then the operator's command or the quarantine decides
			cancel()
		}
		if err != nil && ctx.Err() == nil && opening.Err() != context.Canceled {
			g.log.Warn("fence attempt failed", "path", e.name, "through", w.name, "cause", err)
		}
	}
	backoff := fenceBackoff
	for ctx.Err() == nil {
		if t, err := g.fenceTurn(ctx, g.targetOf(e)); t != nil {
			for _, w := range g.alive(ways) {
				opening, opened := context.WithTimeout(ctx, turnLogin)
				try(opening, opened, w, t)
				opened()
			}
			t.end()
		} else if err == nil {
			var wg sync.WaitGroup
			opening, opened := context.WithCancel(ctx)
			for _, w := range ways {
				wg.Go(func() { try(opening, opened, w, nil) })
			}
			wg.Wait()
			opened()
		}
		e.askedAll()
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

// fenceThrough fences e through one portal: five round trips, those of the
// connection and of two login stages included. opening is for logins, opened
// ends the others'. Where fences take turns the login is part of t: one that the
// target answers after a reset would end the session that waits for that.
func (g *Group) fenceThrough(ctx, opening context.Context, opened func(), e *epoch, lun [8]byte, w fenceWay, t *turn) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	began := time.Now()
	s, err := w.open(opening)
	if err != nil {
		if ctx.Err() == nil && opening.Err() == context.DeadlineExceeded {
			g.setSilent(w.portal, true)
		}
		return err
	}
	g.setSilent(w.portal, false)
	login := time.Since(began)
	if target := g.targetOf(e); !t.taken() && g.targets.endsSessions(target) { // as was learned meanwhile
		opened() // a second login with this identity would end the first one
		if t, err = g.fenceTurn(ctx, target); err != nil {
			s.Abort(err)
			return err
		}
		defer t.end()
	}
	g.hearFence(s, e, lun)
	if at := nexusOf(s); at != "" && w.nexus != "" && at != w.nexus && at != e.nexus {
		err = fmt.Errorf("it leads to another nexus than when it was tested, which ends nothing: was %s, is %s", w.nexus, at)
	} else {
		err = g.sameUnit(ctx, s, lun)
	}
	if err == nil {
		err = g.drainUnit(ctx, s, e, lun, g.provenClass(), fenceSteps{through: w.name, login: login, identity: time.Since(began) - login})
	}
	if err != nil {
		s.Abort(err)
	}
	end, stop := context.WithTimeout(context.Background(), time.Second)
	defer stop()
	s.Close(end)
	return err
}

// fenceSteps are through which path a fence went, and what its steps took.
type fenceSteps struct {
	through         string
	login, identity time.Duration // 0: the path's own login
}

func (f fenceSteps) log(reset time.Duration) []any {
	out := []any{"through", f.through}
	if f.login > 0 {
		out = append(out, "login", f.login.Round(10*time.Microsecond), "identity", f.identity.Round(10*time.Microsecond))
	}
	return append(out, "reset", reset.Round(10*time.Microsecond))
}

// drainUnit completes the fence on a session that was logged in with the ISID
// of the dead one, and whose unit has answered TEST UNIT READY since: LOGICAL UNIT
// RESET waits for what the backend still does (tgt answers a login before that).
func (g *Group) drainUnit(ctx context.Context, s Session, e *epoch, lun [8]byte, trust Trust, steps fenceSteps) error {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, g.cfg().FenceWait)
	defer cancel()
	kind := fenceProven
	if trust == Untrusted {
		kind = fenceUnproven
	}
	by := "login"
	if r, ok := s.(resetter); ok && trust != Waits {
		by = "reset"
		var te *initiator.TaskError
		target, of, sent := g.targetOf(e), g.witnesses(e), time.Now()
		switch err := g.resetUnit(ctx, r, e, lun); {
		case errors.As(err, &te):
			kind = fenceUnproven
			g.log.Warn("the target does not reset its unit: what its backend still does cannot be awaited", "path", e.name, "cause", err)
		case err != nil:
			return fmt.Errorf("fence: %w", err)
		default:
			g.unitReset(target, nil)
			if told, asked := g.resetTold(ctx, target, of, sent); !told && asked > 0 {
				kind = fenceUnproven
				g.log.Warn("the target answered LOGICAL UNIT RESET, but no other session heard of a reset: it may not have done it", "path", e.name, "sessions_asked", asked)
			}
		}
	}
	if c := g.cfg(); kind == fenceUnproven && (c.Quarantine > 0 || c.FenceCommand != nil) {
		return errUnproven
	}
	reset := time.Since(began)
	g.flushFence(ctx, s, e, lun)
	g.closeEpoch(e, kind, by, steps.log(reset)...)
	return nil
}

var errUnproven = errors.New("the target answered, but what it says is no proof: the fence command or the quarantine has to end the old session")

// sameUnit makes sure that a fence session leads to the map's own disk, and that
// its unit answers.
func (g *Group) sameUnit(ctx context.Context, s Session, lun [8]byte) error {
	ctx, cancel := context.WithTimeout(ctx, min(g.cfg().CheckTimeout, stepTime))
	defer cancel()
	ids, err := initiator.UnitIDs(ctx, s, lun)
	if err == nil && !slices.Contains(ids, g.lu().WWID) {
		err = fmt.Errorf("it leads to another disk, %q", ids)
	}
	return err
}

// fenceOwn ends the path's epochs on its own new session, before it serves. t is
// the turn that the login had, which ends here.
func (p *Path) fenceOwn(ctx context.Context, s Session, t *turn) (err error) {
	for _, e := range p.g.ledger.of(p.Name) {
		if !t.taken() {
			if t, err = p.g.fenceTurn(ctx, p.Target); err != nil {
				return err
			}
		}
		replaced := p.g.cfg().replaced
		err = p.g.drainUnit(ctx, s, e, p.LUN, p.trustFor(e), fenceSteps{through: p.Name})
		t.end()
		if errors.Is(err, errUnproven) {
			p.g.log.Warn("path waits: its old session is not proven to be over", "path", p.Name, "cause", err)
			select {
			case <-e.fenced:
				err = nil
			case <-replaced: // what it waits for may not come any more
			case <-s.Done():
			case <-ctx.Done():
			}
		}
		if err != nil {
			return err
		}
	}
	t.end()
	return nil
}
