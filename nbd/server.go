// Package nbd serves any block.Device to NBD clients: fixed-newstyle
// handshake, many requests in flight per connection, bounded memory.
package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/nbd/proto"
)

// Config bounds a server.
type Config struct {
	Logger         *slog.Logger // nil: nothing is logged
	MaxConnections int          // of one export, and in the handshake of one listener; default 64
	MaxRequests    int          // in flight per connection, default 128
	// TLS is what listeners with TLS offer. The kernel's own connections never use it.
	TLS *tls.Config
	// MaxBytes of buffers are for the clients of one export, default 40 MiB; one
	// client gets half of them, or one buffer. KernelBytes are for one connection of
	// the kernel's, default 16 MiB, with Resident all of them from the start.
	MaxBytes    int
	KernelBytes int
	Resident    bool
	// Without hides parts of the protocol from clients, so that they show what they
	// do without them: see ParseWithout.
	Without Without

	stuck time.Duration // stuckTime, but in tests
}

// Without are parts of the protocol that a server denies to know.
type Without struct {
	Structured bool // structured replies, and with them meta contexts and extended headers
	Extended   bool // extended headers
	Meta       bool // meta contexts
	NoZeroes   bool // EXPORT_NAME without 124 zeroes
	Go         bool // INFO and GO, so that EXPORT_NAME is what remains
}

// ParseWithout reads a list of what to hide: structured, extended, meta,
// no-zeroes, go.
func ParseWithout(words []string) (w Without, err error) {
	for _, word := range words {
		switch word {
		case "structured":
			w.Structured = true
		case "extended":
			w.Extended = true
		case "meta":
			w.Meta = true
		case "no-zeroes":
			w.NoZeroes = true
		case "go":
			w.Go = true
		default:
			return w, fmt.Errorf("%q: want structured, extended, meta, no-zeroes or go", word)
		}
	}
	return w, nil
}

// hides tells whether an option is answered as if it were unknown.
func (w Without) hides(opt uint32) bool {
	switch opt {
	case proto.OptStructuredReply:
		return w.Structured
	case proto.OptExtendedHeaders:
		return w.Structured || w.Extended
	case proto.OptListMetaContext, proto.OptSetMetaContext:
		return w.Structured || w.Meta
	case proto.OptInfo, proto.OptGo:
		return w.Go
	}
	return false
}

// Export is a device under a name. Aliases name it too but are not listed
// (NBD_OPT_LIST).
type Export struct {
	Name        string       // at most proto.MaxString bytes
	Aliases     []string     // the same
	Description string       // NBD_INFO_DESCRIPTION
	Device      block.Device // not the server's: it outlives the export
}

type export struct {
	Export
	orphans     orphans
	align       *aligner
	limits      atomic.Pointer[proto.Limits]
	connections atomic.Int64
	clients     clients
	spare       []*block.Arena // of kernel connections that ended, for the next ones; under Server.mu
}

// Server serves exports to connections. All methods are safe for concurrent use.
type Server struct {
	cfg Config

	mu      sync.Mutex
	exports map[string]*export // by name and alias
	conns   map[*conn]struct{}
	entered uint64                   // connections so far
	shaking map[net.Listener][]*conn // in the handshake, by where they came from, oldest first
	lns     map[net.Listener]struct{}
	stopped bool
	alive   sync.WaitGroup
}

// NewServer returns a server without exports.
func NewServer(c Config) *Server {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.MaxConnections <= 0 {
		c.MaxConnections = 64
	}
	if c.MaxRequests <= 0 {
		c.MaxRequests = 128
	}
	if c.MaxBytes <= 0 {
		c.MaxBytes = 40 << 20
	}
	if c.stuck <= 0 {
		c.stuck = stuckTime
	}
	if c.KernelBytes <= 0 {
		c.KernelBytes = 16 << 20
	}
	return &Server{cfg: c, exports: map[string]*export{}, conns: map[*conn]struct{}{}, shaking: map[net.Listener][]*conn{}, lns: map[net.Listener]struct{}{}}
}

// Flags are the transmission flags that describe a device: nothing is
// announced that the device cannot do.
func Flags(g block.Geometry) uint16 {
	f := proto.HasFlags | proto.SendCache | proto.SendFlush | proto.SendFUA | proto.SendWriteZeroes | proto.CanMultiConn
	if g.ReadOnly {
		f |= proto.ReadOnly
	}
	if g.Trim {
		f |= proto.SendTrim
	}
	if g.FastZero {
		f |= proto.SendFastZero
	}
	if g.Rotational {
		f |= proto.Rotational
	}
	return f
}

func limitsOf(g block.Geometry) *proto.Limits {
	return &proto.Limits{Size: g.Size, Block: g.BlockSize, Flags: Flags(g), MaxBytes: proto.MaxPayload}
}

