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
	// Shadow lets an overlapping write through, keeps its bytes in memory, serves
	// reads of them from there, and writes them again after the fence: for one
	// host that would rather risk its own crash than wait.
	Shadow = "shadow"
	// Off protects nothing, as dm-multipath does.
	Off = "off"
)

// Protections are the modes of Config.Protection, the default first.
var Protections = []string{Hold, Strict, Shadow, Off}

// epoch is one session of a path that died with writes under way.
type epoch struct {
	name     string // of the path
	nexus    string // of its session, see nexusOf; empty: not known
	path     *Path  // nil for a path that an earlier run used and that is not here yet
	target   string // of that one
	key      uint64 // its reservation key, 0: none
	extents  []extent
	whole    bool // nothing is known: the whole device counts (after a crash)
	caches   bool // what it writes may stay in a cache that a flush through another server does not reach
	since    time.Time
	flushed  atomic.Bool   // its server's cache was, after its last write
	fenced   chan struct{} // closed when no write of the epoch can execute any more
	tried    chan struct{} // closed when each other portal was asked once, or none is
	askedAll func()        // closes it
	hopeless bool          // what waits for it fails; guarded by ledger.mu
	stopVia  func()        // ends fencing through other portals and waits; guarded by Group.mu
	ways     []fenceWay    // the last that were known; guarded by Group.mu
}

func newEpoch(path string) *epoch {
	e := &epoch{name: path, since: time.Now(), fenced: make(chan struct{}), tried: make(chan struct{})}
	e.askedAll = sync.OnceFunc(func() { close(e.tried) })
	return e
}

// Rule is one thing that the ledger must do. Simulations leave out one at a
// time (Config.LeaveOut), to see that they would notice.
type Rule uint16

// The rules of the ledger.
const (
	RuleClassify   Rule = 1 << iota // a write that the kernel took is ambiguous
	RuleOverlap                     // a later mutation of an ambiguous extent waits
	RuleInFlight                    // a retry waits while another write of its blocks is in flight
	RuleForget                      // a request that is done is not its own retry
	RuleFence                       // an epoch is open until its fence
	RuleRewrite                     // what was kept in memory is written again after the fence
	RuleShadowRead                  // reads of it come from memory until then
	RuleCaches                      // a flush waits for the fence of a server whose cache it does not reach
	RuleLoss                        // a flush fails after a server lost its power and acknowledged writes
	RuleWhole                       // the whole device waits for what an earlier run left
	RuleKept                        // a later mutation of what is kept in memory is kept too
	RuleLocked                      // and waits while that is written again
	RuleFlushAll                    // a flush goes to every path that took writes since its last one
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
	dirties   bool // leaves data in a cache
}

// ledger knows the epochs that are not fenced and the requests that wait for
// that. Without an open epoch it costs a mutation one store and one load.
type ledger struct {
	open   atomic.Int64 // open epochs, and one for a shadow; not zero makes mutations ask
	behind atomic.Int64 // requests held for another mutation in flight, which starts them when it ends

	mu     sync.Mutex
	epochs []*epoch
	held   []heldRequest // first in, first out
	shadow shadow

	omit      Rule // Config.LeaveOut
	ambiguous int64
	holds     int64
	waited    time.Duration // sum over the requests that were held
	longest   time.Duration
	fences    map[string]int64 // by how they ended
	means     map[string]int64 // by what ended them
	late      atomic.Int64     // not over after FenceWait
}

type heldRequest struct {
	req    *block.Request
	lo, hi uint64
	since  time.Time
	behind bool // counted in ledger.behind
}

// count keeps open. Caller holds mu.
func (l *ledger) count() {
	n := len(l.epochs)
	if len(l.shadow.blocks) > 0 {
		n++
	}
	l.open.Store(int64(n))
}

