package initiator_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/paths"
)

// What units say, and answers with lengths that lie: SC and a part of HM.
var scsiCases = map[string]conformanceCase{
	"SC01": {"answers with each sense of the disposition table, in fixed and descriptor format, cut short, deferred, or with none", "does what the table says: nothing, retry there, retry elsewhere, fail the path, or fail with the exact kind of error", disposition},
	"SC02": {"is another disk, or a smaller one, after the next login", "does not use the path", func(t *testing.T) {
		m := newMapped(t, 1, options{})
		m.lu.SetIdentity(target.DefaultIdentity("another"))
		m.portals[0].Drop()
		m.await("refused", func() bool { return m.log.has("identity changed") })
		_, c := begin(m.g, block.Write, 0, 4096, 0)
		require.Equal(t, block.ErrNoPath, finish(t, c))
		require.Zero(t, m.count(nil), "a byte went to another disk")
		require.Contains(t, m.path(0).LastError, "its ID is")
		require.NoError(t, m.g.ReinstatePath(m.portals[0].Addr()))
		m.lu.SetIdentity(target.DefaultIdentity("conformance"))

		small := newMapped(t, 1, options{})
		require.NoError(t, small.srv.Resize(small.lu, mappedSize/2))
		small.portals[0].Drop()
		small.await("refused", func() bool { return small.log.has("it shrank") })
		require.Equal(t, block.ErrNoPath, small.io(block.Write, 0, 4096))
		require.Zero(t, small.count(nil))
	}},
	"SC03": {"is in transition for ten seconds, then another port group is optimized", "waits, moves, and fails nothing", func(t *testing.T) {
		state := func(a, b uint8) map[uint16]target.Access {
			return map[uint16]target.Access{1: {State: a}, 2: {State: b}}
		}
		m := newMapped(t, 2, options{group: true, paths: paths.Config{Prio: "alua", Policy: "group_by_prio", PollingInterval: time.Second}})
		m.srv.SetAccess(m.lu, false, state(target.Optimized, target.Standby))
		m.await("ranked", func() bool { return m.path(0).Access == "active/optimized" && m.path(1).Access == "standby" })
		require.NoError(t, m.io(block.Write, 0, 4096))
		m.srv.SetAccess(m.lu, false, state(target.Transitioning, target.Transitioning))
		began := time.Now()
		time.AfterFunc(10*time.Second, func() { m.srv.SetAccess(m.lu, false, state(target.Unavailable, target.Optimized)) })
		var all []chan *block.Request
		for i := range 16 {
			_, c := begin(m.g, block.Op(i%2), int64(i)*4096, 4096, 0)
			all = append(all, c)
		}
		for _, c := range all {
			require.NoError(t, finish(t, c))
		}
		require.Greater(t, time.Since(began), 9*time.Second)
		m.await("moved", func() bool { return m.path(1).Serving && m.path(1).Access == "active/optimized" })
		require.NoError(t, m.io(block.Write, 0, 4096))

		// While one group is in transition, another one serves at once.
		other := newMapped(t, 2, options{group: true, paths: paths.Config{Prio: "alua", Policy: "group_by_prio"}})
		other.srv.SetAccess(other.lu, false, state(target.Transitioning, target.NonOptimized))
		for i := range 4 {
			require.NoError(t, other.io(block.Op(i%2), 0, 4096))
		}
	}},
	"SC04": {"does not know UNMAP and WRITE SAME, or refuses a field of theirs", "stops using them; trims do nothing, zeroes are written", func(t *testing.T) {
		for _, asc := range []byte{0x20, 0x24} {
			m := newMapped(t, 1, options{})
			require.True(t, m.g.Geometry().FastZero)
			m.hook(func(c *target.Cmd) target.Action {
				if op := c.Op(); op == 0x42 || op == 0x93 {
					return *senseOf(5, asc, 0)
				}
				return target.Action{}
			})
			const size = 1 << 20
			require.NoError(t, m.io(block.Write, 0, size))
			for range 3 {
				require.NoError(t, m.io(block.Trim, 0, size))
			}
			require.Equal(t, 1, m.count(nil, 0x42), "UNMAP was not given up")
			got := make([]byte, size+4096)
			m.lu.ReadAt(got, 0)
			require.Equal(t, bytes.Repeat([]byte{0xa5}, size), got[:size], "a trim that was refused changed data")
			require.NoError(t, m.io(block.WriteZeroes, 512, size-1024))
			m.lu.ReadAt(got, 0)
			require.Equal(t, bytes.Repeat([]byte{0xa5}, 512), got[:512])
			require.Equal(t, make([]byte, size-1024), got[512:size-512])
			require.Equal(t, bytes.Repeat([]byte{0xa5}, 512), got[size-512:size])
			require.NoError(t, m.io(block.WriteZeroes, 0, size))
			require.Equal(t, 1, m.count(nil, 0x93), "WRITE SAME was not given up")
			require.Equal(t, block.ErrNotSup, io1(t, m.g, block.WriteZeroes, 0, size, block.FastZero))
			require.False(t, m.g.Geometry().FastZero)
		}
		limits(t)
	}},
	"SC05": {"dies with acknowledged writes in its cache, while another server serves", "fails the flush, or waits with it for the server; it never succeeds without", func(t *testing.T) {
		// Two servers with caches of their own, which do not know FUA.
		servers := func(retry int) (*paths.Group, *target.Server, []*target.Portal, *target.LU) {
			var portals []*target.Portal
			var first *target.Server
			var lu0 *target.LU
			for i := range 2 {
				lu, err := target.NewLU(mappedSize, 512, target.DefaultIdentity("twin"))
				require.NoError(t, err)
				srv, err := target.New(target.Config{Targets: []*target.Target{{Name: fmt.Sprintf("%s.%d", iqn, i), LUs: []*target.LU{lu}}}})
				require.NoError(t, err)
				t.Cleanup(srv.Kill)
				p, err := srv.Listen("127.0.0.1:0")
				require.NoError(t, err)
				srv.OnCommand(func(c *target.Cmd) target.Action {
					if c.Op() == 0x1a { // MODE SENSE (6): WCE, no DPOFUA
						return target.Action{Data: append([]byte{23, 0, 0, 0, 8, 18, 4}, make([]byte, 17)...)}
					}
					return target.Action{}
				})
				if portals = append(portals, p); i == 0 {
					first, lu0 = srv, lu
				}
			}
			g := mapOver(t, &logged{}, options{paths: paths.Config{NoPathRetry: retry, PollingInterval: 2 * time.Second}}, portals...)
			require.Eventually(t, func() bool { return g.Snapshot().Paths.Usable == 2 }, 20*time.Second, time.Millisecond)
			return g, first, portals, lu0
		}
		for _, retry := range []int{paths.Fail, paths.Queue} {
			g, first, portals, _ := servers(retry)
			require.NoError(t, io1(t, g, block.Write, 0, 4096, 0))
			portals[0].Stop()
			require.Eventually(t, func() bool { return g.Snapshot().Paths.Usable == 1 }, 20*time.Second, time.Millisecond)
			_, c := begin(g, block.Flush, 0, 0, 0)
			require.NoError(t, io1(t, g, block.Write, 4096, 4096, 0), "a write waits behind the flush")
			if retry == paths.Fail {
				require.Equal(t, block.ErrIO, finish(t, c))
				continue
			}
			time.Sleep(time.Second)
			require.Empty(t, c, "success without the server that holds the write")
			flushes := first.Stats().Flushes
			require.NoError(t, portals[0].Start())
			require.NoError(t, finish(t, c))
			require.Greater(t, first.Stats().Flushes, flushes)
		}
	}},
	"SC06": {"answers RESERVATION CONFLICT", "fails the request with that, without trying another path", func(t *testing.T) {
		m := newMapped(t, 2, options{paths: paths.Config{NoPathRetry: paths.Queue}})
		m.hook(func(*target.Cmd) target.Action { return target.Action{Status: 0x18} })
		require.Equal(t, block.ErrReservation, m.io(block.Write, 0, 4096))
		require.Equal(t, block.ErrReservation, m.io(block.Read, 0, 4096))
		require.Equal(t, 2, m.count(m.portals[0]))
		require.Zero(t, m.count(m.portals[1]))
		require.Equal(t, 2, m.g.Snapshot().Paths.Usable)
	}},
	"HM08": {"lies about lengths in INQUIRY, VPD pages, REPORT LUNS, port groups and mode pages: 0, huge, cut off", "parses what is there, or refuses the unit; the session lives", lies},
	"HM09": {"tells block sizes of 0, 513 or 2^31 bytes, or a last block of all ones", "refuses the unit, and the path of a map", func(t *testing.T) {
		m := newMapped(t, 1, options{})
		for _, c := range []struct {
			last uint64
			size uint32
		}{{99, 0}, {99, 1}, {99, 513}, {99, 1 << 31}, {99, 1<<32 - 1}, {1<<64 - 1, 512}, {1<<63 - 1, 4096}, {1 << 55, 65536}, {1<<64 - 1, 0}} {
			lie := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(nil, c.last), c.size)
			m.srv.OnCommand(func(cmd *target.Cmd) target.Action {
				if cmd.Op() == 0x9e {
					return target.Action{Data: append(bytes.Clone(lie), make([]byte, 20)...)}
				}
				return target.Action{}
			})
			require.ErrorContains(t, identified(t, m), "capacity", "%+v", c)
			m.portals[0].Drop()
			m.await("refused", func() bool { return m.g.Snapshot().Paths.Usable == 0 && m.log.has("capacity: ") })
		}
		// The short form of all ones means that the long one is needed, which
		// this unit refuses.
		m.srv.OnCommand(func(cmd *target.Cmd) target.Action {
			switch cmd.Op() {
			case 0x9e:
				return *senseOf(5, 0x20, 0)
			case 0x25:
				return target.Action{Data: []byte{255, 255, 255, 255, 0, 0, 2, 0}}
			}
			return target.Action{}
		})
		require.ErrorContains(t, identified(t, m), "too large for READ CAPACITY (10)")
	}},
	"HM11": {"sends what the fuzzers found or were given", "neither panics nor runs out of memory", func(t *testing.T) {
		// The seeds and finds of every fuzz target of what a target sends.
		out, err := exec.Command("go", "test", "-count=1", "-run", "^Fuzz", ".", "./pdu", "../scsi").CombinedOutput()
		require.NoError(t, err, "%s", out)
	}},
}

