package initiator_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
)

// Pings both ways, and what their absence means.
var nopCases = map[string]conformanceCase{
	"NP01": {"pings while 16 large writes are under way", "answers with TTT and LUN copied, immediate, without data, ahead of what waits", func(t *testing.T) {
		const writes = 16
		c := scripted(t, func(_ int, r *raw) {
			r.Conn.(*net.TCPConn).SetReadBuffer(64 << 10)
			r.login("InitialR2T", "No", "ImmediateData", "Yes", "FirstBurstLength", "262144", "MaxBurstLength", "262144", "MaxRecvDataSegmentLength", "8192")
			time.Sleep(200 * time.Millisecond) // the writes wait in the initiator
			p := nopIn(pdu.NoTag, 0x55)
			p.SetLUN([8]byte{0, 9})
			p.SetStatSN(r.statSN)
			r.send(p, []byte("0123456"), false)
			time.Sleep(50 * time.Millisecond)
			var tags []uint32
			pdus, ends := 0, 0
			for answered := false; ends < writes || !answered; pdus++ {
				h, _, ok := r.read()
				if !assert.True(t, ok) {
					return
				}
				switch {
				case h.Opcode() == pdu.OpSCSICommand:
					tags = append(tags, h.ITT())
				case h.Opcode() == pdu.OpDataOut && h.IsFinal():
					ends++
				case h.Opcode() == pdu.OpNopOut && h.ITT() != pdu.NoTag:
					r.pong(h)
				case h.Opcode() == pdu.OpNopOut:
					answered = true
					assert.True(t, h.IsImmediate())
					assert.EqualValues(t, 0x55, h.TTT())
					assert.Equal(t, [8]byte{0, 9}, h.LUN())
					assert.Zero(t, h.DataLen())
					assert.Less(t, pdus, 128, "of 512 PDUs")
				}
			}
			for _, itt := range tags {
				r.good(itt, nil)
			}
			r.drain()
		})
		c.Dial = smallBuffer(64 << 10)
		c.FailoverTime = 5 * time.Second
		s, err := initiator.Open(context.Background(), c)
		require.NoError(t, err)
		t.Cleanup(func() { s.Abort(os.ErrClosed); <-s.Done() })
		var ws []*waited
		for range writes {
			ws = append(ws, write(t, s, 256<<10))
		}
		for _, w := range ws {
			require.NoError(t, w.result(t).Err)
		}
	}},
	"NP02": {"sends NOP-Ins without tags", "answers none", func(t *testing.T) {
		done := make(chan struct{})
		logsIn(t, func(r *raw) {
			defer close(done)
			r.login()
			for range 3 {
				r.update()
			}
			r.targetPing(9)
			h, _, _ := r.read()
			assert.EqualValues(t, 9, h.TTT(), "the answer to the only one that wants one")
			r.quiet(t, 100*time.Millisecond, pdu.OpNopOut)
		})
		<-done
	}},
	"NP03": {"answers our ping late, never, with data, or under a tag of no ping", "suspects it until then; drops in FailoverTime; drops; drops", func(t *testing.T) {
		pinged := func(t *testing.T, answer func(r *raw, ping pdu.Header)) (*initiator.Session, *waited, *events) {
			ev := &events{}
			c := scripted(t, func(_ int, r *raw) {
				r.login()
				read, _, _ := r.read()
				ping, _, _ := r.read()
				assert.Equal(t, pdu.OpNopOut, ping.Opcode())
				answer(r, ping)
				r.dataIn(read.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				r.drain()
			})
			c.OnState = ev.on
			s, err := initiator.Open(context.Background(), c)
			require.NoError(t, err)
			t.Cleanup(func() { s.Abort(os.ErrClosed); <-s.Done() })
			return s, read8(t, s), ev
		}
		t.Run("late", func(t *testing.T) {
			s, w, ev := pinged(t, func(r *raw, ping pdu.Header) {
				time.Sleep(500 * time.Millisecond)
				r.pong(ping)
			})
			require.NoError(t, w.result(t).Err)
			require.Eventually(t, func() bool { return len(ev.list()) == 2 }, 5*time.Second, time.Millisecond)
			require.Equal(t, []initiator.State{initiator.Suspect, initiator.Up}, ev.list())
			require.NoError(t, s.Err())
		})
		t.Run("never", func(t *testing.T) {
			began := time.Now()
			s, w, ev := pinged(t, func(r *raw, _ pdu.Header) { r.drain() })
			dropped(t, s, "no sign of life")
			between(t, 900*time.Millisecond, 3*time.Second, time.Since(began))
			require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
			require.Equal(t, []initiator.State{initiator.Suspect, initiator.Dead}, ev.list())
		})
		t.Run("with data", func(t *testing.T) {
			s, w, _ := pinged(t, func(r *raw, ping pdu.Header) { r.send(nopIn(ping.ITT(), pdu.NoTag), []byte("other"), true) })
			dropped(t, s, "5 bytes in the answer to an empty ping")
			require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
		})
		t.Run("another tag", func(t *testing.T) {
			s, w, _ := pinged(t, func(r *raw, ping pdu.Header) { r.send(nopIn(ping.ITT()+1, pdu.NoTag), nil, true) })
			dropped(t, s, "answer to a ping that was not sent")
			require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
		})
		t.Run("twice", func(t *testing.T) {
			s, _, _ := pinged(t, func(r *raw, ping pdu.Header) { r.pong(ping); r.pong(ping) })
			dropped(t, s, "answer to a ping that was not sent")
		})
	}},
	"NP04": {"stops altogether, but its TCP acknowledges", "suspects the path after 0.3 of FailoverTime and uses the other for new I/O; what is in flight moves after FailoverTime, without an error", func(t *testing.T) {
		const failover = 2 * time.Second
		m := newMapped(t, 2, options{})
		require.NoError(t, m.io(block.Write, 0, 4096))
		m.portals[0].Hang()
		t.Cleanup(m.portals[0].Resume)
		began := time.Now()
		_, hung := begin(m.g, block.Read, 0, 4096, 0)
		m.await("suspect", func() bool { return m.path(0).State == "suspect" })
		require.Less(t, time.Since(began), failover*8/10)
		require.NoError(t, m.io(block.Read, 4096, 4096), "new I/O while the old one hangs")
		require.Less(t, time.Since(began), failover*9/10)
		require.Empty(t, hung)
		require.NoError(t, finish(t, hung))
		between(t, failover*8/10, 2*failover, time.Since(began))
	}},
	"NP05": {"answers pings, but a command only after twice FailoverTime", "keeps the session, suspects nothing", func(t *testing.T) {
		ev := &events{}
		c := scripted(t, func(_ int, r *raw) {
			r.login()
			h, _, _ := r.command()
			for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
				q, _, ok := r.read()
				if !ok {
					return
				}
				if q.Opcode() == pdu.OpNopOut {
					r.pong(q)
				}
			}
			r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
			r.drain()
		})
		c.OnState = ev.on
		s, err := initiator.Open(context.Background(), c)
		require.NoError(t, err)
		t.Cleanup(func() { s.Abort(os.ErrClosed); <-s.Done() })
		require.NoError(t, read8(t, s).result(t).Err)
		require.Empty(t, ev.list())
	}},
	"NP06": {"pings 10000 times a second; or takes no answers", "answers each, in order, while commands go on; drops when 8192 answers wait", func(t *testing.T) {
		t.Run("10000 a second", pingStorm)
		t.Run("takes no answers", func(t *testing.T) {
			c := scripted(t, func(_ int, r *raw) {
				r.Conn.(*net.TCPConn).SetReadBuffer(4096)
				r.login()
				one := nopIn(pdu.NoTag, 1)
				one.SetStatSN(r.statSN)
				one.SetMaxCmdSN(31)
				var batch []byte
				for range 256 {
					batch = append(batch, one[:]...)
				}
				for {
					if _, err := r.Write(batch); err != nil {
						return
					}
					time.Sleep(2 * time.Millisecond)
				}
			})
			c.FailoverTime = 5 * time.Second
			c.Dial = smallBuffer(4096)
			s, err := initiator.Open(context.Background(), c)
			require.NoError(t, err)
			dropped(t, s, "8192 pings whose answers it does not take")
		})
	}},
}

