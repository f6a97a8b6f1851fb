package initiator_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/scsi"
)

// Writes as RFC 7143 4.2.5.2 has them, and targets that ask oddly or answer
// early: WR.
var writeCases = map[string]conformanceCase{
	"WR01": {"negotiates InitialR2T=Yes, ImmediateData=Yes", "sends immediate data up to FirstBurstLength and the segment size, F set; the rest on R2T", writeMatrix(true, true)},
	"WR02": {"negotiates InitialR2T=Yes, ImmediateData=No", "sends nothing but the command, F set; all data on R2T", writeMatrix(true, false)},
	"WR03": {"negotiates InitialR2T=No, ImmediateData=Yes", "sends immediate data, then unsolicited Data-Out of exactly the rest of FirstBurstLength, then on R2T; bursts keep the order of the commands", writeMatrix(false, true)},
	"WR04": {"negotiates InitialR2T=No, ImmediateData=No", "sends FirstBurstLength of unsolicited Data-Out, F set on the last, then on R2T; bursts keep the order of the commands", writeMatrix(false, false)},
	"WR08": {"sends as many R2Ts of a command at once as were agreed on, then one more", "serves them in their order; drops at one more", manyR2Ts},
	"WR09": {"asks for data of 32 commands in turns", "serves them in turns too, DataSN from 0 for each R2T, F on its last, tag and LUN copied", fairData},
	"WR10": {"answers DataSequenceInOrder=No, or asks for data out of order", "ends the login: Yes was offered, which settles it (RFC 7143 13.19); drops at an R2T out of order", outOfOrder},
	"WR11": {"answers GOOD before it has all the data", "reports a short write if the residual covers what is missing, else drops; sends no more of it", earlyGood},
	"WR12": {"answers CHECK CONDITION in the middle of the data", "stops sending it, gives sense and buffer back, and goes on with the session", earlyCheck},
	"WR13": {"takes a write and never asks for its data", "aborts it after the command timeout, the session goes on", func(t *testing.T) {
		s := hangs(t, nil, func(r *raw, cmd pdu.Header) {
			rq, _, ok := r.next(pdu.OpTaskMgmtReq, nil)
			if !ok || rq.Flags() != pdu.Final|pdu.TMFAbortTask || rq.TTT() != cmd.ITT() {
				return
			}
			r.tmfResponse(rq, pdu.TMFComplete)
			again, _, _ := r.command()
			r.r2t(again.ITT(), 1, 0, 0, 4096)
			r.next(pdu.OpDataOut, nil)
			r.good(again.ITT(), nil)
			r.answerAll(0, 0)
		})
		began := time.Now()
		require.ErrorIs(t, write(t, s.Session, 4096).result(t).Err, initiator.ErrTimeout)
		require.Greater(t, time.Since(began), 900*time.Millisecond)
		require.NoError(t, write(t, s.Session, 4096).result(t).Err)
		require.NoError(t, s.Err())
	}},
	"WR14": {"does not read what it is sent (TCP window of zero), silent or not", "takes commands up to its depth and no more; if silent it is dead after FailoverTime, else its command times out", slowReader},
	"WR15": {"asks for data and resets the connection", "tells of each write how much of it the target may have", deliveries},
	"WR16": {"answers a write with GOOD and an underflow", "reports a short write, which is tried again, never success", func(t *testing.T) {
		for _, left := range []uint32{1, 512, 4096, 1<<32 - 1} {
			s := logsIn(t, func(r *raw) {
				r.login()
				h, _, _ := r.command()
				r.good(h.ITT(), func(h *pdu.Header) { h[1] |= pdu.Underflow; h.SetResidual(left) })
				r.drain()
			})
			got := write(t, s, 4096).result(t)
			require.Equal(t, initiator.ErrShort, got.Err)
			require.Equal(t, left, got.Residual)
			require.NoError(t, s.Err())
		}
	}},
}

