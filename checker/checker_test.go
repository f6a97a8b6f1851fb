package checker

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/scsi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// unit is a unit of the built-in target, its script, and a session to it.
type unit struct {
	LU
	mu     sync.Mutex
	script map[byte]target.Action // by operation code
	pages  map[byte][]byte        // vital product data; none: no such page
	count  int
}

// on makes the unit answer a command so; the zero Action is as usual.
func (u *unit) on(op byte, a target.Action) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.script[op] = a
}

// page gives the unit a page, or takes it away.
func (u *unit) page(code byte, b []byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.pages[code] = b
}

func (u *unit) reads() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.count
}

func newUnit(t *testing.T) *unit {
	lu, err := target.NewLU(1<<20, 512, target.DefaultIdentity("checked"))
	require.NoError(t, err)
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: "iqn.2026-11.example:c", LUs: []*target.LU{lu}}}})
	require.NoError(t, err)
	t.Cleanup(srv.Kill)
	p, err := srv.Listen("127.0.0.1:0")
	require.NoError(t, err)
	s, err := initiator.Open(context.Background(), initiator.Config{Address: p.Addr(), TargetName: "iqn.2026-11.example:c", InitiatorName: "iqn.2026-11.example:i", FailoverTime: 10 * time.Second})
	require.NoError(t, err)
	t.Cleanup(func() { s.Close(context.Background()) })
	u := &unit{LU: LU{Doer: s, BlockSize: 512, Use16: true}, script: map[byte]target.Action{}, pages: map[byte][]byte{}}
	srv.OnCommand(func(c *target.Cmd) target.Action {
		u.mu.Lock()
		defer u.mu.Unlock()
		if c.Op() == 0x88 {
			u.count++
		}
		if c.Op() == 0x12 && c.CDB[1]&1 == 1 {
			if b := u.pages[c.CDB[2]]; b != nil {
				return target.Action{Data: b}
			}
		}
		return u.script[c.Op()]
	})
	return u
}

func (u *unit) check(t *testing.T, c Checker) State {
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	v := c.Check(ctx, u.LU)
	if v.State != Up {
		require.Error(t, v.Err, "a verdict but for up says why")
	}
	return v.State
}

func checkCondition(key, asc, ascq byte) target.Action {
	return target.Action{Status: 2, Sense: target.Sense{Key: key, ASC: asc, ASCQ: ascq}}
}

func named(t *testing.T, name string) Checker {
	c, err := New(name)
	require.NoError(t, err)
	require.Equal(t, name, c.Name())
	return c
}

func TestUnknownCheckersAreRefused(t *testing.T) {
	_, err := New("guess")
	require.ErrorContains(t, err, "want tur, readsector0, directio, none, rdac, emc_clariion, hp_sw")
	for _, n := range Names {
		named(t, n)
	}
}

// What the answers to TEST UNIT READY and to a READ mean.
func TestVerdictsOfAnswers(t *testing.T) {
	u := newUnit(t)
	for _, c := range []struct {
		what    string
		act     target.Action
		tur, rd State
	}{
		{"good", target.Action{}, Up, Up},
		{"reservation conflict", target.Action{Status: 0x18}, Up, Up},
		{"standby", checkCondition(2, 4, 0x0b), Ghost, Ghost},
		{"transition", checkCondition(2, 4, 0x0a), Pending, Pending},
		{"unavailable", checkCondition(2, 4, 0x0c), Down, Down},
		{"no such unit", checkCondition(5, 0x25, 0), Disconnected, Disconnected},
		{"not ready", checkCondition(2, 4, 3), Down, Down},
		{"medium error", checkCondition(3, 0x11, 0), Down, Down},
		{"unit attention for ever", checkCondition(6, 0x29, 0), Down, Down},
		{"target failure", target.Action{Response: 1}, Down, Down},
		{"silence", target.Action{Silent: true}, Timeout, Timeout},
	} {
		u.on(0x88, target.Action{})
		u.on(0x00, c.act)
		require.Equal(t, c.tur, u.check(t, named(t, "tur")), "tur, %s", c.what)
		require.Equal(t, Up, u.check(t, named(t, "none")))
		u.on(0x00, target.Action{})
		u.on(0x88, c.act)
		for _, name := range []string{"readsector0", "directio"} {
			require.Equal(t, c.rd, u.check(t, named(t, name)), "%s, %s", name, c.what)
		}
		require.Equal(t, Up, u.check(t, named(t, "tur")), "tur does not read")
	}
}

func TestReadsAreAsLargeAsTheirCheckersRead(t *testing.T) {
	u := newUnit(t)
	u.BlockSize = 0
	require.Equal(t, Down, u.check(t, named(t, "readsector0")))
	u.BlockSize = 512
	require.Equal(t, Up, u.check(t, named(t, "directio")))
	require.Equal(t, Up, u.check(t, named(t, "readsector0")))
	require.Equal(t, 2, u.reads())
}

