package initiator_test

import (
	"bytes"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/faultnet"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/scsi"
)

// Data-In that asks for acknowledgement, comes late, or has a residual: DI.
var dataCases = map[string]conformanceCase{
	"DI10": {"reports residuals: too few bytes, too many, or both at once", "reports a short read, or one of another length, never success; drops on both at once", residuals},
	"DI12": {"asks for acknowledgement of Data-In (A) at ErrorRecoveryLevel 0", "takes the data and sends no SNACK", func(t *testing.T) {
		seen := make(chan []pdu.Header, 1)
		s := logsIn(t, func(r *raw) {
			r.login()
			h, _, _ := r.command()
			r.dataIn(h.ITT(), pdu.DataAck, 0, 0, pattern[:1024])
			r.dataIn(h.ITT(), pdu.DataAck|pdu.Final, 1, 1024, pattern[1024:2048])
			r.dataIn(h.ITT(), pdu.DataAck|pdu.Final|pdu.StatusBit, 2, 2048, pattern[2048:])
			seen <- r.answerAll(0, 0)
		})
		w := read8(t, s)
		w.result(t)
		whole(t, w)
		require.NoError(t, s.Close(t.Context()))
		got := <-seen
		require.Len(t, got, 1, "more than the logout: %x", got)
		require.Equal(t, pdu.OpLogoutReq, got[0].Opcode())
	}},
	"DI14": {"delivers the data of a read that another path has answered since", "has closed the connection before: nothing touches the buffer any more", lateData},
	"DI15": {"sends the rest of a read whose abort it has confirmed", "drops, and the buffer stays as it was given back", func(t *testing.T) {
		for name, rest := range map[string]func(r *raw, cmd pdu.Header){
			"the rest, with status": func(r *raw, cmd pdu.Header) {
				r.dataIn(cmd.ITT(), pdu.Final|pdu.StatusBit, 1, 2048, pattern[2048:])
			},
			"the rest": func(r *raw, cmd pdu.Header) { r.dataIn(cmd.ITT(), 0, 1, 2048, pattern[2048:]) },
			"nothing":  func(r *raw, cmd pdu.Header) { r.dataIn(cmd.ITT(), 0, 1, 2048, nil) },
			"all":      func(r *raw, cmd pdu.Header) { r.dataIn(cmd.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern) },
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				given := make(chan struct{})
				s := hangs(t, nil, func(r *raw, cmd pdu.Header) {
					r.dataIn(cmd.ITT(), 0, 0, 0, pattern[:2048])
					rq, _, _ := r.next(pdu.OpTaskMgmtReq, nil)
					r.tmfResponse(rq, pdu.TMFComplete)
					<-given
					rest(r, cmd)
					r.drain()
				})
				w := read8(t, s.Session)
				require.ErrorIs(t, w.result(t).Err, initiator.ErrTimeout)
				spoil(w.c.Data)
				close(given)
				require.ErrorIs(t, ends(t, s), initiator.ErrProtocol)
				require.True(t, spoilt(w.c.Data), "the buffer was touched")
			})
		}
	}},
}

func spoil(b []byte) {
	for i := range b {
		b[i] = 0xee
	}
}

func spoilt(b []byte) bool { return bytes.Count(b, []byte{0xee}) == len(b) }