// sent is a PDU with data as the target got it.
type sent struct {
	op        pdu.Opcode
	final     bool
	ttt       uint32
	sn, at, n uint32
}

// dataOut is what a sequence of Data-Out must look like, PDU by PDU.
func dataOuts(ttt, at, end, segment uint32) (out []sent) {
	for sn := uint32(0); at < end; sn++ {
		n := min(segment, end-at)
		out = append(out, sent{pdu.OpDataOut, at+n == end, ttt, sn, at, n})
		at += n
	}
	return out
}

// take reads the next PDU that is no ping and checks what all of them have in
// common. data is the write's.
func (r *raw) take(t *testing.T, itt uint32, data []byte) sent {
	for {
		h, b, ok := r.read()
		switch {
		case !ok:
			return sent{}
		case h.Opcode() == pdu.OpNopOut:
			if h.ITT() != pdu.NoTag {
				r.pong(h)
			}
			continue
		}
		got := sent{op: h.Opcode(), final: h.IsFinal(), n: uint32(len(b))}
		if h.Opcode() == pdu.OpDataOut {
			got.ttt, got.sn, got.at = h.TTT(), h.DataSN(), h.BufferOffset()
			// Answers to pings may be under way: ExpStatSN lags behind.
			if h.ITT() != itt || h.IsImmediate() || h.Flags()&^pdu.Final != 0 || h.U32(24) != 0 || r.statSN-h.ExpStatSN() > 2 || h.AHSLen() != 0 {
				t.Errorf("header of Data-Out: %x", h)
			}
		}
		if end := int(got.at) + len(b); end > len(data) || !bytes.Equal(b, data[got.at:end]) {
			t.Errorf("data of %+v is not that of the write", got)
		}
		return got
	}
}

func patterned(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i>>8 + i)
	}
	return b
}

// writeMatrix plays writes of every interesting size with every odd relation
// of FirstBurstLength, MaxBurstLength and the target's segment size.
func writeMatrix(initialR2T, immediate bool) func(t *testing.T) {
	return func(t *testing.T) {
		for _, p := range []struct{ first, burst, segment int }{
			{65536, 262144, 8192},
			{65536, 65536, 262144},
			{4096, 16384, 65536},
			{512, 512, 512},
			{1000, 3000, 700},
			{8192, 1 << 20, 8192},
			{1536, 1 << 20, 1021}, // segments of 1020
		} {
			t.Run(fmt.Sprintf("%d %d %d", p.first, p.burst, p.segment), func(t *testing.T) {
				t.Parallel()
				segment := p.segment &^ 3
				imm := min(p.first, segment)
				sizes := []int{1, 3, 511, 512, imm - 1, imm, imm + 1, p.first - 1, p.first, p.first + 1, p.first + segment, p.first + p.burst, p.first + p.burst + 1, 2*p.burst + 7}
				if p.segment >= 8192 {
					sizes = append(sizes, 16<<20)
				}
				for _, size := range sizes {
					oneWrite(t, initialR2T, immediate, p.first, p.burst, segment, p.segment, size)
				}
			})
		}
		if !initialR2T {
			t.Run("in order", func(t *testing.T) { burstsInOrder(t, immediate) })
		}
	}
}

