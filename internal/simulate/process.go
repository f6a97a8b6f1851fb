package simulate

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/nbd"
	"github.com/mpathd/mpathd/paths"
)

const (
	initiatorName = "iqn.2026-11.sim:host"
	exportName    = "disk"
)

// stateFile is what outlives a process, as the daemon's file of unfenced
// paths does: path name to the portals that can fence it.
type stateFile struct {
	mu   sync.Mutex
	risk map[string][]string
	lost bool
}

// process is one run of the product, put together as the daemon does it.
type process struct {
	w      *world
	n      uint64
	dead   atomic.Bool  // it crashed: nothing it does has an effect any more
	fuse   atomic.Int64 // it crashes before the nth system call from now; 0: not
	back   time.Duration
	over   bool // dead, and its successor is on its way
	ctx    context.Context
	cancel context.CancelFunc
	server *nbd.Server
	wg     sync.WaitGroup
	buried chan struct{} // closed when the last goroutine of a crashed one ended

	mu    sync.Mutex
	group *paths.Group
	conns []*conn
	pipes []*pipe
}

func (w *world) launch() {
	p := &process{w: w, buried: make(chan struct{}), server: nbd.NewServer(nbd.Config{MaxRequests: 8})}
	if w.proc != nil {
		p.n = w.proc.n + 1
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	w.state.mu.Lock()
	w.proc = p
	w.procs = append(w.procs, p)
	w.state.mu.Unlock()
	for i, l := range w.net.links {
		p.wg.Go(func() { p.bringUp(i, l) })
	}
}

func (p *process) enter(c *conn) {
	p.mu.Lock()
	p.conns = append(slices.DeleteFunc(p.conns, (*conn).gone), c)
	p.mu.Unlock()
}

func (p *process) theGroup() *paths.Group {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.group
}

// session opens a session of the path that belongs to link own, at address.
func (p *process) session(ctx context.Context, own *link, isid, address string, onState func(initiator.State, error), onRoom func(*block.Plug)) (*initiator.Session, error) {
	return initiator.Open(ctx, initiator.Config{
		Address: address, TargetName: own.srv.iqn, InitiatorName: initiatorName, ISID: initiator.PathISID(initiatorName, own.srv.iqn, isid),
		FailoverTime: time.Second, CommandTimeout: 8 * time.Second, QueueDepth: 6, OnState: onState, OnRoom: onRoom,
		Dial: func(ctx context.Context, _, address string) (net.Conn, error) { return p.w.net.dial(ctx, p, address) },
	})
}

// bringUp tries a path until its unit is in the map.
func (p *process) bringUp(order int, l *link) {
	for p.ctx.Err() == nil {
		if err := p.try(order, l); err == nil {
			return
		}
		select {
		case <-time.After(200*time.Millisecond + time.Duration(order)*time.Millisecond):
		case <-p.ctx.Done():
		}
	}
}

func (p *process) try(order int, l *link) error {
	ctx, cancel := context.WithTimeout(p.ctx, 20*time.Second)
	defer cancel()
	s, err := p.session(ctx, l, "probe "+l.address, l.address, nil, nil)
	if err != nil {
		return err
	}
	defer s.Close(ctx)
	info, err := initiator.Identify(ctx, s, [8]byte{})
	if err != nil {
		return err
	}
	name := l.address + "/0"
	pc := paths.PathConfig{Name: name, URL: "iscsi://" + name, Portal: l.address, Target: l.srv.iqn, Order: order}
	pc.Open = func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (paths.Session, error) {
		s, err := p.session(ctx, l, name, l.address, onState, onRoom)
		if err != nil {
			return nil, err
		}
		return s, nil
	}
	pc.OpenAt = func(ctx context.Context, portal string) (paths.Session, error) { return p.openAt(ctx, name, portal) }
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.group == nil {
		g, err := paths.NewGroup(p.config(info), info)
		if err != nil {
			return err
		}
		if err := p.server.AddExport(nbd.Export{Name: exportName, Device: g}); err != nil {
			return err
		}
		p.group = g
	}
	_, err = p.group.AddPath(pc, info)
	return err
}

// openAt logs in at a portal with the identity of the path name.
func (p *process) openAt(ctx context.Context, name, portal string) (paths.Session, error) {
	i := slices.IndexFunc(p.w.net.links, func(l *link) bool { return l.address+"/0" == name })
	s, err := p.session(ctx, p.w.net.links[i], name, portal, nil, nil)
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (p *process) config(info *initiator.LUInfo) paths.Config {
	w := p.w
	jitter := w.rand(3, p.n)
	var jmu sync.Mutex
	c := paths.Config{
		Alias: exportName, WWID: info.WWID, Policy: w.set.Policy, Selector: "round-robin 0", Checker: w.set.Checker, NoPathRetry: paths.Queue,
		PollingInterval: 2 * time.Second, QueueDepth: 6, Protection: w.set.Protection, Replicated: w.set.Replicated, MultibusServers: true, LeaveOut: w.set.LeaveOut,
		HedgeReads: w.set.HedgeReads, HedgeAfter: time.Millisecond, GrayPaths: w.set.GrayPaths, MarginalGroups: w.set.Marginal,
		Logger: w.set.log,
		Jitter: func(d time.Duration) time.Duration {
			jmu.Lock()
			defer jmu.Unlock()
			return time.Duration(jitter.Int64N(int64(d)))
		},
	}
	if w.set.Sampling {
		c.Sampling = paths.Sampling{DoubleFailed: time.Minute, Sample: time.Second, Recheck: 5 * time.Second, Rate: 10}
	}
	if w.set.PathErrors {
		c.PathErrors = paths.PathErrors{Threshold: 1, ForgetRate: 3, Recovery: 8 * time.Second}
	}
	w.state.mu.Lock()
	defer w.state.mu.Unlock()
	if p.dead.Load() {
		return c
	}
	for _, name := range slices.Sorted(maps.Keys(w.state.risk)) {
		u := paths.Unfenced{Path: name, Via: map[string]func(context.Context) (paths.Session, error){}}
		for _, portal := range w.state.risk[name] {
			u.Via[portal] = func(ctx context.Context) (paths.Session, error) { return p.openAt(ctx, name, portal) }
		}
		c.Unfenced = append(c.Unfenced, u)
	}
	c.Lost = w.state.lost
	c.OnLoss = func(lost bool) {
		p.point()
		w.state.mu.Lock()
		defer w.state.mu.Unlock()
		switch {
		case !p.dead.Load():
			w.state.lost = lost
		case lost: // it crashed with the report in its hands, which is not made again
			w.guest.tells(1)
		}
	}
	c.OnRisk = func(path string, risk bool, portals []string) {
		p.point()
		w.state.mu.Lock()
		defer w.state.mu.Unlock()
		switch {
		case p.dead.Load():
		case risk:
			w.state.risk[path] = portals
		default:
			delete(w.state.risk, path)
		}
	}
	return c
}

// connect gives the guest a connection to the NBD server.
func (p *process) connect() net.Conn {
	a, b := newPipe()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dead.Load() {
		b.Close()
		return a
	}
	b.point = p.point
	p.pipes = append(p.pipes, b)
	p.wg.Go(func() { p.server.ServeConn(b, nbd.Access{}) })
	return a
}

// crash ends the process between two instructions: its sockets are its
// kernel's now, its memory is gone. What its goroutines still do until they
// end reaches nobody.
func (p *process) crash() {
	p.mu.Lock()
	p.dead.Store(true)
	conns, pipes := p.conns, p.pipes
	p.mu.Unlock()
	for _, c := range conns {
		c.kill()
	}
	for _, b := range pipes {
		b.Close()
	}
	p.w.nudge()
}

// point is a place where a process may crash: just before it hands bytes to its
// kernel or changes its state file.
func (p *process) point() {
	if p.fuse.Load() > 0 && p.fuse.Add(-1) == 0 {
		p.crash()
	}
}

// succeed starts the process that follows one that crashed.
func (w *world) succeed() {
	p := w.proc
	if !p.dead.Load() || p.over {
		return
	}
	p.over = true
	w.tally.Crashes++
	p.book()
	p.bury()
	w.after(p.back, w.launch)
}

// book adds what the process counted.
func (p *process) book() {
	g := p.theGroup()
	if g == nil {
		return
	}
	m := g.Snapshot()
	for how, n := range m.Safety.Fences {
		p.w.tally.Fences[how] += n
	}
	p.w.tally.Holds += m.Safety.Holds
	for _, pg := range m.Groups {
		for _, pt := range pg.Paths {
			p.w.tally.Failovers += pt.Failures
		}
	}
}

// bury ends the goroutines.
func (p *process) bury() {
	p.cancel()
	go func() {
		defer close(p.buried)
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if g := p.theGroup(); g != nil {
			g.Close(ctx)
		}
		if err := p.server.Shutdown(ctx); err != nil {
			p.w.guest.fail(fmt.Errorf("a process that ended left requests behind: %w", err))
		}
		p.wg.Wait()
	}()
}

// healed tells whether every path serves and nothing is left to fence.
func (p *process) healed() error {
	g := p.theGroup()
	if g == nil {
		return fmt.Errorf("no path came up")
	}
	m := g.Snapshot()
	switch {
	case m.Paths.Usable < len(p.w.net.links):
		return fmt.Errorf("%d of %d paths are up", m.Paths.Usable, len(p.w.net.links))
	case len(m.Safety.Unfenced) > 0:
		return fmt.Errorf("%d sessions are not fenced", len(m.Safety.Unfenced))
	case m.Queued > 0 || m.Safety.Held > 0:
		return fmt.Errorf("%d requests queued, %d held", m.Queued, m.Safety.Held)
	}
	return nil
}
