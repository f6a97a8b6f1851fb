package initiator_test

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
)

// A window that stays shut, and a session that has nothing to send.
var idleCases = map[string]conformanceCase{
	"FF07": {"keeps its window shut although nothing is in flight", "pings, suspects the path after FailoverTime, ends it after five; one that opens serves again", func(t *testing.T) {
		const failover = 400 * time.Millisecond
		shut := func(t *testing.T, opens time.Duration) (*initiator.Session, *events, chan int) {
			pings := make(chan int, 1)
			ev := &events{}
			c := scripted(t, func(_ int, r *raw) {
				r.window = 1
				if !r.login() {
					return
				}
				h, _, _ := r.command()
				r.window = 0
				r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				n := 0
				for end := time.Now().Add(opens); time.Now().Before(end); {
					r.SetReadDeadline(end)
					h, _, ok := r.read()
					if !ok {
						break
					}
					n++
					assert.Equal(t, pdu.OpNopOut, h.Opcode())
					r.pong(h)
				}
				pings <- n
				r.SetDeadline(time.Now().Add(10 * time.Second))
				r.window = 4
				r.update()
				if h, _, ok := r.command(); ok {
					r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
					r.command()
				}
			})
			c.FailoverTime, c.OnState = failover, ev.on
			s, err := initiator.Open(context.Background(), c)
			require.NoError(t, err)
			t.Cleanup(func() { s.Abort(os.ErrClosed); <-s.Done() })
			require.NoError(t, readBlocking(s))
			return s, ev, pings
		}
		t.Run("for good", func(t *testing.T) {
			s, ev, pings := shut(t, 5*time.Second)
			began := time.Now()
			require.Eventually(t, func() bool { return len(ev.list()) > 0 }, 5*time.Second, time.Millisecond)
			between(t, failover*7/10, 3*failover, time.Since(began))
			dropped(t, s, "keeps its command window shut")
			between(t, 4*failover, 8*failover, time.Since(began))
			require.Equal(t, []initiator.State{initiator.Suspect, initiator.Dead}, ev.list())
			require.GreaterOrEqual(t, <-pings, 5)
		})
		t.Run("for twice FailoverTime", func(t *testing.T) {
			s, ev, pings := shut(t, 2*failover)
			require.NoError(t, readBlocking(s))
			require.GreaterOrEqual(t, <-pings, 2)
			require.Eventually(t, func() bool { return len(ev.list()) == 2 }, 5*time.Second, time.Millisecond)
			require.Equal(t, []initiator.State{initiator.Suspect, initiator.Up}, ev.list())
			require.Never(t, func() bool { return len(ev.list()) > 2 }, 3*failover, 10*time.Millisecond)
			require.NoError(t, s.Err())
		})
		t.Run("from the login on", func(t *testing.T) {
			c := scripted(t, func(_ int, r *raw) {
				r.window = 0
				r.login()
				r.command()
			})
			c.FailoverTime = failover
			s, err := initiator.Open(context.Background(), c)
			require.NoError(t, err)
			began := time.Now()
			dropped(t, s, "keeps its command window shut")
			between(t, 4*failover, 8*failover, time.Since(began))
		})
	}},
	"FF11": {"waits for its last status to be acknowledged while nothing else is sent", "pings within a second, with the ExpStatSN that acknowledges it; of an idle session every fourth FailoverTime", func(t *testing.T) {
		t.Run("idle", acknowledgesWhenIdle)
		t.Run("a long read is under way", acknowledgesMeanwhile)
	}},
}

func acknowledgesWhenIdle(t *testing.T) {
	const failover = 500 * time.Millisecond
	done := make(chan struct{})
	c := scripted(t, func(_ int, r *raw) {
		defer close(done)
		r.login()
		h, _, _ := r.command()
		r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
		for _, after := range []time.Duration{failover, 4 * failover, 4 * failover} {
			began := time.Now()
			h, _, ok := r.read()
			assert.True(t, ok)
			assert.Equal(t, pdu.OpNopOut, h.Opcode())
			assert.Equal(t, r.statSN, h.ExpStatSN())
			between(t, after*3/4, after*3/2+failover, time.Since(began))
			r.pong(h)
		}
		r.drain()
	})
	c.FailoverTime = failover
	s, err := initiator.Open(context.Background(), c)
	require.NoError(t, err)
	require.NoError(t, readBlocking(s))
	time.Sleep(10 * failover)
	require.NoError(t, s.Err())
	// What is dead although it was idle shows with the next command.
	began := time.Now()
	w := read8(t, s)
	dropped(t, s, "no sign of life")
	between(t, failover*8/10, 3*failover, time.Since(began))
	require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
	<-done
}

func acknowledgesMeanwhile(t *testing.T) {
	const failover = time.Second
	got := make(chan time.Duration, 1)
	c := scripted(t, func(_ int, r *raw) {
		r.login()
		long, _, _ := r.command()
		short, _, _ := r.command()
		r.dataIn(short.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
		began := time.Now()
		waiting := true
		var off uint32
		for i := range uint32(63) {
			r.dataIn(long.ITT(), 0, i, off, pattern[off:][:64])
			off += 64
			if !waiting {
				break
			}
			r.SetReadDeadline(time.Now().Add(22 * time.Millisecond))
			h, _, ok := r.read()
			if !ok {
				continue
			}
			waiting = false
			assert.Equal(t, pdu.OpNopOut, h.Opcode())
			assert.Equal(t, r.statSN, h.ExpStatSN())
			got <- time.Since(began)
			r.SetReadDeadline(time.Now().Add(10 * time.Second))
			r.pong(h)
		}
		r.dataIn(long.ITT(), pdu.Final|pdu.StatusBit, off/64, off, pattern[off:])
		r.command()
	})
	c.FailoverTime = failover
	s, err := initiator.Open(context.Background(), c)
	require.NoError(t, err)
	t.Cleanup(func() { s.Abort(os.ErrClosed); <-s.Done() })
	long := read8(t, s)
	require.NoError(t, readBlocking(s))
	require.NoError(t, long.result(t).Err)
	select {
	case took := <-got:
		between(t, 0, 2*failover, took)
	default:
		t.Error("never acknowledged")
	}
}

// between leaves room above for a busy machine.
func between(t *testing.T, least, most, got time.Duration) {
	t.Helper()
	assert.GreaterOrEqual(t, got, least)
	assert.Less(t, got, most)
}