func oneWrite(t *testing.T, initialR2T, immediate bool, first, burst, segment, declared, size int) {
	yes := map[bool]string{true: "Yes", false: "No"}
	data := patterned(size)
	var got, want []sent
	s := watches(t, unhurried, func(r *raw) {
		r.login("InitialR2T", yes[initialR2T], "ImmediateData", yes[immediate], "FirstBurstLength", fmt.Sprint(first), "MaxBurstLength", fmt.Sprint(burst),
			"MaxRecvDataSegmentLength", fmt.Sprint(declared), "MaxOutstandingR2T", "1")
		cmd, imm, ok := r.command()
		if !ok {
			return
		}
		// What must come unasked, and then for each R2T.
		at, unsolicited := uint32(0), uint32(0)
		if immediate {
			at = uint32(min(size, first, segment))
		}
		if !initialR2T {
			unsolicited = uint32(min(size, first))
		}
		if !bytes.Equal(imm, data[:at]) || cmd.IsFinal() != (unsolicited <= at) || cmd.EDTL() != uint32(size) || cmd.Flags()&^pdu.Final != pdu.CmdWrite|pdu.AttrSimple {
			t.Errorf("write of %d: the command is %x with %d bytes", size, cmd, len(imm))
		}
		want = append(want, dataOuts(pdu.NoTag, at, unsolicited, uint32(segment))...)
		for range want {
			got = append(got, r.take(t, cmd.ITT(), data))
		}
		at = max(at, unsolicited)
		for sn := uint32(0); at < uint32(size); sn++ {
			n := min(uint32(burst), uint32(size)-at)
			if sn%3 == 1 && n > 2 {
				n = n/2 + 1 // a target may ask for less
			}
			r.r2t(cmd.ITT(), 1000+sn, sn, at, n)
			due := dataOuts(1000+sn, at, at+n, uint32(segment))
			for range due {
				got = append(got, r.take(t, cmd.ITT(), data))
			}
			want = append(want, due...)
			at += n
		}
		r.good(cmd.ITT(), nil)
		if more := r.answerAll(0, 0); len(more) != 1 {
			t.Errorf("write of %d: more came: %x", size, more)
		}
	})
	w := write(t, s.Session, size)
	require.NoError(t, w.result(t).Err, "write of %d", size)
	require.NoError(t, s.Close(t.Context()))
	require.Equal(t, want, got, "write of %d", size)
}

// burstsInOrder submits many writes at once: the unsolicited data of each comes
// before the next command.
func burstsInOrder(t *testing.T, immediate bool) {
	type came struct {
		itt uint32
		sent
	}
	const n, first, segment = 8, 8192, 2048
	seen := make(chan []came, 1)
	s := logsIn(t, func(r *raw) {
		r.login("InitialR2T", "No", "ImmediateData", map[bool]string{true: "Yes", false: "No"}[immediate], "FirstBurstLength", fmt.Sprint(first), "MaxBurstLength", "65536",
			"MaxRecvDataSegmentLength", fmt.Sprint(segment))
		var got []came
		var tags []uint32
		for left := n * first; left > 0; {
			h, b, ok := r.read()
			if !ok {
				break
			}
			switch h.Opcode() {
			case pdu.OpNopOut:
				r.pong(h)
				continue
			case pdu.OpSCSICommand:
				tags = append(tags, h.ITT())
				// The first command is asked for more at once, which must not
				// overtake the bursts of those that came before.
				if len(tags) == 1 {
					r.r2t(h.ITT(), 7, 0, first, 4096)
				}
			}
			if h.Opcode() == pdu.OpDataOut && h.TTT() != pdu.NoTag {
				continue
			}
			left -= len(b)
			got = append(got, came{h.ITT(), sent{op: h.Opcode(), final: h.IsFinal(), n: uint32(len(b))}})
		}
		seen <- got
		r.drain()
	})
	var p block.Plug
	for range n {
		w := &waited{done: make(chan struct{})}
		w.c = &initiator.Command{Dir: initiator.DataOut, Data: patterned(16384), Owner: w}
		scsi.Write(&w.c.CDB, 0, 32, false, true)
		require.True(t, s.Submit(w.c, &p))
	}
	p.Flush()
	got := <-seen
	imm := uint32(0)
	if immediate {
		imm = segment
	}
	var want []came
	for i := range n {
		itt := got[min(len(got)-1, len(want))].itt
		want = append(want, came{itt, sent{op: pdu.OpSCSICommand, n: imm}})
		for at := imm; at < first; at += segment {
			want = append(want, came{itt, sent{op: pdu.OpDataOut, final: at+segment == first, n: segment}})
		}
		require.NotContains(t, want[:len(want)-1-(first-int(imm))/segment], itt, "command %d", i)
	}
	require.Equal(t, want, got)
}

