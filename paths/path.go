package paths

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/checker"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
	"github.com/mpathd/mpathd/selector"
)

// Path is one way to the logical unit: a session and the attempts on it. Its
// goroutine connects, verifies, checks and connects again; it shares no queue
// and no timer with other paths.
type Path struct {
	PathConfig
	g     *Group
	index int
	load  selector.Load
	wake  chan struct{}
	quit  chan struct{} // closed when the group closes or the path is removed
	gone  chan struct{} // closed when routine ended

	dirty         atomic.Bool // took writes since its last cache flush
	sync10        atomic.Bool // knows only SYNCHRONIZE CACHE (10)
	ios           atomic.Int64
	errors        atomic.Int64
	read, written atomic.Int64 // bytes
	failures      atomic.Int64
	latency       histogram
	blamed        atomic.Bool // an I/O failed the path, not its session

	amu      sync.Mutex
	free     *attempt
	attempts []attempt
	lost     []lost // see lose

	// Guarded by Group.mu.
	session      Session
	current      atomic.Pointer[sessionBox] // what attempts use; nil: not serving
	up           bool                       // logged in, verified, checker content
	suspect      bool
	failedByHand bool
	wrongLU      bool // answers as another disk: never served again by itself
	checkState   checker.State
	lastError    string
	trust        Trust
	via          map[*Path]bool // whose portal can end this path's session: tried, and the answer
	stopVia      func()         // ends fencing through other portals and waits
	recheck      chan struct{}  // see doubt
	rerank       chan struct{}  // asks for the priority anew
	prio         int            // unknownPrio until asked
	access       int            // asymmetric access state, accessUnknown without
	activated    bool           // an explicit transition was tried since this group was chosen
	delayed      bool           // logged in, but kept for when nothing else is left
	seen         bool           // was up once
	serial       string
	blocks       uint64 // capacity as last seen through this path
	portGroup    int
	strikes      int       // I/Os that failed this path, see probation
	struck       time.Time // the last of them
}

type sessionBox struct{ Session }

func newPath(g *Group, pc PathConfig, index int) *Path {
	p := &Path{PathConfig: pc, g: g, index: index, wake: make(chan struct{}, 1), quit: make(chan struct{}), gone: make(chan struct{}), recheck: make(chan struct{}, 1), rerank: make(chan struct{}, 1), prio: unknownPrio, access: accessUnknown, portGroup: -1, checkState: checker.Pending}
	p.via = map[*Path]bool{}
	p.attempts = make([]attempt, g.cfg().QueueDepth)
	for i := range p.attempts {
		a := &p.attempts[i]
		a.path = p
		a.cmd.Owner = a
		a.next = p.free
		p.free = a
	}
	return p
}

// usable tells whether I/O may go here. Caller holds Group.mu.
func (p *Path) usable() bool { return p.up && !p.failedByHand && !p.wrongLU }

// take returns an attempt and the session to use it on, or nil.
func (p *Path) take() (*attempt, Session) {
	box := p.current.Load()
	if box == nil {
		return nil, nil
	}
	p.amu.Lock()
	a := p.free
	if a != nil {
		p.free = a.next
	}
	p.amu.Unlock()
	if a == nil {
		return nil, nil
	}
	return a, box.Session
}

func (p *Path) give(a *attempt) {
	p.amu.Lock()
	a.next = p.free
	p.free = a
	p.amu.Unlock()
}

// failIO fails the path because of what an I/O met: evidence that outranks any
// checker. The path logs in and proves itself again.
func (p *Path) failIO(r *initiator.Result) {
	cause := r.Err
	if cause == nil {
		cause = errIOFailed
	}
	if box := p.current.Swap(nil); box != nil {
		p.blamed.Store(true)
		box.Abort(cause) // only closes; the session's end reports it
	}
}

// doubt takes the path out of service until its unit has proved again that it
// is the map's disk. It never waits.
func (p *Path) doubt() {
	p.current.Store(nil)
	select {
	case p.recheck <- struct{}{}:
	default:
	}
}

