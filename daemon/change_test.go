package daemon

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/paths"
)

// array is a target with a portal in each of two port groups.
func array(t *testing.T, explicit bool, access map[uint16]target.Access) (*target.Server, *target.LU, []*target.Portal) {
	lu, err := target.NewLU(8<<20, 512, target.DefaultIdentity("array"))
	require.NoError(t, err)
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: iqn, LUs: []*target.LU{lu}}}})
	require.NoError(t, err)
	t.Cleanup(srv.Kill)
	var ps []*target.Portal
	for i := range 2 {
		p, err := srv.Listen("127.0.0.1:0")
		require.NoError(t, err)
		p.SetGroup(uint16(i + 1))
		ps = append(ps, p)
	}
	srv.SetAccess(lu, explicit, access)
	return srv, lu, ps
}

func await(t *testing.T, d *Daemon, what string, ok func(m paths.MapStatus) bool) paths.MapStatus {
	t.Helper()
	var last Maps
	require.Eventually(t, func() bool {
		last = d.Snapshot()
		return len(last.Maps) == 1 && ok(last.Maps[0])
	}, patience, 5*time.Millisecond, "%s: %+v", what, &last)
	return last.Maps[0]
}

// serves are the portals that serve.
func serves(m paths.MapStatus) (out []string) {
	for _, g := range m.Groups {
		for _, p := range g.Paths {
			if p.Serving {
				out = append(out, p.Portal)
			}
		}
	}
	return out
}

func write(t *testing.T, d *Daemon, export string, off int64) {
	t.Helper()
	kind, addr, _ := strings.Cut(d.o.NBD, ":")
	c, err := client.Dial(kind, addr, export)
	require.NoError(t, err)
	defer c.Close()
	_, err = c.WriteAt(make([]byte, 4096), off)
	require.NoError(t, err)
}

func TestALUAGroupsServeByState(t *testing.T) {
	t.Parallel()
	srv, lu, ps := array(t, false, map[uint16]target.Access{1: {State: target.NonOptimized}, 2: {State: target.Optimized}})
	d, _ := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, Policy: paths.Config{Alias: "m", Policy: "group_by_prio"}})
	m := await(t, d, "the optimized path serves", func(m paths.MapStatus) bool {
		return m.Paths.Usable == 2 && len(serves(m)) == 1 && serves(m)[0] == ps[1].Addr()
	})
	require.Equal(t, 50, m.Groups[0].Prio)
	require.Equal(t, 10, m.Groups[1].Prio)
	require.Equal(t, "active/optimized", m.Groups[0].Paths[0].Access)
	// The array moves the unit by itself: the I/O that hears of it is enough.
	srv.SetAccess(lu, false, map[uint16]target.Access{1: {State: target.Optimized}, 2: {State: target.NonOptimized}})
	write(t, d, "m", 0)
	await(t, d, "I/O follows the array", func(m paths.MapStatus) bool {
		return len(serves(m)) == 1 && serves(m)[0] == ps[0].Addr() && m.Groups[0].Prio == 50
	})
	// The preferred bit of the other group does not move I/O off an optimized
	// path to one that is optimized too.
	srv.SetAccess(lu, false, map[uint16]target.Access{1: {State: target.Optimized}, 2: {State: target.Optimized, Preferred: true}})
	write(t, d, "m", 0)
	m = await(t, d, "equal groups are one", func(m paths.MapStatus) bool { return len(m.Groups) == 1 })
	require.Equal(t, 50, m.Groups[0].Prio)
}

func TestStandbyPathTakesOverAfterAnExplicitTransition(t *testing.T) {
	t.Parallel()
	srv, lu, ps := array(t, true, map[uint16]target.Access{1: {State: target.Optimized}, 2: {State: target.Standby}})
	d, l := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, FailoverTime: time.Second, Policy: paths.Config{Alias: "m", PollingInterval: time.Second, Checker: "readsector0"}})
	m := await(t, d, "both known", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 && len(serves(m)) == 1 })
	require.Equal(t, []string{ps[0].Addr()}, serves(m))
	require.Equal(t, "ghost", m.Groups[1].Paths[0].State)
	require.Equal(t, uint8(target.Standby), lu.Access(2).State, "no probe may move the unit")
	ps[0].Stop()
	write(t, d, "m", 4096)
	time.Sleep(2 * time.Second)
	t.Log(d.Snapshot(), l)
	require.Equal(t, uint8(target.Optimized), lu.Access(2).State)
	await(t, d, "the standby path serves", func(m paths.MapStatus) bool {
		return len(serves(m)) == 1 && serves(m)[0] == ps[1].Addr() && m.Groups[0].Prio+m.Groups[1].Prio == 50
	})
	require.NoError(t, ps[0].Start())
	await(t, d, "the old path is back, in standby, and takes nothing", func(m paths.MapStatus) bool {
		return m.Paths.Usable == 2 && serves(m)[0] == ps[1].Addr()
	})
	_ = srv
}