// narrow makes the socket buffers of a session small, so that
// a target that does not read is noticed after some hundred kilobytes.
func narrow(c *initiator.Config) {
	c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		nc, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err == nil {
			nc.(*net.TCPConn).SetWriteBuffer(32 << 10)
		}
		return nc, err
	}
}

func (r *raw) narrow() { r.Conn.(*net.TCPConn).SetReadBuffer(32 << 10) }

// r2ts sends several R2Ts of n bytes each with one write.
func (r *raw) r2ts(itt, ttt, sn, at, n uint32, count int) {
	var out []byte
	for i := range uint32(count) {
		var h pdu.Header
		h[0], h[1] = uint8(pdu.OpR2T), pdu.Final
		h.SetITT(itt)
		h.SetTTT(ttt + i)
		h.SetStatSN(r.statSN)
		h.SetExpCmdSN(r.expCmdSN)
		h.SetMaxCmdSN(r.expCmdSN + r.window - 1)
		h.SetDataSN(sn + i)
		h.SetBufferOffset(at + i*n)
		h.SetDesiredLen(n)
		out = append(out, h[:]...)
	}
	r.Write(out)
}

func manyR2Ts(t *testing.T) {
	const burst, agreed = 1 << 20, 3
	login := []string{"InitialR2T", "Yes", "ImmediateData", "No", "MaxBurstLength", fmt.Sprint(burst), "MaxRecvDataSegmentLength", "65536", "MaxOutstandingR2T", fmt.Sprint(agreed)}
	data := patterned(2 * agreed * burst)
	var got, want []sent
	s := logsIn(t, func(r *raw) {
		r.login(login...)
		cmd, _, _ := r.command()
		for round := range uint32(2) {
			r.r2ts(cmd.ITT(), 50+round*agreed, round*agreed, round*agreed*burst, burst, agreed)
			for i := range uint32(agreed) {
				k := round*agreed + i
				due := dataOuts(50+k, k*burst, (k+1)*burst, 65536)
				for range due {
					got = append(got, r.take(t, cmd.ITT(), data))
				}
				want = append(want, due...)
			}
		}
		r.good(cmd.ITT(), nil)
		r.answerAll(0, 0)
	})
	require.NoError(t, write(t, s, len(data)).result(t).Err)
	require.NoError(t, s.Close(t.Context()))
	require.Equal(t, want, got)

	over := watches(t, narrow, func(r *raw) {
		r.narrow()
		r.login(login...)
		cmd, _, _ := r.command()
		r.r2ts(cmd.ITT(), 50, 0, 0, burst, agreed+1)
		time.Sleep(100 * time.Millisecond) // with full buffers: none of it is served
		r.drain()
	})
	w := write(t, over.Session, len(data))
	require.ErrorContains(t, ends(t, over), "more than the 3 R2Ts")
	require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
}

