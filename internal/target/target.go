// Package target is an iSCSI target in one process (RFC 7143): RAM disks
// behind any number of targets and portals, fast enough to load mpathd and
// scriptable, so that tests and drills can make it misbehave on purpose. It
// keeps nothing: it is never for data.
package target

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Target is one iSCSI target node: a name and its logical units. The index in
// LUs is the LUN; nil entries are LUNs that do not exist. The same *LU may be
// behind several targets and several servers.
type Target struct {
	Name string
	LUs  []*LU

	changed atomic.Pointer[[]*LU] // instead of LUs, see Server.SetUnits
}

func (t *Target) units() []*LU {
	if l := t.changed.Load(); l != nil {
		return *l
	}
	return t.LUs
}

// SetUnits replaces the units of a target. The sessions that there are hear of
// it by UNIT ATTENTION 3F/0E, once per unit that remains, if tell.
func (s *Server) SetUnits(name string, lus []*LU, tell bool) {
	t := s.targets[name]
	t.changed.Store(&lus)
	if !tell {
		return
	}
	for _, p := range s.Portals() {
		for _, c := range p.list() {
			c.post(func() {
				if !c.full || c.target != t {
					return
				}
				for i, l := range lus {
					if l != nil {
						c.ua = append(c.ua, attention{i, 0x3f, 0x0e})
					}
				}
			})
		}
	}
}

// Config is what New needs. The zero value of every field but Targets is a
// sane default.
type Config struct {
	Targets []*Target
	// Window is the command window (MaxCmdSN-ExpCmdSN+1), 256 by default.
	Window int
	// MaxRecvSegment is the declared MaxRecvDataSegmentLength in bytes,
	// MaxBurst and FirstBurst the burst limits offered in login, bytes.
	MaxRecvSegment, MaxBurst, FirstBurst int
	// InitialR2T and NoImmediateData forbid what they name, to force an
	// initiator through its other data paths.
	InitialR2T, NoImmediateData bool
	// Time2Wait, in seconds, is the least DefaultTime2Wait, and what answers to
	// a logout ask for.
	Time2Wait int
	// ResetEndsSessions makes LOGICAL UNIT RESET end the other sessions of the
	// same initiator and target first, and answer nothing on its own meanwhile,
	// this long: as istgt does.
	ResetEndsSessions time.Duration
	// PowerOnUA makes each new session meet UNIT ATTENTION 29/00 once per LU.
	PowerOnUA bool
	// Logger gets one line for each protocol error; nil discards them.
	Logger *slog.Logger
}

const (
	defaultWindow  = 256
	defaultSegment = 256 << 10
	defaultBurst   = 1 << 20
	loginTimeout   = 15 * time.Second
)

// Server is a running set of portals. All methods may be called from any
// goroutine, and all but Kill and Portal.Stop from inside a hook.
type Server struct {
	cfg     Config
	targets map[string]*Target
	hook    atomic.Pointer[func(*Cmd) Action]
	onTask  atomic.Pointer[func(Task) TaskAction]
	stats   counters
	tsih    atomic.Uint32

	mu       sync.Mutex
	portals  []*Portal
	nextPort uint16 // relative target port of the last portal
	sessions map[nexus]*conn
	late     map[*deferred]struct{}
	wg       sync.WaitGroup // connections and accept loops
}

// New checks the configuration. Nothing listens until Listen.
func New(cfg Config) (*Server, error) {
	def := func(v *int, d, lo, hi int, name string) error {
		if *v == 0 {
			*v = d
		}
		if *v < lo || *v > hi {
			return fmt.Errorf("target: %s is %d, want %d to %d", name, *v, lo, hi)
		}
		return nil
	}
	if err := errors.Join(
		def(&cfg.Window, defaultWindow, 1, 65536, "Window"),
		def(&cfg.MaxRecvSegment, defaultSegment, 512, 1<<20, "MaxRecvSegment"),
		def(&cfg.MaxBurst, defaultBurst, 512, 1<<24-1, "MaxBurst"),
		def(&cfg.FirstBurst, min(defaultSegment, cfg.MaxBurst), 512, cfg.MaxBurst, "FirstBurst"),
	); err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if len(cfg.Targets) == 0 {
		return nil, errors.New("target: no target configured")
	}
	s := &Server{
		cfg: cfg, targets: map[string]*Target{},
		sessions: map[nexus]*conn{}, late: map[*deferred]struct{}{},
	}
	for _, t := range cfg.Targets {
		if t.Name == "" || len(t.Name) > 223 {
			return nil, fmt.Errorf("target: name %q: want 1 to 223 bytes", t.Name)
		}
		if s.targets[t.Name] != nil {
			return nil, fmt.Errorf("target: name %q twice", t.Name)
		}
		if len(t.LUs) > 16384 { // flat space addressing ends there
			return nil, fmt.Errorf("target: %q has %d logical units, want at most 16384", t.Name, len(t.LUs))
		}
		s.targets[t.Name] = t
	}
	return s, nil
}

