// Package nbd serves any block.Device to NBD clients: fixed-newstyle
// handshake, many requests in flight per connection, bounded memory.
package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
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
	Logger         *slog.Logger
	MaxConnections int // default 64
	MaxRequests    int // in flight per connection, default 128
	// TLS, if set, is offered to clients; with TLSRequired clients that come over
	// TCP get nothing before it. The kernel's own connections never use it.
	TLS         *tls.Config
	TLSRequired bool
	// Allow, if not empty, are the networks from which TCP clients may come.
	Allow    []netip.Prefix
	MaxBytes int // of buffers for the whole server, default 40 MiB
}

// Export is a device under a name. Aliases name it too but are not listed.
type Export struct {
	Name        string
	Aliases     []string
	Description string
	Device      block.Device
}

type export struct {
	Export
	orphans     orphans
	limits      atomic.Pointer[proto.Limits]
	connections atomic.Int64
}

// Server serves exports to connections. All methods are safe for concurrent use.
type Server struct {
	cfg   Config
	arena *block.Arena

	mu      sync.Mutex
	exports map[string]*export // by name and alias
	conns   map[*conn]struct{}
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
	return &Server{cfg: c, arena: block.NewArena(c.MaxBytes), exports: map[string]*export{}, conns: map[*conn]struct{}{}, lns: map[net.Listener]struct{}{}}
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

// AddExport offers a device. Names are unique over names and aliases.
func (s *Server) AddExport(e Export) error {
	g := e.Device.Geometry()
	x := &export{Export: e}
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

// Connections counts the connections that use an export.
func (s *Server) Connections(name string) int {
	if x := s.find(name); x != nil {
		return int(x.connections.Load())
	}
	return 0
}

// Serve accepts connections until the listener is closed or Shutdown is called.
func (s *Server) Serve(ln net.Listener) error {
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
		go s.ServeConn(c)
	}
}

const handshakeTime = 10 * time.Second

// ServeConn shakes hands and serves one client until it leaves. It owns c.
func (s *Server) ServeConn(c net.Conn) {
	cn, ok := s.enter(c)
	if !ok {
		c.Close()
		return
	}
	defer s.leave(cn)
	c.SetDeadline(time.Now().Add(handshakeTime))
	if !s.welcome(c) {
		s.cfg.Logger.Warn("NBD client refused: its address is not allowed", "client", c.RemoteAddr().String())
		return
	}
	x, agreed, err := s.handshake(c)
	if err != nil {
		s.cfg.Logger.Debug("NBD handshake ended", "error", err)
		return
	}
	if x == nil {
		return
	}
	c.SetDeadline(time.Time{})
	cn.agreed = agreed
	s.transmit(cn, x)
}

// welcome tells whether a client may come from its address.
func (s *Server) welcome(c net.Conn) bool {
	a, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok || len(s.cfg.Allow) == 0 {
		return true
	}
	ip := a.AddrPort().Addr().Unmap()
	return slices.ContainsFunc(s.cfg.Allow, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// ServeTransmission serves one export to a client that needs no handshake: the
// kernel's end of a socket pair. It owns c and returns when the client leaves.
func (s *Server) ServeTransmission(c net.Conn, name string) error {
	x := s.find(name)
	if x == nil {
		c.Close()
		return fmt.Errorf("export %q does not exist", name)
	}
	cn, ok := s.enter(c)
	if !ok {
		c.Close()
		return errors.New("NBD server: too many connections, or shutting down")
	}
	defer s.leave(cn)
	s.transmit(cn, x)
	return nil
}

func (s *Server) enter(c net.Conn) (*conn, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped || len(s.conns) >= s.cfg.MaxConnections {
		return nil, false
	}
	cn := &conn{c: c}
	s.conns[cn] = struct{}{}
	s.alive.Add(1)
	return cn, true
}

func (s *Server) leave(cn *conn) {
	cn.c.Close()
	s.mu.Lock()
	delete(s.conns, cn)
	s.mu.Unlock()
	s.alive.Done()
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
	s.mu.Unlock()
	done := make(chan struct{})
	go func() { s.alive.Wait(); close(done) }()
	select {
	case <-done:
		s.arena.Close()
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
