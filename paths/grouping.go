package paths

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/mpathd/mpathd/checker"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
	"github.com/mpathd/mpathd/selector/prio"
)

// Policies: how paths fall into groups (Config.Policy).
var policies = []string{"failover", "multibus", "group_by_serial", "group_by_prio", "group_by_node_name", "group_by_tpg"}

// Failback of Config: whether I/O returns to the best group by itself.
const (
	Immediate  = "immediate"  // as soon as a better group has a path
	Manual     = "manual"     // never: only when the group in use has no path left
	Followover = "followover" // when the first path of the best group comes back
	// A number of seconds waits that long after the last change.
)

// Failbacks are the words for Config.Failback; empty chooses by the targets.
var Failbacks = []string{Immediate, Manual, Followover}

// pathGroup is paths that share the I/O while their group is in use.
type pathGroup struct {
	paths   []*Path
	prio    int // mean over the usable paths, 0 if none is
	rank    int // mean over all paths with a known priority: the order of groups
	enabled int // usable paths
	// marginal groups come after all others and serve only for want of one.
	marginal bool
}

const unknownPrio = -1

// settleTime is how long after a map begins a better group that comes up for the
// first time is no failback.
const settleTime = 10 * time.Second

// key tells the paths of one group from others.
func (g *Group) key(p *Path) string {
	k := ""
	switch g.cfg().Policy {
	case "failover":
		return p.Name
	case "multibus":
		return ""
	case "group_by_serial":
		k = p.serial
	case "group_by_prio":
		k = strconv.Itoa(p.prio)
	case "group_by_node_name":
		return p.Target
	case "group_by_tpg":
		k = strconv.Itoa(p.portGroup)
	}
	if !g.cfg().MultibusServers {
		// Two target names may be two servers, of which neither can end the
		// other's late writes: they do not share I/O unasked.
		k += " " + p.Target
	}
	return k
}

// grouping sorts the paths into groups: higher rank first, then those of more
// paths, the others as configured. Caller holds mu.
func (g *Group) grouping(usable func(*Path) bool) []*pathGroup {
	var out []*pathGroup
	by := map[string]*pathGroup{}
	for _, p := range g.paths {
		k := g.key(p)
		if p.marginal() {
			k += "\x00marginal"
		}
		pg := by[k]
		if pg == nil {
			pg = &pathGroup{marginal: p.marginal()}
			by[k] = pg
			out = append(out, pg)
		}
		pg.paths = append(pg.paths, p)
	}
	for _, pg := range out {
		sum, n, all, known := 0, 0, 0, 0
		for _, p := range pg.paths {
			if p.prio != unknownPrio {
				all += p.prio
				known++
			}
			if usable(p) {
				pg.enabled++
				if p.prio != unknownPrio {
					sum += p.prio
					n++
				}
			}
		}
		if known > 0 {
			pg.rank = all / known
		}
		switch {
		case n > 0:
			pg.prio = sum / n
		case pg.enabled > 0:
			pg.prio = unknownPrio
		}
	}
	slices.SortStableFunc(out, func(a, b *pathGroup) int {
		switch {
		case a.marginal == b.marginal && a.rank == b.rank:
			return len(b.paths) - len(a.paths)
		case a.marginal == b.marginal:
			return b.rank - a.rank
		case a.marginal:
			return 1
		}
		return -1
	})
	return out
}

// best is the group that should serve: the highest priority among those with a
// usable path, then the most such paths, then the order; a marginal one only if
// there is no other. nil if none has a usable path.
func best(groups []*pathGroup) (b *pathGroup) {
	for _, pg := range groups {
		switch {
		case pg.enabled == 0 || b != nil && pg.marginal && !b.marginal:
		case b == nil || b.marginal && !pg.marginal || pg.prio > b.prio || pg.prio == b.prio && pg.enabled > b.enabled:
			b = pg
		}
	}
	return b
}

