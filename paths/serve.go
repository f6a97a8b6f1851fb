package paths

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mpathd/mpathd/checker"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/coalesce"
	"github.com/mpathd/mpathd/scsi"
)

// Reconnect backs off from 50 ms to 1 s, with jitter, so that many paths do
// not knock at once on a target that comes back; to 5 s where the path has been
// down for a minute and nothing waits for it, since hundreds of dead paths would
// cost much of a core otherwise. A login that only a change of configuration can
// mend is tried every backoffRefused to twice that.
const (
	backoffMin     = 50 * time.Millisecond
	backoffMax     = time.Second
	backoffLong    = 5 * time.Second
	longAfter      = time.Minute
	backoffRefused = 30 * time.Second
)

// longestBackoff is how far a path backs off that is down since then. A long one
// ends when no other path is left, see wakeRested.
func (p *Path) longestBackoff(since time.Time) time.Duration {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	p.patient = time.Since(since) >= longAfter && len(p.g.table.Load().all) > 0 && len(p.g.ledger.of(p.Name)) == 0
	if p.patient {
		return backoffLong
	}
	return backoffMax
}

// routine is the path's life.
func (p *Path) routine() {
	defer p.g.routines.Done()
	defer close(p.gone)
	backoff, downSince := backoffMin, time.Now()
	var logged []string // causes, so that one that alternates with another fills no log
	for {
		p.g.mu.Lock()
		held := p.failedByHand && len(p.g.ledger.of(p.Name)) == 0 || p.wrongLU // a login that ends its old session is no service
		p.g.mu.Unlock()
		if held {
			select {
			case <-p.wake:
				continue
			case <-p.ctx.Done():
				return
			}
		}
		served, err := p.serve()
		if err != nil {
			if cause := err.Error(); !slices.Contains(logged, cause) {
				logged = append(logged[max(0, len(logged)-7):], cause)
				p.g.log.Warn("path does not come up", "path", p.Name, "cause", err)
			}
			p.set(func() { p.lastError = err.Error() })
		}
		if served > 0 {
			logged, downSince = nil, time.Now()
		}
		if served > 5*time.Second {
			backoff = backoffMin
		}
		if errors.Is(err, errSpoilt) {
			p.noteEnd(0, true)
		}
		wait := backoff/2 + p.g.cfg().Jitter(backoff)
		backoff = min(2*backoff, p.longestBackoff(downSince))
		if err != nil && initiator.Retry(err) == initiator.RetrySlowly {
			wait = backoffRefused + p.g.cfg().Jitter(backoffRefused)
		}
		wait = max(wait, p.resting())
		select {
		case <-time.After(wait):
		case <-p.wake:
			backoff = backoffMin
		case <-p.ctx.Done():
			return
		}
		p.g.mu.Lock()
		p.patient = false
		p.g.mu.Unlock()
	}
}