// A map that begins with a path that is not optimized waits for ghost_delay before
// it has the array move the unit; a better path that comes meanwhile saves the move.
func TestGhostDelayWaitsForABetterPath(t *testing.T) {
	t.Parallel()
	start := func(delay time.Duration) (*Daemon, *logText, *target.LU, []*target.Portal) {
		_, lu, ps := array(t, true, map[uint16]target.Access{1: {State: target.Optimized}, 2: {State: target.NonOptimized}})
		ps[0].Stop()
		d, l := begin(t, Options{URLs: []string{ps[1].URL(0), ps[0].URL(0)}, FailoverTime: time.Second, Policy: paths.Config{Alias: "m", GhostDelay: delay, Policy: "group_by_prio"}})
		return d, l, lu, ps
	}
	_, l, lu, ps := start(-1)
	says(t, l, "port group activated", ps[1].Addr())
	require.Equal(t, uint8(target.Optimized), lu.Access(2).State)

	d, l, lu, ps := start(time.Minute)
	await(t, d, "one path is up", func(m paths.MapStatus) bool { return m.Paths.Usable == 1 })
	require.NoError(t, ps[0].Start())
	await(t, d, "the better path serves", func(m paths.MapStatus) bool {
		return m.Paths.Usable == 2 && len(serves(m)) == 1 && serves(m)[0] == ps[0].Addr()
	})
	write(t, d, "m", 0)
	require.Equal(t, uint8(target.NonOptimized), lu.Access(2).State)
	require.NotContains(t, l.String(), "activated", "the unit was moved needlessly")
}

// A host that boots while the unit is in standby through all that it reaches has
// its map all the same; the unit tells no size there (SPC-4 5.15.2.4).
func TestMapOfAUnitThatIsInStandbyAlone(t *testing.T) {
	start := func(explicit bool, delay time.Duration) (*Daemon, *logText, *target.Server, *target.LU, []*target.Portal) {
		srv, lu, ps := array(t, explicit, map[uint16]target.Access{1: {State: target.Optimized}, 2: {State: target.Standby}})
		ps[0].Stop()
		d, l := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, FailoverTime: time.Second, Policy: paths.Config{Alias: "m", GhostDelay: delay, Checker: "readsector0"}})
		m := await(t, d, "a map", func(m paths.MapStatus) bool { return m.Paths.Usable == 1 })
		require.Equal(t, "ghost", m.Groups[0].Paths[0].State)
		return d, l, srv, lu, ps
	}
	serves := func(d *Daemon, p *target.Portal) {
		m := await(t, d, "the map has its size and serves", func(m paths.MapStatus) bool { return m.Size == 8<<20 && slices.Equal(serves(m), []string{p.Addr()}) })
		require.Equal(t, 512, m.BlockSize)
		await(t, d, "the path is up", func(m paths.MapStatus) bool { return m.State != "no_path" })
		write(t, d, "m", 4096)
		require.Error(t, d.maps[0].group.Resize(false), "nothing to do")
	}
	reaches := func(d *Daemon) error {
		kind, addr, _ := strings.Cut(d.o.NBD, ":")
		c, err := client.Dial(kind, addr, "m")
		if err == nil {
			c.Close()
		}
		return err
	}

	t.Run("a better path comes in time", func(t *testing.T) {
		d, l, _, lu, ps := start(true, time.Minute)
		require.Equal(t, "no_path", d.Snapshot().Maps[0].State)
		require.Error(t, reaches(d), "no export without a size")
		require.ErrorContains(t, d.maps[0].group.Resize(false), "in standby")
		require.NoError(t, ps[0].Start())
		serves(d, ps[0])
		require.Equal(t, uint8(target.Standby), lu.Access(2).State)
		require.NotContains(t, l.String(), "activated", "the unit was moved needlessly")
	})
	t.Run("no other path comes", func(t *testing.T) {
		d, l, _, lu, ps := start(true, 300*time.Millisecond)
		says(t, l, "port group activated", ps[1].Addr())
		serves(d, ps[1])
		require.Equal(t, uint8(target.Optimized), lu.Access(2).State)
	})
	t.Run("the target alone moves it", func(t *testing.T) {
		d, _, srv, lu, ps := start(false, -1)
		require.Equal(t, "no_path", d.Snapshot().Maps[0].State)
		require.Equal(t, uint8(target.Standby), lu.Access(2).State, "no probe may move the unit")
		srv.SetAccess(lu, false, map[uint16]target.Access{1: {State: target.Standby}, 2: {State: target.NonOptimized}})
		serves(d, ps[1])
	})
}

