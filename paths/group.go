// Package paths makes one device out of several paths to the same logical
// unit: a Group is a block.Device that picks a path for each request, retries
// elsewhere, queues while no path is left, and brings paths back.
package paths

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/checker"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/selector"
	"github.com/mpathd/mpathd/selector/prio"
)

// Session is a way to the target; *initiator.Session is one.
type Session interface {
	Submit(c *initiator.Command, p *block.Plug) bool
	Do(ctx context.Context, c *initiator.Command) error
	Abort(cause error)
	Close(ctx context.Context) error
	Done() <-chan struct{}
}

// Opener logs in anew, with the ISID that belongs to the path.
type Opener func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error)

// no_path_retry values besides a number of checks.
const (
	Queue = -1 // wait for a path for ever
	Fail  = 0  // fail at once
)

// Config is the policy of a map.
type Config struct {
	Alias, WWID        string
	Policy             string // failover (default), multibus or group_by_*
	Selector           string
	Checker            string
	Prio, PrioArgs     string        // of selector/prio; empty: alua if the unit knows it, else const
	Failback           string        // Immediate (default), Manual, Followover
	FailbackAfter      time.Duration // not 0: immediate, but after this wait
	MinIO              int           // I/Os in a row that round-robin gives a path; 0 counts as 1
	WeightByPrio       bool          // rr_weight priorities: MinIO times the path's priority
	NoPathRetry        int           // Queue, Fail or a number of polling intervals
	PollingInterval    time.Duration
	MaxPollingInterval time.Duration
	CheckTimeout       time.Duration
	Merge              bool // the WWID was named by the operator: trust a numbered default ID
	QueueDepth         int  // commands per path, default 128
	Logger             *slog.Logger

	Protection string        // Hold (default), Strict or Off
	FenceWait  time.Duration // after which an unfenced session is complained about, default 30 s
	Quarantine time.Duration // after which an unfenced session counts as dead without proof; 0 never
	// FenceCommand fences a path outside iSCSI; nil means that it worked.
	FenceCommand func(ctx context.Context, path string) error
	// OnRisk is told that a path is about to take writes (before the first),
	// with the portals through which its session could be fenced, and that
	// nothing of it can execute any more. What is at risk when the process
	// dies is Unfenced of the next run.
	OnRisk     func(path string, risk bool, portals []string)
	Unfenced   []Unfenced
	AutoResize string // GrowOnly (default), Never or GrowAndCut
	// OnResize is told the new size in bytes.
	OnResize func(size int64) error
	// Replicated says that the servers of this disk replicate every write
	// before they acknowledge it: a flush of one of them is enough.
	Replicated bool
	// MultibusServers allows the policy multibus over different target names.
	MultibusServers bool
}

// Unfenced is a path on which an earlier run may have left writes on the way.
// All mutations are held until it is fenced: by its own login, or by a login
// with its ISID through one of the portals that proved able to.
type Unfenced struct {
	Path string
	LUN  [8]byte
	Via  map[string]func(ctx context.Context) (Session, error)
}

// Group is one logical unit through its paths. See the package comment.
type Group struct {
	policy atomic.Pointer[policy]
	info   atomic.Pointer[initiator.LUInfo] // the unit; a resize replaces it
	log    *slog.Logger
	zeroes []byte // source of written zeroes, never modified
	maxIO  int64  // bytes per command

	noStatus        atomic.Bool // the unit does not know GET LBA STATUS
	noUnmap, noSame atomic.Bool // the unit turned out not to know these
	table           atomic.Pointer[table]
	everyPath       atomic.Pointer[[]*Path]
	through         atomic.Bool // writes are sent with FUA: no server keeps any that another cannot flush
	ledger          ledger
	retried         histogram    // requests that needed a second path, from submission to completion
	failedUp        atomic.Int64 // requests that failed
	resizing        sync.Mutex
	waiting         atomic.Int64 // requests in the queue
	stop            chan struct{}
	testing         chan struct{} // held by the path whose session is under self-test
	routines        sync.WaitGroup

	mu            sync.Mutex
	paths         []*Path
	head          *block.Request
	tail          *block.Request
	draining      bool
	again         bool
	closed        bool
	active        *Path // a path of the group that serves
	switched      *Path // a path of the group that the operator switched to
	begun         time.Time
	activating    bool        // an explicit transition is under way: I/O waits
	patience      *time.Timer // see premature
	failback      *time.Timer // end of the wait for FailbackAfter
	failbackDue   bool
	groupSwitches int64
	giveUp        *time.Timer
	parked        *block.Request // flushes that wait for a path, linked by Route.Next
	giveUpFlush   *time.Timer
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
}