// serve connects, verifies and serves until the session ends. It returns how
// long it served, or why it did not.
func (p *Path) serve() (time.Duration, error) {
	ctx, cancel := context.WithCancel(p.ctx)
	defer cancel()
	p.set(func() { p.leaving = false })
	t, err := p.loginTurn(ctx)
	if err != nil {
		return 0, err
	}
	defer t.end()
	hung := time.AfterFunc(turnLogin, t.end)
	s, err := p.login(ctx)
	hung.Stop()
	p.g.setSilent(p.Portal, initiator.Unanswered(err))
	if err != nil {
		p.events.refused.Add(1)
		return 0, err
	}
	p.events.logins.Add(1)
	opened := time.Now()
	p.g.mu.Lock()
	p.opened = opened
	p.g.mu.Unlock()
	if !p.moved(s) {
		p.endVia()
	}
	p.g.mu.Lock()
	untested := p.trust == Untested && p.OpenAt != nil
	p.g.mu.Unlock()
	tested := func() {}
	if untested {
		t.end() // a path that is tested may wait for one too
		taken := false
		if tested, taken = p.takeTest(s); !taken {
			if tested, err = p.g.testTurn(ctx); err != nil {
				s.Abort(err)
				<-s.Done()
				p.resumeVia()
				return 0, err
			}
		}
		defer tested()
		if !taken {
			if s, err = p.selfTest(ctx, s); err != nil {
				p.resumeVia()
				return 0, err
			}
		}
	}
	defer func() {
		<-s.Done()
		p.down()
		p.settle()
		p.rest(s)
		ended, ok := s.(interface{ Err() error })
		p.noteEnd(time.Since(opened), ok && initiator.ClosedByTarget(ended.Err()))
	}()
	p.listen(s)
	// Who is this? Only the unit that took the old writes can end them.
	state := checker.Up
	info, err := p.identify(ctx, s)
	if err == nil {
		p.foreign.Store(false)
		err = p.fenceOwn(ctx, s, t)
		if err == nil {
			state, err = p.prove(ctx, s, info)
		}
	}
	if err == nil {
		p.rank(ctx, s, info)
		for tries := 1; err == nil && p.strange.Load(); tries++ { // it became another one meanwhile, it says
			if info, state, err = p.verify(ctx, s); tries == strangeTries {
				err = cmp.Or(err, errForeign)
			}
		}
	}
	if err != nil {
		s.Abort(err)
		p.resumeVia()
		return 0, err
	}
	p.risk(true)
	for _, q := range p.siblings() {
		if untested { // they can now be fenced through this path too
			q.risk(false)
		}
	}
	release := p.probation()
	defer release()
	began, byHand := time.Now(), false
	p.refill()
	p.set(func() {
		if byHand = p.failedByHand; byHand { // while it logged in
			return
		}
		if p.seen {
			p.noteReturn()
		}
		if p.held&heldSample != 0 {
			p.g.routines.Add(1)
			go p.sampled(ctx, s)
		}
		p.session = s
		p.suspect = false
		p.checkState = state
		select {
		case <-s.Done():
		default:
			p.doubted.Store(false)
			p.current.Store(&sessionBox{s})
			p.up, p.seen = true, true
			p.lastError = ""
			p.g.log.Info("path is up", "path", p.Name)
		}
	})
	if byHand {
		s.Abort(errByHand)
		return 0, errByHand
	}
	tested()
	for _, q := range *p.g.everyPath.Load() {
		if q.current.Load() == nil {
			q.passDirt() // this one can flush for it
		}
	}
	p.g.regrow()
	p.watch(ctx, s, info)
	return time.Since(began), nil
}

const strangeTries = 3 // before a path logs in anew whose unit says again and again that it became another one

// A session that the target ends sooner than shortLife after its login, contestEnds
// times in a row: somebody else logs in with the same name and ISID, and each
// login ends the other's session (RFC 7143 6.3.5).
const (
	shortLife   = 5 * time.Second
	contestEnds = 5
)

// noteEnd hears how long a session lived and whether the target ended it.
func (p *Path) noteEnd(lived time.Duration, byTarget bool) {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	switch {
	case lived >= shortLife:
		p.cutShort = 0
	case byTarget && !p.g.closed:
		p.cutShort++
		known := slices.ContainsFunc(p.g.paths, func(q *Path) bool { return q != p && q.contested() })
		if p.cutShort == contestEnds && !known {
			p.g.log.Warn("path is contested: the target ends its sessions soon after each login, as if another host or daemon logged in with the same initiator name",
				"path", p.Name, "do", "give each host and daemon a name of its own: name in the section initiator, --initiator or /etc/iscsi/initiatorname.iscsi")
		}
	}
}

// contested tells whether somebody else seems to log in as this path does. Caller
// holds Group.mu.
func (p *Path) contested() bool {
	return p.cutShort >= contestEnds && !(p.up && time.Since(p.opened) >= shortLife)
}