// choose picks the group to use among groups with usable paths, by failback
// and by what the operator switched to. came tells which paths became usable
// just now. Caller holds mu.
func (g *Group) choose(groups []*pathGroup, usable, came func(*Path) bool) *pathGroup {
	to := best(groups)
	if to == nil {
		return nil
	}
	in := func(p *Path) *pathGroup { // the group of p, if it can serve
		for _, pg := range groups {
			if pg.enabled > 0 && p != nil && slices.Contains(pg.paths, p) {
				return pg
			}
		}
		return nil
	}
	g.why = "the operator"
	if pg := in(g.switched); pg != nil {
		return pg
	}
	if g.switched != nil {
		g.switched, g.why = nil, noneUsable
	}
	now := in(g.active)
	switch {
	case g.released:
	case now == nil:
		g.why = noneUsable
	case now.marginal && !to.marginal: // leaving a gray path is no failback
		g.why = "its paths are gray"
	}
	if g.released || now == nil || now == to || now.marginal && !to.marginal {
		g.released = false
		g.stopFailback()
		return to
	}
	g.why = "failback"
	switch {
	case time.Since(g.begun) < settleTime && slices.ContainsFunc(to.paths, func(p *Path) bool { return came(p) && p.failures.Load() == 0 }):
		// The map is just coming up, in whatever order its paths log in.
		g.why = "a better path came up for the first time"
	case g.failbackMode() == Manual:
		return now
	case g.failbackMode() == Followover:
		// A cluster's peer may have moved the array on purpose: go back only
		// if it was the loss of our paths there that made us leave.
		first := slices.ContainsFunc(to.paths, came) && !slices.ContainsFunc(to.paths, func(p *Path) bool { return usable(p) && !came(p) })
		if first {
			return to
		}
		return now
	case g.cfg().FailbackAfter > 0:
		if g.failback == nil {
			g.failback = time.AfterFunc(g.cfg().FailbackAfter, g.failBack)
		} else if slices.ContainsFunc(to.paths, came) {
			g.failback.Reset(g.cfg().FailbackAfter)
		}
		if !g.failbackDue {
			return now
		}
		g.stopFailback()
	}
	return to
}

// failbackMode is the word in force. Of two servers each move risks what the
// other still has under way: unasked it is not made. Caller holds mu.
func (g *Group) failbackMode() string {
	switch {
	case g.cfg().Failback != "":
		return g.cfg().Failback
	case g.servers() > 1:
		return Manual
	}
	return Immediate
}

const noneUsable = "no path of the group is usable"

func (g *Group) stopFailback() {
	if g.failback != nil {
		g.failback.Stop()
	}
	g.failback, g.failbackDue = nil, false
}

// failBack is the end of the wait that failback N asks for.
func (g *Group) failBack() {
	g.mu.Lock()
	g.failbackDue = true
	g.publish()
	g.mu.Unlock()
	g.restart()
}

// Switch makes group n (1 is the first that `show topology` prints) serve until
// its last path fails; 0 goes back to the policy's choice.
func (g *Group) Switch(n int) error {
	g.mu.Lock()
	groups := g.grouping((*Path).usable)
	switch {
	case n < 0 || n > len(groups):
		g.mu.Unlock()
		return fmt.Errorf("map %s has groups 1 to %d, not %d (0 returns to the policy's choice)", g.cfg().Alias, len(groups), n)
	case n == 0:
		g.switched, g.released = nil, true
	default:
		i := slices.IndexFunc(groups[n-1].paths, (*Path).usable)
		if i < 0 {
			g.mu.Unlock()
			return fmt.Errorf("map %s: group %d has no usable path to switch to", g.cfg().Alias, n)
		}
		g.switched = groups[n-1].paths[i]
	}
	g.publish()
	g.mu.Unlock()
	g.restart()
	return nil
}

// rank asks for the path's priority; true if it changed.
func (p *Path) rank(ctx context.Context, s Session, info *initiator.LUInfo) bool {
	ctx, cancel := context.WithTimeout(ctx, p.g.cfg().CheckTimeout)
	defer cancel()
	n, access, err := p.g.prioOf(ctx, p, s, info)
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	if err != nil {
		n, access = unknownPrio, accessUnknown
		if ctx.Err() == nil {
			p.g.log.Warn("priority unknown", "path", p.Name, "prio", p.g.cfg().prio.Name(), "cause", err)
		}
	}
	changed := n != p.prio || access != p.access
	if changed && p.access != accessUnknown && access != accessUnknown && p.access != access {
		p.g.log.Info("access state changed", "path", p.Name, "from", scsi.AccessStateText(uint8(p.access)), "to", scsi.AccessStateText(uint8(access)), "prio", n)
	}
	p.prio, p.access = n, access
	return changed
}

const accessUnknown = -1

// rankOthers lets the other live paths ask for their priorities anew: one that
// changed is seldom the only one.
func (g *Group) rankOthers(p *Path) {
	for _, q := range *g.everyPath.Load() {
		if q != p {
			q.askRank()
		}
	}
}

