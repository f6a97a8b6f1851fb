package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/paths"
	"github.com/mpathd/mpathd/scsi"
)

// follower brings a PATH-URL up and, if it names a whole target, follows what
// units there are. It lives beside all others and holds nothing of theirs.
type follower struct {
	u     initiator.URL
	order int
	ctx   context.Context
	stop  context.CancelFunc
	again chan struct{}      // the target's units or its secrets may have changed
	told  map[[8]byte]string // why a unit was left out, by LUN, as logged
}

// addURL begins to bring a URL up, once. One that is known may have other secrets
// than before.
func (d *Daemon) addURL(u initiator.URL) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ctx.Err() != nil {
		return
	}
	d.takeCredentials(u)
	if d.following[u.String()] != nil {
		return
	}
	f := &follower{u: u, order: len(d.urls), again: make(chan struct{}, 1), told: map[[8]byte]string{}}
	f.ctx, f.stop = context.WithCancel(d.ctx)
	d.following[u.String()] = f
	d.urls = append(slices.DeleteFunc(slices.Clone(d.urls), func(x initiator.URL) bool { return x.String() == u.String() }), u)
	d.pending[u.String()] = "connecting"
	d.wg.Add(1)
	go func() { defer d.wg.Done(); d.follow(f) }()
}

// takeCredentials makes those of u the ones with which its target is logged in to
// from now on, unless the configuration gives the target its own. Caller holds d.mu.
func (d *Daemon) takeCredentials(u initiator.URL) {
	at := targetOf(u)
	for _, x := range d.o.Targets {
		if targetOf(x) == at {
			u = x
		}
	}
	if have, _ := d.secrets.Swap(at, u.Credentials); have == u.Credentials {
		return
	}
	for i, x := range d.urls {
		if targetOf(x) == at {
			d.urls[i].Credentials = u.Credentials
		}
	}
	for _, f := range d.following {
		if targetOf(f.u) == at {
			f.look()
		}
	}
}

// targetOf is a URL without its unit.
func targetOf(u initiator.URL) string {
	u.HasLUN = false
	return u.String()
}

// look makes a follower that still follows look again.
func (f *follower) look() {
	select {
	case f.again <- struct{}{}:
	default:
	}
}

// Waits of a follower.
const (
	retryMin    = 100 * time.Millisecond
	retryMax    = 5 * time.Second
	settleTime  = 200 * time.Millisecond // after a change was told, for those that come with it
	inquireTime = 10 * time.Second       // for one unit to say who it is
	orderTime   = time.Second            // for which units are taken in the order of their numbers
)

// follow tries a URL until its units are in maps, then as often as something
// may have changed.
func (d *Daemon) follow(f *follower) {
	defer f.stop()
	wait, logged := retryMin, ""
	for f.ctx.Err() == nil {
		complete, err := d.tryURL(f)
		d.mu.Lock()
		switch {
		case f.ctx.Err() != nil: // nobody's any more
		case err == nil:
			delete(d.pending, f.u.String())
		default:
			d.pending[f.u.String()] = err.Error()
		}
		d.mu.Unlock()
		if err == nil {
			logged = ""
		} else if err.Error() != logged && f.ctx.Err() == nil {
			logged = err.Error()
			d.log.Error("path not usable yet", "url", f.u.String(), "cause", err)
		}
		refused := errors.Is(err, paths.ErrRefused)
		if (err == nil || refused) && !f.wholeTarget() {
			return
		}
		pause := retryAfter(err, wait)
		wait = min(2*wait, retryMax)
		if err == nil && complete || refused {
			pause, wait = d.o.RescanInterval, retryMin
		}
		var due <-chan time.Time
		if pause > 0 {
			due = time.After(pause)
		}
		select {
		case <-due:
		case <-f.again:
			select {
			case <-time.After(settleTime):
			case <-f.ctx.Done():
			}
			wait = retryMin
		case <-f.ctx.Done():
		}
	}
}

func (f *follower) wholeTarget() bool { return wholeTarget(f.u) }

// rescan makes those who follow a target look for its units; empty: all.
func (d *Daemon) rescan(target string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range d.following {
		if f.wholeTarget() && (target == "" || f.u.Target == target) {
			f.look()
		}
	}
}

// followPortal asks a portal for its targets every RescanInterval, as long as
// the configuration names it.
func (d *Daemon) followPortal(p Discovery) {
	if d.o.RescanInterval <= 0 {
		return
	}
	for {
		select {
		case <-time.After(d.o.RescanInterval):
		case <-d.ctx.Done():
			return
		}
		if !d.discovers(p) {
			return
		}
		d.discoverNow(p)
	}
}

// found is what one unit said of itself.
type found struct {
	i    int // its place among the LUNs
	info *initiator.LUInfo
	err  error
}

