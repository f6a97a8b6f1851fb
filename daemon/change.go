package daemon

import (
	"errors"
	"fmt"
	"slices"

	"github.com/mpathd/mpathd/initiator"
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
	d.o.Resolve = r.Resolve
	maps := slices.Clone(d.maps)
	d.mu.Unlock()
	var all []error
	for _, m := range maps {
		cfg, _, err := r.Resolve(m.group.Info())
		if err == nil {
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
	d.dropTargets(r.Targets)
	for _, u := range r.Targets {
		d.addURL(u)
	}
	d.mu.Lock()
	known := slices.Clone(d.o.Discover)
	d.o.Discover = r.Discover
	d.mu.Unlock()
	for _, p := range r.Discover {
		if slices.Contains(known, p) {
			d.discoverOnce(p) // what is new behind a known portal
			continue
		}
		d.wg.Add(1)
		go func() { defer d.wg.Done(); d.discover(p) }()
	}
	d.log.Info("configuration applied", "maps", len(maps), "problems", len(all))
	return errors.Join(all...)
}

// dropTargets forgets the configured targets that the new configuration does
// not name any more; those found by discovery stay.
func (d *Daemon) dropTargets(now []initiator.URL) {
	names := func(list []initiator.URL, u initiator.URL) bool {
		return slices.ContainsFunc(list, func(x initiator.URL) bool { return x.String() == u.String() })
	}
	d.mu.Lock()
	var gone []initiator.URL
	for _, u := range d.o.Targets {
		if !names(now, u) {
			gone = append(gone, u)
		}
	}
	d.o.Targets = now
	d.urls = slices.DeleteFunc(d.urls, func(u initiator.URL) bool { return names(gone, u) })
	for _, u := range gone {
		delete(d.pending, u.String())
	}
	maps := slices.Clone(d.maps)
	d.mu.Unlock()
	for _, u := range gone {
		for _, m := range maps {
			m.group.RemovePaths(u.Address, u.Target)
		}
	}
}

// discoverOnce asks a portal for its targets in the background.
func (d *Daemon) discoverOnce(p Discovery) {
	d.wg.Add(1)
	go func() {
		defer d.wg.Done()
		ts, err := initiator.Discover(d.ctx, d.sessionConfig(initiator.URL{Address: p.Address, Credentials: p.Credentials}, "discovery "+p.Address))
		if err != nil {
			d.log.Error("discovery failed", "portal", p.Address, "cause", err)
			return
		}
		d.add(p, ts)
	}()
}

func (d *Daemon) add(p Discovery, ts []initiator.DiscoveredTarget) {
	for _, t := range ts {
		for _, at := range t.Portals {
			d.addURL(initiator.URL{Address: at.Address, Target: t.Name, Credentials: p.Credentials})
		}
	}
}

// resized passes a map's new size on to its export and its kernel device.
func (d *Daemon) resized(m *mapEntry, size int64) error {
	d.server.Resized(m.alias)
	d.mu.Lock()
	k := m.kernel
	d.mu.Unlock()
	if k.Resize == nil {
		return nil
	}
	return k.Resize(size)
}