func (e *epoch) overlaps(lo, hi uint64) bool {
	if e.whole {
		return true
	}
	for _, x := range e.extents {
		if x.lo >= hi {
			return false // sorted
		}
		if lo < x.hi {
			return true
		}
	}
	return false
}

// bytesAtRisk is the sum of the extents.
func (e *epoch) blocksAtRisk() (n uint64) {
	for _, x := range e.extents {
		n += x.hi - x.lo
	}
	return n
}

// span packs blocks [lo, hi) into the one word that an attempt publishes while
// its mutation is in flight: 24 bits of length, 40 of position. Beyond 2^40
// blocks positions are compared modulo that, which may only find too much.
func span(lo, hi uint64) uint64 { return lo<<spanLen | (hi - lo) }

const spanLen = 24 // bits; a command is at most 1 GiB

func (a *attempt) overlaps(lo, hi uint64) bool {
	v := a.span.Load()
	at, n := v>>spanLen, v&(1<<spanLen-1)
	const mod = 1<<(64-spanLen) - 1
	return n != 0 && ((lo-at)&mod < n || (at-lo)&mod < hi-lo)
}

// mutation tells whether r's next command changes the disk.
func mutation(r *block.Request) bool {
	return r.Op != block.Read && r.Op != block.Flush && r.Route.State&stateSynced == 0
}

// lose keeps a mutation that its dying session handed back until all are back;
// settle goes on with them. Called by the session's last goroutine only.
func (p *Path) lose(a *attempt, r *block.Request, d initiator.Delivery) {
	lo := uint64((r.Off + r.Route.Pos) / int64(p.g.lu().BlockSize))
	p.lost = append(p.lost, lost{r, lo, lo + uint64(a.size)/uint64(p.g.lu().BlockSize), d != initiator.NotSent && p.g.ledger.omit&RuleClassify == 0, a.dirties})
}

// settle opens an epoch for the writes that a dead session may still execute,
// starts its fence, and retries everything in order. The session is done.
func (p *Path) settle() {
	all := p.lost
	p.lost = nil
	p.g.mu.Lock()
	nexus, caches := p.nexus, p.g.separateCaches()
	p.g.mu.Unlock()
	e := newEpoch(p.Name)
	e.path, e.nexus = p, nexus
	if p.keyed.Swap(false) {
		e.key = p.Key
	}
	for _, l := range all {
		if l.ambiguous {
			e.extents = append(e.extents, extent{l.lo, l.hi, l.req})
			e.caches = e.caches || caches && l.dirties && p.g.ledger.omit&RuleCaches == 0
		}
	}
	if len(e.extents) > 0 && p.g.ledger.omit&RuleFence == 0 {
		p.g.openEpoch(e)
	}
	p.passDirt()
	p.riskMu.Lock()
	p.risky = false
	p.riskMu.Unlock()
	p.g.noRisk(p.Name)
	var plug block.Plug
	for _, l := range all {
		p.g.retry(l.req, Action{}, p, &plug)
	}
	p.g.releaseBehind(&plug)
	p.g.unpark(nil, &plug) // passDirt may have found another path for them
	if p.g.waiting.Load() > 0 {
		p.g.drain(&plug)
	}
	plug.Flush()
}

// atRisk tells what a mode does until the fence.
var atRisk = map[string]string{Hold: "waits", Strict: "and its retries wait", Shadow: "is kept in memory too", Off: "is not protected"}