// Resized looks at the geometry of an export's device again: requests and new
// connections see the new size. NBD has no way to tell connected clients.
func (s *Server) Resized(name string) {
	if x := s.find(name); x != nil {
		x.limits.Store(limitsOf(x.Device.Geometry()))
	}
}

// AddExport offers a device to clients that connect from now on. Names are unique
// over names and aliases; a name that is taken or too long is an error, and then
// nothing is offered.
func (s *Server) AddExport(e Export) error {
	g := e.Device.Geometry()
	x := &export{Export: e, align: newAligner()}
	x.limits.Store(limitsOf(g))
	s.mu.Lock()
	defer s.mu.Unlock()
	names := append([]string{e.Name}, e.Aliases...)
	for _, n := range names {
		if len(n) > proto.MaxString {
			return fmt.Errorf("export %.40q: name longer than %d bytes", n, proto.MaxString)
		}
		if s.exports[n] != nil {
			return fmt.Errorf("export %q: the name is taken", n)
		}
	}
	for _, n := range names {
		s.exports[n] = x
	}
	return nil
}

// RemoveExport takes an export away, unless a connection uses it: it reports
// whether it is gone.
func (s *Server) RemoveExport(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.exports[name]
	if x == nil {
		return true
	}
	if x.connections.Load() > 0 {
		return false
	}
	maps.DeleteFunc(s.exports, func(_ string, have *export) bool { return have == x })
	for _, a := range x.spare {
		a.Close()
	}
	x.spare = nil
	return true
}

// find returns an export; the empty name is the only export there is.
func (s *Server) find(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x := s.exports[name]; x != nil || name != "" {
		return x
	}
	var only *export
	for _, x := range s.exports {
		if only != nil && only != x {
			return nil
		}
		only = x
	}
	return only
}

func (s *Server) names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ns []string
	for n, x := range s.exports {
		if n == x.Name {
			ns = append(ns, n)
		}
	}
	sort.Strings(ns)
	return ns
}

// Connections counts the connections that use an export, the kernel's included; 0 if
// there is no such export.
func (s *Server) Connections(name string) int {
	if x := s.find(name); x != nil {
		return int(x.connections.Load())
	}
	return 0
}

// Serve accepts connections until the listener is closed or Shutdown is called, which
// closes ln: nil then, net.ErrClosed if Shutdown came before. It survives errors of
// single connections, as when descriptors run out.
func (s *Server) Serve(ln net.Listener, a Access) error {
	s.mu.Lock()
	if s.stopped {
		s.mu.Unlock()
		return net.ErrClosed
	}
	s.lns[ln] = struct{}{}
	s.mu.Unlock()
	for {
		c, err := ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			var ne net.Error
			if errors.As(err, &ne) { // out of descriptors, say: live on
				time.Sleep(50 * time.Millisecond)
				continue
			}
			return err
		}
		if cn, ok := s.enter(c, ln, a); ok { // in the order of arrival
			go s.serve(cn)
		}
	}
}

const handshakeTime = 10 * time.Second

// ServeConn shakes hands and serves one client until it leaves. It owns c.
func (s *Server) ServeConn(c net.Conn, a Access) {
	if cn, ok := s.enter(c, nil, a); ok {
		s.serve(cn)
	}
}

func (s *Server) serve(cn *conn) {
	defer s.leave(cn)
	c := cn.c
	c.SetDeadline(time.Now().Add(handshakeTime))
	x, agreed, err := s.handshake(c, cn.access.TLS)
	if err != nil {
		s.cfg.Logger.Debug("NBD handshake ended", "error", err)
		return
	}
	if x == nil {
		return
	}
	s.known(cn)
	c.SetDeadline(time.Time{})
	cn.agreed = agreed
	cn.s, cn.x = s, x
	if !x.clients.enter(cn, &s.cfg) {
		s.cfg.Logger.Warn("NBD client refused: the export has all the connections it may have", "export", x.Name, "limit", s.cfg.MaxConnections)
		return
	}
	defer x.clients.leave(cn)
	cn.transmit()
}

