package daemon

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/paths"
)

// Reconfigure reads the configuration again and applies what changed: policies
// of maps at once, new targets and portals, and targets that are gone. A bad
// file changes nothing.
func (d *Daemon) Reconfigure() error {
	if d.o.Reload == nil {
		return errors.New("reconfigure: this daemon runs from PATH-URLs, without a configuration file")
	}
	d.changing.Lock()
	defer d.changing.Unlock()
	r, err := d.o.Reload()
	if err != nil {
		d.log.Error("configuration refused, the old one stays in force", "cause", err)
		return fmt.Errorf("reconfigure: nothing changed: %w", err)
	}
	d.mu.Lock()
	d.o.Resolve, d.o.Refuse = r.Resolve, r.Refuse
	maps := slices.Clone(d.maps)
	d.mu.Unlock()
	var all []error
	for _, m := range maps {
		cfg, device, err := r.Resolve(m.group.Info())
		if err == nil {
			if device != m.pinned {
				d.log.Warn("a new nbd_device takes effect with the next start", "map", m.alias, "nbd_device", device)
			}
			if cfg.Alias != "" && cfg.Alias != m.alias {
				d.log.Warn("a new alias takes effect with the next start", "map", m.alias, "alias", cfg.Alias)
			}
			err = m.group.Reconfigure(cfg)
		} else {
			err = fmt.Errorf("map %s: %w: it stays until the next start", m.alias, err)
		}
		if err != nil {
			all = append(all, err)
		}
	}
	d.mu.Lock()
	known := slices.Clone(d.o.Discover)
	d.mu.Unlock()
	d.dropTargets(r.Targets, r.Discover)
	for _, u := range r.Targets {
		d.addURL(u)
	}
	d.rescan("")
	for _, p := range r.Discover {
		if slices.Contains(known, p) {
			d.discoverOnce(p) // what is new behind a known portal
			continue
		}
		d.wg.Add(1)
		go func() { defer d.wg.Done(); d.discover(p) }()
	}
	d.dropMaps()
	d.log.Info("configuration applied", "maps", len(maps), "problems", len(all))
	return errors.Join(all...)
}

// dropTargets forgets the URLs that neither the targets of the new configuration
// name nor a portal has named that it still discovers.
func (d *Daemon) dropTargets(now []initiator.URL, discover []Discovery) {
	d.mu.Lock()
	wanted := func(u initiator.URL) bool {
		if slices.ContainsFunc(now, func(x initiator.URL) bool { return x.String() == u.String() }) {
			return true
		}
		return slices.ContainsFunc(discover, func(p Discovery) bool { return d.foundAt[u.String()][p.Address] })
	}
	var gone, stay []initiator.URL
	for _, u := range d.urls {
		if wanted(u) {
			stay = append(stay, u)
		} else {
			gone = append(gone, u)
		}
	}
	d.o.Targets, d.o.Discover, d.urls = now, discover, stay
	for _, u := range gone {
		if f := d.following[u.String()]; f != nil {
			f.stop()
		}
		delete(d.following, u.String())
		delete(d.foundAt, u.String())
		delete(d.pending, u.String())
	}
	maps := slices.Clone(d.maps)
	d.mu.Unlock()
	for _, u := range gone {
		all := true
		for _, m := range maps {
			all = m.group.RemovePaths(func(pc paths.PathConfig) bool {
				return leadsTo(u, pc) && !slices.ContainsFunc(stay, func(x initiator.URL) bool { return leadsTo(x, pc) })
			}) && all
		}
		if !all { // the next reconfigure tries again
			d.mu.Lock()
			d.urls = append(d.urls, u)
			d.mu.Unlock()
		}
	}
}

// Waits before a map without paths ends.
const (
	replaceTime    = 10 * time.Second // for new targets to lead to its unit
	disconnectTime = 5 * time.Second  // for the kernel's connection to end after its device
)

