package initiator_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/paths"
)

// mapped is a map over the portals of a target.
type mapped struct {
	t       *testing.T
	srv     *target.Server
	lu      *target.LU
	portals []*target.Portal
	g       *paths.Group
	log     *logged

	mu   sync.Mutex
	seen []target.Cmd // commands that move or unmap data, in order
}

// count is how many of those commands a portal got.
func (m *mapped) count(p *target.Portal, ops ...byte) (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.seen {
		if (p == nil || c.Portal == p) && (len(ops) == 0 || bytes.IndexByte(ops, c.Op()) >= 0) {
			n++
		}
	}
	return n
}

// hook decides about reads, writes and unmapping; the others pass.
func (m *mapped) hook(f func(c *target.Cmd) target.Action) {
	m.srv.OnCommand(func(c *target.Cmd) target.Action {
		switch c.Op() {
		case 0x28, 0x2a, 0x88, 0x8a, 0x42, 0x93, 0x35, 0x91:
			m.mu.Lock()
			m.seen = append(m.seen, *c)
			m.mu.Unlock()
			if f != nil {
				return f(c)
			}
		}
		return target.Action{}
	})
}

type logged struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logged) has(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.b.String(), text)
}

// options of newMapped.
type options struct {
	target  target.Config
	paths   paths.Config
	session func(path int, c *initiator.Config)
	group   bool // each portal is a target port group of its own
	addr    func(path int, addr string) string
}

const mappedSize = 8 << 20

func newMapped(t *testing.T, n int, o options) *mapped {
	t.Helper()
	m := &mapped{t: t, log: &logged{}}
	var err error
	m.lu, err = target.NewLU(mappedSize, 512, target.DefaultIdentity("conformance"))
	require.NoError(t, err)
	o.target.Targets = []*target.Target{{Name: iqn, LUs: []*target.LU{m.lu}}}
	m.srv, err = target.New(o.target)
	require.NoError(t, err)
	t.Cleanup(m.srv.Kill)
	for i := range n {
		p, err := m.srv.Listen("127.0.0.1:0")
		require.NoError(t, err)
		if o.group {
			p.SetGroup(uint16(i + 1))
		}
		m.portals = append(m.portals, p)
	}
	m.hook(nil)
	m.g = mapOver(t, m.log, o, m.portals...)
	require.Eventually(t, func() bool { return m.g.Snapshot().Paths.Usable == n }, 20*time.Second, time.Millisecond)
	return m
}

// mapOver makes a map over portals, which may be of several servers.
func mapOver(t *testing.T, log io.Writer, o options, portals ...*target.Portal) *paths.Group {
	t.Helper()
	config := func(i int) initiator.Config {
		c := initiator.Config{Address: portals[i].Addr(), TargetName: portals[i].TargetName(), InitiatorName: "iqn.2026-11.example:i", ISID: [6]byte{0x80, 9, 9, 0, 0, byte(i)},
			FailoverTime: 2 * time.Second, LoginTimeout: 10 * time.Second}
		if o.session != nil {
			o.session(i, &c)
		}
		return c
	}
	probe := config(0)
	probe.ISID[3] = 7
	s, err := initiator.Open(context.Background(), probe)
	require.NoError(t, err)
	info, err := initiator.Identify(context.Background(), s, [8]byte{})
	require.NoError(t, err)
	require.NoError(t, s.Close(context.Background()))
	o.paths.Alias, o.paths.Merge = "m", true
	if o.paths.PollingInterval == 0 {
		o.paths.PollingInterval = time.Hour // the checker is not what notices
	}
	o.paths.Logger = slog.New(slog.NewTextHandler(log, nil))
	g, err := paths.NewGroup(o.paths, info)
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		g.Close(ctx)
	})
	for i, p := range portals {
		_, err := g.AddPath(paths.PathConfig{Name: p.Addr(), Portal: p.Addr(), Target: p.TargetName(), Order: i,
			Open: func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (paths.Session, error) {
				c := config(i)
				if o.addr != nil {
					c.Address = o.addr(i, c.Address)
				}
				c.OnState, c.OnRoom = onState, onRoom
				s, err := initiator.Open(ctx, c)
				if err != nil {
					return nil, err
				}
				return s, nil
			}}, nil)
		require.NoError(t, err)
	}
	return g
}

