package paths

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/initiator"
)

// Trust is what the self-test at bring-up found about a target.
type Trust string

// The classes of targets.
const (
	Untested   Trust = ""           // no second login was possible
	Reinstates Trust = "reinstates" // a login with the same ISID ends the old session; what its backend still does must be awaited by a reset
	Waits      Trust = "waits"      // the operator knows that such a login waits for the backend too (Config.Waits)
	Drops      Trust = "drops"      // as Reinstates, and the reset ends other sessions of this initiator too, see Targets
	Untrusted  Trust = "untrusted"  // it does not
)

const (
	reinstateTime = time.Second // in which a reinstated session must be gone
	selfTests     = 2           // a session that ends by chance does so once
)

// selfTest logs in a second time with the path's ISID and looks whether the
// first session ends: through the portals of sibling paths, which can then
// fence this path and be fenced through it, and through the path's own. It
// takes s and returns the session to use. An error says that the network
// spoilt the test.
func (p *Path) selfTest(ctx context.Context, s Session) (Session, error) {
	var powerOns atomic.Int32
	heard := func(s Session, err error) (Session, error) {
		if err == nil {
			hear(s, p.LUN, func() { powerOns.Add(1); p.lostPower() })
		}
		return s, err
	}
	heard(s, nil)
	for _, q := range p.siblings() {
		f, ended, err := p.ends(ctx, s, func() (Session, error) { return heard(p.loginAt(ctx, q.Portal)) })
		if errors.Is(err, errSpoilt) {
			return nil, err
		}
		if err != nil {
			continue
		}
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
	trust, saysPower := Reinstates, true
	for range selfTests {
		before := powerOns.Load()
		again, ended, err := p.ends(ctx, s, func() (Session, error) { return heard(p.login(ctx)) })
		if err != nil {
			s.Abort(errSelfTest)
			<-s.Done()
			return nil, err
		}
		saysPower = saysPower && powerOns.Load() > before // while the session before it lived
		if !ended {
			s.Abort(errSelfTest)
			<-s.Done()
			p.g.log.Warn("the target does not end a session when its initiator logs in anew: late writes cannot be ruled out by fencing", "path", p.Name, "target", p.Target)
			trust = Untrusted
		}
		if s = again; !ended {
			break
		}
	}
	trust = p.class(trust != Untrusted)
	if saysPower {
		p.retractLoss()
	}
	p.set(func() {
		p.trust, p.nexus, p.taken = trust, nexusOf(s), false
		for q := range p.via {
			if trust == Untrusted && p.via[q] { // what ended a session there was something else
				p.via[q], q.via[p] = false, false
			}
		}
	})
	p.announceClass(trust)
	return s, nil
}

// class is that of a target which ends old sessions, or does not.
func (p *Path) class(ends bool) Trust {
	switch {
	case !ends:
		return Untrusted
	case p.g.cfg().Waits:
		return Waits
	case p.g.targets.endsSessions(p.Target):
		return Drops // a test would be a reset: it is not made for curiosity
	}
	return Reinstates
}

func (p *Path) announceClass(c Trust) {
	if before := p.g.cfg().Classes[p.Target]; before != "" && before != c {
		p.g.log.Warn("the target is of another class than it was", "path", p.Name, "target", p.Target, "was", before, "is", c)
	}
	if f := p.g.cfg().OnClass; f != nil {
		f(p.Target, c)
	}
}

// Tested is what the self-test found about a path.
type Tested struct {
	Target    string          `json:"target"`
	Nexus     string          `json:"nexus"` // see nexusOf
	Trust     Trust           `json:"trust"`
	SaysPower bool            `json:"says_power,omitempty"` // its unit says at every login that it lost its power
	Ends      map[string]bool `json:"ends,omitempty"`       // whether a login at that path's portal ends this one's session
}

// Tested is what the self-test found about each path that passed through it, by
// name: Config.Tested of a run that goes on where this one stops.
func (g *Group) Tested() map[string]Tested {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := map[string]Tested{}
	for _, p := range g.paths {
		if p.trust == Untested || p.nexus == "" {
			continue
		}
		t := Tested{p.Target, p.nexus, p.trust, p.saysPower, map[string]bool{}}
		for q, ends := range p.via {
			t.Ends[q.Name] = ends
		}
		out[p.Name] = t
	}
	return out
}

// testedFor is how long after its beginning a run believes the one before it.
const testedFor = time.Minute

// takeTest takes what the run before found about the path in place of a test of its
// own, if s has led to the same nexus and nothing else is to be found out: paths
// that are up and that it did not know, or one that is being tested. done must be
// called when the path serves, or does not: a test waits for that.
func (p *Path) takeTest(s Session) (done func(), ok bool) {
	g := p.g
	known := g.cfg().Tested
	t, ok := known[p.Name]
	if !ok || time.Since(g.begun) > testedFor || t.Target != p.Target || t.Nexus == "" || t.Nexus != nexusOf(s) || t.Trust == Untested || len(g.ledger.of(p.Name)) > 0 {
		return nil, false
	}
	select {
	case g.testing <- struct{}{}:
		defer func() { <-g.testing }()
	default:
		return nil, false
	}
	for _, q := range p.siblings() {
		if _, ok := t.Ends[q.Name]; !ok {
			return nil, false
		}
	}
	c := p.class(t.Trust != Untrusted)
	if t.SaysPower {
		p.retractLoss()
	}
	g.taking.Add(1)
	p.set(func() {
		p.trust, p.taken = c, true
		for _, q := range g.paths {
			ends, ok := t.Ends[q.Name]
			if ok && q.taken && q.Target == p.Target && q.Portal != p.Portal {
				p.via[q], q.via[p] = ends, known[q.Name].Ends[p.Name]
			}
		}
	})
	p.announceClass(c)
	return sync.OnceFunc(func() { g.taking.Add(-1) }), true
}

// testTurn waits until no other path is tested and those of takeTest are up: each test
// then finds the paths before it.
func (g *Group) testTurn(ctx context.Context) (done func(), err error) {
	select {
	case g.testing <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	for g.taking.Load() > 0 {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			<-g.testing
			return nil, ctx.Err()
		}
	}
	return sync.OnceFunc(func() { <-g.testing }), nil
}

var errSpoilt = errors.New("fence self-test: the session was lost to something else than the second login")

// ends opens another session and tells whether that ended s. Both answers are
// proven: s must answer just before, and must then be closed from the other
// side, by itself or when it is spoken to, while the new session answers, or
// still answer itself. The new session
// is the caller's, s too unless errSpoilt is returned.
func (p *Path) ends(ctx context.Context, s Session, open func() (Session, error)) (_ Session, ended bool, _ error) {
	spoilt := func() error {
		s.Abort(errSelfTest)
		<-s.Done()
		return errSpoilt
	}
	if !p.answers(ctx, s) {
		return nil, false, spoilt()
	}
	f, err := open()
	if err != nil {
		return nil, false, err
	}
	if ended = within(s, reinstateTime); !ended {
		if p.answers(ctx, s) {
			return f, false, nil
		}
		// istgt serves an ended session no more, but looks at its connection only
		// when something arrives there or 3 s have passed.
		ended = within(s, reinstateTime)
	}
	cause, _ := s.(interface{ Err() error })
	if !ended || cause != nil && !initiator.ClosedByTarget(cause.Err()) || !p.answers(ctx, f) {
		f.Abort(errSelfTest)
		<-f.Done()
		return nil, false, spoilt()
	}
	return f, true, nil
}

// answers tells whether the unit answers on s.
func (p *Path) answers(ctx context.Context, s Session) bool {
	ctx, cancel := context.WithTimeout(ctx, reinstateTime)
	defer cancel()
	err := initiator.TestUnitReady(ctx, s, p.LUN)
	var status *initiator.StatusError
	return err == nil || errors.As(err, &status)
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

// siblings are the other paths to the same target name that are up and whose
// portal can be logged in to.
func (p *Path) siblings() (out []*Path) {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	for _, q := range p.g.paths {
		if q != p && q.OpenAt != nil && q.Target == p.Target && q.Portal != p.Portal && q.up {
			out = append(out, q)
		}
	}
	return out
}

// classLocked is what is known of the path's target: by the self-test, or from
// an earlier run while there was none. Caller holds Group.mu.
func (p *Path) classLocked() Trust {
	switch {
	case p.trust == Untested:
		return p.g.cfg().Classes[p.Target]
	case p.trust == Reinstates && p.g.targets.endsSessions(p.Target):
		return Drops
	}
	return p.trust
}

// provenClass is that of a target whose portals proved able to end a session.
func (g *Group) provenClass() Trust {
	if g.cfg().Waits {
		return Waits
	}
	return Reinstates
}
