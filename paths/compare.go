package paths

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/mpathd/mpathd/internal/coalesce"
)

// How paths are compared with their siblings: every compareTick, by what their
// own I/O took. A path is gray after compareBad bad windows more than good
// ones, for at least grayLeast; it comes back when compareGood probes in a row
// were as good as a sibling's. Coming and going again makes the least time
// longer, up to grayMost.
const (
	compareTick  = time.Second
	compareIOs   = 4 // in a window, for its mean to say something
	compareAge   = 5 // ticks that a window lasts at most
	compareBad   = 3
	compareGood  = 3
	slowFactor   = 4                     // times a sibling's latency
	slowFloor    = 10 * time.Millisecond // more than a sibling's
	wellFactor   = 2
	wellFloor    = 5 * time.Millisecond
	badErrors    = 3  // in a window
	badRate      = 50 // of them to one of that many I/Os
	probes       = 3
	probeEvery   = 5 // windows
	grayLeast    = 30 * time.Second
	grayMost     = 10 * time.Minute
	grayForget   = 30 * time.Minute
	judgeWindows = 3 // after which a move that helped nothing is taken back
)

// rating is what is known of a path in comparison. Used by the group's
// comparing goroutine only.
type rating struct {
	ios, errors, sum int64 // counters when the window began; sum is ns
	age              int   // ticks of the window
	n, failed        int64 // of the last whole window
	mean             time.Duration
	whole            int // ticks since it ended

	bad, good int
	since     time.Time // gray since; zero: is not
	least     time.Duration
	left      time.Time     // was gray until then
	until     time.Time     // not judged before: the last time helped nothing
	was       time.Duration // mean when it became gray
	helped    bool          // the others are better without it
	vain      int           // windows in which they were not
}

// routineCompare looks for gray paths until the group stops.
func (g *Group) routineCompare() {
	defer g.routines.Done()
	for n := 0; ; n++ {
		select {
		case <-g.stop:
			return
		case <-time.After(coalesce.Period(compareTick)):
		}
		g.compare(n%probeEvery == 0)
	}
}

// compare judges one window.
func (g *Group) compare(probing bool) {
	every := *g.everyPath.Load()
	mode := g.cfg().GrayPaths
	if len(every) < 2 || mode == GrayOff {
		for _, p := range every {
			if !p.rating.since.IsZero() {
				p.endGray("they are not looked for any more")
			}
		}
		return
	}
	for _, p := range every {
		p.rate()
	}
	busy := *g.table.Load()
	for _, p := range busy.paths {
		if r := &p.rating; r.since.IsZero() && r.whole == 0 && time.Now().After(r.until) {
			g.compareServing(p, &busy, mode)
		}
	}
	for _, p := range every {
		if !p.rating.since.IsZero() {
			g.compareGray(p, &busy, probing)
		}
	}
}

// rate closes the path's window if it tells enough, or is old.
func (p *Path) rate() {
	r := &p.rating
	ios, errs, sum := p.ios.Load(), p.errors.Load(), p.latency.sum.Load()
	r.age++
	r.whole++
	if n, failed := ios-r.ios, errs-r.errors; n+failed >= compareIOs {
		r.n, r.failed, r.mean, r.whole = n, failed, time.Duration((sum-r.sum)/max(n, 1)), 0
	} else if r.age < compareAge {
		return
	}
	r.ios, r.errors, r.sum, r.age = ios, errs, sum, 0
}

// tells says that the path's last window is fresh enough to compare with.
func (r *rating) tells() bool { return r.since.IsZero() && r.n >= compareIOs && r.whole < compareAge }