// Listen opens a portal at a TCP address ("127.0.0.1:0" picks a port) for the
// targets named, or for all of them.
func (s *Server) Listen(addr string, targets ...string) (*Portal, error) {
	for _, name := range targets {
		if s.targets[name] == nil {
			return nil, fmt.Errorf("target: portal %s names the unknown target %q", addr, name)
		}
	}
	if len(targets) == 0 {
		for _, t := range s.cfg.Targets {
			targets = append(targets, t.Name)
		}
	}
	p := &Portal{srv: s, addr: addr, targets: targets, conns: map[*conn]struct{}{}, group: 1}
	s.mu.Lock()
	s.nextPort++
	p.index = s.nextPort
	s.mu.Unlock()
	if err := p.Start(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.portals = append(s.portals, p)
	s.mu.Unlock()
	return p, nil
}

// Portals lists the portals in the order of their Listen calls.
func (s *Server) Portals() []*Portal {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*Portal(nil), s.portals...)
}

// Hang makes every portal stop reading and answering while its TCP
// connections stay open, as a stopped process does.
func (s *Server) Hang() { s.each((*Portal).Hang) }

// Resume ends Hang; what arrived meanwhile is executed and answered.
func (s *Server) Resume() { s.each((*Portal).Resume) }

// DropAll resets (RST) every connection. The portals go on listening.
func (s *Server) DropAll() { s.each((*Portal).Drop) }

// RejectLogin makes every login end with this status (RFC 7143 11.13.5);
// class 0 accepts logins again.
func (s *Server) RejectLogin(class, detail uint8) {
	s.each(func(p *Portal) { p.RejectLogin(class, detail) })
}

// Inject sends raw bytes on every logged-in connection, between two PDUs.
func (s *Server) Inject(b []byte) { s.each(func(p *Portal) { p.Inject(b) }) }

// Ping sends a NOP-In that asks for an answer on every logged-in connection.
func (s *Server) Ping() { s.each((*Portal).Ping) }

// OnCommand installs a hook that sees each SCSI command when it arrives and
// decides what becomes of it; nil removes it. The hook is called on the
// connection's goroutine and must not block for long.
func (s *Server) OnCommand(hook func(*Cmd) Action) {
	if hook == nil {
		s.hook.Store(nil)
		return
	}
	s.hook.Store(&hook)
}

// OnTask installs a hook for task management requests, on the same terms as
// OnCommand; nil removes it.
func (s *Server) OnTask(hook func(Task) TaskAction) {
	if hook == nil {
		s.onTask.Store(nil)
		return
	}
	s.onTask.Store(&hook)
}

// Kill closes all listeners and connections, as the kernel does for a killed
// process, drops commands that wait to be late, and waits for every goroutine
// of the server. Portals can be started again afterwards.
func (s *Server) Kill() {
	s.each((*Portal).Stop)
	s.cancelLate(func(*deferred) bool { return true })
	s.wg.Wait()
}

// Close is Kill, for callers that want an io.Closer.
func (s *Server) Close() error {
	s.Kill()
	return nil
}

func (s *Server) each(f func(*Portal)) {
	for _, p := range s.Portals() {
		f(p)
	}
}

// Stats counts what the server did since New.
type Stats struct {
	Connections, Logins, Commands, Reads, Writes, Flushes, Nops, TaskMgmt uint64
	ReadBytes, WrittenBytes                                               uint64
}

type counters struct {
	connections, logins, commands, reads, writes, flushes, nops, tmfs atomic.Uint64
	readBytes, writtenBytes                                           atomic.Uint64
}

// Stats is a snapshot of the counters.
func (s *Server) Stats() Stats {
	c := &s.stats
	return Stats{
		Connections: c.connections.Load(), Logins: c.logins.Load(), Commands: c.commands.Load(),
		Reads: c.reads.Load(), Writes: c.writes.Load(), Flushes: c.flushes.Load(),
		Nops: c.nops.Load(), TaskMgmt: c.tmfs.Load(),
		ReadBytes: c.readBytes.Load(), WrittenBytes: c.writtenBytes.Load(),
	}
}

// nexus names a session: what a new login must equal to reinstate it
// (RFC 7143 6.3.5).
type nexus struct {
	initiator, target string
	isid              [6]byte
	group             uint16
}

// wildcard tells whether a listener's address says nothing about where a
// client reaches it, so that SendTargets must answer with the client's view.
func wildcard(a net.Addr) bool {
	t, ok := a.(*net.TCPAddr)
	return !ok || t.IP.IsUnspecified()
}