// openEpoch enters e and starts to fence it.
func (g *Group) openEpoch(e *epoch) {
	slices.SortFunc(e.extents, func(a, b extent) int { return cmp.Compare(a.lo, b.lo) })
	l := &g.ledger
	l.mu.Lock()
	l.epochs = append(l.epochs, e)
	l.ambiguous += int64(len(e.extents))
	l.count()
	l.mu.Unlock()
	g.log.Warn("a session died with writes under way: what overlaps them "+atRisk[g.cfg().Protection]+" until it is fenced", "path", e.name,
		"writes_at_risk", len(e.extents), "blocks_at_risk", e.blocksAtRisk(), "whole_device", e.whole)
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
// reports whether it did; an error says that waiting is hopeless. a is the attempt that r was about to use; its span is
// published already, so that of two overlapping mutations on two paths one
// sees the other.
func (g *Group) hold(r *block.Request, a *attempt, lo, hi uint64) (held bool, err error) {
	l, mode := &g.ledger, g.cfg().Protection
	if mode == Off && l.shadow.used.Load() == 0 || r.Route.State&stateRewrite != 0 {
		return false, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	risk, own := false, false
	if mode != Off { // what is in memory has to be on the disk first all the same
		risk, own = l.conflicts(r, lo, hi, mode)
	}
	risk = risk || l.shadow.covers(lo, hi) && l.omit&RuleKept == 0
	wait := l.shadow.isLocked(lo, hi) && l.omit&RuleLocked == 0
	for i := range l.held {
		h := &l.held[i]
		wait = wait || lo < h.hi && h.lo < hi // nobody overtakes: the first in is the first out
	}
	behind := false
	if !wait && (own && !risk && l.omit&RuleInFlight == 0 || risk && mode == Shadow) {
		// Another write of these blocks may be between us and the disk: if it came
		// second there, the late copy would undo it, or the shadow would not be
		// what the disk holds.
		l.behind.Add(1) // before the look: who ends after it sees it
		if behind = g.inFlight(a, lo, hi); !behind {
			l.behind.Add(-1)
		}
		if !behind && risk && l.shade(r, lo, hi, g.lu().BlockSize, g.cfg().ShadowLimit) {
			return false, nil
		}
	}
	if risk && mode != Off && l.hopeless(lo, hi) {
		if behind {
			l.behind.Add(-1)
		}
		return false, block.ErrIO
	}
	if wait || behind || risk {
		l.held = append(l.held, heldRequest{r, lo, hi, time.Now(), behind})
		l.holds++
		return true, nil
	}
	return false, nil
}

// hopeless tells whether the blocks are at risk by an epoch for which nobody
// waits any more. Caller holds mu.
func (l *ledger) hopeless(lo, hi uint64) bool {
	return slices.ContainsFunc(l.epochs, func(e *epoch) bool { return e.hopeless && e.overlaps(lo, hi) })
}

// conflicts looks for blocks [lo, hi) among the extents: whether they overlap
// one that is at risk, and whether one is r's own. Caller holds mu.
func (l *ledger) conflicts(r *block.Request, lo, hi uint64, mode string) (risk, own bool) {
	for _, e := range l.epochs {
		risk = risk || e.whole && l.omit&RuleWhole == 0
		for _, x := range e.extents {
			if x.lo >= hi {
				break // sorted
			}
			switch {
			case lo >= x.hi:
			case x.req == r && mode != Strict:
				own = true // the same bytes, be it in other pieces: executing both is executing one
			default:
				risk = risk || l.omit&RuleOverlap == 0
			}
		}
	}
	return risk, own
}

// inFlight tells whether an attempt other than a mutates blocks of [lo, hi).
func (g *Group) inFlight(a *attempt, lo, hi uint64) bool {
	for _, p := range *g.everyPath.Load() {
		for _, slab := range *p.slabs.Load() {
			for i := range slab {
				if o := &slab[i]; o != a && o.overlaps(lo, hi) {
					return true
				}
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
	if l.omit&RuleForget != 0 {
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

// closeEpoch ends an epoch for the reason how, by which means, and lets what it
// held go on; more is for the log.
func (g *Group) closeEpoch(e *epoch, how, by string, more ...any) bool {
	l := &g.ledger
	if (e.caches || e.whole && g.lu().WriteCache) && !e.flushed.Load() { // before: a flush must not pass between
		g.leftDirty(e)
	}
	l.mu.Lock()
	i := slices.Index(l.epochs, e)
	if i < 0 {
		l.mu.Unlock()
		return false
	}
	l.epochs = slices.Delete(l.epochs, i, i+1)
	l.count()
	if l.fences == nil {
		l.fences = map[string]int64{}
	}
	l.fences[how]++
	if l.means == nil {
		l.means = map[string]int64{}
	}
	l.means[by]++
	close(e.fenced)
	l.mu.Unlock()
	g.rewriteShadow()
	var plug block.Plug
	n, longest := g.releaseHeld(nil, &plug)
	plug.Flush()
	took := time.Since(e.since)
	log := g.log.Info
	if how != fenceProven && how != fenceCommand {
		log = g.log.Warn
	}
	log("old session fenced", append([]any{"path", e.name, "how", how, "by", by, "took", took.Round(time.Microsecond), "writes_at_risk", len(e.extents),
		"blocks_at_risk", e.blocksAtRisk(), "requests_released", n, "longest_hold", longest.Round(time.Microsecond)}, more...)...)
	g.noRisk(e.name)
	if e.whole || e.caches { // flushes waited for it
		g.unpark(nil, &plug)
		plug.Flush()
	}
	return true
}

// risk tells Config.OnRisk that the path is about to take writes, or through which
// portals it can now be fenced if it does already.
func (p *Path) risk(begins bool) {
	p.riskMu.Lock()
	defer p.riskMu.Unlock()
	if p.risky = p.risky || begins; p.risky && p.g.cfg().OnRisk != nil {
		p.g.cfg().OnRisk(p.Name, true, p.portals())
	}
}

// noRisk tells that a path may be forgotten over a crash, if that is so: no
// session of it can write, be it old or one that began meanwhile, and its server
// holds nothing that only a flush through this path would reach.
func (g *Group) noRisk(name string) {
	if g.cfg().OnRisk == nil {
		return
	}
	risk := false
	for _, p := range *g.everyPath.Load() {
		if p.Name == name {
			p.riskMu.Lock()
			defer p.riskMu.Unlock()
			risk = risk || p.risky || p.unflushed()
		}
	}
	if !risk && len(g.ledger.of(name)) == 0 {
		g.cfg().OnRisk(name, false, nil)
	}
}

// unflushable tells whether an old session may still write to a cache that no
// flush reaches in time: the bytes that another server has acknowledged, and
// then its copy may be the one that counts, or whatever an earlier run left.
func (l *ledger) unflushable() bool {
	if l.open.Load() == 0 {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.epochs, func(e *epoch) bool { return e.whole || e.caches })
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
// conflict are held again. With err they fail instead. It tells how many are
// held no more and the longest time that one was.
func (g *Group) releaseHeld(err error, p *block.Plug) (n int, longest time.Duration) {
	l := &g.ledger
	l.mu.Lock()
	held := l.held
	l.held = nil
	for _, h := range held {
		if h.behind {
			l.behind.Add(-1)
		}
	}
	l.mu.Unlock()
	for _, h := range held {
		if err != nil {
			g.finish(h.req, err, p)
		} else {
			g.proceed(h.req, nil, p)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range held {
		i := slices.IndexFunc(l.held, func(x heldRequest) bool { return x.req == h.req })
		if i >= 0 { // it waits on
			l.held[i].since = h.since
			l.holds--
			continue
		}
		n++
		took := time.Since(h.since)
		l.waited += took
		longest = max(longest, took)
	}
	l.longest = max(l.longest, longest)
	return n, longest
}

// releaseBehind starts what waited for a mutation that has just ended.
func (g *Group) releaseBehind(p *block.Plug) {
	if g.ledger.behind.Load() > 0 {
		g.releaseHeld(nil, p)
	}
}

// failHeld is releaseHeld for those who batch nothing.
func (g *Group) failHeld(err error) {
	var p block.Plug
	g.releaseHeld(err, &p)
	p.Flush()
}