func TestTransitioningIsWaitedOut(t *testing.T) {
	t.Parallel()
	srv, lu, ps := array(t, false, map[uint16]target.Access{1: {State: target.Optimized}, 2: {State: target.NonOptimized}})
	d, _ := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, Policy: paths.Config{Alias: "m"}})
	await(t, d, "up", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 })
	srv.SetAccess(lu, false, map[uint16]target.Access{1: {State: target.Transitioning}, 2: {State: target.Transitioning}})
	time.AfterFunc(700*time.Millisecond, func() {
		srv.SetAccess(lu, false, map[uint16]target.Access{1: {State: target.NonOptimized}, 2: {State: target.Optimized}})
	})
	write(t, d, "m", 0) // no error reaches the client
	m := await(t, d, "moved", func(m paths.MapStatus) bool { return len(serves(m)) == 1 && serves(m)[0] == ps[1].Addr() })
	require.Zero(t, m.Groups[0].Paths[0].Failures+m.Groups[1].Paths[0].Failures, "transitioning is no failure")
}

func TestSwitchSticksUntilTheGroupFails(t *testing.T) {
	t.Parallel()
	_, ps := disk(t, "s", 2)
	d, _ := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, FailoverTime: time.Second, Policy: paths.Config{Alias: "m"}})
	await(t, d, "up", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 })
	g := d.maps[0].group
	require.NoError(t, g.Switch(2))
	await(t, d, "switched", func(m paths.MapStatus) bool { return serves(m)[0] == ps[1].Addr() })
	write(t, d, "m", 0)
	ps[1].Stop()
	await(t, d, "failed over", func(m paths.MapStatus) bool { return len(serves(m)) == 1 && serves(m)[0] == ps[0].Addr() })
	require.ErrorContains(t, g.Switch(2), "no usable path")
	require.ErrorContains(t, g.Switch(3), "groups 1 to 2")
	require.NoError(t, ps[1].Start())
	await(t, d, "back, and not switched to", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 && serves(m)[0] == ps[0].Addr() })
}

func TestResizeGrowsWhenAllPathsAgreeAndShrinksOnlyByForce(t *testing.T) {
	t.Parallel()
	srv, lu, ps := array(t, false, map[uint16]target.Access{1: {}, 2: {}})
	require.NoError(t, srv.Resize(lu, 4<<20))
	d, l := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, FailoverTime: time.Second, Policy: paths.Config{Alias: "m", PollingInterval: 200 * time.Millisecond}})
	await(t, d, "up", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 && m.Size == 4<<20 })
	kind, addr, _ := strings.Cut(d.o.NBD, ":")
	c, err := client.Dial(kind, addr, "m")
	require.NoError(t, err)
	defer c.Close()
	_, err = c.WriteAt(make([]byte, 512), 6<<20)
	require.Error(t, err, "beyond the end")
	require.NoError(t, srv.Resize(lu, 8<<20))
	_, err = c.WriteAt(make([]byte, 512), 0) // hears of it
	require.NoError(t, err)
	await(t, d, "grown", func(m paths.MapStatus) bool { return m.Size == 8<<20 && m.Paths.Usable == 2 })
	says(t, l, "map resized", "from_bytes=4194304", "to_bytes=8388608")
	_, err = c.WriteAt(make([]byte, 512), 6<<20)
	require.NoError(t, err, "a connected client may use the new size")

	require.ErrorContains(t, d.maps[0].group.Resize(false), "nothing to do")
	require.NoError(t, srv.Resize(lu, 2<<20))
	require.ErrorContains(t, d.maps[0].group.Resize(false), "it shrank")
	require.NoError(t, d.maps[0].group.Resize(true))
	await(t, d, "shrunk", func(m paths.MapStatus) bool { return m.Size == 2<<20 })
}

