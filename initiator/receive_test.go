package initiator

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/scsi"
)

// ended counts the ends of a command.
type ended int

func (e *ended) Done(*Command, *block.Plug) { *e++ }

// inFlight is a session with a command of 8 KiB under way.
func inFlight(dir Direction) (*receiver, *slot, *ended) {
	s := &Session{params: Params{MaxBurst: 4096, MaxR2T: 2, TargetMaxData: 4096}, slots: make([]slot, 1), sending: true}
	e := new(ended)
	s.slots[0] = slot{cmd: &Command{Dir: dir, Data: make([]byte, 8192), Owner: e}}
	return &receiver{s: s}, &s.slots[0], e
}

// What a status with and without residuals makes of the bytes that moved (RFC 7143
// 11.4.5): success is when all of them did.
func TestResiduals(t *testing.T) {
	const over, under = pdu.Overflow, pdu.Underflow
	breach := ErrProtocol
	for _, c := range []struct {
		name     string
		dir      Direction
		status   uint8
		moved    uint32 // bytes received, or asked for
		flags    uint8
		residual uint32
		shortOK  bool
		want     error
	}{
		{"all read", DataIn, 0, 8192, 0, 0, false, nil},
		{"a byte missing", DataIn, 0, 8191, 0, 0, false, ErrShort},
		{"short, and said so", DataIn, 0, 4096, under, 4096, false, ErrShort},
		{"all there, and called short", DataIn, 0, 8192, under, 1, false, ErrShort},
		{"short where that is expected", DataIn, 0, 36, under, 8156, true, nil},
		{"an underflow of nothing", DataIn, 0, 8192, under, 0, false, nil},
		{"a residual that no flag goes with", DataIn, 0, 8192, 0, 77, false, nil},
		{"the unit had more", DataIn, 0, 8192, over, 512, false, ErrOverflow},
		{"an overflow of nothing", DataIn, 0, 8192, over, 0, false, nil},
		{"both at once", DataIn, 0, 8192, over | under, 1, false, breach},
		{"short with an error of the unit", DataIn, scsi.StatusCheckCondition, 0, 0, 0, false, nil},
		{"all written", DataOut, 0, 8192, 0, 0, false, nil},
		{"GOOD for what was not asked for", DataOut, 0, 4096, 0, 0, false, breach},
		{"GOOD for part of it, and said so", DataOut, 0, 4096, under, 4096, false, ErrShort},
		{"GOOD for part of it, and said too little", DataOut, 0, 4096, under, 4095, false, breach},
		{"an error for what was not asked for", DataOut, scsi.StatusCheckCondition, 0, 0, 0, false, nil},
	} {
		rc, sl, e := inFlight(c.dir)
		cmd := sl.cmd
		sl.off, cmd.ShortOK, cmd.Result.Status = c.moved, c.shortOK, c.status
		var h pdu.Header
		h[1] = pdu.Final | c.flags
		h.SetResidual(c.residual)
		err := rc.residual(&h, 0, sl)
		if c.want == breach {
			require.ErrorIs(t, err, breach, c.name)
			require.Zero(t, *e, c.name)
			continue
		}
		require.NoError(t, err, c.name)
		require.Equal(t, c.want, cmd.Result.Err, c.name)
		require.EqualValues(t, 1, *e, c.name)
		if c.dir == DataIn {
			require.Equal(t, c.moved, cmd.Result.Received, c.name)
		}
	}
}

func TestGoodForAWriteThatGotNoMoreDataIsAnAbort(t *testing.T) {
	rc, sl, _ := inFlight(DataOut)
	cmd := sl.cmd
	sl.starved, sl.off = true, 8192
	require.NoError(t, rc.residual(new(pdu.Header), 0, sl))
	require.Equal(t, ErrAborted, cmd.Result.Err)
}

