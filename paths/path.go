package paths

import (
	"context"
	"errors"
	"iter"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/checker"
	"github.com/mpathd/mpathd/initiator"
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
	asked chan struct{}   // see ask
	ctx   context.Context // ends when the group closes or the path is removed
	stop  context.CancelFunc
	gone  chan struct{} // closed when routine ended

	dirty         atomic.Bool  // took writes since its last cache flush
	since         atomic.Int64 // the submission of the oldest of them, see now
	powered       atomic.Int64 // when its unit last said that it lost its power, or long ago
	flushing      atomic.Int32 // flushes in flight that found it dirty: it may become so again
	heardReset    atomic.Int64 // when the unit last said that it was reset, Unix ns
	loginsBegun   atomic.Int32 // with its identity, each of which ends the session of the one before
	loginsEnded   atomic.Int32 // in a session or not
	keyed         atomic.Bool  // its reservation key is registered
	doubted       atomic.Bool  // out of service until its unit is verified anew
	foreign       atomic.Bool  // may lead to another disk since: no answer of it counts
	strange       atomic.Bool  // said so out of service, and was not identified since
	sync10        atomic.Bool  // knows only SYNCHRONIZE CACHE (10)
	use10         atomic.Bool  // knows only READ (10) and WRITE (10)
	ios           atomic.Int64
	errors        atomic.Int64
	read, written atomic.Int64 // bytes
	failures      atomic.Int64
	latency       histogram
	events        pathEvents
	checkEvery    atomic.Int64  // ns to the next check from the last
	checkDue      atomic.Int64  // when that is, ns as now() counts
	asks          atomic.Uint32 // see ask
	event         atomic.Uint32 // the last asynchronous event without consequence
	startTried    time.Time     // this and the next three are used by routine only, see seldom
	eventTold     time.Time
	thinTold      time.Time
	deferredTold  time.Time
	blamed        atomic.Bool // an I/O failed the path, not its session

	amu   sync.Mutex
	free  *attempt
	slabs atomic.Pointer[[]*[slabSize]attempt] // all attempts; grows up to the queue depth
	lost  []lost                               // see lose
	depth depth

	riskMu sync.Mutex // held while Config.OnRisk is told
	risky  bool       // takes writes, or is about to; guarded by riskMu

	// Guarded by Group.mu.
	session      Session
	current      atomic.Pointer[sessionBox] // what attempts use; nil: not serving
	up           bool                       // logged in, verified, checker content
	suspect      bool
	failedByHand bool
	wrongLU      bool // answers as another disk: never served again by itself
	shrunk       bool // wrongLU because its unit is smaller than the map
	checkState   checker.State
	lastError    string
	trust        Trust
	taken        bool           // trust is the finding of the run before, see takeTest
	saysPower    bool           // its unit says at every login that it lost its power: it means nothing
	nexus        string         // of the last session, see nexusOf
	via          map[*Path]bool // whose portal can end this path's session: tried, and the answer
	leaving      bool           // the target asked for a logout: no new I/O
	restUntil    time.Time      // no login before, see rest
	restFirmly   bool           // whatever the other paths do
	patient      bool           // backs off for long, since others serve
	prio         int            // unknownPrio until asked
	access       int            // asymmetric access state, accessUnknown without
	activated    bool           // an explicit transition was tried since this group was chosen
	held         held           // why it is gray, if it is
	record       record
	relief       time.Duration // how long it was heldFull the last time
	seen         bool          // was up once
	cutShort     int           // sessions in a row that the target ended soon, see noteEnd
	opened       time.Time     // the last login
	silent       bool          // its session died of silence or the like, or its login was not answered, and none since
	serial       string
	blocks       uint64 // capacity as last seen through this path
	portGroup    int
	strikes      int       // I/Os that failed this path, see probation
	struck       time.Time // the last of them

	rating rating // used by routineCompare only
}

type sessionBox struct{ Session }

func newPath(g *Group, pc PathConfig, index int) *Path {
	p := &Path{PathConfig: pc, g: g, index: index, wake: make(chan struct{}, 1), gone: make(chan struct{}), asked: make(chan struct{}, 1), prio: unknownPrio, access: accessUnknown, portGroup: -1, checkState: checker.Pending}
	p.ctx, p.stop = context.WithCancel(context.Background())
	p.via = map[*Path]bool{}
	p.powered.Store(math.MinInt64)
	if g.lu().WriteCache && slices.ContainsFunc(g.cfg().Unfenced, func(u Unfenced) bool { return u.Path == pc.Name }) {
		p.soil(math.MinInt64 + 1) // before this process
	}
	p.slabs.Store(&[]*[slabSize]attempt{})
	p.depth.most = g.cfg().QueueDepth
	p.refill()
	return p
}

// slabSize attempts are made at a time: most paths never need all.
const slabSize = 16

// grow makes attempts, unless there are as many as the queue is deep. Caller
// holds amu.
func (p *Path) grow() {
	have := *p.slabs.Load()
	n := min(p.g.cfg().QueueDepth-len(have)*slabSize, slabSize)
	if n <= 0 {
		return
	}
	slab := &[slabSize]attempt{}
	for i := range slab[:n] {
		a := &slab[i]
		a.path, a.next = p, p.free
		a.cmd.Owner = a
		p.free = a
	}
	more := append(slices.Clip(have), slab)
	p.slabs.Store(&more)
}

// attempts are all that were made, in use or not.
func (p *Path) attempts() iter.Seq[*attempt] {
	return func(yield func(*attempt) bool) {
		for _, slab := range *p.slabs.Load() {
			for i := range slab {
				if !yield(&slab[i]) {
					return
				}
			}
		}
	}
}

// usable tells whether I/O may go here. Caller holds Group.mu.
func (p *Path) usable() bool { return p.up && !p.leaving && !p.failedByHand && !p.wrongLU }

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
	p.doubted.Store(true)
	p.current.Store(nil)
	p.ask(askVerify)
}

// suspectForeign is the stronger doubt: the unit said that its identity or the
// LUN map changed. What is sent but not taken yet is dropped with a reset, and
// what the path still answers is done again: it may be another disk's word. It
// logs in anew, which verifies. It never waits.
func (p *Path) suspectForeign() {
	p.foreign.Store(true)
	if box := p.current.Swap(nil); box != nil {
		box.Abort(errForeign)
	}
}

var errForeign = errors.New("the unit says that its identity or its LUN changed")

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
		p.events.suspect.Add(1)
		p.g.log.Warn("path is suspect", "path", p.Name, "cause", cause)
		p.set(func() { p.suspect = true })
	case initiator.Up:
		p.set(func() { p.suspect = false })
	case initiator.Leaving:
		p.leave(cause)
	case initiator.Dead:
		if errors.Is(cause, initiator.ErrProtocol) {
			p.blamed.Store(true) // again and again, it is kept apart: see probation
		}
		p.blame(cause)
		p.g.losses.Add(1)
		p.current.Store(nil)
		p.doubted.Store(false)
		p.set(func() {
			if p.up && !p.g.closed {
				p.failures.Add(1)
				if errors.Is(cause, errByHand) {
					p.record.byHand = true
				} else {
					p.noteFailure()
				}
				p.g.log.Warn("path failed", "path", p.Name, "cause", cause)
			}
			p.up, p.suspect, p.silent = false, false, !initiator.ClosedByTarget(cause)
			p.checkState = checker.Down
			if !p.failedByHand {
				p.lastError = cause.Error()
			}
		})
	}
}

func (p *Path) onRoom(plug *block.Plug) { p.g.drain(plug) }