// compareServing looks whether a path that serves is worse than others.
func (g *Group) compareServing(p *Path, t *table, mode string) {
	r := &p.rating
	verdict, told := false, false
	var means []time.Duration
	siblingErrors, siblingIOs := int64(0), int64(0)
	for _, q := range t.paths {
		if q != p && q.rating.tells() {
			means = append(means, q.rating.mean)
			siblingErrors += q.rating.failed
			siblingIOs += q.rating.n
		}
	}
	switch {
	case len(means) > 0:
		slices.Sort(means)
		told, verdict = true, slower(r.mean, means[(len(means)-1)/2], slowFactor, slowFloor)
		if r.failed >= badErrors && r.failed*badRate >= r.n && siblingErrors*badRate*4 < siblingIOs {
			verdict = true
		}
	case mode == GrayMap && len(t.paths) == 1 && r.mean >= slowFloor:
		if q := g.alternative(p, t); q != nil {
			told, verdict = true, g.probedSlower(p, q, slowFactor, slowFloor)
		}
	default:
		told = true
	}
	switch {
	case !told:
	case !verdict:
		r.bad = max(r.bad-1, 0)
	default:
		r.bad++
	}
	if r.bad < compareBad {
		return
	}
	if r.least == 0 || time.Since(r.left) > grayForget {
		r.least = grayLeast
	} else {
		r.least = min(2*r.least, grayMost)
	}
	r.bad, r.good, r.since, r.was, r.helped, r.vain = 0, 0, time.Now(), r.mean, r.failed >= badErrors, 0
	g.log.Warn("gray path: it answers worse than its siblings and serves only when they cannot", "path", p.Name, "latency", r.mean, "errors", r.failed, "at_least", r.least)
	p.hold(heldSlow)
}

// compareGray looks whether a gray path is as good as the others again, or
// whether they are as bad without it.
func (g *Group) compareGray(p *Path, t *table, probing bool) {
	r := &p.rating
	for _, q := range t.paths {
		if q == p || q.rating.whole != 0 || !q.rating.tells() || r.helped {
			continue
		}
		if r.helped = slower(r.was, q.rating.mean, wellFactor, 0); r.helped {
			break
		}
		if r.vain++; r.vain == judgeWindows {
			p.endGray("the others are as slow without it")
			r.until = time.Now().Add(r.least)
			return
		}
		break
	}
	if !probing || time.Since(r.since) < r.least {
		return
	}
	for _, q := range t.all {
		if q == p || !q.rating.since.IsZero() {
			continue
		}
		if g.probedSlower(p, q, wellFactor, wellFloor) {
			r.good = 0
		} else if r.good++; r.good >= compareGood {
			p.endGray("it answers as well as the others again")
		}
		return
	}
	p.endGray("there is nothing to compare it with") // no other path is left
}

func (p *Path) endGray(why string) {
	p.rating.since, p.rating.left, p.rating.bad = time.Time{}, time.Now(), 0
	p.g.log.Info("path is no longer gray: "+why, "path", p.Name)
	p.release(heldSlow)
}

func slower(a, b time.Duration, factor int, floor time.Duration) bool {
	return a >= time.Duration(factor)*b && a-b >= floor
}

// alternative is a path of another group that could serve as well as p: as
// near to the unit, so that its use moves nothing.
func (g *Group) alternative(p *Path, t *table) *Path {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, q := range t.able {
		if q != p && q.access == p.access && q.held == 0 && p.checkState == q.checkState {
			return q
		}
	}
	return nil
}

// probedSlower compares what probes take on two paths, at the same time.
func (g *Group) probedSlower(p, q *Path, factor int, floor time.Duration) bool {
	var took [2]time.Duration
	var failed [2]bool
	var wg sync.WaitGroup
	for i, x := range []*Path{p, q} {
		box := x.current.Load()
		if box == nil {
			return false
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), probes*compareTick)
			defer cancel()
			defer context.AfterFunc(stopContext{g.stop}, cancel)()
			all := make([]time.Duration, 0, probes)
			for range probes {
				began := time.Now()
				if x.probe(ctx, box.Session) != nil {
					failed[i] = true
				}
				all = append(all, time.Since(began))
			}
			slices.Sort(all)
			took[i] = all[len(all)/2]
		})
	}
	wg.Wait()
	return !failed[1] && (failed[0] || slower(took[0], took[1], factor, floor))
}