// identified is what Identify says of the unit on a session of its own.
func identified(t *testing.T, m *mapped) error {
	t.Helper()
	s, err := initiator.Open(context.Background(), initiator.Config{Address: m.portals[0].Addr(), TargetName: iqn, InitiatorName: "iqn.2026-11.example:i", ISID: [6]byte{0x80, 5}, LoginTimeout: 10 * time.Second})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err = initiator.Identify(ctx, s, [8]byte{})
	require.NoError(t, s.Err(), "the session died of an answer")
	require.NoError(t, s.Close(ctx))
	return err
}

func disposition(t *testing.T) {
	type row struct {
		name           string
		key, asc, ascq byte
		always         bool // else the first command alone meets it
		err            error
		a, b           int // READs that the first and the second path get
	}
	const many = -1
	rows := []row{
		{"no sense", 0, 0, 0, false, nil, 1, 1}, // it says so, but moved nothing: the path fails
		{"not ready, cause unknown", 2, 4, 0, false, nil, 1, 1},
		{"becoming ready", 2, 4, 1, false, nil, 2, 0},
		{"needs START UNIT", 2, 4, 2, false, nil, 1, 1},
		{"manual intervention", 2, 4, 3, false, nil, 1, 1},
		{"self-test in progress", 2, 4, 9, false, nil, 2, 0},
		{"transition", 2, 4, 0x0a, false, nil, 1, 1},
		{"standby", 2, 4, 0x0b, false, nil, 1, 1},
		{"unavailable", 2, 4, 0x0c, false, nil, 1, 1},
		{"offline", 2, 4, 0x12, false, nil, 1, 1},
		{"no medium", 2, 0x3a, 0, true, block.ErrIO, 1, 0},
		{"unrecovered read error", 3, 0x11, 0, true, block.ErrMedium, 1, 0},
		{"other medium error", 3, 0x31, 0, true, block.ErrMedium, 6, 0},
		{"hardware error", 4, 0x44, 0, true, block.ErrTarget, 1, 1},
		{"LBA out of range", 5, 0x21, 0, true, block.ErrOutOfRange, 1, 0},
		{"unit gone on this path", 5, 0x25, 0, false, nil, 1, 1},
		{"parameter list", 5, 0x26, 0, true, block.ErrTarget, 1, 0},
		{"READ (16) unknown", 5, 0x20, 0, false, nil, 2, 0}, // then READ (10)
		{"reset", 6, 0x29, 0, false, nil, 2, 0},
		{"mode parameters changed", 6, 0x2a, 1, false, nil, 2, 0},
		{"reservations preempted", 6, 0x2a, 3, false, nil, 2, 0},
		{"access state changed", 6, 0x2a, 6, false, nil, 2, 0},
		{"capacity changed", 6, 0x2a, 9, false, nil, 2, 0},
		{"commands cleared", 6, 0x2f, 0, false, nil, 2, 0},
		{"thin pool runs full", 6, 0x38, 7, false, nil, 2, 0},
		{"inquiry data changed", 6, 0x3f, 3, false, nil, many, many},
		{"other attention", 6, 0x28, 0, false, nil, 2, 0},
		{"thin pool full", 7, 0x27, 7, true, block.ErrNoSpace, 1, 0},
		{"write protected", 7, 0x27, 0, true, block.ErrReadOnly, 1, 0},
		{"blank check", 8, 0, 0, true, block.ErrTarget, 1, 0},
		{"protection information", 0xb, 0x10, 1, true, block.ErrIntegrity, 1, 0},
		{"duration limit", 0xb, 0x2e, 1, true, block.ErrTimeLimit, 1, 0},
		{"parity error", 0xb, 0x47, 0, false, nil, 1, 1},
		{"aborted command", 0xb, 0x44, 0, true, block.ErrIO, 6, 0},
		{"miscompare", 0xe, 0x1d, 0, true, block.ErrTarget, 1, 0},
		{"duration limit, completed", 0xf, 0x55, 0x0a, true, block.ErrTimeLimit, 1, 0},
	}
	play := func(t *testing.T, m *mapped, r row, act target.Action) {
		began := m.count(m.portals[0])
		before := m.count(m.portals[1])
		if r.always {
			m.hook(func(*target.Cmd) target.Action { return act })
		} else {
			m.hook(once(act))
		}
		require.Equal(t, r.err, m.io(block.Read, 0, 4096))
		if r.a != many {
			require.Equal(t, r.a, m.count(m.portals[0])-began, "on the path")
			require.Equal(t, r.b, m.count(m.portals[1])-before, "on the other path")
		}
		m.hook(nil)
		m.await("whole again", func() bool { return m.g.Snapshot().Paths.Usable == 2 && m.path(0).State == "up" && m.path(0).Serving })
	}
	for format := range eachFormat(0, 0, 0) {
		m := newMapped(t, 2, options{}) // rows that fail the path get one of their own: it remembers
		for _, r := range rows {
			t.Run(r.name+", "+format, func(t *testing.T) {
				on := m
				if r.b == 1 {
					on = newMapped(t, 2, options{})
				} else {
					on.t = t
				}
				play(t, on, r, target.Action{Status: 2, SenseData: eachFormat(r.key, r.asc, r.ascq)[format]})
			})
		}
	}
	for _, c := range []struct {
		row
		act target.Action
	}{
		{row{"check condition without sense", 0, 0, 0, false, nil, 1, 1}, target.Action{Status: 2, SenseData: []byte{}}},
		{row{"check condition with two bytes", 0, 0, 0, false, nil, 1, 1}, target.Action{Status: 2, SenseData: []byte{0x70, 0}}},
		{row{"busy", 0, 0, 0, false, nil, 2, 0}, target.Action{Status: 0x08}},
		{row{"task set full", 0, 0, 0, false, nil, 2, 0}, target.Action{Status: 0x28}},
		{row{"ACA active", 0, 0, 0, false, nil, 2, 0}, target.Action{Status: 0x30}},
		{row{"task aborted", 0, 0, 0, false, nil, 2, 0}, target.Action{Status: 0x40}},
		{row{"reservation conflict", 0, 0, 0, true, block.ErrReservation, 1, 0}, target.Action{Status: 0x18}},
		{row{"unknown status", 0, 0, 0, false, nil, 1, 1}, target.Action{Status: 0x22}},
		{row{"target failure", 0, 0, 0, false, nil, 1, 1}, target.Action{Response: 1}},
	} {
		t.Run(c.name, func(t *testing.T) { play(t, newMapped(t, 2, options{}), c.row, c.act) })
	}
	t.Run("ACA is cleared", func(t *testing.T) {
		m := newMapped(t, 1, options{})
		cleared := make(chan struct{}, 1)
		m.srv.OnTask(func(tk target.Task) target.TaskAction {
			if tk.Function == 3 {
				m.hook(nil)
				cleared <- struct{}{}
			}
			return target.TaskAction{}
		})
		m.hook(func(*target.Cmd) target.Action { return target.Action{Status: 0x30} })
		require.NoError(t, m.io(block.Read, 0, 4096))
		require.Len(t, cleared, 1)
	})
	t.Run("a stopped unit is started", func(t *testing.T) {
		m := newMapped(t, 1, options{})
		m.srv.OnCommand(func(c *target.Cmd) target.Action {
			if c.Op() == 0x1b {
				m.hook(nil)
				return target.Action{Status: 0, Delay: time.Millisecond}
			}
			return *senseOf(2, 4, 2)
		})
		require.NoError(t, m.io(block.Read, 0, 4096))
	})
	t.Run("deferred", func(t *testing.T) {
		for _, sense := range [][]byte{{0x71, 0, 3, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x0c, 0, 0, 0, 0, 0}, {0x73, 3, 0x0c, 0, 0, 0, 0, 0}} {
			m := newMapped(t, 2, options{})
			require.NoError(t, m.io(block.Write, 0, 4096))
			m.hook(once(target.Action{Status: 2, SenseData: sense}))
			require.NoError(t, m.io(block.Read, 0, 4096), "the command that brings it is only told")
			require.Equal(t, block.ErrIO, m.io(block.Flush, 0, 0), "a lost write must show")
			require.Equal(t, block.ErrIO, m.io(block.Flush, 0, 0), "so soon the answer to the first may have been lost")
			m.await("logged", func() bool { return m.log.has("acknowledged before has failed") })
		}
	})
}