// tryURL logs in once to learn which units there are and who they are, and adds
// a path for each to its map. It reports whether all could be asked. A unit that
// hangs delays no other.
func (d *Daemon) tryURL(f *follower) (complete bool, err error) {
	u := f.u
	if units := d.o.Surveyed.take(u); units != nil {
		for _, n := range units {
			if e := d.addPath(f, n.lun, n.info); e != nil && err == nil {
				err = e
			}
		}
		return true, err
	}
	ctx, cancel := context.WithTimeout(f.ctx, 20*time.Second)
	defer cancel()
	s, end, err := Inquire(ctx, u, d.sessionConfig(u, "probe "+u.Address))
	if err != nil {
		return false, err
	}
	defer end()
	if !f.wholeTarget() {
		info, err := initiator.Identify(ctx, s, LUN(u))
		if err != nil {
			return false, fmt.Errorf("%s: %w", UnitName(u), err)
		}
		return true, d.addPath(f, LUN(u), info)
	}
	luns, err := initiator.ReportLUNs(ctx, s)
	if err != nil {
		return false, err
	}
	luns = d.compare(f, luns)
	asked := make(chan found, len(luns)) // nobody waits for those that answer too late
	room := make(chan struct{}, 8)
	for i, lun := range luns {
		go func() {
			room <- struct{}{}
			defer func() { <-room }()
			ctx, cancel := context.WithTimeout(ctx, inquireTime)
			defer cancel()
			info, err := initiator.Identify(ctx, s, lun)
			asked <- found{i, info, err}
		}()
	}
	complete = true
	var first error
	take := func(x found) {
		err := x.err
		if err == nil {
			if err = d.addPath(f, luns[x.i], x.info); err == nil {
				delete(f.told, luns[x.i])
				return
			}
			if first == nil {
				first = err
			}
		}
		complete = complete && errors.Is(err, paths.ErrRefused)
		if lun := luns[x.i]; f.told[lun] != err.Error() {
			f.told[lun] = err.Error()
			d.log.Warn("unit left out", "target", u.Target, "lun", scsi.LUNText(lun), "cause", err)
		}
	}
	held, next := map[int]found{}, 0
	disorder := time.After(orderTime)
	for range luns {
		var x found
		for waiting := true; waiting; {
			select {
			case x = <-asked:
				waiting = false
			case <-disorder:
				disorder = nil
				for i := range luns {
					if y, ok := held[i]; ok {
						take(y)
					}
				}
				held, next = nil, -1
			}
		}
		if next < 0 {
			take(x)
			continue
		}
		for held[x.i] = x; ; next++ {
			y, ok := held[next]
			if !ok {
				break
			}
			delete(held, next)
			take(y)
		}
	}
	return complete, first
}

// compare tells which of the LUNs that a target reports are worth asking, and
// takes out the paths to units that are gone or became another disk, where the
// map has other paths. Those that serve, or may have writes on the way, stay.
func (d *Daemon) compare(f *follower, luns [][8]byte) (ask [][8]byte) {
	known := map[[8]byte]bool{}
	gone := func(lun [8]byte) bool { return !slices.Contains(luns, lun) }
	d.mu.Lock()
	maps := slices.Clone(d.maps)
	d.mu.Unlock()
	for _, m := range maps {
		st := m.group.Snapshot()
		for _, g := range st.Groups {
			for _, p := range g.Paths {
				if !leadsTo(f.u, paths.PathConfig{URL: p.URL}) {
					continue
				}
				at, err := initiator.ParseURL(p.URL)
				if err != nil {
					continue
				}
				lun := at.LUN
				unfenced := slices.ContainsFunc(st.Safety.Unfenced, func(x paths.UnfencedStatus) bool { return x.Path == p.Name })
				switch {
				case p.State != "down" || unfenced || !p.Foreign && !gone(lun):
					known[lun] = true
					if !gone(lun) {
						delete(f.told, lun)
					}
				case p.Foreign && !gone(lun):
					m.group.RemovePaths(func(pc paths.PathConfig) bool { return pc.Name == p.Name })
					d.log.Warn("path leads to the unit no more", "map", m.alias, "path", p.Name, "target", f.u.Target, "lun", scsi.LUNText(lun))
				case m.group.RemoveSparePath(p.Name):
					d.log.Warn("path leads to the unit no more", "map", m.alias, "path", p.Name, "target", f.u.Target, "lun", scsi.LUNText(lun))
				default:
					known[lun] = true
					if why := "the target does not report it any more"; f.told[lun] != why {
						f.told[lun] = why
						d.log.Warn("unit is gone", "map", m.alias, "path", p.Name, "target", f.u.Target, "lun", scsi.LUNText(lun), "cause", why)
					}
				}
			}
		}
	}
	for _, lun := range luns {
		if !known[lun] {
			ask = append(ask, lun)
		}
	}
	return ask
}
