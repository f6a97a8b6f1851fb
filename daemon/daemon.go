// Package daemon builds sessions, maps and exports from what the operator
// asked for, and answers the control socket.
package daemon

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/kernel"
	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/nbd"
	"github.com/mpathd/mpathd/paths"
)

// Options is what `mpathd run` was asked to do.
type Options struct {
	URLs                     []string
	Targets                  []initiator.URL // like URLs, with secrets that no URL could carry
	Discover                 []Discovery     // portals whose targets are asked for
	Resolve                  Resolver        // settings of each map; nil: Policy for all
	Refuse                   Refuser         // paths to leave alone; nil: none
	InitiatorName            string
	NBD                      string      // as nbd.ParseListeners reads it
	TLS                      *tls.Config // offered to NBD clients, if set
	Access                   nbd.Access  // of those that come over TCP, where NBD does not say
	Control                  string      // path of the control socket
	Merge                    []string
	FailoverTime             time.Duration
	HeaderDigest, DataDigest initiator.Digest
	RedirectTo               []netip.Prefix // to where targets may redirect; empty: anywhere
	Lenient                  bool           // see initiator.Config
	QueueDepth               int
	Without                  nbd.Without  // hidden from NBD clients
	Policy                   paths.Config // Policy, Selector, Checker, Manual, NoPathRetry, intervals
	Attach                   Attacher     // nil: no kernel device
	// Attached is the size of the kernel device that an earlier run made for a
	// unit, in bytes, or 0; nil: there is none.
	Attached func(wwid string) int64
	// RescanInterval is how often targets without a LUN are asked for their
	// units, and portals for their targets, besides when they say that something
	// changed; 0: never.
	RescanInterval time.Duration
	Resident       bool   // the buffers of kernel devices have their memory from the start
	State          string // file that remembers unfenced paths across runs; empty: none
	Logger         *slog.Logger
	ShowConfig     func() any // what `show config` prints; nil: nothing
	// ConfigText and BlacklistText are the same for multipathd's clients: in
	// multipath.conf's grammar, as far as maps that are there need it (local)
	// or all, and as multipathd prints its blacklist.
	ConfigText    func(local bool) string
	BlacklistText func() string
	// CompatSocket is where multipathd's clients find us: PATH or, in the
	// abstract namespace, @NAME; empty: nowhere.
	CompatSocket string
	// Reload reads the configuration again, for `reconfigure` and SIGHUP; nil:
	// there is none.
	Reload    func() (Reloaded, error)
	Inherited []Inherited // kernel devices that an earlier run handed over
	Surveyed  *Surveyed   // what Survey found; nil: nothing
	Metrics   string      // host:port of the Prometheus endpoint; empty: none
}

