package paths

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/mpathd/mpathd/checker"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/selector"
	"github.com/mpathd/mpathd/selector/prio"
)

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
	Failback           string        // Immediate, Manual, Followover; empty: Immediate, over several servers Manual
	FailbackAfter      time.Duration // not 0: immediate, but after this wait
	MinIO              int           // I/Os in a row that round-robin gives a path; 0 counts as 1
	WeightByPrio       bool          // rr_weight priorities: MinIO times the path's priority
	NoPathRetry        int           // Queue, Fail or a number of polling intervals
	PathErrors         PathErrors    // when a path that comes and goes is kept back
	Sampling           Sampling      // the same by sampling
	MarginalGroups     bool          // what these two find goes into a marginal group instead
	MaxIO              int64         // bytes per command; 0: as the unit says
	GrayPaths          string        // GrayGroup (default), GrayMap or GrayOff
	HedgeReads         int           // percent of the I/Os that may be reads issued again on another path; 0: none
	HedgeAfter         time.Duration // when a read is late enough for that; 0: learnt from what reads take
	PollingInterval    time.Duration
	MaxPollingInterval time.Duration
	CheckTimeout       time.Duration
	Merge              bool // the WWID was named by the operator: trust a numbered default ID
	QueueDepth         int  // commands per path, default 128
	Logger             *slog.Logger

	Protection  string        // Hold (default), Strict, Shadow or Off
	ShadowLimit int64         // bytes of memory for the mode Shadow, default 64 MiB; what does not fit is held
	FenceBy     string        // ByReset (default) or ByPreempt
	FenceWait   time.Duration // after which an unfenced session is complained about, default 30 s
	GhostDelay  time.Duration // for which a map that begins waits for a better path before a port group is activated; default 3 s, negative none
	Quarantine  time.Duration // after which an unfenced session counts as dead without proof; 0 never
	// FenceCommand fences a path outside iSCSI; nil means that it worked. It is
	// called commandAfter after the path died, again after an error, and must
	// end when ctx does, after FenceWait at the latest.
	FenceCommand func(ctx context.Context, r FenceRequest) error
	// OnRisk is told that a path is about to take writes (before the first),
	// with the portals through which its session could be fenced, and that
	// nothing of it can execute any more. What is at risk when the process
	// dies is Unfenced of the next run.
	OnRisk   func(path string, risk bool, portals []string)
	Unfenced []Unfenced
	// Waits says that the login that replaces a session waits for the commands
	// of the old one: a fence needs no LOGICAL UNIT RESET, which other hosts feel.
	Waits bool
	// Classes are the targets' classes by name as earlier runs found them, and
	// OnClass is told what the self-test of this one finds.
	Classes    map[string]Trust
	OnClass    func(target string, c Trust)
	Tested     map[string]Tested // of a run that this one goes on for, see Group.Tested
	AutoResize string            // GrowOnly (default), Never or GrowAndCut
	Targets    *Targets          // shared by the maps of a process; nil: the map's own
	// OnLUNs is told that the LUNs of a target may have changed.
	OnLUNs func(portal, target string)
	// OnResize is told the new size in bytes, and the first one of a map that
	// NewGroup knew none of. It is called by who brings paths up: it must not wait
	// for I/O.
	OnResize func(size int64) error
	// Replicated says that the servers of this disk replicate every write
	// before they acknowledge it: a flush of one of them is enough.
	Replicated bool
	// MultibusServers allows the policy multibus over different target names.
	MultibusServers bool
	// Lost says that acknowledged writes of an earlier run are lost and that no
	// flush has failed for that yet: the next one does. OnLoss is told to
	// remember that, and that it was done.
	Lost   bool
	OnLoss func(lost bool)
	// LeaveOut disables rules of the ledger and Jitter replaces the random wait
	// before a login, up to the duration given: both are for simulations only.
	LeaveOut Rule
	Jitter   func(time.Duration) time.Duration
}

