package paths

import (
	"errors"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/block"
)

// The mode Shadow: a write that overlaps what a dead session may still execute
// goes out at once, and its bytes are kept until the session is fenced. Reads
// of those blocks come from memory, so that a late write is never seen; after
// the fence they are written again, whatever the disk holds by then (looking
// first would race), and flushed. Mutations of one block go one at a time
// meanwhile: memory and disk see them in the same order.

// shadow is guarded by ledger.mu, but for used.
type shadow struct {
	used      atomic.Int64 // blocks; reads look only if there are any
	blocks    map[uint64][]byte
	locked    []run // being written again: mutations of them wait
	rewriting bool
	rewritten int64 // blocks, since start
}

// run is blocks [lo, hi).
type run struct{ lo, hi uint64 }

// covers tells whether a block of [lo, hi) is kept.
func (s *shadow) covers(lo, hi uint64) bool {
	if len(s.blocks) == 0 {
		return false
	}
	for b := lo; b < hi; b++ {
		if s.blocks[b] != nil {
			return true
		}
	}
	return false
}

func (s *shadow) isLocked(lo, hi uint64) bool {
	return slices.ContainsFunc(s.locked, func(x run) bool { return lo < x.hi && x.lo < hi })
}

// shade keeps what r's next command writes to those of blocks [lo, hi) that are
// at risk or kept already, up to limit bytes in all. False: it does not fit, or is not worth it;
// r has to wait. Caller holds ledger.mu.
func (l *ledger) shade(r *block.Request, lo, hi uint64, bs int, limit int64) bool {
	if r.Op == block.Trim { // nobody waits for a trim
		return false
	}
	s := &l.shadow
	var at []uint64
	fresh := 0
	for b := lo; b < hi; b++ {
		if s.blocks[b] == nil {
			if !slices.ContainsFunc(l.epochs, func(e *epoch) bool { return e.overlaps(b, b+1) }) {
				continue
			}
			fresh++
		}
		at = append(at, b)
		if int64(len(s.blocks)+fresh)*int64(bs) > limit {
			return false
		}
	}
	if s.blocks == nil {
		s.blocks = map[uint64][]byte{}
	}
	for _, b := range at {
		m := s.blocks[b]
		if m == nil {
			m = make([]byte, bs)
			s.blocks[b] = m
		}
		if r.Op == block.Write {
			copy(m, r.Data[r.Route.Pos+int64(b-lo)*int64(bs):])
		} else {
			clear(m)
		}
	}
	s.used.Store(int64(len(s.blocks)))
	l.count()
	return true
}

// readShadow fills what it can of a read, from Route.Pos on, and tells how many
// of the next size bytes the disk must give; 0: r has everything.
func (l *ledger) readShadow(r *block.Request, size, bs int64) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	for r.Route.Pos < r.Len {
		m := l.shadow.blocks[uint64((r.Off+r.Route.Pos)/bs)]
		if m == nil {
			break
		}
		r.Route.Pos += int64(copy(r.Data[r.Route.Pos:], m))
	}
	size = min(size, r.Len-r.Route.Pos)
	for n := bs; n < size; n += bs {
		if l.shadow.blocks[uint64((r.Off+r.Route.Pos+n)/bs)] != nil {
			return n
		}
	}
	return size
}

