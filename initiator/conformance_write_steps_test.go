package initiator_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/scsi"
)

// Steps of WR11 to WR15: writes that end before their data has gone.

func earlyGood(t *testing.T) {
	const size = 4 << 20
	login := []string{"InitialR2T", "Yes", "ImmediateData", "No", "MaxBurstLength", fmt.Sprint(1 << 20), "MaxRecvDataSegmentLength", "65536"}
	under := func(n uint32) func(h *pdu.Header) {
		return func(h *pdu.Header) { h[1] |= pdu.Underflow; h.SetResidual(n) }
	}
	for name, c := range map[string]struct {
		asked  uint32 // by R2T
		taken  bool   // the target takes all of that before it answers
		change func(h *pdu.Header)
		err    error
		drops  bool
	}{
		"nothing asked for":                    {0, true, nil, nil, true},
		"some asked for":                       {1 << 20, true, nil, nil, true},
		"asked for, not taken":                 {1 << 20, false, nil, nil, true},
		"residual of less":                     {1 << 20, true, under(512), nil, true},
		"residual of what was not asked for":   {1 << 20, true, under(size - 1<<20), initiator.ErrShort, false},
		"residual of all":                      {0, true, under(size), initiator.ErrShort, false},
		"residual, but it is still on its way": {1 << 20, false, under(size - 1<<20), nil, true},
		"residual of what is on its way too":   {1 << 20, false, under(size), initiator.ErrShort, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out := make(chan int, 1)
			s := watches(t, narrow, func(r *raw) {
				r.narrow()
				r.login(login...)
				cmd, _, _ := r.command()
				if c.asked > 0 {
					r.r2t(cmd.ITT(), 9, 0, 0, c.asked)
				}
				got := 0
				for c.taken && got < int(c.asked) {
					_, b, ok := r.next(pdu.OpDataOut, nil)
					if !ok {
						return
					}
					got += len(b)
				}
				if !c.taken { // until the socket is full
					time.Sleep(100 * time.Millisecond)
				}
				r.good(cmd.ITT(), c.change)
				if !c.taken {
					time.Sleep(100 * time.Millisecond)
				}
				for {
					h, b, ok := r.read()
					if !ok {
						break
					}
					switch h.Opcode() {
					case pdu.OpDataOut:
						got += len(b)
					case pdu.OpNopOut:
						r.pong(h)
					case pdu.OpSCSICommand:
						r.good(h.ITT(), nil)
					case pdu.OpLogoutReq:
						r.logoutResponse(h, 0, 0)
					}
				}
				out <- got
			})
			w := write(t, s.Session, size)
			if c.drops {
				require.ErrorContains(t, ends(t, s), "did not take")
				require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
				return
			}
			require.Equal(t, c.err, w.result(t).Err)
			spoil(w.c.Data) // none of it may be on its way
			tur := &initiator.Command{}
			require.NoError(t, s.Do(t.Context(), tur), "the session goes on")
			require.NoError(t, s.Close(t.Context()))
			got := <-out
			if c.taken {
				require.EqualValues(t, c.asked, got)
			} else {
				require.Less(t, got, 3<<18, "data was sent on after the answer")
			}
		})
	}
}

func earlyCheck(t *testing.T) {
	const size = 1 << 20
	for name, c := range map[string]struct {
		all   int // what would be sent without an answer
		login []string
	}{
		"on R2T":      {size, []string{"InitialR2T", "Yes", "ImmediateData", "No", "MaxBurstLength", fmt.Sprint(size), "MaxRecvDataSegmentLength", "16384"}},
		"unsolicited": {256 << 10, []string{"InitialR2T", "No", "ImmediateData", "No", "MaxBurstLength", fmt.Sprint(size), "FirstBurstLength", fmt.Sprint(256 << 10), "MaxRecvDataSegmentLength", "512"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			type tally struct {
				bytes int
				wrong bool
			}
			out := make(chan tally, 1)
			data := patterned(size)
			answered := make(chan struct{})
			s := watches(t, narrow, func(r *raw) {
				r.narrow()
				r.login(c.login...)
				cmd, _, _ := r.command()
				if c.login[1] == "Yes" {
					r.r2t(cmd.ITT(), 9, 0, 0, size)
				}
				time.Sleep(100 * time.Millisecond) // the socket is full
				r.check(cmd.ITT(), fixedSense(3, 0x0c, 2)...)
				<-answered // or not yet: the rest of a PDU must leave
				var got tally
				for {
					h, b, ok := r.read()
					if !ok {
						break
					}
					switch h.Opcode() {
					case pdu.OpDataOut:
						got.bytes += len(b)
						at := int(h.BufferOffset())
						got.wrong = got.wrong || h.ITT() != cmd.ITT() || !bytes.Equal(b, data[at:at+len(b)])
					case pdu.OpNopOut:
						r.pong(h)
					case pdu.OpSCSICommand:
						r.good(h.ITT(), nil)
					case pdu.OpLogoutReq:
						r.logoutResponse(h, 0, 0)
					}
				}
				out <- got
			})
			w := write(t, s.Session, size)
			time.AfterFunc(300*time.Millisecond, func() { close(answered) })
			got := w.result(t)
			require.NoError(t, got.Err)
			require.EqualValues(t, 2, got.Status)
			sense := scsi.ParseSense(got.SenseData())
			require.Equal(t, []byte{3, 0x0c, 2}, []byte{byte(sense.Key), sense.ASC, sense.ASCQ})
			spoil(w.c.Data)
			require.NoError(t, s.Do(t.Context(), &initiator.Command{}), "the session goes on")
			require.NoError(t, s.Close(t.Context()))
			tl := <-out
			require.False(t, tl.wrong, "data that is not the write's")
			require.NotZero(t, tl.bytes)
			require.Less(t, tl.bytes, c.all*3/4, "data was sent on after the answer")
		})
	}
}