// limits plays a unit with odd limits of its commands (VPD page B0).
func limits(t *testing.T) {
	b0 := make([]byte, 64)
	b0[1], b0[3], b0[4] = 0xb0, 60, 1            // WSNZ
	binary.BigEndian.PutUint16(b0[6:], 8)        // transfers in multiples of 8
	binary.BigEndian.PutUint32(b0[8:], 100)      // at most 100 blocks
	binary.BigEndian.PutUint32(b0[20:], 48)      // UNMAP: 48 blocks,
	binary.BigEndian.PutUint32(b0[24:], 1)       // one descriptor,
	binary.BigEndian.PutUint32(b0[28:], 16)      // granules of 16
	binary.BigEndian.PutUint32(b0[32:], 1<<31|5) // from block 5 on
	binary.BigEndian.PutUint64(b0[36:], 64)      // WRITE SAME: 64 blocks
	page := target.Action{Data: b0}
	var portal *target.Portal // the second path alone has these limits
	m := newMapped(t, 2, options{})
	m.srv.OnCommand(func(c *target.Cmd) target.Action {
		if c.Op() == 0x12 && c.CDB[1] == 1 && c.CDB[2] == 0xb0 && c.Portal == portal {
			return page
		}
		return target.Action{}
	})
	portal = m.portals[1]
	portal.Drop()
	m.await("narrowed", func() bool { return m.log.has("narrows what the map can do") })
	m.await("whole", func() bool { return m.g.Snapshot().Paths.Usable == 2 })
	m.hook(nil)
	require.NoError(t, m.io(block.Write, 0, 256<<10)) // 512 blocks, by 96
	m.mu.Lock()
	for i, c := range m.seen {
		n := binary.BigEndian.Uint32(c.CDB[10:])
		require.LessOrEqual(t, n, uint32(96))
		require.True(t, n == 96 || i == len(m.seen)-1, "%d blocks", n)
	}
	require.Len(t, m.seen, 6)
	m.seen = nil
	m.mu.Unlock()
	require.NoError(t, m.io(block.WriteZeroes, 0, 100<<9))
	require.Equal(t, 2, m.count(nil, 0x93))
	require.NoError(t, m.io(block.Write, 0, 128<<9))
	m.hook(nil)
	require.NoError(t, m.io(block.Trim, 0, 128<<9)) // granules are 5-20, 21-36 ... 101-116
	require.Equal(t, 3, m.count(nil, 0x42), "112 blocks by 48")
	got := make([]byte, 128<<9)
	m.lu.ReadAt(got, 0)
	require.Equal(t, bytes.Repeat([]byte{0xa5}, 5<<9), got[:5<<9], "the head is no granule")
	require.Equal(t, make([]byte, 112<<9), got[5<<9:117<<9])
	require.Equal(t, bytes.Repeat([]byte{0xa5}, 11<<9), got[117<<9:], "the tail is no granule")
	unmaps := m.count(nil, 0x42)
	require.NoError(t, m.io(block.Trim, 8<<9, 8<<9))
	require.Equal(t, unmaps, m.count(nil, 0x42), "less than a granule")
}

