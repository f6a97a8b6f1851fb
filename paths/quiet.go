package paths

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/initiator"
)

// Targets is what the maps of a process know together of the targets behind
// their paths. LOGICAL UNIT RESET should end commands and nothing else. Some
// targets (istgt) end every other session of the same initiator with it. With
// writes under way those sessions are old sessions to be fenced, by a reset that
// ends the next ones, and so on for ever. There the maps let what is under way
// end first, and wait: a reset then meets sessions without writes.
type Targets struct {
	mu     sync.Mutex
	groups map[*Group]bool
	known  map[string]*knownTarget
}

type knownTarget struct {
	turn   chan struct{} // held by a fence of a target whose reset ends sessions
	resets int           // under way
	begun  int           // resets ever
	reset  time.Time     // end of the last one
	ends   bool          // a reset ends sessions
	told   bool          // a reset was told to other sessions
}

// NewTargets is for Config.Targets.
func NewTargets() *Targets {
	return &Targets{groups: map[*Group]bool{}, known: map[string]*knownTarget{}}
}

const (
	resetEcho   = 2 * time.Second // after a reset, in which an end that it caused is seen
	quietTime   = 5 * time.Second // for what is under way, before a reset goes ahead all the same
	quietReturn = 5 * time.Second // for a path to come back after a reset
	quietPoll   = 2 * time.Millisecond
	turnLogin   = 2 * time.Second // of a fence's turn, for a login: istgt takes one

	pauseTime  = time.Second            // before a reset, for what is under way in its unit
	pauseReset = 100 * time.Millisecond // for a reset to reach it
)

// of is what is known of a target. Caller holds mu.
func (ts *Targets) of(target string) *knownTarget {
	k := ts.known[target]
	if k == nil {
		k = &knownTarget{turn: make(chan struct{}, 1)}
		ts.known[target] = k
	}
	return k
}

// endsSessions tells whether a reset is known to end sessions of the target.
func (ts *Targets) endsSessions(target string) bool {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	return ts.of(target).ends
}

// remember sets what endsSessions tells, and tells whether that is news.
func (ts *Targets) remember(target string, ends bool) bool {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	k := ts.of(target)
	news := k.ends != ends
	k.ends = ends
	return news
}

// others are the groups with paths to a target.
func (ts *Targets) others(target string) (out []*Group) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for g := range ts.groups {
		for _, p := range *g.everyPath.Load() {
			if p.Target == target {
				out = append(out, g)
				break
			}
		}
	}
	return out
}

// blame looks at a session that its target closed: if a reset of ours was under
// way, or just over, that was it. One that was not in service yet may have been
// ended by the fence's login for this very path.
func (p *Path) blame(cause error) {
	p.g.mu.Lock()
	up := p.up
	p.g.mu.Unlock()
	if !up || !initiator.ClosedByTarget(cause) {
		return
	}
	ts := p.g.targets
	ts.mu.Lock()
	k := ts.of(p.Target)
	caused := k.resets > 0 || !k.reset.IsZero() && time.Since(k.reset) < resetEcho
	ts.mu.Unlock()
	if caused {
		p.g.endsSessions(p.Target, "path", p.Name)
	}
}

// turn is held by the one fence that may log in to a target whose reset ends
// sessions, and reset it. nil is none.
type turn struct {
	of   chan struct{}
	over atomic.Bool
}

func (t *turn) taken() bool { return t != nil && !t.over.Load() }

// end may be called more than once.
func (t *turn) end() {
	if t != nil && !t.over.Swap(true) {
		<-t.of
	}
}

// fenceTurn waits for the turn of a fence: without turns they would end each
// other's sessions. Other targets need none.
func (g *Group) fenceTurn(ctx context.Context, target string) (*turn, error) {
	if !g.targets.endsSessions(target) {
		return nil, ctx.Err()
	}
	g.targets.mu.Lock()
	t := &turn{of: g.targets.of(target).turn}
	g.targets.mu.Unlock()
	err := ctx.Err()
	select {
	case t.of <- struct{}{}:
		if err = ctx.Err(); err == nil {
			return t, nil
		}
		t.end()
	case <-ctx.Done():
		err = ctx.Err()
	}
	return nil, fmt.Errorf("another fence through this target does not end: %w", err)
}