// rewriteShadow begins to write again what no open epoch can revert any more, or,
// with the protection switched off, everything.
func (g *Group) rewriteShadow() {
	l := &g.ledger
	l.mu.Lock()
	if l.omit&RuleRewrite != 0 {
		clear(l.shadow.blocks)
		l.shadow.used.Store(0)
		l.count()
	}
	begin := len(l.shadow.blocks) > 0 && !l.shadow.rewriting
	l.mu.Unlock()
	if !begin {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if g.closed || l.shadow.rewriting {
		return
	}
	l.shadow.rewriting = true
	g.routines.Add(1)
	go g.routineRewrite()
}

const (
	rewriteMax   = 256 << 10 // bytes of one write
	rewritePause = 5 * time.Millisecond
	rewriteRetry = time.Second
)

// routineRewrite writes until nothing is left that can be.
func (g *Group) routineRewrite() {
	defer g.routines.Done()
	wait := func(d time.Duration) (on bool) {
		select {
		case <-g.stop:
			return false
		case <-time.After(d):
			return true
		}
	}
	for {
		began := time.Now()
		runs := g.ledger.lockShadow(g.cfg().Protection == Off)
		if len(runs) == 0 {
			return
		}
		for slices.ContainsFunc(runs, func(x run) bool { return g.inFlight(nil, x.lo, x.hi) }) { // that came first
			if !wait(rewritePause) {
				return
			}
		}
		written, err := g.writeShadow(runs)
		if n := g.ledger.dropShadow(written); n > 0 {
			g.log.Info("blocks kept in memory are on the disk again", "blocks", n, "took", time.Since(began).Round(time.Microsecond))
		}
		g.failHeld(nil)
		if err != nil {
			g.log.Error("blocks kept in memory could not be written again, they stay there", "cause", err)
			if !wait(rewriteRetry) {
				return
			}
		}
	}
}

// lockShadow finds the runs that no open epoch overlaps, or all, and makes mutations
// of them wait. With none the rewriting is over.
func (l *ledger) lockShadow(all bool) (runs []run) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range slices.Sorted(maps.Keys(l.shadow.blocks)) {
		if !all && slices.ContainsFunc(l.epochs, func(e *epoch) bool { return e.overlaps(b, b+1) }) {
			continue
		}
		if n := len(runs); n > 0 && runs[n-1].hi == b {
			runs[n-1].hi++
		} else {
			runs = append(runs, run{b, b + 1})
		}
	}
	l.shadow.locked = runs
	l.shadow.rewriting = len(runs) > 0
	return runs
}

// dropShadow forgets runs that are on the disk again, and lets mutations of all go on.
func (l *ledger) dropShadow(runs []run) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, x := range runs {
		for b := x.lo; b < x.hi; b++ {
			delete(l.shadow.blocks, b)
			n++
		}
	}
	l.shadow.locked = nil
	l.shadow.rewritten += int64(n)
	l.shadow.used.Store(int64(len(l.shadow.blocks)))
	l.count()
	return n
}

// writeShadow writes the runs and flushes them. It returns those that are on the
// disk, and why others are not.
func (g *Group) writeShadow(runs []run) (written []run, err error) {
	losses := g.losses.Load()
	for _, x := range runs {
		if e := g.writeRun(x); e != nil {
			err = e
		} else {
			written = append(written, x)
		}
	}
	if e := g.do(&block.Request{Op: block.Flush}); e != nil {
		return nil, e
	}
	if losses != g.losses.Load() {
		return nil, errMaybeLost
	}
	return written, err
}

func (g *Group) writeRun(x run) error {
	bs := uint64(g.lu().BlockSize)
	step := max(uint64(min(int64(rewriteMax), g.maxIO.Load()))/bs, 1)
	for lo := x.lo; lo < x.hi; lo += step {
		hi := min(lo+step, x.hi)
		r := &block.Request{Op: block.Write, Off: int64(lo * bs), Len: int64((hi - lo) * bs), Data: make([]byte, 0, (hi-lo)*bs)}
		g.ledger.mu.Lock()
		for b := lo; b < hi; b++ {
			r.Data = append(r.Data, g.ledger.shadow.blocks[b]...)
		}
		g.ledger.mu.Unlock()
		if err := g.do(r); err != nil {
			return err
		}
	}
	return nil
}

var errMaybeLost = errors.New("a session ended meanwhile, maybe with its server and what it had not flushed")

// do submits a request of the group's own, which is never held, and waits.
func (g *Group) do(r *block.Request) error {
	w := make(waiter, 1)
	r.Owner = w
	r.Route = block.Route{Start: now(), State: stateRewrite}
	var p block.Plug
	g.proceed(r, nil, &p)
	p.Flush()
	<-w
	return r.Err
}

type waiter chan struct{}

func (w waiter) Complete(*block.Request, *block.Plug) { w <- struct{}{} }