// lies answers each command of Identify and its relatives with wrong lengths.
func lies(t *testing.T) {
	m := newMapped(t, 1, options{})
	s, err := initiator.Open(context.Background(), initiator.Config{Address: m.portals[0].Addr(), TargetName: iqn, InitiatorName: "iqn.2026-11.example:i", ISID: [6]byte{0x80, 5}, LoginTimeout: 10 * time.Second})
	require.NoError(t, err)
	defer s.Close(context.Background())
	ctx := context.Background()
	vpd := func(page byte) func(c *target.Cmd) bool {
		return func(c *target.Cmd) bool { return c.Op() == 0x12 && c.CDB[1] == 1 && c.CDB[2] == page }
	}
	op := func(op byte) func(c *target.Cmd) bool {
		return func(c *target.Cmd) bool { return c.Op() == op && (op != 0x12 || c.CDB[1] == 0) }
	}
	tests := map[string]func(c *target.Cmd) bool{"INQUIRY": op(0x12), "REPORT LUNS": op(0xa0), "MODE SENSE": op(0x1a), "port groups": op(0xa3), "READ CAPACITY": op(0x9e)}
	for _, p := range []byte{0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2} {
		tests[fmt.Sprintf("VPD %02x", p)] = vpd(p)
	}
	full := bytes.Repeat([]byte{0xff}, 8300)
	head := func(n int, at ...int) []byte { // zeroes, but ff where lengths are
		b := make([]byte, n)
		for _, i := range at {
			b[i] = 0xff
		}
		return b
	}
	for name, is := range tests {
		for i, lie := range [][]byte{{}, {0}, full, full[:5], head(4), head(8, 0, 1, 2, 3), head(12, 2, 3, 7), head(40, 3, 4, 7), head(252, 0, 1, 2, 3, 4, 5, 6, 7), {0, 0x83, 0xff, 0xff, 1, 3, 0, 0xff, 1}, {0, 0x00, 0xff, 0xff}} {
			m.srv.OnCommand(func(c *target.Cmd) target.Action {
				if is(c) {
					return target.Action{Data: append(make([]byte, 0, len(lie)), lie...)}
				}
				return target.Action{}
			})
			info, err := initiator.Identify(ctx, s, [8]byte{})
			if err == nil {
				require.EqualValues(t, mappedSize, info.Size(), "%s %d", name, i)
			}
			luns, _ := initiator.ReportLUNs(ctx, s)
			require.LessOrEqual(t, len(luns), 8208/8)
			groups, _ := initiator.TargetPortGroups(ctx, s, [8]byte{})
			require.LessOrEqual(t, len(groups), 512)
			require.NoError(t, s.Err(), "%s %d: the session died of an answer", name, i)
		}
	}
	m.srv.OnCommand(nil)
	info, err := initiator.Identify(ctx, s, [8]byte{})
	require.NoError(t, err)
	require.EqualValues(t, mappedSize, info.Size())
}