// path is what the map says of a path.
func (m *mapped) path(i int) (st paths.PathStatus) {
	for _, g := range m.g.Snapshot().Groups {
		for _, p := range g.Paths {
			if p.Portal == m.portals[i].Addr() {
				return p
			}
		}
	}
	m.t.Fatalf("no path %d", i)
	return st
}

func (m *mapped) await(what string, f func() bool) {
	m.t.Helper()
	require.Eventually(m.t, f, 20*time.Second, time.Millisecond, what)
}

type doneIO struct{ c chan *block.Request }

func (d doneIO) Complete(r *block.Request, _ *block.Plug) { d.c <- r }

// begin submits a request; its end arrives on the channel.
func begin(g *paths.Group, op block.Op, off int64, size int, flags block.Flags) (*block.Request, chan *block.Request) {
	d := doneIO{make(chan *block.Request, 1)}
	r := &block.Request{Op: op, Flags: flags, Off: off, Len: int64(size), Owner: d}
	if op == block.Read || op == block.Write {
		r.Data = bytes.Repeat([]byte{0xa5}, size)
	}
	var p block.Plug
	g.Submit(r, &p)
	p.Flush()
	return r, d.c
}

func finish(t *testing.T, c chan *block.Request) error {
	t.Helper()
	select {
	case r := <-c:
		return r.Err
	case <-time.After(25 * time.Second):
		t.Fatal("the request did not end")
		return nil
	}
}

func io1(t *testing.T, g *paths.Group, op block.Op, off int64, size int, flags block.Flags) error {
	t.Helper()
	_, c := begin(g, op, off, size, flags)
	return finish(t, c)
}

func (m *mapped) io(op block.Op, off int64, size int) error {
	m.t.Helper()
	return io1(m.t, m.g, op, off, size, 0)
}

// relogsInAfter ends the session of the first of two paths as the target does,
// and requires that its next login comes no earlier than after wait, while the
// other path serves.
func relogsInAfter(t *testing.T, wait time.Duration, c target.Config, end func(p *target.Portal)) {
	t.Helper()
	m := newMapped(t, 2, options{target: c})
	logins := m.srv.Stats().Logins
	began := time.Now()
	end(m.portals[0])
	m.await("left", func() bool { return m.g.Snapshot().Paths.Usable == 1 })
	require.NoError(t, m.io(block.Write, 0, 4096))
	require.Equal(t, 1, m.count(m.portals[1], 0x8a), "served by the other path")
	m.await("back", func() bool { return m.srv.Stats().Logins > logins })
	require.GreaterOrEqual(t, time.Since(began), wait, "logged in too early")
	m.await("serves again", func() bool { return m.g.Snapshot().Paths.Usable == 2 })
}

// detour is a portal that passes its first connection on to addr and redirects
// every later one to there.
func detour(t *testing.T, addr string) (front string, redirects func() int) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var mu sync.Mutex
	n := 0
	var wg sync.WaitGroup
	wg.Go(func() {
		for first := true; ; first = false {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				if !first {
					r := &raw{Conn: c, window: 1}
					h, _, ok := r.read()
					if ok {
						mu.Lock()
						n++
						mu.Unlock()
						r.loginResponse(h, 0, keys("TargetAddress", addr), func(h *pdu.Header) { h.SetLoginStatus(1, 1) })
					}
					return
				}
				to, err := net.Dial("tcp", addr)
				if err != nil {
					return
				}
				defer to.Close()
				wg.Go(func() { io.Copy(c, to); c.Close() })
				io.Copy(to, c)
			})
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return ln.Addr().String(), func() int { mu.Lock(); defer mu.Unlock(); return n }
}

func senseOf(key, asc, ascq byte) *target.Action {
	return &target.Action{Status: 2, Sense: target.Sense{Key: key, ASC: asc, ASCQ: ascq}}
}

// once answers the first read or write with an action.
func once(act target.Action) func(c *target.Cmd) target.Action {
	var o sync.Once
	return func(*target.Cmd) (a target.Action) {
		o.Do(func() { a = act })
		return a
	}
}

func eachFormat(key, asc, ascq byte) map[string][]byte {
	return map[string][]byte{
		"fixed":       fixedSense(key, asc, ascq),
		"descriptors": {0x72, key, asc, ascq, 0, 0, 0, 12, 0, 10, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"cut short":   fixedSense(key, asc, ascq)[:14],
	}
}