// An R2T asks for the next bytes, at most a burst of them (RFC 7143 11.8).
func TestWhatAnR2TMayAskFor(t *testing.T) {
	type ask struct{ sn, ttt, off, n uint32 }
	for _, c := range []struct {
		name string
		dir  Direction
		asks []ask
		good bool // the last one is; all before are
	}{
		{"a burst", DataOut, []ask{{0, 1, 0, 4096}}, true},
		{"the bursts one by one", DataOut, []ask{{0, 1, 0, 4096}, {1, 2, 4096, 4096}}, true},
		{"less than a burst", DataOut, []ask{{0, 1, 0, 1000}, {1, 1, 1000, 24}}, true},
		{"more than a burst", DataOut, []ask{{0, 1, 0, 4097}}, false},
		{"nothing", DataOut, []ask{{0, 1, 0, 0}}, false},
		{"a gap", DataOut, []ask{{0, 1, 512, 512}}, false},
		{"the same again", DataOut, []ask{{0, 1, 0, 512}, {1, 2, 0, 512}}, false},
		{"beyond the end", DataOut, []ask{{0, 1, 0, 4096}, {1, 2, 4096, 4097}}, false},
		{"a number twice", DataOut, []ask{{0, 1, 0, 512}, {0, 2, 512, 512}}, false},
		{"a number left out", DataOut, []ask{{1, 1, 0, 512}}, false},
		{"no tag", DataOut, []ask{{0, pdu.NoTag, 0, 512}}, false},
		{"more at once than agreed on", DataOut, []ask{{0, 1, 0, 512}, {1, 2, 512, 512}, {2, 3, 1024, 512}}, false},
		{"of a read", DataIn, []ask{{0, 1, 0, 512}}, false},
	} {
		rc, sl, _ := inFlight(c.dir)
		for i, a := range c.asks {
			var h pdu.Header
			h.SetOpcode(pdu.OpR2T)
			h.SetTTT(a.ttt)
			h.SetDataSN(a.sn)
			h.SetBufferOffset(a.off)
			h.SetDesiredLen(a.n)
			err := rc.r2t(&h)
			if i == len(c.asks)-1 && !c.good {
				require.ErrorIs(t, err, ErrProtocol, c.name)
				continue
			}
			require.NoError(t, err, c.name)
			require.Equal(t, i+1, sl.r2ts, c.name)
		}
	}
}

// A task that is being aborted, or a session that logs out, sends no more data:
// none of it may arrive late.
func TestAnR2TThatIsNotAnswered(t *testing.T) {
	for name, change := range map[string]func(rc *receiver, sl *slot){
		"aborting": func(_ *receiver, sl *slot) { sl.aborting = true },
		"closed":   func(rc *receiver, _ *slot) { rc.s.closed = true },
	} {
		rc, sl, _ := inFlight(DataOut)
		change(rc, sl)
		var h pdu.Header
		h.SetDesiredLen(512)
		require.NoError(t, rc.r2t(&h), name)
		require.True(t, sl.starved, name)
		require.Zero(t, sl.first, name)
	}
}

// Only R2Ts for crumbs that are not the last are counted as idle talk.
func TestCrumbsAreCounted(t *testing.T) {
	for _, c := range []struct{ off, n, counted uint32 }{{0, 512, 0}, {0, 511, 1}, {8192 - 100, 100, 0}} {
		rc, sl, _ := inFlight(DataOut)
		sl.off = c.off
		var h pdu.Header
		h.SetBufferOffset(c.off)
		h.SetDesiredLen(c.n)
		require.NoError(t, rc.r2t(&h))
		require.EqualValues(t, c.counted, rc.idleSeen, "%d bytes", c.n)
	}
}

// The window and the commands that are known only move forward; what contradicts
// itself is ignored (RFC 7143 4.2.2.1).
func TestWindowMovesForward(t *testing.T) {
	for _, c := range []struct {
		name             string
		exp, maxSN       uint32
		wantExp, wantMax uint32
		breach           bool
	}{
		{"more room", 12, 40, 12, 40, false},
		{"less room", 12, 20, 12, 30, false},
		{"older", 9, 40, 10, 40, false},
		{"shut", 15, 14, 15, 30, false},
		{"contradicts itself", 15, 13, 10, 30, false},
		{"all commands known", 15, 40, 15, 40, false},
		{"knows one that was not sent", 16, 40, 10, 30, true},
	} {
		rc, _, _ := inFlight(DataIn)
		s := rc.s
		s.cfg.TargetName = "iqn"
		s.expCmdSN.Store(10)
		s.maxCmdSN.Store(30)
		s.wireSN.Store(15)
		var h pdu.Header
		h.SetExpCmdSN(c.exp)
		h.SetMaxCmdSN(c.maxSN)
		err := rc.window(&h)
		require.Equal(t, c.breach, err != nil, c.name)
		require.Equal(t, []uint32{c.wantExp, c.wantMax}, []uint32{s.expCmdSN.Load(), s.maxCmdSN.Load()}, c.name)
		if c.breach {
			s.cfg.Lenient = true
			require.NoError(t, rc.window(&h))
			s.cfg.Lenient, s.cfg.TargetName = false, ""
			require.NoError(t, rc.window(&h), "discovery: istgt counts immediate requests")
			require.EqualValues(t, 10, s.expCmdSN.Load())
		}
	}
}
