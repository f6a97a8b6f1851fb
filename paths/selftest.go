package paths

import (
	"context"
	"errors"
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
	switch {
	case trust == Reinstates && p.g.cfg().Waits:
		trust = Waits
	case trust == Reinstates && p.g.targets.endsSessions(p.Target):
		trust = Drops // a test would be a reset: it is not made for curiosity
	}
	if saysPower {
		p.retractLoss()
	}
	p.set(func() {
		p.trust, p.nexus = trust, nexusOf(s)
		for q := range p.via {
			if trust == Untrusted && p.via[q] { // what ended a session there was something else
				p.via[q], q.via[p] = false, false
			}
		}
	})
	if before := p.g.cfg().Classes[p.Target]; before != "" && before != trust {
		p.g.log.Warn("the target is of another class than it was", "path", p.Name, "target", p.Target, "was", before, "is", trust)
	}
	if f := p.g.cfg().OnClass; f != nil {
		f(p.Target, trust)
	}
	return s, nil
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