// verify proves again that the path leads to the map's own disk.
func (p *Path) verify(ctx context.Context, s Session) (*initiator.LUInfo, checker.State, error) {
	info, err := p.identify(ctx, s)
	if err != nil {
		return nil, checker.Down, err
	}
	state, err := p.prove(ctx, s, info)
	return info, state, err
}

// identify asks who the unit is: page 0x83, capacity and block size must be the
// map's.
func (p *Path) identify(ctx context.Context, s Session) (*initiator.LUInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, p.g.cfg().CheckTimeout)
	defer cancel()
	p.strange.Store(false)
	info, err := initiator.Identify(ctx, s, p.LUN)
	if err != nil {
		return nil, err
	}
	p.g.learnUnit(info)
	if err := p.fits(info); err != nil {
		err = fmt.Errorf("identity changed, the path stays out until `mpathd reinstate %s`: %w", p.Name, err)
		p.set(func() {
			p.wrongLU = true
			if errors.Is(err, errShrank) {
				p.shrunk, p.blocks = true, info.Blocks
			}
		})
		return nil, err
	}
	p.g.mu.Lock()
	p.serial, p.blocks = info.Serial, info.Blocks
	if _, group, ok := scsi.TargetPort(info.Designators); ok {
		p.portGroup = int(group)
	}
	p.g.mu.Unlock()
	p.use10.Store(!info.Use16)
	p.g.learnCache(info)
	p.g.learnLimits(info)
	return info, nil
}

// prove flushes what the path may hold unflushed, and checks it.
func (p *Path) prove(ctx context.Context, s Session, info *initiator.LUInfo) (checker.State, error) {
	ctx, cancel := context.WithTimeout(ctx, p.g.cfg().CheckTimeout)
	defer cancel()
	if err := p.register(ctx, s); err != nil {
		return checker.Down, err
	}
	if p.dirty.Load() {
		if err := p.flushCache(ctx, s, info); err != nil {
			return checker.Down, err
		}
	}
	v := p.check(ctx, s, info.Standby)
	if v.State != checker.Up && v.State != checker.Ghost {
		return v.State, fmt.Errorf("checker %s: %s: %w", p.g.cfg().checker.Name(), v.State, v.Err)
	}
	return v.State, nil
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
	if wait > 0 {
		p.held |= heldBlamed
	}
	p.g.mu.Unlock()
	if wait <= 0 {
		return func() {}
	}
	p.g.log.Warn("path delayed: its I/O failed repeatedly although it answers", "path", p.Name, "for", wait, "failures", p.strikes)
	t := time.AfterFunc(wait, func() { p.release(heldBlamed) })
	return func() {
		t.Stop()
		p.release(heldBlamed)
	}
}

// check runs the checker. A path in standby is never read: that could make an
// array move the unit. Nor is a unit whose block size nobody has told yet.
func (p *Path) check(ctx context.Context, s Session, standby bool) checker.Verdict {
	ctx, cancel := context.WithTimeout(ctx, p.g.cfg().CheckTimeout)
	defer cancel()
	chk := p.g.cfg().checker
	p.g.mu.Lock()
	if standby || p.access != accessUnknown && p.access != int(scsi.ActiveOptimized) || p.g.lu().Blocks == 0 {
		chk = checker.TUR
	}
	p.g.mu.Unlock()
	v := chk.Check(ctx, checker.LU{Doer: s, LUN: p.LUN, BlockSize: p.g.lu().BlockSize, Use16: p.g.lu().Use16})
	p.events.checked(v.State)
	return v
}

const (
	goodbyeTime = 3 * time.Second
	lastAnswers = 2 * time.Second // of that, for what is in flight
)

// goodbye ends the session when the path or its group ends. Commands in flight come
// back first: after the logout nobody would fence what they may still write, nor
// flush what they have written.
func (p *Path) goodbye(s Session, info *initiator.LUInfo) {
	stop, cancel := context.WithTimeout(context.Background(), goodbyeTime)
	defer cancel()
	p.awaitAnswers(stop, s)
	if p.dirty.Load() { // the next run would know nothing of it
		p.flushCache(stop, s, info)
	}
	p.leaveReservation(stop, s)
	s.Close(stop)
}