func TestReconfigureAppliesAndRefuses(t *testing.T) {
	t.Parallel()
	_, ps := disk(t, "r", 2)
	var targets []initiator.URL
	for _, p := range ps {
		u, err := initiator.ParseURL(p.URL(0))
		require.NoError(t, err)
		targets = append(targets, u)
	}
	next := func() (Reloaded, error) { return Reloaded{}, errors.New("line 7: no such word") }
	policy := func(name string) Resolver {
		return func(*initiator.LUInfo) (paths.Config, string, error) {
			return paths.Config{Alias: "m", Policy: name, NoPathRetry: paths.Queue}, "", nil
		}
	}
	d, l := begin(t, Options{Targets: targets[:1], Resolve: policy("failover"), Reload: func() (Reloaded, error) { return next() }, FailoverTime: time.Second})
	await(t, d, "up", func(m paths.MapStatus) bool { return m.Paths.Usable == 1 })
	require.ErrorContains(t, d.Reconfigure(), "nothing changed: line 7")
	next = func() (Reloaded, error) {
		return Reloaded{Targets: targets[:1], Resolve: func(*initiator.LUInfo) (paths.Config, string, error) {
			return paths.Config{Alias: "n", NoPathRetry: paths.Queue}, "/dev/nbd7", nil
		}}, nil
	}
	require.NoError(t, d.Reconfigure())
	says(t, l, "a new alias takes effect with the next start", "alias=n")
	says(t, l, "a new nbd_device takes effect with the next start", "nbd_device=/dev/nbd7")
	next = func() (Reloaded, error) { return Reloaded{Targets: targets, Resolve: policy("multibus")}, nil }
	require.NoError(t, d.Reconfigure())
	await(t, d, "a path more, and both serve", func(m paths.MapStatus) bool { return m.Paths.Active == 2 })
	write(t, d, "m", 0)
	next = func() (Reloaded, error) { return Reloaded{Targets: targets[1:], Resolve: policy("failover")}, nil }
	require.NoError(t, d.Reconfigure())
	m := await(t, d, "a path less", func(m paths.MapStatus) bool { return m.Paths.Total == 1 && m.Paths.Usable == 1 })
	require.Equal(t, ps[1].Addr(), m.Groups[0].Paths[0].Portal)
	write(t, d, "m", 0)
	next = func() (Reloaded, error) { return Reloaded{Targets: targets, Resolve: policy("group_by_moon")}, nil }
	require.ErrorContains(t, d.Reconfigure(), "group_by_moon")
	await(t, d, "the path is back, the policy as it was", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 && m.Paths.Active == 1 })
}

func TestEventsTellWhatHappenedAndWhy(t *testing.T) {
	_, ps := disk(t, "e", 2)
	d, _ := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, FailoverTime: time.Second, Policy: paths.Config{Alias: "m"}})
	await(t, d, "up", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 })
	h := httptest.NewServer(d.handler())
	rs, err := http.Get(h.URL + "/events?past=yes")
	require.NoError(t, err)
	in := bufio.NewScanner(rs.Body)
	next := func(name string) Event {
		for in.Scan() {
			var e Event
			require.NoError(t, json.Unmarshal(in.Bytes(), &e))
			if e.Name == name {
				return e
			}
		}
		t.Fatalf("the stream ended without %s: %v", name, in.Err())
		return Event{}
	}
	require.Equal(t, "m", next("path-is-up").Map)
	ps[0].Drop()
	e := next("path-failed")
	require.Equal(t, ps[0].Addr()+"/0", e.Path)
	require.NotEmpty(t, e.Cause)
	next("path-group-switched")
	rs.Body.Close()
	h.Close()
	http.DefaultClient.CloseIdleConnections()
}