func (p *Path) askRank() { p.ask(askRank) }

// needsActivation tells whether the group is one that an explicit transition
// should make optimal before I/O goes there (SPC-4 5.15.2.7). Caller holds mu.
func (g *Group) needsActivation(pg *pathGroup) bool {
	if g.lu().TPGS&scsi.TPGSExplicit == 0 || pg == nil || g.closed {
		return false
	}
	for _, p := range pg.paths {
		if p.access == int(scsi.ActiveOptimized) || p.access == accessUnknown {
			return false
		}
	}
	return !slices.ContainsFunc(pg.paths, func(p *Path) bool { return p.activated })
}

// premature tells that a transition should wait: the map is just coming up, and
// a path that is still to come, perhaps of a portal that nothing is known of yet,
// may lead to the group that serves already.
// Caller holds mu.
func (g *Group) premature(to *pathGroup) bool {
	left := g.cfg().GhostDelay - time.Since(g.begun)
	if left <= 0 || !g.needsActivation(to) {
		return false
	}
	toCome := slices.ContainsFunc(g.paths, func(p *Path) bool { return !p.seen && !p.failedByHand })
	better := slices.ContainsFunc(g.paths, func(p *Path) bool { return p.seen && p.access == int(scsi.ActiveOptimized) })
	if !toCome && better { // it was here, and is gone
		return false
	}
	if g.patience == nil {
		g.patience = time.AfterFunc(left, func() {
			g.mu.Lock()
			g.publish()
			g.mu.Unlock()
			g.restart()
		})
	}
	return true
}

// activate makes a port group optimal through one of its paths, then publishes.
// I/O waits in the queue meanwhile.
func (g *Group) activate(p *Path, s Session) {
	defer g.routines.Done()
	ctx, cancel := context.WithTimeout(context.Background(), g.cfg().CheckTimeout)
	defer cancel()
	defer context.AfterFunc(stopContext{g.stop}, cancel)()
	err := initiator.ActivatePortGroup(ctx, s, p.LUN, uint16(p.portGroup))
	if err != nil {
		g.log.Warn("port group not activated", "path", p.Name, "port_group", p.portGroup, "cause", err)
	} else {
		g.log.Info("port group activated", "path", p.Name, "port_group", p.portGroup)
		p.askRank()
	}
	g.mu.Lock()
	g.activating = false
	g.publish()
	g.mu.Unlock()
	g.rankOthers(p)
	p.askRank()
	g.restart()
}

// enter makes a group the one in use, and begins an explicit transition if it
// needs one. Caller holds mu.
func (g *Group) enter(to *pathGroup, usable func(*Path) bool, wait bool) {
	if was := g.active; was == nil || !slices.Contains(to.paths, was) || !usable(was) {
		g.active = to.paths[slices.IndexFunc(to.paths, usable)]
		if was != nil && !slices.Contains(to.paths, was) {
			for _, p := range g.paths {
				p.activated = false
			}
			if !g.closed {
				g.groupSwitches++
				g.log.Info("path group switched", "from", was.Name, "to", g.active.Name, "cause", g.why)
			}
		}
	}
	if !wait && !g.activating && g.needsActivation(to) && g.active.session != nil {
		g.active.activated, g.activating = true, true
		g.routines.Add(1)
		go g.activate(g.active, g.active.session)
	}
}

// servers are the paths of a group that take I/O: those in standby only if
// there are no others.
func servers(pg *pathGroup, usable func(*Path) bool) (out []*Path) {
	for _, ghosts := range []bool{false, true} {
		for _, p := range pg.paths {
			if usable(p) && (p.checkState == checker.Ghost) == ghosts {
				out = append(out, p)
			}
		}
		if len(out) > 0 {
			return out
		}
	}
	return nil
}

// prioOf asks the prioritizer.
func (g *Group) prioOf(ctx context.Context, p *Path, s Session, info *initiator.LUInfo) (n, access int, err error) {
	q := prio.Path{Doer: s, LUN: p.LUN, Info: info, Name: p.Name, Address: p.Portal, Target: p.Target}
	pr := g.cfg().prio
	if a, ok := pr.(prio.Access); ok {
		n, state, err := a.Access(ctx, q)
		return n, int(state), err
	}
	n, err = pr.Prio(ctx, q)
	return n, accessUnknown, err
}