// loginTurn waits for the turn of a login that ends an old session to be fenced.
// Other portals have the first try, for this one may be the hung one. Logins with
// nothing to fence only let a fence be over: they gain nothing in a target that
// answers nobody meanwhile. Nor have those through a silent portal a turn.
func (p *Path) loginTurn(ctx context.Context) (*turn, error) {
	if !p.g.targets.endsSessions(p.Target) {
		return nil, ctx.Err()
	}
	ways := p.g.alive(p.ways())
	if len(ways) > 0 {
		first, stop := context.WithTimeout(ctx, quietTime)
		defer stop()
		for _, e := range p.g.ledger.of(p.Name) {
			select {
			case <-e.fenced:
			case <-e.tried:
			case <-first.Done():
			}
		}
	}
	t, err := p.g.fenceTurn(ctx, p.Target)
	p.g.mu.Lock()
	silent := p.silent
	p.g.mu.Unlock()
	if len(p.g.ledger.of(p.Name)) == 0 || silent && len(ways) > 0 {
		t.end()
	}
	return t, err
}

// alive are the ways whose portals are not known to be silent, or all.
func (g *Group) alive(ways []fenceWay) []fenceWay {
	silent := map[string]bool{}
	g.mu.Lock()
	for _, q := range g.paths {
		silent[q.Portal] = silent[q.Portal] || q.silent
	}
	g.mu.Unlock()
	alive := slices.DeleteFunc(slices.Clone(ways), func(w fenceWay) bool { return silent[w.portal] })
	if len(alive) == 0 {
		return ways
	}
	return alive
}

// setSilent takes note of whether a portal answers logins.
func (g *Group) setSilent(portal string, silent bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, q := range g.paths {
		if q.Portal == portal {
			q.silent = silent
		}
	}
}

// resetUnit sends LOGICAL UNIT RESET and awaits it.
func (g *Group) resetUnit(ctx context.Context, r resetter, e *epoch, lun [8]byte) error {
	target := g.targetOf(e)
	if !g.targets.endsSessions(target) {
		resume := g.pause(ctx)
		defer resume()
		defer time.AfterFunc(pauseReset, resume).Stop() // what comes later it does not meet
		return g.announceReset(ctx, r, e, lun)
	}
	hushed, met := g.hush(ctx, target)
	err := g.announceReset(ctx, r, e, lun)
	if err == nil && len(met) > 0 && !anyEnded(met) && g.targets.remember(target, false) {
		g.log.Info("the target does not end other sessions any more when a unit is reset", "target", target)
		if f := g.cfg().OnClass; f != nil {
			f(target, Reinstates)
		}
	}
	g.routines.Add(1)
	go func() { // the caller goes on: what it waits for is over
		defer g.routines.Done()
		for _, o := range hushed {
			o.unhush(target)
		}
	}()
	return err
}

// pause lets the map start no I/O, and waits for what is under way on paths that
// answer. LIO (Linux 6.1) drops a write that a reset meets while it waits for its
// data, and then the reset waits for that write: both, the unit, and logins had no
// answer until the write's session was given up, 30 s later.
func (g *Group) pause(ctx context.Context) (resume func()) {
	var targets []string
	for _, p := range *g.everyPath.Load() {
		if !slices.Contains(targets, p.Target) {
			targets = append(targets, p.Target)
		}
	}
	g.still(targets...)
	ctx, cancel := context.WithTimeout(ctx, pauseTime)
	defer cancel()
	untilQuiet(ctx, nil, func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return slices.ContainsFunc(*g.everyPath.Load(), func(p *Path) bool { return !p.suspect && p.load.InFlight.Load() > 0 })
	})
	return sync.OnceFunc(func() { g.speak(targets...) })
}

// still lets the map start no I/O to targets until as many calls of speak.
func (g *Group) still(targets ...string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, t := range targets {
		g.quiet[t]++
	}
	g.publish()
}

// speak takes back one call of still, and starts what waited.
func (g *Group) speak(targets ...string) {
	g.mu.Lock()
	for _, t := range targets {
		if g.quiet[t]--; g.quiet[t] <= 0 {
			delete(g.quiet, t)
		}
	}
	g.publish()
	g.mu.Unlock()
	g.restart()
}

// untilQuiet waits until something is busy no more, for as long as ctx lasts, and
// until over is closed, if it is not nil.
func untilQuiet(ctx context.Context, over <-chan struct{}, busy func() bool) {
	for busy() && ctx.Err() == nil {
		select {
		case <-over:
			return
		case <-ctx.Done():
		case <-time.After(quietPoll):
		}
	}
}

// witness is a session that hears of a reset of its unit.
type witness struct {
	p *Path
	s Session
}

// witnesses are the sessions that a reset of e's unit, if it is sent now, must be
// told to: those that serve, on paths that the self-test found to be on the same
// server. A session that begins later may have missed it.
func (g *Group) witnesses(e *epoch) (out []witness) {
	if e.path == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for q, ends := range e.path.via {
		box := q.current.Load()
		if !ends || box == nil {
			continue
		}
		if _, ok := box.Session.(noticer); ok {
			out = append(out, witness{q, box.Session})
		}
	}
	return out
}

