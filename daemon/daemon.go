// Package daemon builds sessions, maps and exports from what the operator
// asked for, and answers the control socket.
package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/nbd"
	"github.com/mpathd/mpathd/paths"
	"github.com/mpathd/mpathd/scsi"
)

// Options is what `mpathd run` was asked to do.
type Options struct {
	URLs                     []string
	Targets                  []initiator.URL // like URLs, with secrets that no URL could carry
	Discover                 []Discovery     // portals whose targets are asked for
	Resolve                  Resolver        // settings of each map; nil: Policy for all
	InitiatorName            string
	NBD                      string         // unix:PATH or tcp:HOST:PORT, several with commas
	TLS                      *tls.Config    // offered to NBD clients, if set
	TLSRequired              bool           // of those that come over TCP
	Allow                    []netip.Prefix // from where TCP clients may come; empty: anywhere
	Control                  string         // path of the control socket
	Merge                    []string
	FailoverTime             time.Duration
	HeaderDigest, DataDigest bool // demand CRC32C
	QueueDepth               int
	Policy                   paths.Config // Policy, Selector, Checker, Manual, NoPathRetry, intervals
	Attach                   Attacher     // nil: no kernel device
	State                    string       // file that remembers unfenced paths across runs; empty: none
	Logger                   *slog.Logger
	ShowConfig               func() any // what `show config` prints; nil: nothing
	// Reload reads the configuration again, for `reconfigure` and SIGHUP; nil:
	// there is none.
	Reload  func() (Reloaded, error)
	Metrics string // host:port of the Prometheus endpoint; empty: none
}

// Reloaded is what a new reading of the configuration asks for.
type Reloaded struct {
	Targets  []initiator.URL
	Discover []Discovery
	Resolve  Resolver
}

// Discovery is a portal to ask for its targets (SendTargets), and the CHAP
// credentials for the discovery and for what it finds.
type Discovery struct {
	Address string
	initiator.Credentials
}

// Resolver gives the policy of the map that a unit belongs to and the kernel
// device pinned to it, if any. An error leaves the unit alone.
type Resolver func(info *initiator.LUInfo) (cfg paths.Config, device string, err error)

// Attacher makes a kernel device of an export, the named one if a name is
// given. One call at a time.
type Attacher func(d *Daemon, export, wwid, device string, g block.Geometry) (Kernel, error)

// Kernel is an attached kernel device.
type Kernel struct {
	Path    string
	Detach  func() error
	Resize  func(bytes int64) error
	Adopted bool // an earlier run had made it
}

// Daemon is a running stack.
type Daemon struct {
	o       Options
	log     *slog.Logger
	server  *nbd.Server
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	begun   time.Time
	risk    *riskFile
	events  *eventLog
	http    *http.Server
	metrics *http.Server

	attaching sync.Mutex
	changing  sync.Mutex // one Reconfigure at a time
	mu        sync.Mutex
	urls      []initiator.URL // all that were asked for or found
	maps      []*mapEntry
	pending   map[string]string // URL -> why it is not up yet
}

type mapEntry struct {
	group  *paths.Group
	alias  string
	pinned string // the device it must get, or empty
	kernel Kernel
}

