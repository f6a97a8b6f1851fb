package paths

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
)

// Modes of write protection (Config.Protection). A write that was on its way
// when its path died may still be executed by the target later, over newer
// data. docs/write-safety.md has the whole argument.
const (
	// Hold fails everything over at once, but holds a later write that
	// overlaps such a write until the old session is fenced.
	Hold = "hold"
	// Strict holds every retry too: for disks that other hosts write.
	Strict = "strict"
	// Off protects nothing, as dm-multipath does.
	Off = "off"
)

// epoch is one session of a path that died with writes under way.
type epoch struct {
	name    string // of the path
	path    *Path  // nil for a path that an earlier run used and that is not here yet
	extents []extent
	whole   bool // nothing is known: the whole device counts (after a crash)
	since   time.Time
	fenced  chan struct{} // closed when no write of the epoch can execute any more
	stopVia func()        // ends fencing through other portals and waits; guarded by Group.mu
}

// rule is one thing that the ledger must do. Tests leave out one at a time, to
// see that the simulation notices.
type rule uint8

const (
	ruleClassify rule = 1 << iota // a write that the kernel took is ambiguous
	ruleOverlap                   // a later mutation of an ambiguous extent waits
	ruleInFlight                  // a retry waits while another write of its blocks is in flight
	ruleForget                    // a request that is done is not its own retry
	ruleFence                     // an epoch is open until its fence
)

// extent is blocks [lo, hi) of an ambiguous write; req is the request that is
// being retried, nil once it completed.
type extent struct {
	lo, hi uint64
	req    *block.Request
}

// lost is a mutation that came back from a dying session.
type lost struct {
	req       *block.Request
	lo, hi    uint64
	ambiguous bool
}

// ledger knows the epochs that are not fenced and the requests that wait for
// that. Without an open epoch it costs a mutation one store and one load.
type ledger struct {
	open atomic.Int64 // open epochs; not zero makes mutations ask

	mu     sync.Mutex
	epochs []*epoch
	held   []heldRequest // first in, first out

	omit    rule // for tests: what the ledger forgets to do
	holds   int64
	longest time.Duration
	fences  map[string]int64 // by how they ended
}

type heldRequest struct {
	req    *block.Request
	lo, hi uint64
	since  time.Time
}

func (e *epoch) overlaps(lo, hi uint64) bool {
	return e.whole || slices.ContainsFunc(e.extents, func(x extent) bool { return lo < x.hi && x.lo < hi })
}

// bytesAtRisk is the sum of the extents.
func (e *epoch) blocksAtRisk() (n uint64) {
	for _, x := range e.extents {
		n += x.hi - x.lo
	}
	return n
}

// span packs blocks [lo, hi) into the one word that an attempt publishes while
// its mutation is in flight.
func span(lo, hi uint64) uint64 { return lo<<24 | (hi - lo) }

func (a *attempt) overlaps(lo, hi uint64) bool {
	v := a.span.Load()
	at := v >> 24
	return v != 0 && lo < at+v&0xffffff && at < hi
}

// mutation tells whether r's next command changes the disk.
func mutation(r *block.Request) bool {
	return r.Op != block.Read && r.Op != block.Flush && r.Route.State&stateSynced == 0
}

// lose keeps a mutation that its dying session handed back until all are back;
// settle goes on with them. Called by the session's last goroutine only.
func (p *Path) lose(a *attempt, r *block.Request, d initiator.Delivery) {
	lo := uint64((r.Off + r.Route.Pos) / int64(p.g.lu().BlockSize))
	p.lost = append(p.lost, lost{r, lo, lo + uint64(a.size)/uint64(p.g.lu().BlockSize), d != initiator.NotSent && p.g.ledger.omit&ruleClassify == 0})
}

// settle opens an epoch for the writes that a dead session may still execute,
// starts its fence, and retries everything in order. The session is done.
func (p *Path) settle() {
	all := p.lost
	p.lost = nil
	e := &epoch{name: p.Name, path: p, since: time.Now(), fenced: make(chan struct{})}
	for _, l := range all {
		if l.ambiguous {
			e.extents = append(e.extents, extent{l.lo, l.hi, l.req})
		}
	}
	if len(e.extents) > 0 && p.g.ledger.omit&ruleFence == 0 {
		p.g.openEpoch(e)
	} else if p.g.cfg().OnRisk != nil && len(p.g.ledger.of(p.Name)) == 0 {
		p.g.cfg().OnRisk(p.Name, false, nil)
	}
	p.passDirt()
	var plug block.Plug
	for _, l := range all {
		p.g.retry(l.req, Action{}, p, &plug)
	}
	p.g.unpark(nil, &plug) // passDirt may have found another path for them
	if p.g.waiting.Load() > 0 {
		p.g.drain(&plug)
	}
	plug.Flush()
}

