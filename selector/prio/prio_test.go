package prio

import (
	"context"
	"math"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/target"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func ask(t *testing.T, name, args string, p Path) (int, error) {
	t.Helper()
	pr, err := New(name, args)
	require.NoError(t, err)
	require.Equal(t, name, pr.Name())
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return pr.Prio(ctx, p)
}

func want(t *testing.T, n int, name, args string, p Path) {
	t.Helper()
	got, err := ask(t, name, args, p)
	require.NoError(t, err, "%s %s", name, args)
	require.Equal(t, n, got, "%s %s", name, args)
}

func TestBadArgumentsAreRefused(t *testing.T) {
	for _, c := range [][2]string{
		{"guess", ""}, {"weightedpath", ""}, {"weightedpath", "devname a"}, {"weightedpath", "hbtl a 1"}, {"weightedpath", "devname [ 1"}, {"weightedpath", "devname a x"}, {"weightedpath", "colour a 1"},
		{"path_latency", "io_num=5"}, {"path_latency", "base_num=11"}, {"path_latency", "fast"}, {"iet", ""}, {"iet", "preferredip=here"}, {"datacore", ""},
	} {
		_, err := New(c[0], c[1])
		require.Error(t, err, "%v", c)
	}
}

func TestPrioritiesThatAskNobody(t *testing.T) {
	p := Path{Name: "10.0.0.12:3260/0", Address: "10.0.0.12:3260", Target: "iqn.2026-11.example:b", Info: &initiator.LUInfo{Serial: "S2"}}
	want(t, 1, "const", "", p)
	want(t, 2, "ontap", "", p)
	want(t, 20, "iet", "preferredip=10.0.0.12", p)
	want(t, 10, "iet", "preferredip=10.0.0.1", p) // no match by prefix
	v6 := p
	v6.Address = "[2001:db8::1]:3260"
	want(t, 20, "iet", "preferredip=2001:db8:0::1", v6)
	want(t, 7, "weightedpath", "devname ^10\\.0\\.0\\.12: 7 .* 3", p)
	want(t, 3, "weightedpath", "devname nothing 7 .* 3", p)
	want(t, 0, "weightedpath", "devname nothing 7", p)
	want(t, 5, "weightedpath", "serial S2 5", p)
	want(t, 6, "weightedpath", "wwn example:b$ 6", p)
	seen := map[int]bool{}
	for range 1000 {
		n, err := ask(t, "random", "", p)
		require.NoError(t, err)
		require.True(t, n >= 1 && n <= 10, n)
		seen[n] = true
	}
	require.Len(t, seen, 10)
}

// session is one to a unit of the built-in target, of which portal group 1
// has this state.
func session(t *testing.T, groups map[uint16]target.Access, hook func(*target.Cmd) target.Action) Path {
	lu, err := target.NewLU(1<<20, 512, target.DefaultIdentity("ranked"))
	require.NoError(t, err)
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: "iqn.2026-11.example:p", LUs: []*target.LU{lu}}}})
	require.NoError(t, err)
	t.Cleanup(srv.Kill)
	p, err := srv.Listen("127.0.0.1:0")
	require.NoError(t, err)
	if groups != nil {
		srv.SetAccess(lu, false, groups)
	}
	s, err := initiator.Open(context.Background(), initiator.Config{Address: p.Addr(), TargetName: "iqn.2026-11.example:p", InitiatorName: "iqn.2026-11.example:i", FailoverTime: 10 * time.Second})
	require.NoError(t, err)
	t.Cleanup(func() { s.Close(context.Background()) })
	info, err := initiator.Identify(context.Background(), s, [8]byte{})
	require.NoError(t, err)
	srv.OnCommand(hook)
	return Path{Doer: s, Info: info, Address: p.Addr(), Target: "iqn.2026-11.example:p"}
}

// The values of multipath-tools: the preferred bit counts 80, at an optimized
// path only if prio_args say so.
func TestALUA(t *testing.T) {
	for _, c := range []struct {
		state           uint8
		preferred       bool
		usual, stricter int
	}{
		{target.Optimized, false, 50, 50}, {target.Optimized, true, 50, 130},
		{target.NonOptimized, false, 10, 10}, {target.NonOptimized, true, 90, 90},
		{target.Standby, false, 1, 1}, {target.Unavailable, false, 0, 0}, {target.Transitioning, false, 0, 0},
	} {
		// The unit is identified while it is optimized: later it may not answer.
		p := session(t, map[uint16]target.Access{1: {State: target.Optimized}, 2: {}}, func(cmd *target.Cmd) target.Action {
			if cmd.Op() != 0xa3 {
				return target.Action{}
			}
			d := c.state
			if c.preferred {
				d |= 0x80
			}
			return target.Action{Data: []byte{0, 0, 0, 24, 0, 0x0f, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2, d, 0x0f, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1}}
		})
		want(t, c.usual, "alua", "", p)
		want(t, c.stricter, "alua", "exclusive_pref_bit", p)
		a, err := New("sysfs", "")
		require.NoError(t, err)
		_, state, err := a.(Access).Access(context.Background(), p)
		require.NoError(t, err)
		require.Equal(t, c.state, state)
	}
}

func TestALUAErrorsLeaveThePriorityUndefined(t *testing.T) {
	p := session(t, nil, nil)
	_, err := ask(t, "alua", "", p)
	require.Error(t, err, "the unit has no port groups")
	p.Info.Designators = nil
	_, err = ask(t, "alua", "", p)
	require.ErrorIs(t, err, errNoGroup)
	p = session(t, map[uint16]target.Access{1: {}}, func(cmd *target.Cmd) target.Action {
		if cmd.Op() == 0xa3 {
			return target.Action{Data: []byte{0, 0, 0, 12, 0, 0x0f, 0, 9, 0, 0, 0, 1, 0, 0, 0, 2}}
		}
		return target.Action{}
	})
	_, err = ask(t, "alua", "", p)
	require.ErrorContains(t, err, "target port group 1 is not among the 1")
}

// Paths of different speed get different priorities, those of about the same
// speed the same.
func TestPathLatency(t *testing.T) {
	delayed := func(d time.Duration) Path {
		return session(t, nil, func(c *target.Cmd) target.Action {
			if c.Op() == 0x88 {
				return target.Action{Delay: d}
			}
			return target.Action{}
		})
	}
	slow, err := ask(t, "path_latency", "io_num=20 base_num=10", delayed(20*time.Millisecond))
	require.NoError(t, err)
	require.Equal(t, int(8-math.Log10(20e3)-0.2), slow, "20 ms and a little")
	fast, err := ask(t, "path_latency", "io_num=20 base_num=10", delayed(0))
	require.NoError(t, err)
	require.Greater(t, fast, slow)
	_, err = ask(t, "path_latency", "", Path{Info: &initiator.LUInfo{}}) // in standby
	require.ErrorContains(t, err, "does not tell its block size")
}

func TestDatacore(t *testing.T) {
	p := session(t, nil, func(c *target.Cmd) target.Action {
		if c.Op() == 0x12 && c.CDB[1]&1 == 0 {
			b := make([]byte, 96)
			copy(b[36:], "SDS-EAST")
			return target.Action{Data: b}
		}
		return target.Action{}
	})
	want(t, 1, "datacore", "timeout=4000 preferredsds=SDS-EAST", p)
	want(t, 0, "datacore", "preferredsds=SDS-WEST", p)
}