// dropMaps ends maps without paths, as soon as all targets of the configuration
// have shown where they lead.
func (d *Daemon) dropMaps() {
	d.mu.Lock()
	maps := slices.Clone(d.maps)
	d.mu.Unlock()
	maps = slices.DeleteFunc(maps, func(m *mapEntry) bool { return m.group.Snapshot().Paths.Total > 0 })
	if len(maps) == 0 {
		return
	}
	d.wg.Go(func() {
		for end := time.Now().Add(replaceTime); time.Now().Before(end); {
			d.mu.Lock()
			known := len(d.pending) == 0
			d.mu.Unlock()
			if known {
				break
			}
			select {
			case <-time.After(50 * time.Millisecond):
			case <-d.ctx.Done():
				return
			}
		}
		d.changing.Lock()
		defer d.changing.Unlock()
		for _, m := range maps {
			d.dropMap(m)
		}
	})
}

// dropMap ends a map whose last path the configuration names no more. One that is
// in use stays, and its I/O waits for a path; so does one with old writes to fence.
func (d *Daemon) dropMap(m *mapEntry) {
	st := m.group.Snapshot()
	if st.Paths.Total > 0 || d.ctx.Err() != nil {
		return
	}
	stays := func(why string) {
		d.log.Warn("map stays without a path, its I/O waits", "map", m.alias, "cause", why, "do", "end its use and reconfigure, or configure a path")
	}
	d.mu.Lock()
	k := m.kernel
	d.mu.Unlock()
	switch {
	case len(st.Safety.Unfenced) > 0:
		stays("old sessions are not fenced")
		return
	case st.Safety.Lost:
		stays("acknowledged writes are lost, and no flush has failed for it yet")
		return
	case k.Detach == nil:
	case k.InUse == nil:
		stays(k.Path + " may be in use")
		return
	default:
		if who := k.InUse(); who != "" {
			stays(who)
			return
		}
		if d.detached(m, k) != nil {
			return
		}
	}
	end := time.Now().Add(disconnectTime)
	for !d.server.RemoveExport(m.alias) {
		if k.Detach == nil || time.Now().After(end) {
			stays("an NBD client uses it")
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	d.mu.Lock()
	if m.export = false; m.group.Snapshot().Paths.Total > 0 { // one came just now
		err := d.expose(m)
		d.mu.Unlock()
		if err != nil {
			d.log.Error("map not exported", "map", m.alias, "cause", err)
		}
		return
	}
	d.maps = slices.DeleteFunc(d.maps, func(x *mapEntry) bool { return x == m })
	d.mu.Unlock()
	m.group.Close(d.ctx)
	d.log.Info("map removed: the configuration names no path to it", "map", m.alias)
}

// discovers tells whether the configuration still names the portal, with the same
// credentials.
func (d *Daemon) discovers(p Discovery) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Contains(d.o.Discover, p)
}

// discoverOnce asks a portal for its targets in the background.
func (d *Daemon) discoverOnce(p Discovery) {
	d.wg.Add(1)
	go func() { defer d.wg.Done(); d.discoverNow(p) }()
}

func (d *Daemon) discoverNow(p Discovery) {
	found, err := initiator.Discover(d.ctx, d.sessionConfig(initiator.URL{Address: p.Address, Credentials: p.Credentials}, "discovery "+p.Address))
	if err != nil {
		if d.ctx.Err() == nil {
			d.log.Error("discovery failed", "portal", p.Address, "cause", err)
		}
		return
	}
	d.add(p, found)
	d.forget(p, found)
}

// forget ends following the targets that p named once and names no longer, unless
// somebody else names them or paths lead there: a portal whose targets come and go
// would leave one more behind each time.
func (d *Daemon) forget(p Discovery, found initiator.Discovered) {
	named := map[string]bool{}
	for _, t := range found.Targets {
		for _, at := range t.Portals {
			u := initiator.TargetURL(at, t.Name)
			u.Credentials = p.Credentials
			named[u.String()] = true
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, u := range d.o.Targets {
		named[u.String()] = true
	}
	for _, text := range d.o.URLs {
		if u, err := initiator.ParseURL(text); err == nil {
			named[u.String()] = true
		}
	}
	var there []paths.PathConfig
	for _, m := range d.maps {
		for _, g := range m.group.Snapshot().Groups {
			for _, q := range g.Paths {
				there = append(there, paths.PathConfig{URL: q.URL})
			}
		}
	}
	d.urls = slices.DeleteFunc(d.urls, func(u initiator.URL) bool {
		s := u.String()
		by := d.foundAt[s]
		if !by[p.Address] || named[s] || slices.ContainsFunc(there, func(pc paths.PathConfig) bool { return leadsTo(u, pc) }) {
			return false
		}
		if delete(by, p.Address); len(by) > 0 {
			return false
		}
		d.following[s].stop()
		delete(d.following, s)
		delete(d.foundAt, s)
		delete(d.pending, s)
		d.homes.Delete(u.Address + "/" + u.Target)
		return true
	})
}

// add begins to bring up what a portal named. Each portal of each target is a
// path of its own, so that one that does not answer holds up no other.
func (d *Daemon) add(p Discovery, found initiator.Discovered) {
	for _, why := range found.Skipped {
		d.log.Warn("left out of what was discovered", "portal", p.Address, "cause", why)
	}
	for _, t := range found.Targets {
		for _, at := range t.Portals {
			u := initiator.TargetURL(at, t.Name)
			u.Credentials = p.Credentials
			d.mu.Lock()
			if d.foundAt[u.String()] == nil {
				d.foundAt[u.String()] = map[string]bool{}
			}
			d.foundAt[u.String()][p.Address] = true
			d.mu.Unlock()
			d.addURL(u)
		}
	}
}

// resized passes a map's new size on to its export and its kernel device, which
// it makes if this is the first size that is known.
func (d *Daemon) resized(m *mapEntry, size int64) error {
	d.mu.Lock()
	if !m.export {
		defer d.mu.Unlock()
		if err := d.ctx.Err(); err != nil {
			return err
		}
		return d.expose(m)
	}
	d.mu.Unlock()
	d.server.Resized(m.alias)
	d.fit(m)
	return nil
}

// fit makes a map's kernel device follow its size. For that the kernel freezes the
// queue (since Linux 6.9): it waits for the requests in flight, and those may wait
// for a path. Nobody who brings paths up may wait for it.
func (d *Daemon) fit(m *mapEntry) (fits <-chan error) {
	done := make(chan error, 1)
	go func() {
		m.fitting.Lock() // whoever comes last sees the last size
		defer m.fitting.Unlock()
		d.mu.Lock()
		k := m.kernel
		d.mu.Unlock()
		size := m.group.Geometry().Size
		if k.Resize == nil || k.Size == size {
			done <- nil
			return
		}
		err := k.Resize(size)
		if err == nil {
			d.mu.Lock()
			if m.kernel.Path == k.Path {
				m.kernel.Size = size
			}
			d.mu.Unlock()
			d.log.Info("the kernel device has its new size", "map", m.alias, "device", k.Path, "from_bytes", k.Size, "to_bytes", size)
		} else {
			d.log.Error("the kernel device keeps its old size", "map", m.alias, "device", k.Path, "from_bytes", k.Size, "to_bytes", size, "cause", err)
		}
		done <- err
	}()
	return done
}

// fitTime is how long a resize by hand waits for the kernel.
const fitTime = 5 * time.Second

// Resize takes over the capacity that all paths of a map report, a smaller one if
// forced. The error is paths.ErrSameSize if the map has it already.
func (d *Daemon) Resize(name string, force bool) error {
	m, err := d.find(name)
	if err != nil {
		return err
	}
	if err = m.group.Resize(force); err != nil && !errors.Is(err, paths.ErrSameSize) {
		return err
	}
	select {
	case e := <-d.fit(m):
		if e != nil {
			return e
		}
	case <-time.After(fitTime):
		return fmt.Errorf("map %s has its new size, its kernel device gets it when the requests in flight have ended", m.alias)
	}
	return err
}