// awaitAnswers waits, for a while, until nothing is in flight on s.
func (p *Path) awaitAnswers(ctx context.Context, s Session) {
	ctx, cancel := context.WithTimeout(ctx, lastAnswers)
	defer cancel()
	untilQuiet(ctx, s.Done(), func() bool { return p.load.InFlight.Load() > 0 })
}

// watch runs the checker until the session ends or the group stops.
func (p *Path) watch(ctx context.Context, s Session, info *initiator.LUInfo) {
	iv := checker.Interval{}
	next := func(steady bool) time.Duration {
		c := p.g.cfg() // it may have changed
		iv.Min, iv.Max = c.PollingInterval, c.MaxPollingInterval
		return iv.Next(steady)
	}
	// The next check is due then, however often a chatty target asks for something
	// else before.
	plan := func(wait time.Duration) time.Time {
		p.checkEvery.Store(int64(wait))
		p.checkDue.Store(now() + int64(wait))
		return time.Now().Add(coalesce.Delay(wait))
	}
	due := plan(next(false))
	for {
		select {
		case <-s.Done():
			return
		case <-p.ctx.Done():
			p.goodbye(s, info)
			return
		case <-p.asked:
			seen, err := p.answer(ctx, s, info)
			if err != nil && ctx.Err() != nil { // quit came first
				continue
			}
			if err != nil {
				p.giveUp(s, err)
				return
			}
			info = seen
			continue
		case <-time.After(time.Until(due)):
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
				was := p.up
				p.up = v.State == checker.Up || v.State == checker.Ghost
				switch {
				case was && !p.up:
					p.noteFailure()
				case !was && p.up:
					p.noteReturn()
					if p.held&heldSample != 0 {
						p.g.routines.Add(1)
						go p.sampled(ctx, s)
					}
				}
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
			p.g.mu.Lock()
			p.noteGoodCheck()
			p.g.mu.Unlock()
			p.rankAndPublish(ctx, s, info)
		}
		wait := next(v.State == checker.Up && !changed)
		if v.State == checker.Pending {
			wait = min(wait, time.Second)
		}
		due = plan(wait)
	}
}

// rankAndPublish asks for the priority and acts on a change.
func (p *Path) rankAndPublish(ctx context.Context, s Session, info *initiator.LUInfo) {
	if !p.rank(ctx, s, info) {
		return
	}
	left := false
	p.set(func() {
		left = p.checkState == checker.Ghost && (p.access == int(scsi.ActiveOptimized) || p.access == int(scsi.ActiveNonOptimized))
	})
	if left { // standby: it tells its size now, and need not wait for its next check
		p.ask(askVerify)
	}
	p.g.rankOthers(p)
}

// down takes the path out of service if it was put in while its session was
// ending: onState, which does that, may have come before.
func (p *Path) down() {
	p.g.mu.Lock()
	late := p.up || p.current.Load() != nil
	p.g.mu.Unlock()
	if late {
		p.current.Store(nil)
		p.set(func() { p.up, p.suspect = false, false })
	}
}

// flushCache flushes what the path's server may hold. What was under way already
// makes the path dirty again when it ends meanwhile.
func (p *Path) flushCache(ctx context.Context, s Session, info *initiator.LUInfo) error {
	var cdb scsi.CDB
	scsi.SyncCache(&cdb, 0, 0, info.Use16 && !p.sync10.Load())
	c := &initiator.Command{LUN: p.LUN, CDB: cdb}
	p.flushing.Add(1) // before: another flush must not find the path clean
	defer p.flushing.Add(-1)
	since := p.since.Load()
	p.dirty.Store(false)
	err := s.Do(ctx, c)
	if err != nil || c.Result.Status != scsi.StatusGood {
		p.soil(since)
	}
	return err
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