func fairData(t *testing.T) {
	const tasks, burst, rounds, segment = 32, 512 << 10, 2, 8192
	lun := func(i uint32) [8]byte { return [8]byte{0x40, byte(i)} }
	type turn struct{ task, round uint32 }
	order := make(chan []turn, 1)
	s := logsIn(t, func(r *raw) {
		r.window = tasks
		r.login("InitialR2T", "Yes", "ImmediateData", "No", "MaxBurstLength", fmt.Sprint(burst), "MaxRecvDataSegmentLength", fmt.Sprint(segment))
		var tags [tasks]uint32
		at := map[uint32]uint32{}
		for i := range tags {
			h, _, ok := r.command()
			if !ok {
				return
			}
			tags[i], at[h.ITT()] = h.ITT(), uint32(i)
		}
		var got []turn
		for round := range uint32(rounds) {
			var out []byte
			for i, itt := range tags {
				var h pdu.Header
				h[0], h[1] = uint8(pdu.OpR2T), pdu.Final
				h.SetLUN(lun(uint32(i)))
				h.SetITT(itt)
				h.SetTTT(round<<16 | uint32(i))
				h.SetStatSN(r.statSN)
				h.SetExpCmdSN(r.expCmdSN)
				h.SetMaxCmdSN(r.expCmdSN + r.window - 1)
				h.SetDataSN(round)
				h.SetBufferOffset(round * burst)
				h.SetDesiredLen(burst)
				out = append(out, h[:]...)
			}
			r.Write(out)
			var sn [tasks]uint32
			for left := tasks * burst; left > 0; {
				h, b, ok := r.next(pdu.OpDataOut, nil)
				if !ok {
					return
				}
				i := at[h.ITT()]
				last := sn[i] == burst/segment-1
				if h.TTT() != round<<16|i || h.LUN() != lun(i) || h.DataSN() != sn[i] || h.BufferOffset() != round*burst+sn[i]*segment || h.IsFinal() != last || len(b) != segment {
					t.Errorf("data of command %d, round %d, PDU %d: %x", i, round, sn[i], h)
				}
				if !bytes.Equal(b, bytes.Repeat([]byte{byte(i)}, segment)) {
					t.Errorf("data of another command than %d", i)
				}
				sn[i]++
				left -= len(b)
				got = append(got, turn{i, round})
			}
		}
		order <- got
		for _, itt := range tags {
			r.good(itt, nil)
		}
		r.answerAll(0, 0)
	})
	var all []*waited
	for i := range uint32(tasks) {
		w := &waited{done: make(chan struct{})}
		w.c = &initiator.Command{LUN: lun(i), Dir: initiator.DataOut, Data: bytes.Repeat([]byte{byte(i)}, rounds*burst), Owner: w}
		scsi.Write(&w.c.CDB, 0, rounds*burst/512, false, true)
		submit(t, s, w.c)
		all = append(all, w)
	}
	for _, w := range all {
		require.NoError(t, w.result(t).Err)
	}
	// In turns: none is ahead of another by more than the PDUs of one batch of
	// 256 KiB, which may leave before the last R2T is read.
	const batch = 256<<10/segment + 1
	done := map[turn]int{}
	for _, x := range <-order {
		done[x]++
		for i := range uint32(tasks) {
			require.LessOrEqual(t, done[x]-done[turn{i, x.round}], batch, "command %d is ahead of %d", x.task, i)
		}
	}
}

func outOfOrder(t *testing.T) {
	for _, key := range []string{"DataSequenceInOrder", "DataPDUInOrder"} {
		refuses(t, key+"=No was not offered", answers(key, "No"))
	}
	offered := make(chan []pdu.Key, 1)
	s := logsIn(t, func(r *raw) {
		r.login("DataSequenceInOrder", "Yes", "DataPDUInOrder", "Yes")
		offered <- r.offered
		r.answerAll(0, 0)
	})
	keys := <-offered
	require.Contains(t, keys, pdu.Key{Name: "DataSequenceInOrder", Value: "Yes"})
	require.Contains(t, keys, pdu.Key{Name: "DataPDUInOrder", Value: "Yes"})
	require.NoError(t, s.Close(t.Context()))
	for name, r2t := range map[string]struct{ sn, at uint32 }{"a gap": {0, 65536}, "by a byte": {0, 1}, "from the end": {0, 256<<10 - 512}} {
		t.Run(name, writeDrops("R2T for", func(r *raw, itt uint32) { r.r2t(itt, 1, r2t.sn, r2t.at, 512) }))
	}
	t.Run("again", writeDrops("R2T for", func(r *raw, itt uint32) {
		r.r2t(itt, 1, 0, 0, 4096)
		r.next(pdu.OpDataOut, nil)
		r.r2t(itt, 2, 1, 0, 4096)
	}))
}
