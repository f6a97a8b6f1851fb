// Package paths makes one device out of several paths to the same logical
// unit: a Group is a block.Device that picks a path for each request, retries
// elsewhere, queues while no path is left, and brings paths back.
package paths

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/checker"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/selector"
)

// Session is a way to the target; *initiator.Session and *kernel.Session are two,
// and say of each method what holds for all: Submit never blocks and takes nothing
// when it returns false; after Abort or a loss every command is handed back, in the
// order of submission, before Done is closed, and nothing touches its data then.
type Session interface {
	Submit(c *initiator.Command, p *block.Plug) bool
	Do(ctx context.Context, c *initiator.Command) error
	Abort(cause error)
	Close(ctx context.Context) error
	Done() <-chan struct{}
}

// Opener logs in anew, with the ISID that belongs to the path; ctx bounds the login
// only. onState and onRoom are initiator.Config's OnState and OnRoom.
type Opener func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error)

// Group is one logical unit through its paths. See the package comment.
type Group struct {
	policy atomic.Pointer[policy]
	info   atomic.Pointer[initiator.LUInfo] // the unit; a resize replaces it
	log    *slog.Logger
	maxIO  atomic.Int64 // bytes per command

	noStatus        atomic.Bool   // the unit does not know GET LBA STATUS
	mapping         chan struct{} // full while as many ask for it as may: see Extents
	noUnmap, noSame atomic.Bool   // the unit turned out not to know these
	table           atomic.Pointer[table]
	everyPath       atomic.Pointer[[]*Path]
	through         atomic.Bool // writes are sent with FUA: no server keeps any that another cannot flush
	ledger          ledger
	requests        requests
	retried         histogram    // requests that needed a second path, from submission to completion
	failedUp        atomic.Int64 // requests that failed
	hedges          atomic.Int64 // reads that were issued twice
	hedgesWon       atomic.Int64 // of those, the ones that the second path answered first
	loss            loss
	losses          atomic.Uint32 // sessions that ended
	resizing        sync.Mutex
	waiting         atomic.Int64 // requests in the queue
	stop            chan struct{}
	targets         *Targets
	reserveMu       sync.Mutex    // held while a path makes the reservation
	reserved        atomic.Bool   // for our keys
	preempts        atomic.Bool   // and PREEMPT AND ABORT was seen to work
	unreserved      atomic.Bool   // reservations are not ours to use
	testing         chan struct{} // held by the path whose session is under self-test
	taking          atomic.Int32  // paths on their way to serve that took a test of the run before
	routines        sync.WaitGroup

	mu            sync.Mutex
	paths         []*Path
	head          *block.Request
	tail          *block.Request
	draining      bool
	again         bool
	closed        bool
	active        *Path  // a path of the group that serves
	switched      *Path  // a path of the group that the operator switched to
	released      bool   // the operator went back to the policy's choice just now
	why           string // the last choice of a group is what it is, for the log
	begun         time.Time
	quiet         map[string]int // targets to which I/O waits, see hush
	activating    bool           // an explicit transition is under way: I/O waits
	patience      *time.Timer    // see premature
	failback      *time.Timer    // end of the wait for FailbackAfter
	failbackDue   bool
	groupSwitches int64
	giveUp        *time.Timer
	giveUpAt      time.Time     // when that ends
	noPathSince   time.Time     // zero while a path is usable
	noPath        time.Duration // without a path before that
	queueTimeouts int64
	parked        *block.Request // flushes that wait for a path, linked by Route.Next
	giveUpFlush   *time.Timer
	hedging       bool // the hedger runs
	failing       bool // no_path_retry is used up
	forced        int  // operator's queue on (1) or off (-1)
}

// table is what Submit looks at: immutable, published whole.
type table struct {
	selector selector.Selector
	observer selector.Observer // the selector, if it learns
	paths    []*Path           // of the active group, that serve
	loads    []*selector.Load
	all      []*Path // of every group, that serve
	able     []*Path // of those, the ones that are not in standby
}

const (
	maxCommand = 4 << 20 // bytes; larger requests go in steps
	maxPaths   = 30      // flushes keep a bit for each, beside stateSynced and stateRewrite
)