// passDirt makes a live path to the same target answer for what this dead one
// left in the target's cache.
func (p *Path) passDirt() {
	if !p.dirty.Load() {
		return
	}
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	for _, q := range p.g.table.Load().all {
		if tried, ok := p.via[q]; q != p && (p.Target == q.Target && (tried || !ok) || p.g.cfg().Replicated) {
			q.dirty.Store(true)
			p.dirty.Store(false)
			return
		}
	}
}

var errIOFailed = errors.New("I/O on this path was refused in a way that blames the path")

// set changes the path's state under the group's lock and publishes.
func (p *Path) set(f func()) {
	p.g.mu.Lock()
	f()
	p.g.publish()
	p.g.mu.Unlock()
	p.g.restart()
}

// onState hears from the session; Dead comes before its commands come back.
func (p *Path) onState(st initiator.State, cause error) {
	switch st {
	case initiator.Suspect:
		p.g.log.Warn("path is suspect", "path", p.Name, "cause", cause)
		p.set(func() { p.suspect = true })
	case initiator.Up:
		p.set(func() { p.suspect = false })
	case initiator.Dead:
		p.current.Store(nil)
		p.set(func() {
			if p.up && !p.g.closed {
				p.failures.Add(1)
				p.g.log.Warn("path failed", "path", p.Name, "cause", cause)
			}
			p.up, p.suspect = false, false
			p.checkState = checker.Down
			if !p.failedByHand {
				p.lastError = cause.Error()
			}
		})
	}
}

func (p *Path) onRoom(plug *block.Plug) { p.g.drain(plug) }

// Reconnect backs off from 50 ms to 1 s, with jitter, so that many paths do
// not knock at once on a target that comes back; a login that only a change of
// configuration can mend is tried every backoffRefused.
const (
	backoffMin     = 50 * time.Millisecond
	backoffMax     = time.Second
	backoffRefused = 30 * time.Second
)

// routine is the path's life.
func (p *Path) routine() {
	defer p.g.routines.Done()
	defer close(p.gone)
	backoff := backoffMin
	logged := ""
	for {
		p.g.mu.Lock()
		held := p.failedByHand || p.wrongLU
		p.g.mu.Unlock()
		if held {
			select {
			case <-p.wake:
				continue
			case <-p.quit:
				return
			}
		}
		served, err := p.serve()
		if err != nil {
			if err.Error() != logged {
				logged = err.Error()
				p.g.log.Warn("path does not come up", "path", p.Name, "cause", err)
			}
			p.set(func() { p.lastError = err.Error() })
		}
		if served > 0 {
			logged = ""
		}
		if served > 5*time.Second {
			backoff = backoffMin
		}
		var login *initiator.LoginError
		if errors.As(err, &login) && login.Permanent() {
			backoff = backoffRefused
		}
		wait := backoff/2 + rand.N(backoff)
		backoff = min(2*backoff, backoffMax)
		select {
		case <-time.After(wait):
		case <-p.wake:
			backoff = backoffMin
		case <-p.quit:
			return
		}
	}
}

// serve connects, verifies and serves until the session ends. It returns how
// long it served, or why it did not.
func (p *Path) serve() (time.Duration, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stopped := context.AfterFunc(stopContext{p.quit}, cancel)
	defer stopped()
	s, err := p.Open(ctx, p.onState, p.onRoom)
	if err != nil {
		return 0, err
	}
	p.g.mu.Lock()
	untested := p.trust == Untested && p.OpenAt != nil
	p.g.mu.Unlock()
	p.endVia()
	tested := func() {}
	if untested {
		// One path at a time, until it serves: each then finds those before it.
		select {
		case p.g.testing <- struct{}{}:
			tested = sync.OnceFunc(func() { <-p.g.testing })
			defer tested()
		case <-ctx.Done():
			s.Abort(ctx.Err())
			<-s.Done()
			return 0, ctx.Err()
		}
		if s, err = p.selfTest(ctx, s); err != nil {
			return 0, err
		}
	}
	defer func() {
		<-s.Done()
		p.settle()
	}()
	var info *initiator.LUInfo
	state := checker.Up
	if err = p.fenceOwn(ctx, s); err == nil {
		info, state, err = p.verify(ctx, s)
	}
	if err != nil {
		s.Abort(err)
		for _, e := range p.g.ledger.of(p.Name) {
			p.g.startVia(e, p.LUN, p.ways())
		}
		return 0, err
	}
	if p.g.cfg().OnRisk != nil {
		p.g.cfg().OnRisk(p.Name, true, p.portals())
		for _, q := range p.siblings() {
			if untested { // they can now be fenced through this path too
				p.g.cfg().OnRisk(q.Name, true, q.portals())
			}
		}
	}
	p.rank(ctx, s, info)
	release := p.probation()
	defer release()
	began := time.Now()
	p.set(func() {
		p.session = s
		p.suspect = false
		p.checkState = state
		select {
		case <-s.Done():
		default:
			p.current.Store(&sessionBox{s})
			p.up, p.seen = true, true
			p.lastError = ""
			p.g.log.Info("path is up", "path", p.Name)
		}
	})
	tested()
	p.g.regrow()
	p.watch(ctx, s, info)
	return time.Since(began), nil
}