// resetTold tells whether a reset that was answered after since took place, as far
// as other sessions know: each gets a unit attention 29h (SAM-5 5.14), or is
// ended. asked is how many of the witnesses could have told. A target that once
// passed is believed.
func (g *Group) resetTold(ctx context.Context, target string, of []witness, since time.Time) (told bool, asked int) {
	ts := g.targets
	ts.mu.Lock()
	k := ts.of(target)
	known := k.told || k.ends
	ts.mu.Unlock()
	if known {
		return true, 0
	}
	ctx, cancel := context.WithTimeout(ctx, reinstateTime)
	defer cancel()
	for _, w := range of {
		if told = w.p.heardReset.Load() >= since.UnixNano(); told {
			break
		}
		err := initiator.TestUnitReady(ctx, w.s, w.p.LUN)
		if told = w.p.heardReset.Load() >= since.UnixNano(); told {
			break
		}
		var refused *initiator.StatusError
		if err == nil || errors.As(err, &refused) {
			asked++
		}
	}
	if told {
		ts.mu.Lock()
		k.told = true
		ts.mu.Unlock()
	}
	return told, asked
}

// announceReset makes ends of sessions meanwhile count as caused by it. Its own
// session may be one of them, if another fence sends a reset at the same time:
// without taking turns two fences would end each other for ever. A login with the
// same identity ends it too, and says nothing.
func (g *Group) announceReset(ctx context.Context, s resetter, e *epoch, lun [8]byte) error {
	ts, target, p := g.targets, g.targetOf(e), g.pathOf(e)
	var before int32
	if p != nil {
		before = p.loginsEnded.Load()
	}
	ts.mu.Lock()
	k := ts.of(target)
	k.resets++
	k.begun++
	nth := k.begun
	ts.mu.Unlock()
	err := s.LUReset(ctx, lun)
	ts.mu.Lock()
	k.resets--
	k.reset = time.Now()
	another := k.begun > nth
	ts.mu.Unlock()
	contested := p != nil && p.loginsBegun.Load() > before
	if another && !contested && initiator.ClosedByTarget(err) {
		g.endsSessions(target)
	}
	return err
}

// endsSessions takes note of a target whose reset has ended another session.
func (g *Group) endsSessions(target string, which ...any) {
	if !g.targets.remember(target, true) {
		return
	}
	g.log.Warn("the target ends other sessions when a unit is reset: I/O to it will wait while old sessions are fenced; if its login waits for what its backend still does, `reinstatement_waits yes` avoids that",
		append([]any{"target", target}, which...)...)
	if f := g.cfg().OnClass; f != nil {
		f(target, Drops)
	}
}

// hush lets no map start I/O to the target, and waits for what is under way.
// It returns those maps and the sessions that the reset will meet.
func (g *Group) hush(ctx context.Context, target string) (hushed []*Group, met []Session) {
	hushed = g.targets.others(target)
	for _, o := range hushed {
		o.still(target)
	}
	ctx, cancel := context.WithTimeout(ctx, quietTime)
	defer cancel()
	untilQuiet(ctx, nil, func() bool {
		return slices.ContainsFunc(hushed, func(o *Group) bool {
			return slices.ContainsFunc(*o.everyPath.Load(), func(p *Path) bool { return p.Target == target && p.load.InFlight.Load() > 0 })
		})
	})
	for _, o := range hushed {
		for _, p := range *o.everyPath.Load() {
			if box := p.current.Load(); box != nil && p.Target == target {
				met = append(met, box.Session)
			}
		}
	}
	return hushed, met
}

// anyEnded tells whether one of the sessions is over, or is so soon.
func anyEnded(met []Session) bool {
	for end := time.Now().Add(reinstateTime); time.Now().Before(end); time.Sleep(quietPoll) {
		for _, s := range met {
			select {
			case <-s.Done():
				return true
			default:
			}
		}
	}
	return false
}

// unhush lets I/O go on when a path is there for it. A session that the reset
// has ended counts as up until that is noticed: each is asked first, or the writes
// that it loses would call for the next reset.
func (g *Group) unhush(target string) {
	var asked sync.WaitGroup
	for _, p := range *g.everyPath.Load() {
		if box := p.current.Load(); box != nil && p.Target == target {
			asked.Go(func() { p.answers(stopContext{g.stop}, box.Session) })
		}
	}
	asked.Wait()
	for end := time.Now().Add(quietReturn); len(g.table.Load().all) == 0 && time.Now().Before(end); {
		select {
		case <-g.stop:
			end = time.Now()
		case <-time.After(quietPoll):
		}
	}
	g.speak(target)
}