func residuals(t *testing.T) {
	under := func(n uint32) func(h *pdu.Header) {
		return func(h *pdu.Header) { h[1] |= pdu.Underflow; h.SetResidual(n) }
	}
	over := func(n uint32) func(h *pdu.Header) {
		return func(h *pdu.Header) { h[1] |= pdu.Overflow; h.SetResidual(n) }
	}
	// withStatus is one Data-In that carries the status too.
	withStatus := func(r *raw, itt uint32, data []byte, change func(h *pdu.Header)) {
		var h pdu.Header
		h[0], h[1] = uint8(pdu.OpDataIn), pdu.Final|pdu.StatusBit
		h.SetITT(itt)
		h.SetTTT(pdu.NoTag)
		change(&h)
		r.send(h, data, true)
	}
	for name, c := range map[string]struct {
		n      int // bytes that arrive
		change func(h *pdu.Header)
		err    error
		left   uint32 // Result.Residual
	}{
		"underflow":                       {2048, under(2048), initiator.ErrShort, 2048},
		"underflow that hides more":       {1024, under(512), initiator.ErrShort, 512},
		"underflow of what arrived":       {4096, under(512), initiator.ErrShort, 512},
		"underflow of more than there is": {4096, under(1 << 31), initiator.ErrShort, 1 << 31},
		"overflow":                        {4096, over(512), initiator.ErrOverflow, 0},
		"overflow of very much":           {4096, over(1<<32 - 1), initiator.ErrOverflow, 0},
		"overflow, but cut short":         {2048, over(512), initiator.ErrShort, 0},
		"flags without a count":           {4096, over(0), nil, 0},
	} {
		t.Run(name, readEnds(func(r *raw, itt uint32) {
			r.dataIn(itt, pdu.Final, 0, 0, pattern[:c.n])
			r.good(itt, c.change)
		}, func(t *testing.T, w *waited) {
			require.Equal(t, c.err, w.c.Result.Err)
			require.Equal(t, c.left, w.c.Result.Residual)
			require.EqualValues(t, c.n, w.c.Result.Received)
		}))
		t.Run(name+", in Data-In", readEnds(func(r *raw, itt uint32) { withStatus(r, itt, pattern[:c.n], c.change) }, func(t *testing.T, w *waited) {
			require.Equal(t, c.err, w.c.Result.Err)
			require.Equal(t, c.left, w.c.Result.Residual)
			require.EqualValues(t, c.n, w.c.Result.Received)
		}))
	}
	both := func(h *pdu.Header) { h[1] |= pdu.Underflow | pdu.Overflow; h.SetResidual(1) }
	t.Run("both", readDrops("overflow and underflow", func(r *raw, itt uint32) { r.good(itt, both) }))
	t.Run("both, in Data-In", readDrops("overflow and underflow", func(r *raw, itt uint32) { withStatus(r, itt, pattern, both) }))
	t.Run("both, without data", writeDrops("overflow and underflow", func(r *raw, itt uint32) { r.good(itt, both) }))

	t.Run("target failure", readEnds(func(r *raw, itt uint32) {
		r.dataIn(itt, pdu.Final, 0, 0, pattern)
		r.good(itt, func(h *pdu.Header) { h.SetResponse(1) })
	}, func(t *testing.T, w *waited) { require.Equal(t, initiator.ErrTargetFailure, w.c.Result.Err) }))

	// Answers whose length the unit chooses may be shorter, and may have been
	// longer than there was room for.
	for name, c := range map[string]struct {
		n      int
		change func(h *pdu.Header)
	}{"shorter": {36, under(4096 - 36)}, "longer": {4096, over(100)}} {
		t.Run("of any length, "+name, func(t *testing.T) {
			s := logsIn(t, func(r *raw) {
				r.login()
				h, _, _ := r.command()
				withStatus(r, h.ITT(), pattern[:c.n], c.change)
				r.drain()
			})
			cmd := &initiator.Command{Dir: initiator.DataIn, Data: make([]byte, 4096), ShortOK: true}
			cmd.CDB = scsi.Inquiry(false, 0, 4096)
			require.NoError(t, s.Do(t.Context(), cmd))
			require.EqualValues(t, c.n, cmd.Result.Received)
		})
	}
}

// lateData holds back the answer to a read until another path has served it.
func lateData(t *testing.T) {
	var proxy *faultnet.Proxy
	m := newMapped(t, 2, options{
		session: func(_ int, c *initiator.Config) { c.FailoverTime = 500 * time.Millisecond },
		addr: func(path int, addr string) string {
			if path != 0 {
				return addr
			}
			if proxy == nil { // the path's own goroutine alone is here
				var err error
				proxy, err = faultnet.New("127.0.0.1:0", addr)
				require.NoError(t, err)
			}
			return proxy.Addr()
		}})
	t.Cleanup(func() { proxy.Close() })
	disk := bytes.Repeat([]byte("on the disk"), 1<<20/11)
	m.lu.WriteAt(disk, 0)
	answered := make(chan struct{})
	var once atomic.Bool
	m.hook(func(c *target.Cmd) target.Action {
		if c.Portal == m.portals[0] && once.CompareAndSwap(false, true) {
			proxy.Stall(faultnet.ToInitiator)
			close(answered)
		}
		return target.Action{}
	})
	r, c := begin(m.g, block.Read, 0, len(disk)&^4095, 0)
	<-answered
	require.NoError(t, finish(t, c))
	require.True(t, bytes.Equal(disk[:len(r.Data)], r.Data))
	require.Equal(t, 1, m.count(m.portals[1]), "served by the other path")
	spoil(r.Data)
	passed := proxy.Count(faultnet.ToInitiator).Bytes
	require.NoError(t, proxy.Heal()) // now it comes
	m.await("delivered, or refused", func() bool {
		return proxy.Count(faultnet.ToInitiator).Bytes > passed || proxy.Connections() == 0
	})
	m.await("back", func() bool { return m.g.Snapshot().Paths.Usable == 2 })
	require.True(t, spoilt(r.Data), "the buffer was touched")

	// A session that ends in the middle of a PDU.
	given := make(chan struct{})
	half := make(chan struct{})
	s := watches(t, nil, func(r *raw) {
		r.login()
		h, _, _ := r.command()
		var a pdu.Header
		a[0], a[1] = uint8(pdu.OpDataIn), pdu.Final|pdu.StatusBit
		a.SetITT(h.ITT())
		a.SetStatSN(r.statSN)
		a.SetExpCmdSN(r.expCmdSN)
		a.SetMaxCmdSN(r.expCmdSN + 31)
		a.SetDataLen(len(pattern))
		r.Write(append(a[:], pattern[:2000]...))
		close(half)
		<-given
		r.Write(pattern[2000:])
		r.drain()
	})
	w := read8(t, s.Session)
	<-half
	s.Abort(fmt.Errorf("test"))
	require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
	spoil(w.c.Data)
	close(given)
	<-s.Done()
	time.Sleep(50 * time.Millisecond) // for a byte that should not come
	require.True(t, spoilt(w.c.Data), "the buffer was touched")
}