// verify proves that the path leads to the map's own disk, flushes what it may
// hold unflushed, and checks it.
func (p *Path) verify(ctx context.Context, s Session) (*initiator.LUInfo, checker.State, error) {
	ctx, cancel := context.WithTimeout(ctx, p.g.cfg().CheckTimeout)
	defer cancel()
	info, err := initiator.Identify(ctx, s, p.LUN)
	if err != nil {
		return nil, checker.Down, err
	}
	if err := p.fits(info); err != nil {
		err = fmt.Errorf("identity changed, the path is out until reinstated by hand: %w", err)
		p.set(func() { p.wrongLU = true })
		return nil, checker.Down, err
	}
	p.g.mu.Lock()
	p.serial, p.blocks = info.Serial, info.Blocks
	if _, group, ok := scsi.TargetPort(info.Designators); ok {
		p.portGroup = int(group)
	}
	p.g.mu.Unlock()
	if p.dirty.Load() && info.WriteCache {
		var cdb scsi.CDB
		scsi.SyncCache(&cdb, 0, 0, info.Use16 && !p.sync10.Load())
		c := &initiator.Command{LUN: p.LUN, CDB: cdb}
		if err := s.Do(ctx, c); err != nil {
			return nil, checker.Down, err
		}
		if c.Result.Status == scsi.StatusGood {
			p.dirty.Store(false)
		}
	}
	v := p.check(ctx, s, info.Standby)
	if v.State != checker.Up && v.State != checker.Ghost {
		return nil, v.State, fmt.Errorf("checker %s: %s: %w", p.g.cfg().checker.Name(), v.State, v.Err)
	}
	return info, v.State, nil
}

// A path that I/O failed although its session and its checker were content
// comes back at once the first time; then it waits longer and longer while
// others serve, so that it cannot draw I/O again and again.
const (
	probationMin    = 2 * time.Second
	probationMax    = time.Minute
	probationForget = 10 * time.Minute
)

// probation delays the path if its I/O keeps failing. The function that it
// returns ends that; it is called when the session ends.
func (p *Path) probation() (release func()) {
	p.g.mu.Lock()
	if p.blamed.Swap(false) {
		if time.Since(p.struck) > probationForget {
			p.strikes = 0
		}
		p.strikes++
		p.struck = time.Now()
	}
	wait := time.Duration(0)
	if p.strikes > 1 && time.Since(p.struck) < probationForget {
		wait = min(probationMin<<min(p.strikes-2, 10), probationMax) - time.Since(p.struck)
	}
	p.delayed = wait > 0
	p.g.mu.Unlock()
	if wait <= 0 {
		return func() {}
	}
	p.g.log.Warn("path delayed: its I/O failed repeatedly although it answers", "path", p.Name, "for", wait, "failures", p.strikes)
	t := time.AfterFunc(wait, func() { p.set(func() { p.delayed = false }) })
	return func() {
		t.Stop()
		p.set(func() { p.delayed = false })
	}
}

