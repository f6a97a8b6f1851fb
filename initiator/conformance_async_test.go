package initiator_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/scsi"
)

// Asynchronous messages and logout: AS, LO. What a map makes of them is in
// conformance_map_test.go.
var asyncCases = map[string]conformanceCase{
	"AS03": {"announces that it drops the connection or the session, with Time2Wait 3", "does not log in again for 3 seconds; for another connection's end it does nothing", func(t *testing.T) {
		for _, event := range []uint8{pdu.AsyncDropConnection, pdu.AsyncDropSession} {
			s := watches(t, nil, func(r *raw) {
				if r.login("DefaultTime2Wait", "1") {
					r.async(event, 0, 3, 0)
					r.drain()
				}
			})
			require.ErrorContains(t, ends(t, s), "3 s of rest")
			wait, announced := s.Time2Wait()
			require.Equal(t, 3*time.Second, wait)
			require.True(t, announced)
		}
		other := watches(t, nil, func(r *raw) {
			if r.login("DefaultTime2Wait", "7") {
				r.async(pdu.AsyncDropConnection, 5, 3, 0)
				h, _, _ := r.command()
				r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				r.drain()
			}
		})
		require.NoError(t, read8(t, other.Session).result(t).Err)
		require.NoError(t, other.Err())
		wait, announced := other.Time2Wait()
		require.Equal(t, 7*time.Second, wait, "the negotiated one")
		require.False(t, announced)
		greedy := watches(t, nil, func(r *raw) {
			if r.login() {
				r.async(pdu.AsyncDropSession, 0, 3600, 0)
				r.drain()
			}
		})
		ends(t, greedy)
		wait, _ = greedy.Time2Wait()
		require.Equal(t, time.Minute, wait)
		relogsInAfter(t, 3*time.Second, target.Config{}, func(p *target.Portal) { p.Async(pdu.AsyncDropSession, [8]byte{}, 0, 3, 0, nil) })
		// The negotiated wait holds for a connection that breaks, while another
		// path serves.
		relogsInAfter(t, 2*time.Second, target.Config{Time2Wait: 2}, (*target.Portal).Drop)
	}},
	"AS04": {"asks for a new negotiation", "lets commands end, logs out and in again", func(t *testing.T) { leaves(t, pdu.AsyncRenegotiate) }},
	"AS06": {"sends events nobody knows, or the end of all tasks without having negotiated it", "goes on; the end of tasks is acknowledged and their data stops", func(t *testing.T) {
		lun := [8]byte{0, 3}
		s := watches(t, nil, func(r *raw) {
			if !r.login("InitialR2T", "Yes", "ImmediateData", "No") {
				return
			}
			h, _, _ := r.command()
			for _, e := range []uint8{200, 255} {
				r.async(e)
			}
			r.asyncData(pdu.AsyncTasksEnd, lun, nil)
			var seen []pdu.Header
			ack, _, ok := r.next(pdu.OpNopOut, &seen)
			if !ok || ack.LUN() != lun || ack.TTT() != pdu.NoTag || !ack.IsImmediate() || ack.ExpStatSN() != r.statSN || len(seen) > 0 {
				return // the test misses the answer to the command
			}
			// The tasks of LUN 3 are over, those of LUN 0 are not.
			r.r2t(h.ITT(), 1, 0, 0, 4096)
			if d, _, ok := r.next(pdu.OpDataOut, nil); ok && d.TTT() == 1 {
				r.good(h.ITT(), nil)
			}
			r.drain()
		})
		w := write(t, s.Session, 4096)
		require.NoError(t, w.result(t).Err)
		require.NoError(t, s.Err())
		var events []uint8
		for _, n := range s.heard() {
			events = append(events, n.Event)
		}
		require.Equal(t, []uint8{200, 255, pdu.AsyncTasksEnd}, events)

		// The tasks that the event means get no more data, and come back.
		over := watches(t, impatient, func(r *raw) {
			if !r.login("InitialR2T", "Yes", "ImmediateData", "No") {
				return
			}
			h, _, _ := r.command()
			r.async(pdu.AsyncTasksEnd)
			if _, _, ok := r.next(pdu.OpNopOut, nil); !ok {
				return
			}
			r.r2t(h.ITT(), 1, 0, 0, 4096)
			var seen []pdu.Header
			if rq, _, ok := r.next(pdu.OpTaskMgmtReq, &seen); ok && len(seen) == 0 {
				r.tmfResponse(rq, pdu.TMFNoTask)
			}
			r.drain()
		})
		require.ErrorIs(t, write(t, over.Session, 4096).result(t).Err, initiator.ErrAborted)
		require.NoError(t, over.Err())
	}},
	"LO01": {"answers the logout", "logs out at once, sends nothing after the request and closes within two seconds", func(t *testing.T) {
		after := make(chan []pdu.Header, 1)
		s := watches(t, nil, func(r *raw) {
			if !r.login("InitialR2T", "Yes", "ImmediateData", "No") {
				return
			}
			cmd, _, _ := r.command()
			rq, _, ok := r.next(pdu.OpLogoutReq, nil)
			if !ok || !rq.IsImmediate() || rq.Flags() != pdu.Final || rq.CmdSN() != cmd.CmdSN()+1 {
				return
			}
			r.r2t(cmd.ITT(), 1, 0, 0, 4096) // would ask for data
			var ping pdu.Header             // would ask for an answer
			ping[0], ping[1] = uint8(pdu.OpNopIn), pdu.Final
			ping.SetITT(pdu.NoTag)
			ping.SetTTT(9)
			ping.SetStatSN(r.statSN)
			r.send(ping, nil, false)
			r.logoutResponse(rq, 0, 0)
			var seen []pdu.Header
			for {
				h, _, ok := r.read()
				if !ok {
					break
				}
				seen = append(seen, h)
			}
			after <- seen
		})
		w := write(t, s.Session, 4096)
		began := time.Now()
		require.NoError(t, s.Close(context.Background()))
		require.Less(t, time.Since(began), 2*time.Second)
		require.Empty(t, <-after, "something followed the logout")
		require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
		wait, announced := s.Time2Wait()
		require.Zero(t, wait)
		require.True(t, announced)
	}},
	"LO02": {"answers the logout with 1, 2 or 3, not at all, or by closing", "closes anyway, within two seconds", func(t *testing.T) {
		closes := func(t *testing.T, script func(r *raw)) {
			s := watches(t, nil, func(r *raw) {
				if r.login() {
					script(r)
				}
			})
			began := time.Now()
			require.NoError(t, s.Close(context.Background()))
			require.Less(t, time.Since(began), 4*time.Second)
			require.ErrorContains(t, s.Err(), "closed by us")
		}
		for response := uint8(1); response <= 3; response++ {
			closes(t, func(r *raw) { r.answerAll(response, 0) })
		}
		closes(t, func(r *raw) { r.drain() })
		closes(t, func(r *raw) { r.next(pdu.OpLogoutReq, nil) })
		// An answer to no logout is a breach.
		s := watches(t, nil, func(r *raw) {
			if r.login() {
				r.logoutResponse(pdu.Header{}, 0, 0)
				r.drain()
			}
		})
		require.ErrorIs(t, ends(t, s), initiator.ErrProtocol)
	}},
	"LO03": {"answers the logout with Time2Wait 2", "does not log in again for 2 seconds", func(t *testing.T) {
		s := watches(t, nil, func(r *raw) {
			if r.login() {
				r.answerAll(0, 2)
			}
		})
		require.NoError(t, s.Close(context.Background()))
		wait, announced := s.Time2Wait()
		require.Equal(t, 2*time.Second, wait)
		require.True(t, announced)
		relogsInAfter(t, 2*time.Second, target.Config{Time2Wait: 2}, func(p *target.Portal) { p.Async(pdu.AsyncLogoutRequest, [8]byte{}, 0, 0, 1, nil) })
	}},
}