// NewGroup makes a map of the logical unit that first describes. It has no path
// yet. A unit in standby may not tell its size (SPC-4 5.15.2.4): the map is then
// of size 0 until OnResize, and must not be given I/O.
func NewGroup(c Config, first *initiator.LUInfo) (*Group, error) {
	if first.Blocks == 0 {
		if !first.Standby {
			return nil, fmt.Errorf("map %s: the unit has no blocks", c.Alias)
		}
		l := *first
		l.BlockSize = cmp.Or(l.BlockSize, 512) // until learnUnit
		first = &l
	}
	pol, err := newPolicy(c, first)
	if err != nil {
		return nil, err
	}
	c = pol.Config
	g := &Group{begun: time.Now(), log: c.Logger.With("map", c.Alias), stop: make(chan struct{}), quiet: map[string]int{}, testing: make(chan struct{}, 1), mapping: make(chan struct{}, extentsAtOnce)}
	g.ledger.omit = c.LeaveOut
	if g.targets = c.Targets; g.targets == nil {
		g.targets = NewTargets()
	}
	g.targets.mu.Lock()
	g.targets.groups[g] = true
	g.targets.mu.Unlock()
	for target, class := range c.Classes {
		if class == Drops {
			g.targets.remember(target, true)
		}
	}
	if c.Lost {
		g.loss.lose(now(), g.ledger.omit)
		g.loss.saved = true
	}
	g.follow(*pol)
	g.info.Store(first)
	g.maxIO.Store(g.largest(first))
	g.table.Store(&table{})
	g.everyPath.Store(&[]*Path{})
	g.routines.Add(1)
	go g.routineCompare()
	g.mu.Lock()
	g.hedge()
	g.mu.Unlock()
	for _, u := range c.Unfenced {
		if c.Protection != Off {
			e := newEpoch(u.Path)
			e.key, e.whole, e.target = u.Key, true, u.Target
			var ways []fenceWay
			for portal, open := range u.Via {
				ways = append(ways, fenceWay{portal, portal, "", open})
			}
			g.openEpoch(e)
			g.startVia(e, u.LUN, ways)
		}
	}
	return g, nil
}

// Geometry is the logical unit's.
func (g *Group) Geometry() block.Geometry {
	l := g.lu()
	return block.Geometry{
		Size: l.Size(), BlockSize: l.BlockSize, PhysicalBlock: l.PhysicalBlock, OptimalIO: int(l.OptTransfer) * l.BlockSize,
		ReadOnly: l.ReadOnly, Rotational: l.Rotational, Trim: l.Unmap, FastZero: l.UnmapSame && l.Zeroes && !g.noSame.Load(), WriteCache: l.WriteCache,
	}
}

func (g *Group) lu() *initiator.LUInfo { return g.info.Load() }

// Info describes the logical unit.
func (g *Group) Info() *initiator.LUInfo { return g.lu() }

// Config is the map's policy.
func (g *Group) Config() Config { return g.cfg().Config }

// SameLU tells why two logical units must not be one map, or nil. An ID that
// only counts a target's own numbers says nothing across target names, unless
// merge says that the operator vouches for it.
func SameLU(a, b *initiator.LUInfo, targetA, targetB string, merge bool) error {
	switch {
	case a.WWID == "" || a.WWID != b.WWID:
		return fmt.Errorf("its ID is %q, the map's is %q", b.WWID, a.WWID)
	case b.Standby && b.Blocks == 0: // tells no size: verified again before it serves
		if a.NumberedDefault && targetA != targetB && !merge {
			return errNumbered(a.WWID)
		}
	case a.Standby && a.Blocks == 0: // the map has no size to compare with yet
		return SameLU(b, a, targetA, targetB, merge)
	case a.BlockSize != b.BlockSize:
		return fmt.Errorf("same ID %s, but its block size is %d and the map's is %d: two disks must not share an ID", a.WWID, b.BlockSize, a.BlockSize)
	case a.Blocks != b.Blocks:
		return fmt.Errorf("same ID %s, but it has %d blocks and the map has %d: two disks must not share an ID", a.WWID, b.Blocks, a.Blocks)
	case a.NumberedDefault && targetA != targetB && !merge:
		return errNumbered(a.WWID)
	}
	return nil
}

func errNumbered(wwid string) error {
	return fmt.Errorf("ID %s is only the target's numbered default, which unrelated servers share: give the units real IDs, or name the WWID in the config or with --merge", wwid)
}

// PathConfig names a path.
type PathConfig struct {
	Name, URL, Portal, Target string  // Name is unique in the map; Portal is host:port
	LUN                       [8]byte // raw
	LUNNumber                 uint64  // scsi.LUNNumber of it
	Order                     int     // as configured: lower is better, whoever comes up first
	Open                      Opener
	OpenAt                    OpenerAt // nil: no fencing through other portals, no self-test
	Key                       uint64   // for FenceBy ByPreempt; the host's part is KeyOwner; 0: none
	Announced                 *uint16  // the portal group tag that discovery named, if it did
}