// rdac page C9 of length 48: flags, own access state, reason, the other's state.
func c9(pq, flags, state, reason, other byte) []byte {
	b := make([]byte, 48)
	b[0], b[1], b[3], b[8], b[10], b[11], b[12] = pq, 0xc9, 44, flags, state, reason, other
	return b
}

func TestRDAC(t *testing.T) {
	u, c := newUnit(t), named(t, "rdac")
	require.Equal(t, Up, u.check(t, c), "without page C9 TEST UNIT READY decides")
	u.on(0x00, checkCondition(2, 4, 0x0b))
	require.Equal(t, Ghost, u.check(t, c))
	u.on(0x00, target.Action{})
	for _, x := range []struct {
		page []byte
		want State
	}{
		{c9(0, 0x01, 0, 0, 0), Up},                            // owner
		{c9(0, 0x00, 0, 0, 0), Ghost},                         // the other one is
		{c9(0, 0x20, 0, 0, 0), Up},                            // either takes I/O
		{c9(0x20, 0x01, 0, 0, 0), Down},                       // no unit
		{c9(0, 0x11, 3, 7, 0), Down},                          // service mode
		{c9(0, 0x11, scsi.Transitioning, 0, 0), Down},         // starting
		{c9(0, 0x11, scsi.Transitioning, 0, 0x0f), Up},        // both move
		{c9(0, 0x10, scsi.ActiveNonOptimized, 0, 0x0), Ghost}, // not the owner
		{c9(0, 0x01, 0, 0, 0)[:10], Down},                     // cut short
	} {
		u.page(0xc9, x.page)
		require.Equal(t, x.want, u.check(t, c), "%x", x.page)
	}
	u.on(0x12, target.Action{Silent: true})
	u.page(0xc9, nil)
	require.Equal(t, Timeout, u.check(t, c))
	require.Zero(t, u.reads(), "it never reads: that could move the unit")
}

func c0(change func(b []byte)) []byte {
	b := make([]byte, 128)
	b[1], b[3], b[4], b[10], b[27], b[28], b[30] = 0xc0, 124, 2, 0x60, 3, 4, 4
	change(b)
	return b
}

func TestClariion(t *testing.T) {
	u, c := newUnit(t), named(t, "emc_clariion")
	require.Equal(t, Up, u.check(t, c), "without page C0 TEST UNIT READY decides")
	set := func(f func(b []byte)) { u.page(0xc0, c0(f)) }
	set(func([]byte) {})
	require.Equal(t, Up, u.check(t, c))
	require.Equal(t, 1, u.reads())
	set(func(b []byte) { b[4] = 1 })
	require.Equal(t, Ghost, u.check(t, c))
	require.Equal(t, 1, u.reads(), "a passive path is not read")
	for _, alter := range []func([]byte){func(b []byte) { b[28] = 0 }, func(b []byte) { b[27] = 0 }, func(b []byte) { b[4] = 0 }, func(b []byte) { b[9] = 5 }} {
		set(alter)
		require.Equal(t, Down, u.check(t, c))
	}
	set(func(b []byte) { b[48] = 1 })
	require.Equal(t, Shaky, u.check(t, c))
	set(func(b []byte) { b[11] = 9 })
	require.Equal(t, Down, u.check(t, c), "another unit")
	// An inactive snapshot tells so on its active path only.
	u.on(0x88, checkCondition(5, 0x25, 1))
	set(func([]byte) {})
	require.Equal(t, Down, u.check(t, c))
	set(func(b []byte) { b[4] = 1 })
	require.Equal(t, Down, u.check(t, c))
	u.on(0x88, target.Action{})
	set(func([]byte) {})
	require.Equal(t, Up, u.check(t, c))
	set(func(b []byte) { b[4] = 1 })
	require.Equal(t, Ghost, u.check(t, c))
}

func TestHPSW(t *testing.T) {
	u, c := newUnit(t), named(t, "hp_sw")
	require.Equal(t, Up, u.check(t, c))
	u.on(0x00, checkCondition(2, 4, 2))
	require.Equal(t, Ghost, u.check(t, c))
	u.on(0x12, checkCondition(5, 0x25, 0))
	require.Equal(t, Disconnected, u.check(t, c))
}

func TestIntervalsDoubleWhileNothingChanges(t *testing.T) {
	i := Interval{Min: 5 * time.Second, Max: 20 * time.Second}
	var got []time.Duration
	for _, steady := range []bool{false, true, true, true, false, true} {
		got = append(got, i.Next(steady)/time.Second)
	}
	require.Equal(t, []time.Duration{5, 10, 20, 20, 5, 10}, got)
}

func TestADeadSessionIsDown(t *testing.T) {
	u := newUnit(t)
	u.Doer.(*initiator.Session).Abort(errors.New("cut by the test"))
	for _, n := range Names[:3] {
		require.Equal(t, Down, u.check(t, named(t, n)), n)
	}
}