// policy is the configuration in force with what it was made into, immutable:
// Reconfigure replaces it.
type policy struct {
	Config
	checker  checker.Checker
	prio     prio.Prio
	selector selector.Selector
}

func (g *Group) cfg() *policy { return g.policy.Load() }

const maxCommand = 4 << 20 // bytes; larger requests go in steps

// newPolicy checks a configuration for a unit and fills in defaults.
func newPolicy(c Config, first *initiator.LUInfo) (*policy, error) {
	if c.Policy == "" {
		c.Policy = "failover"
	}
	if !slices.Contains(policies, c.Policy) {
		return nil, fmt.Errorf("map %s: path_grouping_policy %q: want %s", c.Alias, c.Policy, strings.Join(policies, ", "))
	}
	switch c.Failback {
	case "":
		c.Failback = Immediate
	case Immediate, Manual, Followover:
	default:
		return nil, fmt.Errorf("map %s: failback %q: want immediate, manual, followover or seconds", c.Alias, c.Failback)
	}
	sel, err := selector.New(c.Selector, now)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", c.Alias, err)
	}
	chk, err := checker.New(c.Checker)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", c.Alias, err)
	}
	name := c.Prio
	if name == "" && first.TPGS != 0 {
		name = "alua"
	}
	pr, err := prio.New(name, c.PrioArgs)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", c.Alias, err)
	}
	if c.PollingInterval <= 0 {
		c.PollingInterval = 5 * time.Second
	}
	if c.MaxPollingInterval < c.PollingInterval {
		c.MaxPollingInterval = 4 * c.PollingInterval
	}
	if c.CheckTimeout <= 0 {
		c.CheckTimeout = 30 * time.Second
	}
	if c.QueueDepth <= 0 {
		c.QueueDepth = 128
	}
	switch c.Protection {
	case "":
		c.Protection = Hold
	case Hold, Strict, Off:
	default:
		return nil, fmt.Errorf("map %s: ghost_protection %q: want hold, strict or off", c.Alias, c.Protection)
	}
	if c.FenceWait <= 0 {
		c.FenceWait = 30 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return &policy{c, chk, pr, sel}, nil
}