func slowReader(t *testing.T) {
	const depth = 16
	for name, alive := range map[string]bool{"silent": false, "with signs of life": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			stop := make(chan struct{})
			s := watches(t, func(c *initiator.Config) {
				narrow(c)
				impatient(c)
				c.QueueDepth = depth
			}, func(r *raw) {
				r.narrow()
				r.window = 4 * depth
				r.login("InitialR2T", "No", "ImmediateData", "Yes", "MaxBurstLength", "262144", "FirstBurstLength", "262144", "MaxRecvDataSegmentLength", "65536")
				for alive {
					select {
					case <-stop:
						return
					case <-time.After(50 * time.Millisecond):
						var h pdu.Header
						h[0], h[1] = uint8(pdu.OpNopIn), pdu.Final
						h.SetITT(pdu.NoTag)
						h.SetTTT(pdu.NoTag)
						h.SetStatSN(r.statSN)
						r.send(h, nil, false)
					}
				}
				<-stop
			})
			defer close(stop)
			data := patterned(256 << 10)
			began := time.Now()
			var all []*waited
			for range 4 * depth {
				w := &waited{done: make(chan struct{})}
				w.c = &initiator.Command{Dir: initiator.DataOut, Data: data, Owner: w}
				scsi.Write(&w.c.CDB, 0, 512, false, true)
				var p block.Plug
				if s.Submit(w.c, &p) {
					all = append(all, w)
				}
				p.Flush()
			}
			require.Len(t, all, depth)
			err := ends(t, s)
			took := time.Since(began)
			if alive {
				require.ErrorIs(t, err, initiator.ErrTimeout)
				require.Greater(t, took, 1500*time.Millisecond, "killed although it gave signs of life")
			} else {
				require.ErrorContains(t, err, "no sign of life")
				require.Less(t, took, 3*time.Second)
			}
			unsent := 0
			for _, w := range all {
				require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
				if w.c.Result.Delivery == initiator.NotSent {
					unsent++
				}
			}
			require.GreaterOrEqual(t, unsent, depth/2, "the target took nothing of most of them")
		})
	}
}

func deliveries(t *testing.T) {
	const size = 128 << 10
	login := []string{"InitialR2T", "Yes", "ImmediateData", "No", "MaxBurstLength", "65536", "MaxRecvDataSegmentLength", "65536"}
	for name, c := range map[string]struct {
		script func(r *raw, cmd pdu.Header)
		size   int
		want   []initiator.Delivery
	}{
		"before it asks": {func(*raw, pdu.Header) {}, size, []initiator.Delivery{initiator.PartlySent}},
		"after it asked for half of it": {func(r *raw, cmd pdu.Header) {
			r.r2t(cmd.ITT(), 1, 0, 0, 65536)
			r.next(pdu.OpDataOut, nil)
		}, size, []initiator.Delivery{initiator.PartlySent}},
		"after it has it all": {func(r *raw, cmd pdu.Header) {
			for i := range uint32(2) {
				r.r2t(cmd.ITT(), 1+i, i, i*65536, 65536)
				r.next(pdu.OpDataOut, nil)
			}
		}, size, []initiator.Delivery{initiator.Sent}},
		"at once after it asked": {func(r *raw, cmd pdu.Header) {
			r.r2t(cmd.ITT(), 1, 0, 0, 65536)
		}, 65536, []initiator.Delivery{initiator.Sent, initiator.PartlySent}}, // who is first
	} {
		t.Run(name, func(t *testing.T) {
			s := watches(t, nil, func(r *raw) {
				r.login(login...)
				if cmd, _, ok := r.command(); ok {
					c.script(r, cmd)
				}
				r.Conn.(*net.TCPConn).SetLinger(0)
			})
			w := write(t, s.Session, c.size)
			require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
			require.Contains(t, c.want, w.c.Result.Delivery)
		})
	}
	// Commands that never left, behind one that fills the socket.
	both := make(chan struct{}) // are submitted
	full := watches(t, narrow, func(r *raw) {
		r.narrow()
		r.login("InitialR2T", "No", "ImmediateData", "No", "MaxBurstLength", "1048576", "FirstBurstLength", "262144", "MaxRecvDataSegmentLength", "65536")
		<-both
		r.Conn.(*net.TCPConn).SetLinger(0)
	})
	first := write(t, full.Session, 256<<10)
	time.Sleep(50 * time.Millisecond)
	second := write(t, full.Session, 4096)
	close(both)
	require.ErrorIs(t, first.result(t).Err, initiator.ErrSessionLost)
	require.ErrorIs(t, second.result(t).Err, initiator.ErrSessionLost)
	require.Equal(t, initiator.PartlySent, first.c.Result.Delivery)
	require.Equal(t, initiator.NotSent, second.c.Result.Delivery)
	require.Error(t, full.Err())
	require.NotErrorIs(t, full.Err(), io.EOF)
}
