package initiator_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/scsi"
)

// Numbering, tags and the command window: FF but FF09, FF12 and FF14.
var windowCases = map[string]conformanceCase{
	"FF01": {"counts the CmdSN of 512 commands of 64 goroutines, with pings in between", "starts at the login's CmdSN, one more each, in the order of the wire; pings carry the next one and consume none", func(t *testing.T) {
		const goroutines, each = 64, 8
		done := make(chan struct{})
		s := logsIn(t, func(r *raw) {
			defer close(done)
			r.login()
			for n := uint32(0); n < goroutines*each; {
				h, _, ok := r.read()
				if !assert.True(t, ok, "after %d commands", n) || !assert.Equal(t, n, h.CmdSN(), "opcode %#02x", h.Opcode()) {
					return
				}
				if h.Opcode() == pdu.OpNopOut {
					assert.True(t, h.IsImmediate())
					r.pong(h)
					continue
				}
				n++
				r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
			}
			r.drain()
		})
		var wg sync.WaitGroup
		for i := range goroutines {
			wg.Go(func() {
				for range each {
					assert.NoError(t, readBlocking(s))
					if i%8 == 0 {
						s.Ping()
					}
				}
			})
		}
		wg.Wait()
		s.Abort(os.ErrClosed)
		<-done
	}},
	"FF02": {"keeps its window shut after the login, pings, and opens it in a NOP-In", "sends no command until then, answers the ping all the same, goes on", func(t *testing.T) {
		s := logsIn(t, func(r *raw) {
			r.window = 0
			r.login()
			r.targetPing(0x77)
			h, _, _ := r.read()
			assert.Equal(t, pdu.OpNopOut, h.Opcode())
			assert.EqualValues(t, 0x77, h.TTT())
			r.quiet(t, 200*time.Millisecond, pdu.OpSCSICommand)
			r.window = 1
			r.update()
			for range 3 {
				h := r.unhelped(t)
				r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
			}
			r.drain()
		})
		for range 3 {
			require.NoError(t, readBlocking(s))
		}
	}},
	"FF03": {"has a window of one command", "never sends one beyond MaxCmdSN", func(t *testing.T) {
		s := logsIn(t, func(r *raw) {
			r.window = 1
			r.login()
			for range 16 {
				h, _, ok := r.command()
				if !ok {
					return
				}
				r.window = 0 // also in answers to pings
				r.quiet(t, 5*time.Millisecond, pdu.OpSCSICommand)
				r.window = 1
				r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
			}
			r.drain()
		})
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 4 {
					assert.NoError(t, readBlocking(s))
				}
			})
		}
		wg.Wait()
	}},
	"FF04": {"takes MaxCmdSN back, or contradicts ExpCmdSN with it", "ignores that", func(t *testing.T) {
		told := make(chan struct{})
		s := logsIn(t, func(r *raw) {
			r.window = 4
			r.login()
			for _, pair := range [][2]uint32{{0, 1}, {0, 0xfffffff0}, {10, 2}, {1 << 31, 3}} {
				h := nopIn(pdu.NoTag, pdu.NoTag)
				h.SetStatSN(r.statSN)
				h.SetExpCmdSN(pair[0])
				h.SetMaxCmdSN(pair[1])
				r.Write(h[:])
			}
			h := nopIn(pdu.NoTag, 1) // its answer says that all of them were read
			h.SetMaxCmdSN(1)
			r.Write(h[:])
			r.read()
			close(told)
			var tags []uint32
			for range 4 {
				h, _, ok := r.command()
				if !ok {
					return
				}
				tags = append(tags, h.ITT())
			}
			r.window = 0 // also in answers to pings
			r.quiet(t, 20*time.Millisecond, pdu.OpSCSICommand)
			for _, itt := range tags {
				r.dataIn(itt, pdu.Final|pdu.StatusBit, 0, 0, pattern)
			}
			r.drain()
		})
		<-told
		var ws []*waited
		for range 4 {
			ws = append(ws, read8(t, s))
		}
		require.False(t, s.Submit(&initiator.Command{Owner: ws[0]}, &block.Plug{}), "the window ends there")
		for _, w := range ws {
			require.NoError(t, w.result(t).Err)
		}
	}},
	"FF05": {"lets StatSN and CmdSN wrap", "wraps with them", func(t *testing.T) {
		s := logsIn(t, func(r *raw) {
			r.expCmdSN, r.statSN, r.window = 0xfffffffe, 0xfffffffa, 1
			r.login()
			for n := range uint32(8) {
				h, _, ok := r.read()
				if !ok {
					return
				}
				assert.Equal(t, n-2, h.CmdSN())
				assert.Equal(t, n-4, h.ExpStatSN())
				r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
			}
			r.drain()
		})
		s.StartAt(0xfffffffe)
		for range 8 {
			require.NoError(t, readBlocking(s))
		}
	}},
	"FF06": {"opens its window in NOP-Ins without tags alone", "uses it, and answers none of them", func(t *testing.T) {
		s := logsIn(t, func(r *raw) {
			r.window = 1
			r.login()
			for range 4 {
				h := r.unhelped(t)
				r.window = 0
				r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				r.quiet(t, 20*time.Millisecond, pdu.OpSCSICommand)
				r.window = 1
				r.update()
			}
			r.quiet(t, 50*time.Millisecond, pdu.OpNopOut)
			r.drain()
		})
		for range 4 {
			require.NoError(t, readBlocking(s))
		}
	}},
	"FF08": {"has its window shut when the unit must be reset", "sends the request all the same, and consumes no CmdSN", func(t *testing.T) {
		s := logsIn(t, func(r *raw) {
			r.window = 1
			r.login()
			r.command()
			h, _, _ := r.read()
			assert.Equal(t, pdu.OpTaskMgmtReq, h.Opcode())
			assert.True(t, h.IsImmediate())
			assert.EqualValues(t, 1, h.CmdSN())
			for i := range uint32(2) {
				r.targetPing(i)
				pong, _, _ := r.read()
				assert.EqualValues(t, 1, pong.CmdSN())
			}
			r.window = 2
			r.taskDone(h, pdu.TMFComplete)
			h, _, _ = r.command()
			assert.EqualValues(t, 1, h.CmdSN())
			r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
			r.drain()
		})
		first := read8(t, s)
		require.False(t, s.Submit(&initiator.Command{Owner: first}, &block.Plug{}))
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		require.NoError(t, s.LUReset(ctx, [8]byte{}))
		require.ErrorIs(t, first.result(t).Err, initiator.ErrAborted)
		require.NoError(t, readBlocking(s))
	}},
	"FF10": {"sends what consumes a StatSN and what does not", "acknowledges the last one that did, in each PDU", func(t *testing.T) {
		finished := make(chan struct{})
		s := logsIn(t, func(r *raw) {
			defer close(finished)
			r.login("InitialR2T", "Yes", "ImmediateData", "No", "MaxBurstLength", "65536")
			next := func(op pdu.Opcode) pdu.Header {
				h, _, _ := r.read()
				assert.Equal(t, op, h.Opcode())
				assert.Equal(t, r.statSN, h.ExpStatSN(), "opcode %#02x", h.Opcode())
				return h
			}
			asked := uint32(0)
			ping := func() {
				asked++
				r.targetPing(asked)
				next(pdu.OpNopOut)
			}
			write := next(pdu.OpSCSICommand)
			for i := range uint32(2) {
				r.r2t(write.ITT(), 1, i, i*4096, 4096)
				next(pdu.OpDataOut)
			}
			r.update()
			ping()
			r.good(write.ITT(), nil)
			read := next(pdu.OpSCSICommand)
			for i := range uint32(4) {
				r.dataIn(read.ITT(), 0, i, i*512, pattern[:512])
				ping()
			}
			r.dataIn(read.ITT(), pdu.Final|pdu.StatusBit, 4, 2048, pattern[2048:])
			r.pong(next(pdu.OpNopOut))
			next(pdu.OpLogoutReq)
		})
		require.NoError(t, write(t, s, 8192).result(t).Err)
		require.NoError(t, readBlocking(s))
		s.Ping()
		require.Eventually(t, func() bool { return !s.Pinging() }, 5*time.Second, time.Millisecond)
		s.Close(context.Background())
		<-finished
	}},
	"FF13": {"answers four commands at a time in any order", "gives no tag again before its command has ended, nor soon after", func(t *testing.T) {
		const depth, rounds = 4, 1000
		c := scripted(t, func(_ int, r *raw) {
			r.login()
			var open, last []uint32
			for range rounds {
				h, _, ok := r.command()
				if !ok {
					return
				}
				assert.NotEqual(t, pdu.NoTag, h.ITT())
				assert.NotContains(t, open, h.ITT())
				assert.NotContains(t, last, h.ITT())
				open = append(open, h.ITT())
				if len(open) < depth {
					continue
				}
				i := rand.IntN(depth)
				r.dataIn(open[i], pdu.Final|pdu.StatusBit, 0, 0, pattern)
				if last = append(last, open[i]); len(last) > 32 {
					last = last[1:]
				}
				open = append(open[:i], open[i+1:]...)
			}
			for _, itt := range open {
				r.dataIn(itt, pdu.Final|pdu.StatusBit, 0, 0, pattern)
			}
			r.drain()
		})
		c.QueueDepth = depth
		s, err := initiator.Open(context.Background(), c)
		require.NoError(t, err)
		t.Cleanup(func() { s.Abort(os.ErrClosed); <-s.Done() })
		var wg sync.WaitGroup
		var taken atomic.Int32
		for range depth {
			wg.Go(func() {
				for taken.Add(1) <= rounds && assert.NoError(t, readBlocking(s)) {
				}
			})
		}
		wg.Wait()
	}},
}