// NewGroup makes a map of the logical unit that first describes. It has no path yet.
func NewGroup(c Config, first *initiator.LUInfo) (*Group, error) {
	if first.Blocks == 0 {
		return nil, fmt.Errorf("map %s: the unit is in standby through this port and does not tell its size", c.Alias)
	}
	pol, err := newPolicy(c, first)
	if err != nil {
		return nil, err
	}
	c = pol.Config
	g := &Group{begun: time.Now(), log: c.Logger.With("map", c.Alias), stop: make(chan struct{}), testing: make(chan struct{}, 1)}
	g.policy.Store(pol)
	g.info.Store(first)
	bs := int64(first.BlockSize)
	g.maxIO = maxCommand
	if first.MaxTransfer > 0 {
		g.maxIO = min(g.maxIO, int64(first.MaxTransfer)*bs)
	}
	if !first.Use16 {
		g.maxIO = min(g.maxIO, 65535*bs)
	}
	g.zeroes = make([]byte, min(g.maxIO, 256<<10)&^(bs-1))
	g.table.Store(&table{})
	g.everyPath.Store(&[]*Path{})
	for _, u := range c.Unfenced {
		if c.Protection != Off {
			e := &epoch{name: u.Path, whole: true, since: time.Now(), fenced: make(chan struct{})}
			var ways []fenceWay
			for portal, open := range u.Via {
				ways = append(ways, fenceWay{portal, open})
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
		ReadOnly: l.ReadOnly, Rotational: l.Rotational, Trim: l.Unmap, FastZero: l.Unmap && l.Zeroes && !g.noSame.Load(), WriteCache: l.WriteCache,
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
	Name, URL, Portal, Target string
	LUN                       [8]byte
	LUNNumber                 uint64
	Order                     int // as configured: lower is better, whoever comes up first
	Open                      Opener
	OpenAt                    OpenerAt // nil: no fencing through other portals, no self-test
}

// ErrRefused wraps every refusal of AddPath.
var ErrRefused = errors.New("path refused")

// AddPath adds a path and starts to connect it. info, if known, must match.
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
	if len(g.paths) == 32 {
		return nil, fmt.Errorf("%w: map %s has 32 paths already", ErrRefused, g.cfg().Alias)
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
	if servers && g.lu().WriteCache && g.lu().DPOFUA && !g.cfg().Replicated && !g.through.Swap(true) {
		g.log.Info("the servers have caches of their own: writes are sent with FUA", "unless", "--replicated")
	}
	index := 0 // the lowest free one: flushes keep a bit for each
	for slices.ContainsFunc(g.paths, func(p *Path) bool { return p.index == index }) {
		index++
	}
	p := newPath(g, pc, index)
	g.paths = append(g.paths, p)
	slices.SortStableFunc(g.paths, func(a, b *Path) int { return a.Order - b.Order })
	every := slices.Clone(g.paths)
	g.everyPath.Store(&every)
	g.routines.Add(1)
	go p.routine()
	return p, nil
}

// publish builds and stores a new table from the states of the paths, and
// minds no_path_retry. Caller holds mu.
func (g *Group) publish() {
	c := g.cfg()
	t := &table{selector: c.selector}
	t.observer, _ = c.selector.(selector.Observer)
	for _, fits := range []func(*Path) bool{
		func(p *Path) bool { return !p.suspect && !p.delayed },
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
	before := g.table.Load().all
	usable := func(p *Path) bool { return slices.Contains(t.all, p) }
	came := func(p *Path) bool { return usable(p) && !slices.Contains(before, p) }
	if to := g.choose(g.grouping(usable), usable, came); to != nil {
		wait := g.premature(to)
		g.enter(to, usable, wait)
		if !g.activating && !wait {
			t.paths = servers(to, usable)
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
		if g.giveUp != nil {
			g.giveUp.Stop()
			g.giveUp = nil
		}
	case len(old.all) > 0 && !g.closed:
		g.log.Warn("no usable path left", "no_path_retry", g.retryText())
		if n := g.cfg().NoPathRetry; n > 0 && g.giveUp == nil {
			g.giveUp = time.AfterFunc(time.Duration(n)*g.cfg().PollingInterval, g.stopQueueing)
		}
	}
}

func (g *Group) retryText() string {
	switch n := g.cfg().NoPathRetry; n {
	case Queue:
		return "queue"
	case Fail:
		return "fail"
	default:
		return fmt.Sprint(n)
	}
}

// queueing tells whether requests wait when no path is left. Caller holds mu.
func (g *Group) queueing() bool {
	if g.forced != 0 {
		return g.forced > 0
	}
	return g.cfg().NoPathRetry != Fail && !g.failing
}

func (g *Group) stopQueueing() {
	g.mu.Lock()
	if len(g.table.Load().all) == 0 {
		g.failing = true
	}
	hopeless := g.failing
	g.mu.Unlock()
	g.restart()
	if hopeless {
		g.releaseHeld(block.ErrNoPath)
	}
	g.log.Error("no path came back in time: queued I/O failed", "no_path_retry", g.retryText())
}

// SetQueueing overrides no_path_retry until the daemon restarts.
func (g *Group) SetQueueing(on bool) {
	g.mu.Lock()
	g.forced = -1
	if on {
		g.forced = 1
	}
	hopeless := !on && len(g.table.Load().all) == 0
	g.mu.Unlock()
	g.restart()
	if hopeless {
		g.releaseHeld(block.ErrNoPath)
	}
}

func (g *Group) path(name string) (*Path, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.paths {
		if p.Name == name || p.URL == name {
			return p, nil
		}
	}
	return nil, fmt.Errorf("map %s has no path %q", g.cfg().Alias, name)
}

// Reconfigure replaces the policy of the map while it runs. Names, logger, queue
// depth and the callbacks stay as they are.
func (g *Group) Reconfigure(c Config) error {
	old := g.cfg().Config
	c.Alias, c.WWID, c.Merge, c.QueueDepth, c.Logger = old.Alias, old.WWID, old.Merge, old.QueueDepth, old.Logger
	c.OnRisk, c.OnResize, c.Unfenced = old.OnRisk, old.OnResize, nil
	pol, err := newPolicy(c, g.lu())
	if err != nil {
		return err
	}
	g.mu.Lock()
	if pol.Policy == "multibus" && !pol.MultibusServers {
		for _, p := range g.paths {
			if p.Target != g.paths[0].Target {
				g.mu.Unlock()
				return errServers(c.Alias, g.paths[0].Target, p.Target)
			}
		}
	}
	g.policy.Store(pol)
	g.publish()
	g.mu.Unlock()
	g.restart()
	g.rankOthers(nil)
	return nil
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

// RemovePaths ends the paths through a portal to a target. Their commands come
// back first; one that may hold unflushed writes stays, with an error in the log.
func (g *Group) RemovePaths(portal, target string) {
	g.mu.Lock()
	var gone []*Path
	for _, p := range g.paths {
		if p.Portal == portal && p.Target == target {
			gone = append(gone, p)
		}
	}
	g.mu.Unlock()
	for _, p := range gone {
		if p.passDirt(); p.dirty.Load() {
			g.log.Error("path not removed: its server holds writes that were not flushed", "path", p.Name, "do", "flush (sync) and reconfigure again")
			continue
		}
		g.mu.Lock()
		if g.closed {
			g.mu.Unlock()
			return
		}
		g.paths = slices.DeleteFunc(g.paths, func(x *Path) bool { return x == p })
		p.failedByHand = true
		if g.active == p {
			g.active = nil
		}
		close(p.quit)
		g.publish()
		g.mu.Unlock()
		<-p.gone
		g.mu.Lock()
		every := slices.Clone(g.paths)
		g.everyPath.Store(&every)
		g.mu.Unlock()
		g.restart()
		g.log.Info("path removed", "path", p.Name)
	}
}

// FailPath takes a path out of service until ReinstatePath.
func (g *Group) FailPath(name string) error {
	p, err := g.path(name)
	if err != nil {
		return err
	}
	g.mu.Lock()
	p.failedByHand = true
	p.lastError = "failed by the operator"
	s := p.session
	g.publish()
	g.mu.Unlock()
	if s != nil {
		s.Abort(errors.New("failed by the operator"))
	}
	return nil
}

// ReinstatePath lets a path serve again, after login and identity check.
func (g *Group) ReinstatePath(name string) error {
	p, err := g.path(name)
	if err != nil {
		return err
	}
	g.mu.Lock()
	p.failedByHand, p.wrongLU = false, false
	g.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
	return nil
}

// DeclareFenced is the operator's word that nothing sent on a path's old
// session can execute any more (its server is off, say).
func (g *Group) DeclareFenced(name string) error {
	es := g.ledger.of(name)
	if len(es) == 0 {
		return fmt.Errorf("map %s: path %q has no unfenced session", g.cfg().Alias, name)
	}
	for _, e := range es {
		g.closeEpoch(e, fenceDeclared)
	}
	return nil
}

// Close ends all paths and fails what still waits with ErrShutdown.
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
		close(p.quit)
	}
	close(g.stop)
	g.mu.Unlock()
	var p block.Plug
	g.drain(&p)
	p.Flush()
	g.routines.Wait()
	g.releaseHeld(block.ErrShutdown)
	g.unpark(block.ErrShutdown, &p)
	g.drain(&p)
	p.Flush()
}
