package paths

import (
	"errors"
	"fmt"
	"slices"

	"github.com/mpathd/mpathd/block"
)

// What the operator can do to a running map.

// SetQueueing overrides no_path_retry until RestoreQueueing or the end of the
// daemon.
func (g *Group) SetQueueing(on bool) {
	if on {
		g.force(1, "queueing switched on")
	} else {
		g.force(-1, "queueing switched off")
	}
}

// RestoreQueueing lets no_path_retry decide again, from its start.
func (g *Group) RestoreQueueing() { g.force(0, "queueing restored") }

func (g *Group) force(how int, say string) {
	g.mu.Lock()
	g.forced = how
	g.follow(*g.cfg()) // the same, but fences have to look again
	hopeless := g.retryAnew()
	retry := g.retryText()
	g.mu.Unlock()
	g.log.Info(say, "cause", "the operator", "no_path_retry", retry)
	g.restart()
	if hopeless {
		g.failHeld(block.ErrNoPath)
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
	c.OnRisk, c.OnResize, c.OnLUNs, c.OnClass, c.OnLoss = old.OnRisk, old.OnResize, old.OnLUNs, old.OnClass, old.OnLoss
	c.Targets, c.LeaveOut, c.Jitter = old.Targets, old.LeaveOut, old.Jitter
	c.Unfenced, c.Classes, c.Tested = nil, old.Classes, old.Tested
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
	g.follow(*pol)
	g.forgiveGray()
	g.hedge()
	g.maxIO.Store(g.largest(g.lu()))
	g.decideThrough()
	g.publish()
	hopeless := false
	if pol.NoPathRetry != old.NoPathRetry || pol.PollingInterval != old.PollingInterval {
		hopeless = g.retryAnew()
	}
	g.mu.Unlock()
	g.restart()
	if hopeless {
		g.failHeld(block.ErrNoPath)
	}
	if pol.Protection != old.Protection {
		g.failHeld(nil)   // goes on; what the new mode still holds is held again
		g.rewriteShadow() // Off waits for no fence
	}
	g.rankOthers(nil)
	return nil
}

// RemovePaths ends the paths that which picks. Their commands come back first;
// one that may hold unflushed writes stays, with an error in the log. It reports
// whether all are gone.
func (g *Group) RemovePaths(which func(PathConfig) bool) (all bool) {
	g.mu.Lock()
	var gone []*Path
	for _, p := range g.paths {
		if which(p.PathConfig) {
			gone = append(gone, p)
		}
	}
	g.mu.Unlock()
	all = true
	for _, p := range gone {
		all = g.removePath(p, 0) && all
	}
	return all
}

// RemoveSparePath takes the named path out for good, unless it is the map's last
// one, and reports whether it did. Of two that are removed at once, one stays.
func (g *Group) RemoveSparePath(name string) bool {
	p, err := g.path(name)
	return err == nil && g.removePath(p, 1)
}

// removePath takes a path out if more than left others would stay with it, and
// waits until it is quiet.
func (g *Group) removePath(p *Path, left int) bool {
	if p.passDirt(); p.unflushed() {
		g.log.Error("path not removed: its server holds writes that were not flushed", "path", p.Name, "do", "flush (sync) and reconfigure again")
		return false
	}
	g.mu.Lock()
	if g.closed || len(g.paths) <= left || !slices.Contains(g.paths, p) {
		g.mu.Unlock()
		return false
	}
	g.paths = slices.DeleteFunc(g.paths, func(x *Path) bool { return x == p })
	p.failedByHand = true
	p.stopGray()
	if g.active == p {
		g.active = nil
	}
	p.stop()
	g.publish()
	g.mu.Unlock()
	<-p.gone
	g.mu.Lock()
	g.listPaths(p)
	g.mu.Unlock()
	if p.unflushed() { // it took writes to the last, and then its server did not flush
		g.log.Error("path removed although its server holds writes that were not flushed: the next flush fails", "path", p.Name)
		g.loss.lose(now(), g.ledger.omit)
		g.saveLoss()
		g.noRisk(p.Name)
	}
	g.restart()
	g.log.Info("path removed", "path", p.Name)
	return true
}

// FailPath takes a path, by name or URL, out of service until ReinstatePath: its
// session is cut and what was in flight moves. The error: there is no such path.
func (g *Group) FailPath(name string) error {
	p, err := g.path(name)
	if err != nil {
		return err
	}
	g.mu.Lock()
	p.failedByHand = true
	p.lastError = errByHand.Error()
	s := p.session
	g.publish()
	g.mu.Unlock()
	if s != nil {
		s.Abort(errByHand)
	}
	return nil
}

var errByHand = errors.New("failed by the operator")

// ReinstatePath lets a path, by name or URL, serve again, after login and identity
// check, which it does not wait for. It ends FailPath and the exile of a path that led
// to another disk. The error: there is no such path.
func (g *Group) ReinstatePath(name string) error {
	p, err := g.path(name)
	if err != nil {
		return err
	}
	p.set(func() { p.failedByHand, p.wrongLU, p.shrunk = false, false, false })
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
		g.closeEpoch(e, fenceDeclared, "operator")
	}
	return nil
}