// ErrRefused wraps every refusal of AddPath.
var ErrRefused = errors.New("path refused")

// AddPath adds a path and starts to connect it: it serves when it has logged in and
// proved to lead to the map's unit. info, if known, must match. The error wraps
// ErrRefused (another disk, a path twice, too many, servers that must not share I/O),
// or is ErrShutdown.
func (g *Group) AddPath(pc PathConfig, info *initiator.LUInfo) (*Path, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, block.ErrShutdown
	}
	first := pc.Target
	if len(g.paths) > 0 {
		first = g.paths[0].Target
	}
	if info != nil {
		if err := SameLU(g.lu(), info, first, pc.Target, g.cfg().Merge); err != nil {
			return nil, fmt.Errorf("%w: map %s: %w", ErrRefused, g.cfg().Alias, err)
		}
	}
	before := *g.everyPath.Load()
	if len(before) == maxPaths {
		return nil, fmt.Errorf("%w: map %s has %d paths already", ErrRefused, g.cfg().Alias, maxPaths)
	}
	for _, p := range g.paths {
		if p.Name == pc.Name {
			return nil, fmt.Errorf("%w: map %s has path %s already", ErrRefused, g.cfg().Alias, pc.Name)
		}
	}
	servers := slices.ContainsFunc(g.paths, func(p *Path) bool { return p.Target != pc.Target })
	if servers && g.cfg().Policy == "multibus" && !g.cfg().MultibusServers {
		return nil, fmt.Errorf("%w: %w", ErrRefused, errServers(g.cfg().Alias, first, pc.Target))
	}
	index := 0 // the lowest free one: flushes keep a bit for each
	for slices.ContainsFunc(before, func(p *Path) bool { return p.index == index }) {
		index++
	}
	p := newPath(g, pc, index)
	g.paths = append(g.paths, p)
	slices.SortStableFunc(g.paths, func(a, b *Path) int { return a.Order - b.Order })
	g.listPaths(nil)
	g.decideThrough()
	g.routines.Add(1)
	go p.routine()
	return p, nil
}

// listPaths publishes the paths and those that are being removed: what these have
// in flight or unflushed counts until they are gone. Caller holds mu.
func (g *Group) listPaths(gone *Path) {
	every := slices.Clone(g.paths)
	for _, p := range *g.everyPath.Load() {
		if p != gone && !slices.Contains(every, p) {
			every = append(every, p)
		}
	}
	g.everyPath.Store(&every)
}

// publish builds and stores a new table from the states of the paths, and
// minds no_path_retry. Caller holds mu.
func (g *Group) publish() {
	c := g.cfg()
	t := &table{selector: c.selector}
	t.observer, _ = c.selector.(selector.Observer)
	for _, fits := range []func(*Path) bool{
		func(p *Path) bool { return !p.suspect && !p.delayed() },
		func(p *Path) bool { return !p.suspect },
		func(*Path) bool { return true },
	} {
		for _, p := range g.paths {
			if p.usable() && fits(p) {
				t.all = append(t.all, p)
			}
		}
		if len(t.all) > 0 {
			break
		}
	}
	for _, marginal := range []bool{false, true} { // in the order in which retries try them
		for _, p := range t.all {
			if p.checkState != checker.Ghost && g.quiet[p.Target] == 0 && p.marginal() == marginal {
				t.able = append(t.able, p)
			}
		}
	}
	before := g.table.Load().all
	usable := func(p *Path) bool { return slices.Contains(t.all, p) }
	came := func(p *Path) bool { return usable(p) && !slices.Contains(before, p) }
	if to := g.choose(g.grouping(usable), usable, came); to != nil {
		wait := g.premature(to)
		g.enter(to, usable, wait)
		if !g.activating && !wait {
			t.paths = servers(to, func(p *Path) bool { return usable(p) && g.quiet[p.Target] == 0 })
		}
	}
	for _, p := range t.paths {
		repeat := max(c.MinIO, 1)
		if c.WeightByPrio {
			repeat *= max(p.prio, 1)
		}
		p.load.Repeat.Store(int64(repeat))
		t.loads = append(t.loads, &p.load)
	}
	old := g.table.Swap(t)
	switch {
	case len(t.all) > 0:
		g.failing = false
		if !g.noPathSince.IsZero() {
			g.noPath += time.Since(g.noPathSince)
			g.noPathSince = time.Time{}
		}
	case len(old.all) > 0 && !g.closed:
		g.wakeRested()
		g.noPathSince = time.Now()
		g.log.Warn("no usable path left", "no_path_retry", g.retryText(), "do", "`mpathd show paths` has the last error of each")
	}
	g.mindRetry()
}

