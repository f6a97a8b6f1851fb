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

	dirty    atomic.Bool // took writes since its last cache flush
	sync10   atomic.Bool // knows only SYNCHRONIZE CACHE (10)
	ios      atomic.Int64
	errors   atomic.Int64
	failures atomic.Int64
	latency  histogram

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
}

type sessionBox struct{ Session }

func newPath(g *Group, pc PathConfig, index int) *Path {
	p := &Path{PathConfig: pc, g: g, index: index, wake: make(chan struct{}, 1), recheck: make(chan struct{}, 1), checkState: checker.Pending}
	p.via = map[*Path]bool{}
	p.attempts = make([]attempt, g.cfg.QueueDepth)
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
		if tried, ok := p.via[q]; q != p && (p.Target == q.Target && (tried || !ok) || p.g.cfg.Replicated) {
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
	var plug block.Plug
	p.g.unpark(nil, &plug)
	p.g.drain(&plug)
	plug.Flush()
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
			case <-p.g.stop:
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
		case <-p.g.stop:
			return
		}
	}
}

// serve connects, verifies and serves until the session ends. It returns how
// long it served, or why it did not.
func (p *Path) serve() (time.Duration, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stopped := context.AfterFunc(stopContext{p.g.stop}, cancel)
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
	if err = p.fenceOwn(ctx, s); err == nil {
		err = p.verify(ctx, s)
	}
	if err != nil {
		s.Abort(err)
		for _, e := range p.g.ledger.of(p.Name) {
			p.g.startVia(e, p.LUN, p.ways())
		}
		return 0, err
	}
	if p.g.cfg.OnRisk != nil {
		p.g.cfg.OnRisk(p.Name, true, p.portals())
		for _, q := range p.siblings() {
			if untested { // they can now be fenced through this path too
				p.g.cfg.OnRisk(q.Name, true, q.portals())
			}
		}
	}
	began := time.Now()
	p.set(func() {
		p.session = s
		p.suspect = false
		p.checkState = checker.Up
		select {
		case <-s.Done():
		default:
			p.current.Store(&sessionBox{s})
			p.up = true
			p.lastError = ""
			p.g.log.Info("path serves", "path", p.Name)
		}
	})
	tested()
	p.watch(ctx, s)
	return time.Since(began), nil
}

// verify proves that the path leads to the map's own disk, flushes what it may
// hold unflushed, and checks it.
func (p *Path) verify(ctx context.Context, s Session) error {
	ctx, cancel := context.WithTimeout(ctx, p.g.cfg.CheckTimeout)
	defer cancel()
	info, err := initiator.Identify(ctx, s, p.LUN)
	if err != nil {
		return err
	}
	if err := SameLU(p.g.info, info, p.Target, p.Target, true); err != nil {
		err = fmt.Errorf("identity changed, the path is out until reinstated by hand: %w", err)
		p.set(func() { p.wrongLU = true })
		return err
	}
	if p.dirty.Load() && info.WriteCache {
		var cdb scsi.CDB
		scsi.SyncCache(&cdb, 0, 0, info.Use16 && !p.sync10.Load())
		c := &initiator.Command{LUN: p.LUN, CDB: cdb}
		if err := s.Do(ctx, c); err != nil {
			return err
		}
		if c.Result.Status == scsi.StatusGood {
			p.dirty.Store(false)
		}
	}
	if v := p.check(ctx, s); v.State != checker.Up {
		return fmt.Errorf("checker %s: %s: %w", p.g.checker.Name(), v.State, v.Err)
	}
	return nil
}

func (p *Path) check(ctx context.Context, s Session) checker.Verdict {
	ctx, cancel := context.WithTimeout(ctx, p.g.cfg.CheckTimeout)
	defer cancel()
	return p.g.checker.Check(ctx, checker.LU{Doer: s, LUN: p.LUN, BlockSize: p.g.info.BlockSize, Use16: p.g.info.Use16})
}

// watch runs the checker until the session ends or the group stops.
func (p *Path) watch(ctx context.Context, s Session) {
	iv := checker.Interval{Min: p.g.cfg.PollingInterval, Max: p.g.cfg.MaxPollingInterval}
	wait := iv.Next(false)
	for {
		select {
		case <-s.Done():
			return
		case <-p.g.stop:
			// Commands in flight come back first, within the failover time.
			stop, cancel := context.WithTimeout(context.Background(), 3*time.Second)
			defer cancel()
			s.Close(stop)
			return
		case <-p.recheck:
			if err := p.verify(ctx, s); err != nil {
				s.Abort(err)
				<-s.Done()
				p.set(func() { p.lastError = err.Error() })
				return
			}
			p.set(func() {
				select {
				case <-s.Done():
				default:
					p.current.Store(&sessionBox{s})
					p.up, p.checkState = true, checker.Up
				}
			})
			continue
		case <-time.After(wait):
		}
		v := p.check(ctx, s)
		p.g.mu.Lock()
		changed := v.State != p.checkState
		p.g.mu.Unlock()
		if changed && v.State != checker.Pending {
			p.g.log.Warn("checker changed its mind", "path", p.Name, "checker", p.g.checker.Name(), "state", v.State, "cause", v.Err)
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
		wait = iv.Next(v.State == checker.Up && !changed)
	}
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
