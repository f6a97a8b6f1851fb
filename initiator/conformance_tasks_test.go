package initiator_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
)

const slowR2T = "InitialR2T"

// hangs logs in, takes one command and leaves the rest to the script.
func hangs(t *testing.T, with func(*initiator.Config), script func(r *raw, cmd pdu.Header)) *watched {
	t.Helper()
	return watches(t, func(c *initiator.Config) {
		impatient(c)
		if with != nil {
			with(c)
		}
	}, func(r *raw) {
		if r.login(slowR2T, "Yes", "ImmediateData", "No", "MaxBurstLength", "65536", "FirstBurstLength", "65536") {
			if cmd, _, ok := r.command(); ok {
				script(r, cmd)
			}
		}
	})
}

// Task management: TM. What a map makes of it is in conformance_map_test.go.
var taskCases = map[string]conformanceCase{
	"TM01": {"does not answer a command and completes ABORT TASK", "names the task by tag, CmdSN and LUN, ends it and goes on", func(t *testing.T) {
		lun := [8]byte{0x40, 7}
		s := hangs(t, nil, func(r *raw, cmd pdu.Header) {
			rq, _, ok := r.next(pdu.OpTaskMgmtReq, nil)
			if !ok || rq.Flags() != pdu.Final|pdu.TMFAbortTask || !rq.IsImmediate() || rq.TTT() != cmd.ITT() || rq.U32(32) != cmd.CmdSN() || rq.LUN() != lun || rq.CmdSN() != cmd.CmdSN()+1 {
				return
			}
			r.tmfResponse(rq, pdu.TMFComplete)
			if again, _, ok := r.command(); ok && again.CmdSN() == cmd.CmdSN()+1 && again.ITT() != cmd.ITT() {
				r.dataIn(again.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
			}
			r.drain()
		})
		for _, want := range []error{initiator.ErrTimeout, nil} {
			require.Equal(t, want, readOf(t, s.Session, lun).result(t).Err)
		}
		require.NoError(t, s.Err())
	}},
	"TM02": {"says that the task does not exist", "uses the answer if it came before, else takes the task as aborted; of a write it is not believed", func(t *testing.T) {
		before := hangs(t, nil, func(r *raw, cmd pdu.Header) {
			if rq, _, ok := r.next(pdu.OpTaskMgmtReq, nil); ok {
				r.dataIn(cmd.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				r.tmfResponse(rq, pdu.TMFNoTask)
				r.answerAll(0, 0)
			}
		})
		w := read8(t, before.Session)
		w.result(t)
		whole(t, w)
		require.NoError(t, before.Err())
		none := hangs(t, nil, func(r *raw, cmd pdu.Header) {
			if rq, _, ok := r.next(pdu.OpTaskMgmtReq, nil); ok {
				r.tmfResponse(rq, pdu.TMFNoTask)
				r.answerAll(0, 0)
			}
		})
		require.ErrorIs(t, read8(t, none.Session).result(t).Err, initiator.ErrTimeout)
		require.NoError(t, none.Err())
		wrote := hangs(t, nil, func(r *raw, cmd pdu.Header) {
			a, _, _ := r.next(pdu.OpTaskMgmtReq, nil)
			r.tmfResponse(a, pdu.TMFNoTask)
			if b, _, ok := r.next(pdu.OpTaskMgmtReq, nil); ok && b.Flags() == pdu.Final|pdu.TMFLUReset && b.TTT() == pdu.NoTag {
				r.tmfResponse(b, pdu.TMFComplete)
			}
			r.answerAll(0, 0)
		})
		require.ErrorIs(t, write(t, wrote.Session, 4096).result(t).Err, initiator.ErrAborted)
		require.NoError(t, wrote.Err())
	}},
	"TM03": {"refuses ABORT TASK, and LOGICAL UNIT RESET too, or does not answer", "escalates, then drops, within seconds", func(t *testing.T) {
		for _, response := range []int{int(pdu.TMFNotSupported), int(pdu.TMFRejected), int(pdu.TMFNoLUN), -1} {
			asked := make(chan []uint8, 1)
			s := hangs(t, nil, func(r *raw, _ pdu.Header) {
				var fs []uint8
				for {
					rq, _, ok := r.next(pdu.OpTaskMgmtReq, nil)
					if !ok {
						break
					}
					fs = append(fs, rq.Flags()&^pdu.Final)
					if response >= 0 {
						r.tmfResponse(rq, uint8(response))
					}
				}
				asked <- fs
			})
			w := read8(t, s.Session)
			began := time.Now()
			require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
			require.Less(t, time.Since(began), 7*time.Second)
			require.ErrorIs(t, s.Err(), initiator.ErrTimeout)
			want := []uint8{pdu.TMFAbortTask, pdu.TMFLUReset}
			if response < 0 {
				want = want[:1] // it hangs altogether
			}
			require.Equal(t, want, <-asked)
		}
	}},
	"TM04": {"asks for data of an aborted task, or answers it after all", "gives it nothing; an answer after the abort was complete drops; the command ends once and its buffer stays untouched", func(t *testing.T) {
		r2t := hangs(t, nil, func(r *raw, cmd pdu.Header) {
			rq, _, _ := r.next(pdu.OpTaskMgmtReq, nil)
			r.r2t(cmd.ITT(), 5, 0, 0, 4096)
			time.Sleep(100 * time.Millisecond) // time to send data, if it wanted to
			r.tmfResponse(rq, pdu.TMFComplete)
			if seen := r.answerAll(0, 0); len(seen) > 0 && seen[0].Opcode() == pdu.OpDataOut {
				t.Errorf("data for an aborted task: %x", seen)
			}
		})
		require.ErrorIs(t, write(t, r2t.Session, 4096).result(t).Err, initiator.ErrTimeout)
		require.NoError(t, r2t.Err())
		for _, answer := range []func(r *raw, cmd pdu.Header){
			func(r *raw, cmd pdu.Header) {
				r.dataIn(cmd.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
			},
			func(r *raw, cmd pdu.Header) { r.good(cmd.ITT(), nil) },
			func(r *raw, cmd pdu.Header) { r.r2t(cmd.ITT(), 5, 0, 0, 4096) },
		} {
			given := make(chan struct{})
			s := hangs(t, nil, func(r *raw, cmd pdu.Header) {
				rq, _, _ := r.next(pdu.OpTaskMgmtReq, nil)
				r.tmfResponse(rq, pdu.TMFComplete)
				<-given
				answer(r, cmd)
				r.drain()
			})
			w := read8(t, s.Session)
			require.ErrorIs(t, w.result(t).Err, initiator.ErrTimeout)
			poison := make([]byte, len(w.c.Data))
			for i := range poison {
				poison[i] = 0xee
			}
			copy(w.c.Data, poison)
			close(given)
			require.ErrorContains(t, ends(t, s), "unknown task tag") // a second Done would panic
			require.Equal(t, poison, w.c.Data, "the buffer was touched after its command came back")
		}
		// A command sent after LOGICAL UNIT RESET is none of those that it ends.
		resetting := make(chan struct{})
		younger := hangs(t, nil, func(r *raw, _ pdu.Header) {
			a, _, _ := r.next(pdu.OpTaskMgmtReq, nil)
			r.tmfResponse(a, pdu.TMFNotSupported)
			b, _, _ := r.next(pdu.OpTaskMgmtReq, nil)
			close(resetting)
			c, _, _ := r.command()
			r.tmfResponse(b, pdu.TMFComplete)
			r.dataIn(c.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
			r.answerAll(0, 0)
		})
		old := read8(t, younger.Session)
		<-resetting
		young := read8(t, younger.Session)
		require.ErrorIs(t, old.result(t).Err, initiator.ErrAborted)
		young.result(t)
		whole(t, young)
		require.NoError(t, younger.Err())
		// An answer to a request that nobody waits for any more does not end
		// the next one.
		stray := hangs(t, nil, func(r *raw, _ pdu.Header) {
			rq, _, _ := r.next(pdu.OpTaskMgmtReq, nil)
			rq.SetITT(rq.ITT() + 1)
			r.tmfResponse(rq, pdu.TMFComplete)
			r.drain()
		})
		require.ErrorIs(t, read8(t, stray.Session).result(t).Err, initiator.ErrSessionLost)
		require.ErrorIs(t, stray.Err(), initiator.ErrProtocol)
	}},
	"TM05": {"asks for data of a command while its unit is being reset", "sends none; with KeepDataOut, as RFC 7143 has it without FastAbort, it does until the answer", func(t *testing.T) {
		for _, keep := range []bool{false, true} {
			got := make(chan bool, 1)
			s := hangs(t, func(c *initiator.Config) { c.KeepDataOut = keep }, func(r *raw, cmd pdu.Header) {
				other, _, _ := r.command() // its data is what is asked for
				a, _, _ := r.next(pdu.OpTaskMgmtReq, nil)
				r.tmfResponse(a, pdu.TMFNotSupported)
				b, _, _ := r.next(pdu.OpTaskMgmtReq, nil)
				r.r2t(other.ITT(), 6, 0, 0, 4096)
				sent := false
				if keep {
					d, _, ok := r.next(pdu.OpDataOut, nil)
					sent = ok && d.TTT() == 6
				} else {
					time.Sleep(100 * time.Millisecond)
				}
				r.tmfResponse(b, pdu.TMFComplete)
				for _, h := range r.answerAll(0, 0) {
					sent = sent || h.Opcode() == pdu.OpDataOut
				}
				got <- sent
			})
			a, b := write(t, s.Session, 4096), write(t, s.Session, 4096)
			require.ErrorIs(t, a.result(t).Err, initiator.ErrAborted)
			require.ErrorIs(t, b.result(t).Err, initiator.ErrAborted)
			require.NoError(t, s.Err())
			require.NoError(t, s.Close(t.Context()))
			require.Equal(t, keep, <-got)
		}
	}},
	"TM07": {"reports a reset or cleared commands, and never answers those before", "aborts and hands back the older ones of that unit after a second; younger ones and those of other units stay", func(t *testing.T) {
		for _, sense := range [][]byte{fixedSense(6, 0x29, 3), fixedSense(6, 0x2f, 0)} {
			aborted := make(chan []uint32, 1)
			s := watches(t, nil, func(r *raw) { // commands hang after 30 s
				if !r.login() {
					return
				}
				other, _, _ := r.command() // of another unit
				var cmds [5]pdu.Header
				for i := range cmds {
					cmds[i], _, _ = r.command()
				}
				r.check(cmds[3].ITT(), sense...)
				var tags []uint32
				for range 3 {
					rq, _, ok := r.next(pdu.OpTaskMgmtReq, nil)
					if !ok || rq.Flags() != pdu.Final|pdu.TMFAbortTask {
						break
					}
					tags = append(tags, rq.TTT()-cmds[len(tags)].ITT())
					r.tmfResponse(rq, []uint8{pdu.TMFComplete, pdu.TMFNoTask, pdu.TMFNoTask}[len(tags)-1])
				}
				aborted <- tags
				r.quiet(t, 700*time.Millisecond, pdu.OpTaskMgmtReq)
				r.dataIn(cmds[4].ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				r.dataIn(other.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				r.answerAll(0, 0)
			})
			beside := readOf(t, s.Session, [8]byte{0, 1})
			began := time.Now()
			older := []*waited{read8(t, s.Session), write(t, s.Session, 4096), read8(t, s.Session)}
			ua, younger := read8(t, s.Session), read8(t, s.Session)
			require.EqualValues(t, 2, ua.result(t).Status)
			for _, w := range older {
				require.ErrorIs(t, w.result(t).Err, initiator.ErrAborted)
			}
			require.Less(t, time.Since(began), 8*time.Second)
			require.Equal(t, []uint32{0, 0, 0}, <-aborted)
			for _, w := range []*waited{younger, beside} {
				w.result(t)
				whole(t, w)
			}
			require.NoError(t, s.Err())
			require.NotEmpty(t, s.heard())
			require.EqualValues(t, sense[12], s.heard()[0].Sense.ASC)
		}
		// A unit that does not know ABORT TASK is not reset once more: two
		// initiators would keep each other at it.
		stubborn := watches(t, nil, func(r *raw) {
			if !r.login() {
				return
			}
			r.command()
			b, _, _ := r.command()
			r.check(b.ITT(), fixedSense(6, 0x29, 3)...)
			for {
				rq, _, ok := r.next(pdu.OpTaskMgmtReq, nil)
				if !ok {
					return
				}
				if rq.Flags() != pdu.Final|pdu.TMFAbortTask {
					t.Errorf("task management function %d after a reset", rq.Flags()&^pdu.Final)
				}
				r.tmfResponse(rq, pdu.TMFNotSupported)
			}
		})
		a, b := read8(t, stubborn.Session), read8(t, stubborn.Session)
		b.result(t)
		require.ErrorIs(t, a.result(t).Err, initiator.ErrSessionLost)
	}},
}

// A unit that hangs, behind a target that takes its time for each ABORT TASK, does
// not keep a queue full of commands for as many times that long.
func TestSlowAbortsOfManyCommandsEndInOneReset(t *testing.T) {
	t.Parallel()
	const n = 24
	asked := make(chan uint8, n)
	s := watches(t, impatient, func(r *raw) {
		defer close(asked)
		r.login()
		for {
			rq, _, ok := r.next(pdu.OpTaskMgmtReq, nil)
			if !ok {
				return
			}
			asked <- rq.Flags() &^ pdu.Final
			if rq.Flags()&^pdu.Final == pdu.TMFAbortTask {
				time.Sleep(900 * time.Millisecond) // short enough to be no death
			}
			r.tmfResponse(rq, pdu.TMFComplete)
		}
	})
	var all []*waited
	for range n {
		all = append(all, read8(t, s.Session))
	}
	aborted := 0
	for _, w := range all {
		if w.result(t).Err == initiator.ErrAborted {
			aborted++
		}
	}
	require.NoError(t, s.Err())
	s.Abort(initiator.ErrAborted)
	var functions []uint8
	for f := range asked {
		functions = append(functions, f)
	}
	require.Less(t, len(functions), n/2)
	require.Equal(t, pdu.TMFLUReset, functions[len(functions)-1])
	require.Equal(t, n-len(functions)+1, aborted)
}