// welcomes tells whether a client may come from its address.
func (a Access) welcomes(c net.Conn) bool {
	at, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok || len(a.Allow) == 0 {
		return true
	}
	ip := at.AddrPort().Addr().Unmap().WithZone("") // no prefix contains an address with a zone
	return slices.ContainsFunc(a.Allow, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// ServeTransmission serves one export to a client that needs no handshake: the
// kernel's end of a socket pair. It owns c and returns when the client has left
// and none of its requests is in flight. An error says that the client did not
// leave by itself (NBD_CMD_DISC) and was not sent away by HandOver or Shutdown: a
// kernel that gave this connection up waits for another.
func (s *Server) ServeTransmission(c net.Conn, name string) error {
	x := s.find(name)
	if x == nil {
		c.Close()
		return fmt.Errorf("export %q does not exist", name)
	}
	cn, ok := s.enterAs(&conn{c: c, s: s, x: x, kernel: true, export: name, given: make(chan *os.File, 1)})
	if !ok {
		c.Close()
		return errors.New("NBD server: shutting down")
	}
	defer s.leave(cn)
	cn.arena, cn.share = s.kernelArena(x), s.cfg.KernelBytes
	defer s.keepArena(x, cn.arena)
	err := cn.transmit()
	cn.give(err)
	if errors.Is(err, errDisc) || cn.leaving.Load() || s.isStopped() {
		return nil
	}
	return fmt.Errorf("connection of %s: %w", name, err)
}

// kernelArena is the memory of a connection of the kernel's. What an earlier one
// left comes first: a connection that replaces it needs none of the system's.
func (s *Server) kernelArena(x *export) *block.Arena {
	s.mu.Lock()
	if n := len(x.spare); n > 0 {
		a := x.spare[n-1]
		x.spare = x.spare[:n-1]
		s.mu.Unlock()
		return a
	}
	s.mu.Unlock()
	a := block.NewArena(s.cfg.KernelBytes)
	if s.cfg.Resident {
		if err := a.Populate(); err != nil {
			s.cfg.Logger.Error("the buffers of a kernel device are not resident: it may stall when memory is short", "export", x.Name, "cause", err)
		}
	}
	return a
}

func (s *Server) keepArena(x *export, a *block.Arena) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		a.Close()
		return
	}
	x.spare = append(x.spare, a)
}

func (s *Server) isStopped() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopped
}

// enter admits a client to the handshake, if it may come from its address. When
// too many are in theirs the oldest one goes, so that a flood of silent clients
// keeps no other out; those of another listener are no concern of it.
func (s *Server) enter(c net.Conn, via net.Listener, a Access) (*conn, bool) {
	if !a.welcomes(c) {
		s.cfg.Logger.Warn("NBD client refused: its address is not allowed", "client", c.RemoteAddr().String())
		c.Close()
		return nil, false
	}
	cn, ok := s.enterAs(&conn{c: c, via: via, access: a})
	if !ok {
		c.Close()
		return nil, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.shaking[via]
	if len(old) >= s.cfg.MaxConnections {
		old[0].c.Close()
		old = append(old[:0], old[1:]...)
	}
	s.shaking[via] = append(old, cn)
	return cn, true
}

// known ends the handshake of a client.
func (s *Server) known(cn *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shaking[cn.via] = slices.DeleteFunc(s.shaking[cn.via], func(have *conn) bool { return have == cn })
}

func (s *Server) enterAs(cn *conn) (*conn, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return nil, false
	}
	s.conns[cn] = struct{}{}
	s.entered++
	cn.nth = s.entered
	s.alive.Add(1)
	return cn, true
}

func (s *Server) leave(cn *conn) {
	cn.c.Close()
	s.known(cn)
	s.mu.Lock()
	delete(s.conns, cn)
	s.mu.Unlock()
	s.alive.Done()
}

// Hangs tells which exports have a connection whose reader has been inside of the
// device since the call before: neither submitting nor sending ever waits, so
// nothing will come of it. A lock of the data path that is held for ever holds up
// the call itself. Calls should be seconds apart.
func (s *Server) Hangs() (exports []string) {
	s.mu.Lock()
	var xs []*export
	for n, x := range s.exports {
		if n == x.Name {
			xs = append(xs, x)
		}
	}
	s.mu.Unlock()
	for _, x := range xs {
		x.align.mu.Lock()
		x.align.mu.Unlock()
		x.orphans.mu.Lock()
		cns := slices.Clone(x.orphans.conns)
		x.orphans.mu.Unlock()
		for _, cn := range cns {
			cn.mu.Lock()
			cn.mu.Unlock()
			now := cn.steps.Load()
			if cn.stepsSeen.Swap(now) == now && now%2 == 1 && !slices.Contains(exports, x.Name) {
				exports = append(exports, x.Name)
			}
		}
	}
	return exports
}

// Shutdown closes the listeners, stops reading requests and waits, until ctx
// ends, for those in flight to be answered.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.stopped = true
	for ln := range s.lns {
		ln.Close()
	}
	for cn := range s.conns {
		cn.c.SetReadDeadline(time.Unix(1, 0))
	}
	for _, x := range s.exports {
		for _, a := range x.spare {
			a.Close()
		}
		x.spare = nil
	}
	s.mu.Unlock()
	done := make(chan struct{})
	go func() { s.alive.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	for cn := range s.conns {
		cn.c.Close()
	}
	s.mu.Unlock()
	return ctx.Err()
}