// smallBuffer dials with a send buffer that is soon full.
func smallBuffer(size int) func(ctx context.Context, network, address string) (net.Conn, error) {
	return (&net.Dialer{Control: func(_, _ string, rc syscall.RawConn) error {
		return rc.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, size) })
	}}).DialContext
}

func pingStorm(t *testing.T) {
	const pings, perMS = 10000, 10
	answered := make(chan struct{})
	s := logsIn(t, func(r *raw) {
		r.login()
		var wg sync.WaitGroup
		wg.Go(func() {
			began := time.Now()
			for n := 0; n < pings; {
				for due := int(time.Since(began).Milliseconds()+1) * perMS; n < min(due, pings); n++ {
					h := nopIn(pdu.NoTag, uint32(n))
					h.SetMaxCmdSN(31) // long known
					r.Write(h[:])
				}
				time.Sleep(time.Millisecond)
			}
		})
		defer wg.Wait()
		next := uint32(0)
		for {
			h, _, ok := r.read()
			switch {
			case !ok:
				return
			case h.Opcode() == pdu.OpSCSICommand:
				r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
			case h.ITT() != pdu.NoTag:
				r.pong(h)
			default:
				assert.Equal(t, next, h.TTT())
				if next++; next == pings {
					close(answered)
				}
			}
		}
	})
	commands, worst := 0, time.Duration(0)
	for {
		began := time.Now()
		require.NoError(t, readBlocking(s), fmt.Sprint(commands))
		commands, worst = commands+1, max(worst, time.Since(began))
		select {
		case <-answered:
			t.Logf("%d commands meanwhile, the slowest in %v", commands, worst)
			require.Greater(t, commands, 100)
			require.Less(t, worst, time.Second)
			return
		default:
		}
	}
}