// check runs the checker. A path in standby is never read: that could make an
// array move the unit.
func (p *Path) check(ctx context.Context, s Session, standby bool) checker.Verdict {
	ctx, cancel := context.WithTimeout(ctx, p.g.cfg().CheckTimeout)
	defer cancel()
	chk := p.g.cfg().checker
	p.g.mu.Lock()
	if standby || p.access != accessUnknown && p.access != int(scsi.ActiveOptimized) {
		chk = checker.TUR
	}
	p.g.mu.Unlock()
	return chk.Check(ctx, checker.LU{Doer: s, LUN: p.LUN, BlockSize: p.g.lu().BlockSize, Use16: p.g.lu().Use16})
}

// watch runs the checker until the session ends or the group stops.
func (p *Path) watch(ctx context.Context, s Session, info *initiator.LUInfo) {
	iv := checker.Interval{}
	next := func(steady bool) time.Duration {
		c := p.g.cfg() // it may have changed
		iv.Min, iv.Max = c.PollingInterval, c.MaxPollingInterval
		return iv.Next(steady)
	}
	wait := next(false)
	for {
		select {
		case <-s.Done():
			return
		case <-p.quit:
			// Commands in flight come back first, within the failover time.
			stop, cancel := context.WithTimeout(context.Background(), 3*time.Second)
			defer cancel()
			s.Close(stop)
			return
		case <-p.rerank:
			p.rankAndPublish(ctx, s, info)
			continue
		case <-p.recheck:
			seen, state, err := p.verify(ctx, s)
			if err != nil {
				p.giveUp(s, err)
				return
			}
			info = seen
			p.rank(ctx, s, info)
			p.set(func() {
				select {
				case <-s.Done():
				default:
					p.current.Store(&sessionBox{s})
					p.up, p.checkState = true, state
				}
			})
			p.g.regrow()
			for _, q := range *p.g.everyPath.Load() {
				if q.sees() < info.Blocks { // the others hear of it when they are asked
					q.doubt()
				}
			}
			continue
		case <-time.After(wait):
		}
		v := p.check(ctx, s, false)
		p.g.mu.Lock()
		was := p.checkState
		p.g.mu.Unlock()
		changed := v.State != was
		if changed && v.State == checker.Up && was == checker.Ghost { // it tells its size now: prove it
			seen, state, err := p.verify(ctx, s)
			if err != nil {
				p.giveUp(s, err)
				return
			}
			info, v.State = seen, state
		}
		if changed && v.State != checker.Pending {
			p.g.log.Warn("checker changed its mind", "path", p.Name, "checker", p.g.cfg().checker.Name(), "state", v.State, "cause", v.Err)
			p.set(func() {
				p.checkState = v.State
				p.up = v.State == checker.Up || v.State == checker.Ghost
				if v.Err != nil {
					p.lastError = v.Err.Error()
				}
				select {
				case <-s.Done():
					p.up = false
				default:
				}
			})
		}
		if v.State == checker.Up || v.State == checker.Ghost {
			p.rankAndPublish(ctx, s, info)
		}
		wait = next(v.State == checker.Up && !changed)
		if v.State == checker.Pending {
			wait = min(wait, time.Second)
		}
	}
}

// rankAndPublish asks for the priority and acts on a change.
func (p *Path) rankAndPublish(ctx context.Context, s Session, info *initiator.LUInfo) {
	if p.rank(ctx, s, info) {
		p.set(func() {})
		p.g.rankOthers(p)
	}
}

// giveUp ends a session whose unit failed its verification.
func (p *Path) giveUp(s Session, err error) {
	s.Abort(err)
	<-s.Done()
	p.set(func() { p.lastError = err.Error() })
}

// stopContext is a context that ends when a channel closes.
type stopContext struct{ c <-chan struct{} }

func (s stopContext) Deadline() (time.Time, bool) { return time.Time{}, false }
func (s stopContext) Done() <-chan struct{}       { return s.c }
func (s stopContext) Value(any) any               { return nil }
func (s stopContext) Err() error {
	select {
	case <-s.c:
		return context.Canceled
	default:
		return nil
	}
}