// mindRetry begins the wait of no_path_retry where queueing is to end after it,
// and ends it where it is not. Caller holds mu.
func (g *Group) mindRetry() {
	most, limited := g.retryLimit()
	if !limited || g.failing || g.noPathSince.IsZero() || g.closed {
		stopTimer(&g.giveUp)
	} else if g.giveUp == nil {
		g.giveUpAt = time.Now().Add(most)
		g.giveUp = time.AfterFunc(most, g.stopQueueing)
	}
}

// retryLimit is how long I/O may wait for a path; false: for ever, or not at all.
// Caller holds mu.
func (g *Group) retryLimit() (most time.Duration, limited bool) {
	c := g.cfg()
	return c.retryTime(), c.NoPathRetry > 0 && g.forced == 0
}

func stopTimer(t **time.Timer) {
	if *t != nil {
		(*t).Stop()
		*t = nil
	}
}

// retryAnew begins no_path_retry from its start: what is said about it changed.
// It tells whether what is held can only fail now. Caller holds mu, and restarts
// what waits.
func (g *Group) retryAnew() (hopeless bool) {
	stopTimer(&g.giveUp)
	g.failing = false
	g.mindRetry()
	for r := g.parked; r != nil; r = r.Route.Next {
		r.Route.Parked = now()
	}
	g.timeParked()
	return !g.noPathSince.IsZero() && !g.queueing()
}

// queuesForEver tells whether the operator's word, or else no_path_retry, is that
// nothing fails that can wait. Caller holds mu.
func (g *Group) queuesForEver() bool {
	return g.forced > 0 || g.forced == 0 && g.cfg().NoPathRetry == Queue
}

// retryText is what holds without a path: the operator's word, or no_path_retry.
// Caller holds mu.
func (g *Group) retryText() string {
	n := g.cfg().NoPathRetry
	switch {
	case g.queuesForEver():
		return "queue"
	case g.forced < 0 || n == Fail:
		return "fail"
	}
	return fmt.Sprint(n)
}

// queueing tells whether requests wait when no path is left. Caller holds mu.
func (g *Group) queueing() bool {
	if len(g.quiet) > 0 {
		return true
	}
	if g.forced != 0 {
		return g.forced > 0
	}
	return g.cfg().NoPathRetry != Fail && !g.failing
}

func (g *Group) stopQueueing() {
	g.mu.Lock()
	if g.giveUp == nil || time.Now().Before(g.giveUpAt) { // ended, or begun anew, just now
		g.mu.Unlock()
		return
	}
	g.giveUp = nil
	g.failing = true
	g.queueTimeouts++
	retry := g.retryText()
	g.mu.Unlock()
	g.restart()
	g.failHeld(block.ErrNoPath)
	g.log.Error("no path came back in time: queued I/O failed", "no_path_retry", retry, "do", "bring a path back: I/O goes on at once; `no_path_retry queue` would have waited")
}

func errServers(alias, a, b string) error {
	return fmt.Errorf("map %s: multibus over different targets (%s and %s): neither can end the other's late writes; use failover, or allow it with --multibus-servers", alias, a, b)
}

// within is a context that ends after d, or when the group stops.
func (g *Group) within(d time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	stop := context.AfterFunc(stopContext{g.stop}, cancel)
	return ctx, func() { stop(); cancel() }
}

// Close ends all paths and fails what still waits with ErrShutdown. Sessions log out,
// side by side. It returns when nothing of the map runs any more.
func (g *Group) Close(ctx context.Context) {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return
	}
	g.closed = true
	if g.giveUp != nil {
		g.giveUp.Stop()
	}
	if g.giveUpFlush != nil {
		g.giveUpFlush.Stop()
	}
	g.stopFailback()
	if g.patience != nil {
		g.patience.Stop()
	}
	for _, p := range g.paths {
		p.stopGray()
		p.stop()
	}
	close(g.stop)
	g.mu.Unlock()
	var p block.Plug
	g.drain(&p)
	p.Flush()
	g.routines.Wait()
	g.targets.mu.Lock()
	delete(g.targets.groups, g)
	g.targets.mu.Unlock()
	g.failHeld(block.ErrShutdown)
	if n := g.ledger.shadow.used.Load(); n > 0 {
		g.log.Error("stopped before the fence: these blocks were kept in memory only against a late write, which may yet revert them", "blocks", n)
	}
	g.settleLoss()
	g.unpark(block.ErrShutdown, &p)
	g.drain(&p)
	p.Flush()
}