// Unfenced is a path on which an earlier run may have left writes on the way.
// All mutations are held until it is fenced: by its own login, or by a login
// with its ISID through one of the portals that proved able to.
type Unfenced struct {
	Path, Target string
	Key          uint64 // PathConfig.Key, if the path may have had it
	LUN          [8]byte
	Via          map[string]func(ctx context.Context) (Session, error)
}

// policy is the configuration in force with what it was made into, immutable:
// Reconfigure replaces it.
type policy struct {
	Config
	checker  checker.Checker
	prio     prio.Prio
	selector selector.Selector
	replaced chan struct{} // closed when another one is in force
}

func (g *Group) cfg() *policy { return g.policy.Load() }

// follow puts a policy in force, and tells who follows the one before.
func (g *Group) follow(p policy) {
	p.replaced = make(chan struct{})
	if old := g.policy.Swap(&p); old != nil {
		close(old.replaced)
	}
}

// retryTime is how long no_path_retry lets I/O wait, if that is a number.
func (c *Config) retryTime() time.Duration {
	return time.Duration(c.NoPathRetry) * c.PollingInterval
}

// newPolicy checks a configuration for a unit and fills in defaults.
func newPolicy(c Config, first *initiator.LUInfo) (*policy, error) {
	p, err := c.policyFor(first.TPGS != 0)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", c.Alias, err)
	}
	return p, nil
}

// Check tells which option has a value that no map could be made with, by its
// name in multipath.conf, and what is wanted; nil: none. It does no I/O.
func (c Config) Check() error {
	_, err := c.policyFor(false)
	return err
}

// policyFor makes the policy of a unit with or without asymmetric access states.
func (c Config) policyFor(alua bool) (*policy, error) {
	if err := c.choose(); err != nil {
		return nil, err
	}
	c.fill()
	sel, err := selector.New(c.Selector, now)
	if err != nil {
		return nil, err
	}
	chk, err := checker.New(c.Checker)
	if err != nil {
		return nil, err
	}
	name := c.Prio
	if name == "" && alua {
		name = "alua"
	}
	pr, err := prio.New(name, c.PrioArgs)
	if err != nil {
		return nil, err
	}
	return &policy{Config: c, checker: chk, prio: pr, selector: sel}, nil
}

// choose takes the default where nothing is chosen, and refuses what there is not.
func (c *Config) choose() error {
	for _, o := range []struct {
		option string
		value  *string
		of     []string // the first is the default
	}{
		{"path_grouping_policy", &c.Policy, policies},
		{"ghost_protection", &c.Protection, Protections},
		{"gray_paths", &c.GrayPaths, []string{GrayGroup, GrayMap, GrayOff}},
		{"fence_by", &c.FenceBy, []string{ByReset, ByPreempt}},
	} {
		if *o.value == "" {
			*o.value = o.of[0]
		}
		if !slices.Contains(o.of, *o.value) {
			return fmt.Errorf("%s %q: want one of %s", o.option, *o.value, strings.Join(o.of, ", "))
		}
	}
	if c.Failback != "" && !slices.Contains(Failbacks, c.Failback) {
		return fmt.Errorf("failback %q: want %s or seconds", c.Failback, strings.Join(Failbacks, ", "))
	}
	return nil
}

// fill takes the default for what is not said.
func (c *Config) fill() {
	c.PollingInterval = positive(c.PollingInterval, 5*time.Second)
	if c.MaxPollingInterval < c.PollingInterval {
		c.MaxPollingInterval = 4 * c.PollingInterval
	}
	c.CheckTimeout = positive(c.CheckTimeout, 30*time.Second)
	c.QueueDepth = positive(c.QueueDepth, 128)
	c.ShadowLimit = positive(c.ShadowLimit, 64<<20)
	c.GhostDelay = cmp.Or(c.GhostDelay, 3*time.Second)
	c.FenceWait = positive(c.FenceWait, 30*time.Second)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Jitter == nil {
		c.Jitter = func(d time.Duration) time.Duration { return rand.N(d) }
	}
}

// positive is v, or otherwise if v is not above 0.
func positive[T cmp.Ordered](v, otherwise T) T {
	var zero T
	if v > zero {
		return v
	}
	return otherwise
}