// Reloaded is what a new reading of the configuration asks for.
type Reloaded struct {
	Targets  []initiator.URL
	Discover []Discovery
	Resolve  Resolver
	Refuse   Refuser
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

// Refuser tells why a path to a unit must be left alone, or "".
type Refuser func(u initiator.URL, info *initiator.LUInfo) string

// Attacher makes a kernel device of an export, the named one if a name is
// given. One call at a time.
type Attacher func(d *Daemon, export, wwid, device string, g block.Geometry) (Kernel, error)

// Kernel is an attached kernel device.
type Kernel struct {
	Path    string
	Detach  func() error
	Size    int64                   // bytes, as the kernel was told
	Resize  func(bytes int64) error // may wait for the requests in flight; one call at a time
	Adopted bool                    // an earlier run had made it
	// InUse tells who uses the device, or ""; nil: nobody can tell.
	InUse func() string
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
	state   *sys.Lock // of its file
	targets *paths.Targets
	events  *eventLog
	http    *http.Server
	metrics *http.Server

	leaving   chan struct{}
	successor net.Conn // see serveHandover

	homes     sync.Map // of *initiator.Home, by portal and target
	secrets   sync.Map // of initiator.Credentials, by targetOf: what the configuration says by now
	names     *names
	attaching sync.Mutex
	changing  sync.Mutex // one Reconfigure at a time
	mu        sync.Mutex
	urls      []initiator.URL // all that were asked for or found
	maps      []*mapEntry
	pending   map[string]string          // URL -> why it is not up yet
	following map[string]*follower       // by URL
	foundAt   map[string]map[string]bool // URLs of discovery: the portals that named them
	pathURLs  map[string]string          // by path name
}

type mapEntry struct {
	group  *paths.Group
	alias  string
	pinned string // the device it must get, or empty
	before int64  // size of the device of an earlier run, in bytes, or 0
	kernel Kernel
	export bool // it is offered to NBD clients: its size is known

	fitting sync.Mutex // see fit
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
	specs, err := nbd.ParseListeners(o.NBD, o.Access)
	if err != nil {
		return nil, fmt.Errorf("NBD socket: %w", err)
	}
	var nbdLns []net.Listener
	var ctlLn, compatLn net.Listener
	var state *sys.Lock
	closeAll := func() {
		for _, ln := range append(nbdLns, ctlLn, compatLn) {
			if ln != nil {
				ln.Close()
			}
		}
		state.Release()
	}
	for _, l := range specs {
		if l.TLS == nbd.TLSRequired && o.TLS == nil {
			closeAll()
			return nil, fmt.Errorf("NBD socket %s:%s requires TLS, and there is no certificate: set tls_cert and tls_key", l.Network, l.Address)
		}
		ln, err := listen(l)
		if err != nil {
			closeAll()
			return nil, fmt.Errorf("NBD socket: %w", err)
		}
		nbdLns = append(nbdLns, ln)
	}
	if ctlLn, err = listen(nbd.Listener{Network: "unix", Address: o.Control, Mode: 0o600}); err != nil {
		closeAll()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if o.CompatSocket != "" {
		if compatLn, err = listenCompat(o.CompatSocket); err != nil {
			closeAll()
			return nil, fmt.Errorf("socket for multipathd's clients: %w (does multipathd itself run?)", err)
		}
	}
	if state, err = lockState(o.State); err != nil {
		closeAll()
		return nil, err
	}
	risk, err := openRiskFile(o.State)
	if err != nil {
		closeAll()
		return nil, err
	}
	d := &Daemon{o: o, log: o.Logger, events: events, begun: time.Now(), risk: risk, state: state, targets: paths.NewTargets(), pending: map[string]string{}, pathURLs: map[string]string{}, following: map[string]*follower{}, foundAt: map[string]map[string]bool{}, leaving: make(chan struct{}), names: newNames(),
		server: nbd.NewServer(nbd.Config{Logger: o.Logger, MaxRequests: o.QueueDepth, TLS: o.TLS, Resident: o.Resident, Without: o.Without})}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	if o.Metrics != "" {
		if err := d.serveMetrics(o.Metrics); err != nil {
			closeAll()
			return nil, fmt.Errorf("metrics at %s: %w: want a free HOST:PORT", o.Metrics, err)
		}
	}
	d.http = &http.Server{Handler: d.handler(), ReadHeaderTimeout: 5 * time.Second}
	for i, ln := range nbdLns {
		d.wg.Go(func() { d.server.Serve(ln, specs[i].Access) })
	}
	d.wg.Go(func() { d.http.Serve(ctlLn) })
	d.log.Info("serving", "nbd", o.NBD, "control", o.Control, "initiator", o.InitiatorName)
	if compatLn != nil {
		d.startCompat(compatLn)
	}
	d.wg.Go(d.removeLeftovers)
	for _, u := range urls {
		d.addURL(u)
	}
	for _, p := range o.Discover {
		d.wg.Add(1)
		go func() { defer d.wg.Done(); d.discover(p) }()
	}
	return d, nil
}

// discover asks a portal for its targets until it answers.
func (d *Daemon) discover(p Discovery) {
	wait := 100 * time.Millisecond
	name := "discovery at " + p.Address
	logged := ""
	defer func() {
		d.mu.Lock()
		delete(d.pending, name)
		d.mu.Unlock()
	}()
	for d.ctx.Err() == nil && d.discovers(p) {
		found, err := initiator.Discover(d.ctx, d.sessionConfig(initiator.URL{Address: p.Address, Credentials: p.Credentials}, "discovery "+p.Address))
		if err == nil {
			d.mu.Lock()
			delete(d.pending, name)
			d.mu.Unlock()
			d.log.Info("discovered", "portal", p.Address, "targets", len(found.Targets))
			d.add(p, found)
			d.followPortal(p)
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
		case <-time.After(retryAfter(err, wait)):
		case <-d.ctx.Done():
		}
		wait = min(2*wait, 5*time.Second)
	}
}

// retryAfter is how long to wait after a failed login: long where only a change
// of configuration can help.
func retryAfter(err error, backoff time.Duration) time.Duration {
	if initiator.Retry(err) == initiator.RetrySlowly {
		return retrySlowly
	}
	return backoff
}

const retrySlowly = 30 * time.Second

func (d *Daemon) sessionConfig(u initiator.URL, isid string) initiator.Config {
	if now, ok := d.secrets.Load(targetOf(u)); ok {
		u.Credentials = now.(initiator.Credentials)
	}
	return initiator.Config{Dial: d.names.dial, Address: u.Address, Home: d.home(u.Address, u.Target), RedirectTo: d.o.RedirectTo, TargetName: u.TargetName(), InitiatorName: d.o.InitiatorName, Credentials: u.Credentials, HeaderDigest: d.o.HeaderDigest, DataDigest: d.o.DataDigest, Lenient: d.o.Lenient,
		ISID: initiator.PathISID(d.o.InitiatorName, u.Target, isid), FailoverTime: d.o.FailoverTime, QueueDepth: d.o.QueueDepth}
}

// home is where logins to a target through a portal begin, for all its paths.
func (d *Daemon) home(portal, target string) *initiator.Home {
	h, _ := d.homes.LoadOrStore(portal+"/"+target, &initiator.Home{})
	return h.(*initiator.Home)
}

// addPath puts a path into the map of its unit, making the map if need be.
func (d *Daemon) addPath(f *follower, lun [8]byte, info *initiator.LUInfo) error {
	u, order := f.u, f.order
	if u.Transport != initiator.Local {
		u.LUN, u.HasLUN = lun, true
	}
	if info.WWID == "" {
		return fmt.Errorf("%w: %s has no SCSI ID (VPD pages 83 and 80 are empty): set an ID or a serial number of the unit at the target", paths.ErrRefused, UnitName(u))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if f.ctx.Err() != nil {
		return f.ctx.Err()
	}
	if d.o.Refuse != nil {
		if why := d.o.Refuse(u, info); why != "" {
			return fmt.Errorf("%w: %s is left alone: %s", paths.ErrRefused, UnitName(u), why)
		}
	}
	merge := slices.ContainsFunc(append([]string{info.WWID}, info.Synonyms...), func(id string) bool { return slices.Contains(d.o.Merge, id) })
	var m *mapEntry
	for _, have := range d.maps {
		if have.group.Info().WWID == info.WWID {
			m = have
		}
	}
	pc := d.pathConfig(u, order, lun, info)
	d.pathURLs[pc.Name] = pc.URL
	if m != nil {
		if m.before == m.group.Info().Size() {
			info = notSmaller(info, m.before)
		}
		_, err := m.group.AddPath(pc, info)
		return err
	}
	var before int64
	if d.o.Attached != nil {
		before = d.o.Attached(info.WWID)
		info = notSmaller(info, before)
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
	cfg.OnLUNs = func(_, target string) { d.rescan(target) }
	cfg.OnResize = func(size int64) error { return d.resized(m, size) }
	m = &mapEntry{alias: cfg.Alias, pinned: pinned, before: before}
	g, err := paths.NewGroup(cfg, info)
	if err != nil {
		return err
	}
	m.group = g
	if _, err := g.AddPath(pc, info); err != nil {
		g.Close(d.ctx)
		return err
	}
	if info.Blocks == 0 {
		d.log.Warn("map waits: its unit is in standby through the paths so far and does not tell its size", "map", m.alias)
	} else if err := d.expose(m); err != nil {
		d.wg.Go(func() { g.Close(d.ctx) })
		return err
	}
	d.maps = append(d.maps, m)
	return nil
}

// notSmaller is what a unit says of itself, with at least that many bytes: a map
// has the size of the device that an earlier run left, so that one whose unit shrank
// meanwhile waits as if it had shrunk now. Its paths find that out by themselves.
func notSmaller(info *initiator.LUInfo, bytes int64) *initiator.LUInfo {
	if info.Blocks == 0 || info.Size() >= bytes {
		return info
	}
	l := *info
	l.Blocks = uint64(bytes) / uint64(l.BlockSize)
	return &l
}

// expose offers a map to NBD clients and attaches its kernel device. Caller
// holds d.mu.
func (d *Daemon) expose(m *mapEntry) error {
	info := m.group.Info()
	var aliases []string
	for _, n := range append([]string{info.WWID}, info.Synonyms...) {
		if n != m.alias && n != "" {
			aliases = append(aliases, n)
		}
	}
	if err := d.server.AddExport(nbd.Export{Name: m.alias, Aliases: aliases, Description: info.Vendor + " " + info.Product, Device: m.group}); err != nil {
		return err
	}
	m.export = true
	d.log.Info("map ready", "map", m.alias, "size", info.Size(), "block_size", info.BlockSize)
	if d.o.Attach != nil {
		d.wg.Add(1)
		go func() { defer d.wg.Done(); d.attach(m) }()
	}
	return nil
}

// remember connects a map with the file of unfenced paths: what the run before
// left there must be fenced first, what this run begins is noted.
func (d *Daemon) remember(cfg *paths.Config, wwid string, lun [8]byte) {
	secrets := map[string]initiator.URL{} // the caller holds d.mu
	for _, u := range d.urls {
		secrets[u.Target] = u
	}
	for name, r := range d.risk.of(wwid) {
		un := paths.Unfenced{Path: name, Key: reservationKey(d.o.InitiatorName, name), LUN: lun, Via: map[string]func(context.Context) (paths.Session, error){}}
		if u, err := initiator.ParseURL(r.URL); err == nil {
			un.LUN, un.Target = LUN(u), u.Target
			if have, ok := secrets[u.Target]; ok {
				u.Credentials = have.Credentials
			}
			portals := slices.Clone(r.Portals)
			if d.risk.classes()[u.Target] != paths.Untrusted {
				portals = append(portals, u.Address) // the path may not be configured any more
			}
			for _, portal := range portals {
				un.Via[portal] = func(ctx context.Context) (paths.Session, error) { return d.openAt(ctx, u, portal) }
			}
		}
		d.log.Warn("the run before ended without fencing this path: writes wait until that is done", "path", name, "through", r.Portals)
		cfg.Unfenced = append(cfg.Unfenced, un)
	}
	cfg.Classes, cfg.Tested, cfg.Targets = d.risk.classes(), d.risk.before[wwid], d.targets
	cfg.OnClass = func(target string, c paths.Trust) {
		if err := d.risk.setClass(target, c); err != nil {
			d.unwritten("what the self-test found is known to this run only", err, "target", target)
		}
	}
	cfg.Lost = d.risk.lost(wwid)
	cfg.OnLoss = func(lost bool) {
		if err := d.risk.setLost(wwid, lost); err != nil {
			d.unwritten("after a crash, it would not be known that acknowledged writes are lost", err)
		}
	}
	cfg.OnRisk = func(name string, risk bool, portals []string) {
		d.mu.Lock()
		url := ""
		if u, err := initiator.ParseURL(d.pathURLs[name]); err == nil {
			u.Credentials = initiator.Credentials{}
			url = u.String()
		}
		d.mu.Unlock()
		if err := d.risk.set(wwid, name, risk, riskPath{url, portals}); err != nil {
			d.unwritten("after a crash, writes under way on this path would not be known", err, "path", name)
		}
	}
}

// unwritten tells what it means that the state file could not be written.
func (d *Daemon) unwritten(so string, cause error, with ...any) {
	d.log.Error("state file not written: "+so, append([]any{"file", d.o.State, "cause", cause, "do", "make room there or mend its rights, or name another place with --state"}, with...)...)
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
	if !slices.Contains(d.maps, m) { // it ended meanwhile
		d.mu.Unlock()
		k.Detach()
		return
	}
	m.kernel = k
	d.mu.Unlock()
	what := "attached"
	if k.Adopted {
		what = "device of an earlier run taken over"
	}
	d.log.Info(what, "map", m.alias, "device", k.Path)
	d.fit(m) // an earlier run made it, or the map was resized meanwhile
}

// Server is the NBD server, for attaching.
func (d *Daemon) Server() *nbd.Server { return d.server }

// Stop detaches the kernel devices that nobody uses, answers what is in flight,
// logs out and closes everything, within the time of ctx. A device in use is
// left to the next run: its users wait, instead of failing.
func (d *Daemon) Stop(ctx context.Context) error { return d.stop(ctx, true) }

// Leave is Stop without detaching: I/O on the kernel devices waits for the next
// run, which takes them over.
func (d *Daemon) Leave(ctx context.Context) error { return d.stop(ctx, false) }

func (d *Daemon) stop(ctx context.Context, detach bool) error {
	d.mu.Lock()
	maps := slices.Clone(d.maps)
	d.mu.Unlock()
	if detach {
		d.detachIdle(maps)
	}
	d.cancel()
	drain, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err := d.server.Shutdown(drain)
	tested := map[string]map[string]paths.Tested{}
	for _, m := range maps {
		tested[m.group.Info().WWID] = m.group.Tested()
	}
	d.risk.leave(tested)
	var wg sync.WaitGroup
	for _, m := range maps {
		wg.Add(1)
		go func() { defer wg.Done(); m.group.Close(ctx) }()
	}
	wg.Wait()
	if err := d.risk.flush(); err != nil {
		d.unwritten("the next run tests its paths anew", err)
	}
	d.state.Release()
	if err := kernel.Settle(ctx); err != nil {
		d.log.Error("stop", "cause", err)
	}
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