// leaves checks what a request to log out, by this event, makes of a session
// with two commands in flight.
func leaves(t *testing.T, event uint8) {
	told := make(chan struct{})
	seen := make(chan []pdu.Header, 1)
	s := watches(t, nil, func(r *raw) {
		if !r.login() {
			return
		}
		a, _, _ := r.command()
		b, _, _ := r.command()
		r.async(event, 0, 0, 5)
		<-told
		r.dataIn(a.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
		r.dataIn(b.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
		seen <- r.answerAll(0, 0)
	})
	a, b := read8(t, s.Session), read8(t, s.Session)
	require.Eventually(t, func() bool { return s.saw(initiator.Leaving) }, 5*time.Second, time.Millisecond)
	require.Equal(t, initiator.Leaving, s.State())
	var p block.Plug
	late := &initiator.Command{Dir: initiator.DataIn, Data: make([]byte, 512)}
	scsi.Read(&late.CDB, 0, 1, true)
	require.False(t, s.Submit(late, &p), "takes a new command")
	close(told)
	for _, w := range []*waited{a, b} {
		w.result(t)
		whole(t, w)
	}
	require.ErrorContains(t, ends(t, s), "asked us to log out")
	got := <-seen
	require.Len(t, got, 1, "%x", got)
	require.Equal(t, pdu.OpLogoutReq, got[0].Opcode())

	// What does not end in time goes back when the session does: the logout is due
	// after that many seconds, but a target may ask for an hour.
	for limit, most := range map[uint16]time.Duration{1: 3 * time.Second, 3600: 6 * time.Second} {
		slow := watches(t, nil, func(r *raw) {
			if r.login() {
				r.command()
				r.async(event, 0, 0, limit)
				r.answerAll(0, 0)
			}
		})
		w := read8(t, slow.Session)
		began := time.Now()
		require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
		require.Less(t, time.Since(began), most)
		require.Equal(t, initiator.Sent, w.c.Result.Delivery)
		require.ErrorContains(t, ends(t, slow), "asked us to log out")
	}
}

// rejected plays a Reject of a READ.
func rejected(reason uint8) func(t *testing.T) {
	return readDrops(fmt.Sprintf("%#02x", reason), func(r *raw, itt uint32) {
		var bad pdu.Header
		bad[0] = uint8(pdu.OpSCSICommand)
		bad.SetITT(itt)
		r.rejectPDU(reason, bad)
	})
}

var rejectCases = map[string]conformanceCase{
	"RJ01": {"rejects a PDU, for each reason", "maps it: out of resources is retried as a new task, too many immediate commands are sent again, a wait for logout gets it, anything else drops", func(t *testing.T) {
		for _, reason := range []uint8{0, pdu.RejectDataDigest, pdu.RejectSNACK, pdu.RejectProtocol, pdu.RejectNotSupported, pdu.RejectTooManyImm, pdu.RejectTaskInProgress,
			pdu.RejectInvalidDataAck, pdu.RejectInvalidField, 0x0b, 0x77} {
			t.Run(fmt.Sprintf("%02x", reason), rejected(reason))
		}
		t.Run("0a", func(t *testing.T) { // the second of two commands, by its tag
			s := logsIn(t, func(r *raw) {
				if !r.login() {
					return
				}
				a, _, _ := r.command()
				b, _, _ := r.command()
				r.rejectPDU(pdu.RejectResources, b)
				r.dataIn(a.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				c, _, _ := r.command()
				if c.ITT() != b.ITT() && c.CmdSN() == b.CmdSN()+1 {
					r.dataIn(c.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				}
				r.drain()
			})
			a, b := read8(t, s), read8(t, s)
			require.ErrorIs(t, b.result(t).Err, initiator.ErrAborted)
			a.result(t)
			whole(t, a)
			again := read8(t, s)
			again.result(t)
			whole(t, again)
			require.NoError(t, s.Err())
		})
		t.Run("0a of a command that took no CmdSN", readDrops("out of resources", func(r *raw, itt uint32) {
			var bad pdu.Header
			bad[0] = uint8(pdu.OpSCSICommand)
			bad.SetITT(itt)
			r.expCmdSN--
			r.rejectPDU(pdu.RejectResources, bad)
		}))
	}},
	"RJ02": {"rejects with less than a header, or a PDU that was never sent", "drops with the reason", func(t *testing.T) {
		readDrops("does not show which", func(r *raw, _ uint32) {
			var h pdu.Header
			h[0], h[1] = uint8(pdu.OpReject), pdu.Final
			h.SetResponse(pdu.RejectResources)
			h.SetITT(pdu.NoTag)
			r.send(h, make([]byte, 40), true)
		})(t)
		for _, reason := range []uint8{pdu.RejectResources, pdu.RejectTooManyImm} {
			readDrops("tag 0x00770000", func(r *raw, _ uint32) {
				var bad pdu.Header
				bad[0] = uint8(pdu.OpSCSICommand)
				if reason == pdu.RejectTooManyImm {
					bad[0] = uint8(pdu.OpNopOut) | pdu.Immediate
				}
				bad.SetITT(0x770000)
				r.rejectPDU(reason, bad)
			})(t)
		}
	}},
	"RJ03": {"has too many immediate commands for a ping or a task management request", "waits and sends it again, a few times", func(t *testing.T) {
		// The first two of each are rejected.
		s := watches(t, impatient, func(r *raw) {
			if !r.login() {
				return
			}
			r.read() // the READ
			n := map[pdu.Opcode]int{}
			last := time.Now()
			for {
				h, _, ok := r.read()
				if !ok {
					return
				}
				op := h.Opcode()
				if n[op]++; n[op] <= 2 {
					r.rejectPDU(pdu.RejectTooManyImm, h)
					last = time.Now()
					continue
				}
				if n[op] == 3 && time.Since(last) < 40*time.Millisecond {
					return // no pause
				}
				switch op {
				case pdu.OpNopOut:
					r.pong(h)
				case pdu.OpTaskMgmtReq:
					r.tmfResponse(h, pdu.TMFComplete)
				}
			}
		})
		require.ErrorIs(t, read8(t, s.Session).result(t).Err, initiator.ErrTimeout)
		require.NoError(t, s.Err())
		// One that is always rejected counts as not possible.
		never := watches(t, impatient, func(r *raw) {
			if !r.login() {
				return
			}
			for {
				h, _, ok := r.read()
				if !ok {
					return
				}
				switch h.Opcode() {
				case pdu.OpNopOut:
					r.pong(h)
				case pdu.OpTaskMgmtReq:
					r.rejectPDU(pdu.RejectTooManyImm, h)
				}
			}
		})
		w := read8(t, never.Session)
		require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
		require.ErrorIs(t, never.Err(), initiator.ErrTimeout)
		t.Run("each reset", neverResets)
		t.Run("each ping", neverPings)
	}},
	"RJ04": {"rejects commands because it waits for a logout", "hands that command back, logs out and in again", func(t *testing.T) {
		seen := make(chan []pdu.Header, 1)
		s := watches(t, nil, func(r *raw) {
			if !r.login() {
				return
			}
			a, _, _ := r.command()
			b, _, _ := r.command()
			r.rejectPDU(pdu.RejectWaitLogout, b)
			r.dataIn(a.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
			seen <- r.answerAll(0, 0)
		})
		a, b := read8(t, s.Session), read8(t, s.Session)
		require.ErrorIs(t, b.result(t).Err, initiator.ErrAborted)
		a.result(t)
		whole(t, a)
		require.ErrorContains(t, ends(t, s), "asked us to log out")
		require.True(t, s.saw(initiator.Leaving))
		got := <-seen
		require.Len(t, got, 1)
		require.Equal(t, pdu.OpLogoutReq, got[0].Opcode())
	}},
}

const tries = 6 // of a request that is always rejected

// neverResets rejects each request to reset a unit.
func neverResets(t *testing.T) {
	t.Parallel()
	tags := make(chan uint32, 2*tries)
	s := watches(t, nil, func(r *raw) {
		if !r.login() {
			return
		}
		for {
			h, _, ok := r.next(pdu.OpTaskMgmtReq, nil)
			if !ok {
				return
			}
			tags <- h.ITT()
			r.rejectPDU(pdu.RejectTooManyImm, h)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 9*time.Second)
	defer cancel()
	var refused *initiator.TaskError
	require.ErrorAs(t, s.LUReset(ctx, [8]byte{}), &refused)
	require.Equal(t, pdu.TMFRejected, refused.Response)
	require.Len(t, tags, tries)
	require.NoError(t, s.Err())
}

// neverPings rejects each ping: one that was given up is followed by another one.
func neverPings(t *testing.T) {
	t.Parallel()
	tags := make(chan []uint32, 1)
	s := watches(t, nil, func(r *raw) {
		r.login()
		r.read() // the READ
		var seen []uint32
		for end := time.Now().Add(8 * time.Second); time.Now().Before(end) && len(seen) <= tries; {
			r.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if h, _, ok := r.read(); ok {
				seen = append(seen, h.ITT())
				r.rejectPDU(pdu.RejectTooManyImm, h)
			} else if 0 < len(seen) && len(seen) < tries {
				r.update() // a sign of life; before the first ping it would keep that away
			}
		}
		tags <- seen
	})
	read8(t, s.Session)
	seen := <-tags
	require.Len(t, seen, tries+1)
	for _, tag := range seen[:tries] {
		require.Equal(t, seen[0], tag)
	}
	require.NotEqual(t, seen[0], seen[tries])
}

// What a deferred error tells is for the owner of the unit, whichever command
// brings it.
func TestADeferredErrorIsNoticed(t *testing.T) {
	s := watches(t, nil, func(r *raw) {
		r.login()
		h, _, _ := r.command()
		sense := fixedSense(3, 0x0c, 0)
		sense[0] = 0x71
		r.check(h.ITT(), sense...)
		r.drain()
	})
	require.EqualValues(t, 2, read8(t, s.Session).result(t).Status)
	require.Len(t, s.heard(), 1)
	require.True(t, s.heard()[0].Sense.Deferred)
}

// Rejects that come now and then, as of a target short of resources, are no storm.
func TestRejectsCountForAWhileOnly(t *testing.T) {
	const half = 100 // more than half of what is a storm
	rested := make(chan struct{}, 2)
	s := watches(t, func(c *initiator.Config) { c.FailoverTime = 200 * time.Millisecond }, func(r *raw) {
		r.login()
		r.command() // under way all the time
		for range 2 {
			for range half {
				h, _, ok := r.command()
				if !ok {
					return
				}
				r.rejectPDU(pdu.RejectResources, h)
			}
			for range 12 { // each after a tick at least
				h, _, _ := r.read()
				r.pong(h)
			}
			rested <- struct{}{}
		}
		h, _, _ := r.command()
		r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
		r.answerAll(0, 0)
	})
	read8(t, s.Session)
	for range 2 {
		for range half {
			require.ErrorIs(t, readBlocking(s.Session), initiator.ErrAborted)
		}
		<-rested
	}
	require.NoError(t, readBlocking(s.Session))
}