func TestMetricsAreServed(t *testing.T) {
	_, ps := disk(t, "p", 2)
	addr := unusedAddress(t)
	d, _ := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, Metrics: addr, Policy: paths.Config{Alias: "m"}})
	await(t, d, "up", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 })
	write(t, d, "m", 0)
	rs, err := http.Get("http://" + addr + "/metrics")
	require.NoError(t, err)
	b, err := io.ReadAll(rs.Body)
	require.NoError(t, err)
	rs.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	path := fmt.Sprintf(`{map="m",path="%s/0",target="%s"}`, ps[0].Addr(), iqn)
	for _, name := range []string{"ambiguous_writes_total", "unfenced_sessions", "unfenced_writes", "unfenced_blocks", "held_requests", "holds_total", "hold_seconds_total", "shadow_bytes", "repaired_blocks_total"} {
		require.Contains(t, string(b), "mpathd_map_"+name+`{map="m"} 0`)
	}
	for _, how := range paths.FenceKinds {
		require.Contains(t, string(b), fmt.Sprintf(`mpathd_map_fences_total{how="%s",map="m"} 0`, how))
	}
	for _, want := range []string{`mpathd_map_state{map="m",state="ok"} 1`, `mpathd_map_paths{kind="usable",map="m"} 2`, "mpathd_path_ios_total" + path + " 1",
		"mpathd_path_latency_seconds_count" + path + " 1", fmt.Sprintf(`mpathd_path_bytes_total{direction="written",map="m",path="%s/0",target="%s"} 4096`, ps[0].Addr(), iqn)} {
		require.Contains(t, string(b), want)
	}
	dir := t.TempDir()
	_, err = Start(Options{Metrics: addr, NBD: "unix:" + filepath.Join(dir, "n"), Control: filepath.Join(dir, "c")})
	require.ErrorContains(t, err, "address already in use")
}

// Two daemons with one initiator name end each other's sessions for ever: each
// says what the reason is likely to be.
func TestTwoDaemonsWithOneInitiatorName(t *testing.T) {
	_, ps := disk(t, "contest", 1)
	a, l := begin(t, Options{URLs: []string{ps[0].URL(0)}, Policy: paths.Config{Alias: "m"}})
	m := await(t, a, "up", func(m paths.MapStatus) bool { return m.Paths.Usable == 1 })
	require.False(t, m.Groups[0].Paths[0].Contested)
	b, _ := begin(t, Options{URLs: []string{ps[0].URL(0)}, Policy: paths.Config{Alias: "m"}})
	require.Eventually(t, func() bool { return a.Snapshot().Maps[0].Groups[0].Paths[0].Contested }, time.Minute, 5*time.Millisecond)
	says(t, l, "path is contested", "same initiator name", "a name of its own")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	b.Stop(ctx)
	await(t, a, "it serves again", func(m paths.MapStatus) bool { return m.Paths.Usable == 1 })
}

// What the operator does is an event like any other, with its cause.
func TestOperatorsActionsAreEvents(t *testing.T) {
	_, ps := disk(t, "events", 2)
	d, _ := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, Policy: paths.Config{Alias: "m", Failback: paths.Manual}})
	await(t, d, "up", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 && serves(m)[0] == ps[0].Addr() })
	g := d.maps[0].group
	event := func(name, from, cause string) {
		t.Helper()
		d.events.mu.Lock()
		defer d.events.mu.Unlock()
		var e Event
		for _, x := range d.events.recent {
			if x.Name == name {
				e = x // the last one
			}
		}
		require.Equal(t, []string{name, "m", cause}, []string{e.Name, e.Map, e.Cause})
		require.Equal(t, from, e.Fields["from"])
	}
	g.SetQueueing(false)
	event("queueing-switched-off", "", "the operator")
	g.SetQueueing(true)
	event("queueing-switched-on", "", "the operator")
	before := g.Snapshot().Totals.GroupSwitches
	require.NoError(t, g.Switch(2))
	event("path-group-switched", ps[0].Addr()+"/0", "the operator")
	require.NoError(t, g.Switch(0))
	event("path-group-switched", ps[1].Addr()+"/0", "the operator")
	require.Equal(t, before+2, g.Snapshot().Totals.GroupSwitches)
}