// Start brings everything up that answers and keeps trying the rest. An error
// means that nothing runs.
func Start(o Options) (*Daemon, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	events := &eventLog{}
	o.Logger = slog.New(events.tee(o.Logger.Handler()))
	urls := slices.Clone(o.Targets)
	for _, s := range o.URLs {
		u, err := initiator.ParseURL(s)
		if err != nil {
			return nil, err
		}
		urls = append(urls, u)
	}
	risk, err := openRiskFile(o.State)
	if err != nil {
		return nil, err
	}
	var nbdLns []net.Listener
	closeAll := func() {
		for _, ln := range nbdLns {
			ln.Close()
		}
	}
	for spec := range strings.SplitSeq(o.NBD, ",") {
		ln, err := listen(strings.TrimSpace(spec))
		if err != nil {
			closeAll()
			return nil, fmt.Errorf("NBD socket: %w", err)
		}
		nbdLns = append(nbdLns, ln)
	}
	ctlLn, err := listen("unix:" + o.Control)
	if err != nil {
		closeAll()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	d := &Daemon{o: o, log: o.Logger, events: events, begun: time.Now(), risk: risk, pending: map[string]string{},
		server: nbd.NewServer(nbd.Config{Logger: o.Logger, MaxRequests: o.QueueDepth, TLS: o.TLS, TLSRequired: o.TLSRequired, Allow: o.Allow})}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	if o.Metrics != "" {
		if err := d.serveMetrics(o.Metrics); err != nil {
			closeAll()
			ctlLn.Close()
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	d.http = &http.Server{Handler: d.handler(), ReadHeaderTimeout: 5 * time.Second}
	for _, ln := range nbdLns {
		d.wg.Go(func() { d.server.Serve(ln) })
	}
	d.wg.Go(func() { d.http.Serve(ctlLn) })
	d.log.Info("serving", "nbd", o.NBD, "control", o.Control, "initiator", o.InitiatorName)
	for _, u := range urls {
		d.addURL(u)
	}
	for _, p := range o.Discover {
		d.wg.Add(1)
		go func() { defer d.wg.Done(); d.discover(p) }()
	}
	return d, nil
}

// addURL begins to bring a URL up, once.
func (d *Daemon) addURL(u initiator.URL) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ctx.Err() != nil || slices.ContainsFunc(d.urls, func(have initiator.URL) bool { return have.String() == u.String() }) {
		return
	}
	order := len(d.urls)
	d.urls = append(d.urls, u)
	d.pending[u.String()] = "connecting"
	d.wg.Add(1)
	go func() { defer d.wg.Done(); d.bringUp(u, order) }()
}

// discover asks a portal for its targets until it answers.
func (d *Daemon) discover(p Discovery) {
	wait := 100 * time.Millisecond
	name := "discovery at " + p.Address
	logged := ""
	for d.ctx.Err() == nil {
		ts, err := initiator.Discover(d.ctx, d.sessionConfig(initiator.URL{Address: p.Address, Credentials: p.Credentials}, "discovery "+p.Address))
		if err == nil {
			d.mu.Lock()
			delete(d.pending, name)
			d.mu.Unlock()
			d.log.Info("discovered", "portal", p.Address, "targets", len(ts))
			d.add(p, ts)
			return
		}
		if err.Error() != logged {
			logged = err.Error()
			d.log.Error("discovery failed", "portal", p.Address, "cause", err)
		}
		d.mu.Lock()
		d.pending[name] = err.Error()
		d.mu.Unlock()
		select {
		case <-time.After(wait):
		case <-d.ctx.Done():
		}
		wait = min(2*wait, 5*time.Second)
	}
}

// listen opens a socket that only its owner may use. A socket that a dead
// daemon left is replaced, one in use is an error.
func listen(spec string) (net.Listener, error) {
	kind, addr, ok := strings.Cut(spec, ":")
	switch {
	case ok && kind == "tcp":
		return net.Listen("tcp", addr)
	case !ok || kind != "unix" || addr == "":
		return nil, fmt.Errorf("%q: want unix:PATH or tcp:HOST:PORT", spec)
	}
	if err := os.MkdirAll(filepath.Dir(addr), 0o700); err != nil {
		return nil, err
	}
	if c, err := net.Dial("unix", addr); err == nil {
		c.Close()
		return nil, fmt.Errorf("%s is in use by a running daemon: stop it or choose another path", addr)
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		os.Remove(addr)
	}
	old := syscall.Umask(0o177)
	ln, err := net.Listen("unix", addr)
	syscall.Umask(old)
	return ln, err
}

// bringUp tries a URL until its units are in maps. It lives beside all other
// URLs and holds nothing of theirs.
func (d *Daemon) bringUp(u initiator.URL, order int) {
	wait := 100 * time.Millisecond
	logged := ""
	for {
		err := d.tryURL(u, order)
		d.mu.Lock()
		if err == nil {
			delete(d.pending, u.String())
		} else {
			d.pending[u.String()] = err.Error()
		}
		d.mu.Unlock()
		if err == nil {
			return
		}
		if d.ctx.Err() != nil {
			return
		}
		if err.Error() != logged {
			logged = err.Error()
			d.log.Error("path not usable yet", "url", u.String(), "cause", err)
		}
		if errors.Is(err, paths.ErrRefused) {
			return
		}
		select {
		case <-time.After(wait):
		case <-d.ctx.Done():
			return
		}
		wait = min(2*wait, 5*time.Second)
	}
}

func (d *Daemon) sessionConfig(u initiator.URL, isid string) initiator.Config {
	return initiator.Config{Address: u.Address, TargetName: u.Target, InitiatorName: d.o.InitiatorName, Credentials: u.Credentials, HeaderDigest: d.o.HeaderDigest, DataDigest: d.o.DataDigest,
		ISID: initiator.PathISID(d.o.InitiatorName, u.Target, isid), FailoverTime: d.o.FailoverTime, QueueDepth: d.o.QueueDepth}
}

// tryURL logs in once to learn which units there are and who they are, and
// adds a path for each to its map.
func (d *Daemon) tryURL(u initiator.URL, order int) error {
	ctx, cancel := context.WithTimeout(d.ctx, 20*time.Second)
	defer cancel()
	s, err := initiator.Open(ctx, d.sessionConfig(u, "probe "+u.Address))
	if err != nil {
		return err
	}
	defer s.Close(ctx)
	luns := [][8]byte{scsi.LUNFromNumber(u.LUN)}
	if !u.HasLUN {
		if luns, err = initiator.ReportLUNs(ctx, s); err != nil {
			return err
		}
	}
	var first error
	for _, lun := range luns {
		info, err := initiator.Identify(ctx, s, lun)
		if err == nil {
			err = d.addPath(u, order, lun, info)
		} else if u.HasLUN {
			err = fmt.Errorf("LUN %d of %s: %w", u.LUN, u.Target, err)
		} else {
			d.log.Warn("unit left out", "target", u.Target, "lun", scsi.LUNNumber(lun), "cause", err)
			err = nil
		}
		if err != nil && first == nil {
			first = err
		}
	}
	return first
}

// addPath puts a path into the map of its unit, making the map if need be.
func (d *Daemon) addPath(u initiator.URL, order int, lun [8]byte, info *initiator.LUInfo) error {
	if info.WWID == "" {
		return fmt.Errorf("%w: LUN %d of %s has no SCSI ID (VPD pages 83 and 80 are empty)", paths.ErrRefused, scsi.LUNNumber(lun), u.Target)
	}
	u.LUN, u.HasLUN = scsi.LUNNumber(lun), true
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ctx.Err() != nil {
		return d.ctx.Err()
	}
	merge := slices.ContainsFunc(append([]string{info.WWID}, info.Synonyms...), func(id string) bool { return slices.Contains(d.o.Merge, id) })
	var m *mapEntry
	for _, have := range d.maps {
		if have.group.Info().WWID == info.WWID {
			m = have
		}
	}
	pc := paths.PathConfig{Name: u.Address + "/" + fmt.Sprint(u.LUN), URL: u.String(), Portal: u.Address, Target: u.Target, LUN: lun, LUNNumber: u.LUN, Order: order}
	pc.Open = func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (paths.Session, error) {
		c := d.sessionConfig(u, fmt.Sprint(u.Address, "/", u.LUN))
		c.OnState, c.OnRoom = onState, onRoom
		s, err := initiator.Open(ctx, c)
		if err != nil {
			return nil, err
		}
		return s, nil
	}
	pc.OpenAt = func(ctx context.Context, portal string) (paths.Session, error) { return d.openAt(ctx, u, portal) }
	if m != nil {
		_, err := m.group.AddPath(pc, info)
		return err
	}
	cfg, pinned := d.o.Policy, ""
	if d.o.Resolve != nil {
		var err error
		if cfg, pinned, err = d.o.Resolve(info); err != nil {
			return fmt.Errorf("%w: %w", paths.ErrRefused, err)
		}
		merge = merge || cfg.Merge
	}
	cfg.WWID, cfg.Merge, cfg.Logger, cfg.QueueDepth = info.WWID, merge, d.log, d.o.QueueDepth
	if cfg.Alias == "" || d.o.Resolve == nil && len(d.maps) > 0 {
		cfg.Alias = info.WWID
	}
	d.remember(&cfg, info.WWID, lun)
	cfg.OnResize = func(size int64) error { return d.resized(m, size) }
	m = &mapEntry{alias: cfg.Alias, pinned: pinned}
	g, err := paths.NewGroup(cfg, info)
	if err != nil {
		return err
	}
	m.group = g
	if _, err := g.AddPath(pc, info); err != nil {
		g.Close(d.ctx)
		return err
	}
	var aliases []string
	for _, n := range append([]string{info.WWID}, info.Synonyms...) {
		if n != cfg.Alias && n != "" {
			aliases = append(aliases, n)
		}
	}
	if err := d.server.AddExport(nbd.Export{Name: m.alias, Aliases: aliases, Description: info.Vendor + " " + info.Product, Device: g}); err != nil {
		return err
	}
	d.maps = append(d.maps, m)
	d.log.Info("map ready", "map", m.alias, "size", info.Size(), "block_size", info.BlockSize)
	if d.o.Attach != nil {
		d.wg.Add(1)
		go func() { defer d.wg.Done(); d.attach(m) }()
	}
	return nil
}

// openAt logs in at another portal of u's target as if on u's own path.
func (d *Daemon) openAt(ctx context.Context, u initiator.URL, portal string) (paths.Session, error) {
	c := d.sessionConfig(u, fmt.Sprint(u.Address, "/", u.LUN))
	c.Address = portal
	s, err := initiator.Open(ctx, c)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// remember connects a map with the file of unfenced paths: what the run before
// left there must be fenced first, what this run begins is noted.
func (d *Daemon) remember(cfg *paths.Config, wwid string, lun [8]byte) {
	secrets := map[string]initiator.URL{} // the caller holds d.mu
	for _, u := range d.urls {
		secrets[u.Target] = u
	}
	for name, r := range d.risk.of(wwid) {
		un := paths.Unfenced{Path: name, LUN: lun, Via: map[string]func(context.Context) (paths.Session, error){}}
		if u, err := initiator.ParseURL(r.URL); err == nil {
			un.LUN = scsi.LUNFromNumber(u.LUN)
			if have, ok := secrets[u.Target]; ok {
				u.Credentials = have.Credentials
			}
			for _, portal := range r.Portals {
				un.Via[portal] = func(ctx context.Context) (paths.Session, error) { return d.openAt(ctx, u, portal) }
			}
		}
		d.log.Warn("the run before ended without fencing this path: writes wait until that is done", "path", name, "through", r.Portals)
		cfg.Unfenced = append(cfg.Unfenced, un)
	}
	cfg.OnRisk = func(name string, risk bool, portals []string) {
		url := ""
		if addr, lun, ok := strings.Cut(name, "/"); ok {
			d.mu.Lock()
			urls := slices.Clone(d.urls)
			d.mu.Unlock()
			for _, u := range urls {
				if u.Address == addr {
					u.HasLUN, u.Credentials = true, initiator.Credentials{}
					fmt.Sscan(lun, &u.LUN)
					url = u.String()
				}
			}
		}
		if err := d.risk.set(wwid, name, risk, riskPath{url, portals}); err != nil {
			d.log.Error("state file not written: after a crash, writes under way on this path would not be known", "file", d.o.State, "cause", err)
		}
	}
}

func (d *Daemon) attach(m *mapEntry) {
	d.attaching.Lock()
	k, err := d.o.Attach(d, m.alias, m.group.Info().WWID, m.pinned, m.group.Geometry())
	d.attaching.Unlock()
	if err != nil {
		d.log.Warn("no kernel device", "map", m.alias, "cause", err)
		return
	}
	d.mu.Lock()
	m.kernel = k
	d.mu.Unlock()
	what := "attached"
	if k.Adopted {
		what = "device of an earlier run taken over"
	}
	d.log.Info(what, "map", m.alias, "device", k.Path)
}

// Server is the NBD server, for attaching.
func (d *Daemon) Server() *nbd.Server { return d.server }

// Stop detaches, answers what is in flight, logs out and closes everything,
// within the time of ctx.
func (d *Daemon) Stop(ctx context.Context) error { return d.stop(ctx, true) }

// Leave is Stop without detaching: I/O on the kernel devices waits for the next
// run, which takes them over.
func (d *Daemon) Leave(ctx context.Context) error { return d.stop(ctx, false) }

func (d *Daemon) stop(ctx context.Context, detach bool) error {
	d.mu.Lock()
	maps := slices.Clone(d.maps)
	d.mu.Unlock()
	for _, m := range maps {
		if m.kernel.Detach != nil && detach {
			if err := m.kernel.Detach(); err != nil {
				d.log.Warn("detach failed", "device", m.kernel.Path, "cause", err)
			}
		}
	}
	d.cancel()
	drain, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err := d.server.Shutdown(drain)
	var wg sync.WaitGroup
	for _, m := range maps {
		wg.Add(1)
		go func() { defer wg.Done(); m.group.Close(ctx) }()
	}
	wg.Wait()
	d.events.close()
	d.http.Close()
	if d.metrics != nil {
		d.metrics.Close()
	}
	d.wg.Wait()
	if err != nil {
		err = fmt.Errorf("stop: requests were still waiting and were failed: %w", err)
	}
	return err
}