// readBlocking is a READ of 4096 bytes that waits for room in the window.
func readBlocking(s *initiator.Session) error {
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	c := &initiator.Command{Dir: initiator.DataIn, Data: make([]byte, len(pattern))}
	scsi.Read(&c.CDB, 0, 8, true)
	if err := s.Do(ctx, c); err != nil {
		return err
	}
	if string(c.Data) != string(pattern) {
		return fmt.Errorf("status %#02x, wrong data", c.Result.Status)
	}
	return nil
}

func nopIn(itt, ttt uint32) (h pdu.Header) {
	h[0], h[1] = uint8(pdu.OpNopIn), pdu.Final
	h.SetITT(itt)
	h.SetTTT(ttt)
	return h
}

// targetPing asks for a NOP-Out.
func (r *raw) targetPing(ttt uint32) {
	h := nopIn(pdu.NoTag, ttt)
	h.SetStatSN(r.statSN)
	r.send(h, nil, false)
}

// update tells the command window in a NOP-In that wants no answer.
func (r *raw) update() { r.targetPing(pdu.NoTag) }

func (r *raw) taskDone(rq pdu.Header, response uint8) {
	var h pdu.Header
	h[0], h[1] = uint8(pdu.OpTaskMgmtResp), pdu.Final
	h.SetITT(rq.ITT())
	h.SetResponse(response)
	r.send(h, nil, true)
}

// unhelped waits for a command as command does, but answers pings only when it
// is there: an answer would tell the window too.
func (r *raw) unhelped(t *testing.T) pdu.Header {
	var pings []pdu.Header
	for {
		h, _, ok := r.read()
		switch {
		case !assert.True(t, ok, "no command"):
			return h
		case h.Opcode() == pdu.OpSCSICommand:
			for _, p := range pings {
				r.pong(p)
			}
			return h
		case assert.NotEqual(t, pdu.NoTag, h.ITT(), "an answer to a window update"):
			pings = append(pings, h)
		}
	}
}

// quiet answers pings for a while, in which no PDU with that opcode, or none
// without a task tag if that is NOP-Out, may come.
func (r *raw) quiet(t *testing.T, d time.Duration, never pdu.Opcode) {
	end := time.Now().Add(d)
	defer r.SetDeadline(time.Now().Add(10 * time.Second))
	for {
		r.SetReadDeadline(end)
		h, _, ok := r.read()
		if !ok {
			return
		}
		if h.Opcode() == pdu.OpNopOut && h.ITT() != pdu.NoTag {
			r.pong(h)
			continue
		}
		assert.NotEqual(t, never, h.Opcode(), "while it must not come")
	}
}