// A map whose last target the configuration names no more ends, unless somebody
// uses it; a unit that comes through another target meanwhile keeps its map.
func TestMapsEndWithTheirLastTarget(t *testing.T) {
	_, ps := disk(t, "ends", 2)
	var targets []initiator.URL
	for _, p := range ps {
		u, err := initiator.ParseURL(p.URL(0))
		require.NoError(t, err)
		targets = append(targets, u)
	}
	var next []initiator.URL
	resolve := func(*initiator.LUInfo) (paths.Config, string, error) {
		return paths.Config{Alias: "m", NoPathRetry: paths.Queue}, "", nil
	}
	var attached, detached int
	inUse := ""
	d, l := begin(t, Options{Targets: targets[:1], Resolve: resolve, Reload: func() (Reloaded, error) { return Reloaded{Targets: next, Resolve: resolve}, nil },
		Attach: func(*Daemon, string, string, string, block.Geometry) (Kernel, error) {
			attached++
			return Kernel{Path: "/dev/nbd9", Detach: func() error { detached++; return nil }, InUse: func() string { return inUse }}, nil
		}})
	device := func(m paths.MapStatus) bool { return m.Paths.Usable == 1 && m.NBD.Device == "/dev/nbd9" }
	await(t, d, "up", device)
	g := d.maps[0].group
	next = targets[1:]
	require.NoError(t, d.Reconfigure())
	await(t, d, "the other target leads to it", device)
	require.Same(t, g, d.maps[0].group)

	next, inUse = nil, "/dev/nbd9 is mounted on /srv"
	require.NoError(t, d.Reconfigure())
	says(t, l, "map stays without a path", "/dev/nbd9 is mounted on /srv")
	kind, addr, _ := strings.Cut(d.o.NBD, ":")
	c, err := client.Dial(kind, addr, "m")
	require.NoError(t, err)
	await(t, d, "the client is counted", func(m paths.MapStatus) bool { return m.NBD.Connections == 1 })
	inUse = ""
	require.NoError(t, d.Reconfigure())
	says(t, l, "map stays without a path", "an NBD client uses it")
	require.NoError(t, c.Close())
	require.Eventually(t, func() bool { return d.Reconfigure() == nil && len(d.Snapshot().Maps) == 0 }, 10*time.Second, 100*time.Millisecond)
	require.Equal(t, 1, attached)
	require.Equal(t, 1, detached)
	_, err = client.Dial(kind, addr, "m")
	require.Error(t, err, "no export is left")

	next = targets
	require.NoError(t, d.Reconfigure())
	await(t, d, "made anew", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 && m.NBD.Device == "/dev/nbd9" })
	write(t, d, "m", 0)
}

// A path that cannot be removed because its server holds unflushed writes can be
// after a flush, as the log says.
func TestPathOfADroppedTargetIsRemovedByTheNextReconfigureAfterAFlush(t *testing.T) {
	_, ps := disk(t, "dropped", 1)
	u, err := initiator.ParseURL(ps[0].URL(0))
	require.NoError(t, err)
	resolve := func(*initiator.LUInfo) (paths.Config, string, error) {
		return paths.Config{Alias: "m", NoPathRetry: paths.Queue}, "", nil
	}
	d, l := begin(t, Options{Targets: []initiator.URL{u}, Resolve: resolve, Reload: func() (Reloaded, error) { return Reloaded{Resolve: resolve}, nil }})
	await(t, d, "up", func(m paths.MapStatus) bool { return m.Paths.Usable == 1 })
	write(t, d, "m", 0)
	require.NoError(t, d.Reconfigure())
	says(t, l, "path not removed", "flush (sync) and reconfigure again")
	require.Equal(t, 1, d.maps[0].group.Snapshot().Paths.Total)
	kind, addr, _ := strings.Cut(d.o.NBD, ":")
	c, err := client.Dial(kind, addr, "m")
	require.NoError(t, err)
	require.NoError(t, c.Flush())
	require.NoError(t, c.Close())
	require.NoError(t, d.Reconfigure())
	require.Eventually(t, func() bool {
		maps := d.Snapshot().Maps
		return len(maps) == 0 || maps[0].Paths.Total == 0
	}, patience, 5*time.Millisecond)
}