// openEpoch enters e and starts to fence it.
func (g *Group) openEpoch(e *epoch) {
	slices.SortFunc(e.extents, func(a, b extent) int { return cmp.Compare(a.lo, b.lo) })
	l := &g.ledger
	l.mu.Lock()
	l.epochs = append(l.epochs, e)
	l.open.Add(1)
	l.mu.Unlock()
	g.mu.Lock()
	closed := g.closed
	if !closed {
		g.routines.Add(1)
	}
	g.mu.Unlock()
	if !closed {
		go g.routineFence(e)
		if e.path != nil {
			g.startVia(e, e.path.LUN, e.path.ways())
		}
	}
}

// hold keeps r if its mutation of blocks [lo, hi) has to wait for a fence, and
// reports whether it did. a is the attempt that r was about to use; its span is
// published already, so that of two overlapping mutations on two paths one
// sees the other.
func (g *Group) hold(r *block.Request, a *attempt, lo, hi uint64) bool {
	l := &g.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	conflict, own := false, false
	for _, e := range l.epochs {
		if e.whole {
			conflict = true
		}
		for _, x := range e.extents {
			if x.lo >= hi {
				break // sorted
			}
			switch {
			case lo >= x.hi:
			case x.req == r && x.lo == lo && x.hi == hi && g.cfg().Protection != Strict:
				own = true // the same bytes: executing both is executing one
			default:
				conflict = conflict || l.omit&ruleOverlap == 0
			}
		}
	}
	for i := range l.held {
		h := &l.held[i]
		conflict = conflict || lo < h.hi && h.lo < hi // nobody overtakes: the first in is the first out
	}
	// Another write of these blocks may be between us and the disk: if it came
	// second there, the late copy would undo it.
	conflict = conflict || own && l.omit&ruleInFlight == 0 && g.inFlight(a, lo, hi)
	if conflict {
		l.held = append(l.held, heldRequest{r, lo, hi, time.Now()})
		l.holds++
	}
	return conflict
}

// inFlight tells whether an attempt other than a mutates blocks of [lo, hi).
func (g *Group) inFlight(a *attempt, lo, hi uint64) bool {
	for _, p := range *g.everyPath.Load() {
		for i := range p.attempts {
			if o := &p.attempts[i]; o != a && o.overlaps(lo, hi) {
				return true
			}
		}
	}
	return false
}

// forget takes a request that is done out of the extents: the next request in
// the same memory is another one.
func (l *ledger) forget(r *block.Request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.omit&ruleForget != 0 {
		return
	}
	for _, e := range l.epochs {
		for i := range e.extents {
			if e.extents[i].req == r {
				e.extents[i].req = nil
			}
		}
	}
}

// closeEpoch ends an epoch for the reason how and lets what it held go on.
func (g *Group) closeEpoch(e *epoch, how string) bool {
	l := &g.ledger
	l.mu.Lock()
	i := slices.Index(l.epochs, e)
	if i < 0 {
		l.mu.Unlock()
		return false
	}
	l.epochs = slices.Delete(l.epochs, i, i+1)
	l.open.Add(-1)
	if l.fences == nil {
		l.fences = map[string]int64{}
	}
	l.fences[how]++
	close(e.fenced)
	l.mu.Unlock()
	n, longest := g.releaseHeld(nil)
	took := time.Since(e.since)
	log := g.log.Info
	if how != fenceProven && how != fenceCommand {
		log = g.log.Warn
	}
	log("old session fenced", "path", e.name, "how", how, "took", took.Round(time.Microsecond), "writes_at_risk", len(e.extents),
		"blocks_at_risk", e.blocksAtRisk(), "requests_released", n, "longest_hold", longest.Round(time.Microsecond))
	if g.cfg().OnRisk != nil && len(l.of(e.name)) == 0 {
		g.cfg().OnRisk(e.name, false, nil)
	}
	return true
}

// heldNow counts the requests that wait for a fence.
func (l *ledger) heldNow() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.held)
}

// of are the open epochs of a path.
func (l *ledger) of(name string) (es []*epoch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.epochs {
		if e.name == name {
			es = append(es, e)
		}
	}
	return es
}

// releaseHeld starts the held requests anew, in order; those that still
// conflict are held again. With err they fail instead.
func (g *Group) releaseHeld(err error) (n int, longest time.Duration) {
	l := &g.ledger
	l.mu.Lock()
	held := l.held
	l.held = nil
	for _, h := range held {
		longest = max(longest, time.Since(h.since))
	}
	l.longest = max(l.longest, longest)
	l.mu.Unlock()
	var plug block.Plug
	for _, h := range held {
		if err != nil {
			g.finish(h.req, err, &plug)
		} else {
			g.proceed(h.req, nil, &plug)
		}
	}
	plug.Flush()
	return len(held), longest
}
