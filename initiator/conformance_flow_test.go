package initiator_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
)

// StatSN, reads, writes and digests: FF09, DI, WR, DG.
var flowCases = map[string]conformanceCase{
	"FF09": {"skips a StatSN", "drops", readDrops("StatSN", func(r *raw, itt uint32) {
		r.statSN++
		r.dataIn(itt, pdu.Final|pdu.StatusBit, 0, 0, pattern)
	})},
	"DI01": {"sends one Data-In with status", "completes the command", readEnds(func(r *raw, itt uint32) { r.dataIn(itt, pdu.Final|pdu.StatusBit, 0, 0, pattern) }, whole)},
	"DI02": {"sends many Data-Ins and a response", "completes the command", readEnds(func(r *raw, itt uint32) {
		for i := range uint32(8) {
			r.dataIn(itt, 0, i, i*512, pattern[i*512:][:512])
		}
		r.good(itt, nil)
	}, whole)},
	"DI03": {"ends sequences early", "takes both", readEnds(func(r *raw, itt uint32) {
		r.dataIn(itt, pdu.Final, 0, 0, pattern[:2048])
		r.dataIn(itt, pdu.Final|pdu.StatusBit, 1, 2048, pattern[2048:])
	}, whole)},
	"DI04": {"skips a DataSN", "drops", func(t *testing.T) {
		for _, sn := range []uint32{1, 2, 0xffffffff} {
			t.Run(fmt.Sprint(sn), readDrops("DataSN", func(r *raw, itt uint32) { r.dataIn(itt, 0, sn, 0, pattern[:512]) }))
		}
	}},
	"DI05": {"sends data out of order", "drops", func(t *testing.T) {
		for _, off := range []uint32{0, 256, 1024} {
			t.Run(fmt.Sprint(off), readDrops("Data-In of", func(r *raw, itt uint32) {
				r.dataIn(itt, 0, 0, 0, pattern[:512])
				r.dataIn(itt, 0, 1, off, pattern[:512])
			}))
		}
	}},
	"DI06": {"sends data beyond the buffer", "drops, writes nothing outside the buffer", func(t *testing.T) {
		t.Run("beyond", readDrops("Data-In of", func(r *raw, itt uint32) { r.dataIn(itt, 0, 0, 0, make([]byte, 4097)) }))
		t.Run("wraps", readDrops("Data-In of", func(r *raw, itt uint32) { r.dataIn(itt, 0, 0, 0xfffffe00, make([]byte, 1024)) }))
	}},
	"DI07": {"sends more in one PDU than we declared, or announces it", "drops before it reads", func(t *testing.T) {
		t.Run("announced", readDrops("bytes of data in one PDU", func(r *raw, itt uint32) {
			var h pdu.Header
			h[0] = uint8(pdu.OpDataIn)
			h.SetITT(itt)
			h.SetDataLen(1<<24 - 1)
			r.Write(h[:])
		}))
		for _, most := range []int{512, 4096, 256 << 10} { // what is asked for, but in too large a piece
			for _, over := range []int{0, 1, 4} {
				s := watches(t, func(c *initiator.Config) { c.Offer.MaxData = most }, func(r *raw) {
					r.login()
					h, _, _ := r.command()
					r.dataIn(h.ITT(), 0, 0, 0, make([]byte, most))
					r.dataIn(h.ITT(), 0, 1, uint32(most), make([]byte, most+over))
					r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 2, uint32(2*most+over), make([]byte, most-over))
					r.drain()
				})
				c := &initiator.Command{Dir: initiator.DataIn, Data: make([]byte, 3*most)}
				err := s.Do(t.Context(), c)
				if over == 0 {
					require.NoError(t, err)
					continue
				}
				require.ErrorIs(t, err, initiator.ErrSessionLost)
				require.ErrorContains(t, s.Err(), "bytes of data in one PDU")
			}
		}
	}},
	"DI08": {"sends data for tasks that do not read", "drops", func(t *testing.T) {
		for name, itt := range map[string]uint32{"unknown": 0x00010007, "none": pdu.NoTag, "beyond": 0x0001ffff} {
			t.Run(name, readDrops("unknown task tag", func(r *raw, _ uint32) { r.dataIn(itt, 0, 0, 0, pattern[:512]) }))
		}
		t.Run("completed", func(t *testing.T) {
			s := logsIn(t, func(r *raw) {
				r.login()
				h, _, _ := r.command()
				r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				r.dataIn(h.ITT(), 0, 0, 0, pattern[:512])
				r.drain()
			})
			require.NoError(t, read8(t, s).result(t).Err)
			dropped(t, s, "unknown task tag")
		})
		t.Run("for a write", writeDrops("reads nothing", func(r *raw, itt uint32) { r.dataIn(itt, 0, 0, 0, pattern[:512]) }))
	}},
	"DI09": {"sends status that is not final, or twice, or CHECK CONDITION, in Data-In", "drops", func(t *testing.T) {
		t.Run("not final", readDrops("not final", func(r *raw, itt uint32) { r.dataIn(itt, pdu.StatusBit, 0, 0, pattern) }))
		t.Run("CHECK CONDITION", readDrops("Data-In with CHECK CONDITION", func(r *raw, itt uint32) {
			h := pdu.Header{0: uint8(pdu.OpDataIn), 1: pdu.Final | pdu.StatusBit, 3: 2}
			h.SetITT(itt)
			h.SetTTT(pdu.NoTag)
			r.send(h, pattern, true)
		}))
		t.Run("and a response", func(t *testing.T) {
			s := logsIn(t, func(r *raw) {
				r.login()
				h, _, _ := r.command()
				r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				r.good(h.ITT(), nil)
				r.drain()
			})
			require.NoError(t, read8(t, s).result(t).Err)
			dropped(t, s, "unknown task tag")
		})
	}},
	"DI11": {"sends less than it says", "reports a short read, never stale data", readEnds(func(r *raw, itt uint32) {
		r.dataIn(itt, pdu.Final, 0, 0, pattern[:2048])
		r.good(itt, nil)
	}, func(t *testing.T, w *waited) { require.ErrorIs(t, w.c.Result.Err, initiator.ErrShort) })},
	"DI13": {"sends empty and odd segments", "takes them", readEnds(func(r *raw, itt uint32) {
		r.dataIn(itt, 0, 0, 0, nil)
		r.dataIn(itt, 0, 1, 0, pattern[:1021])
		r.dataIn(itt, pdu.Final|pdu.StatusBit, 2, 1021, pattern[1021:])
	}, whole)},
	"WR05": {"asks for more than MaxBurstLength", "drops", writeDrops("R2T for", func(r *raw, itt uint32) { r.r2t(itt, 1, 0, 0, 65537) })},
	"WR06": {"asks for what is not there", "drops", func(t *testing.T) {
		for name, c := range map[string]struct {
			ttt, off, n uint32
			why         string
		}{"empty": {1, 0, 0, "R2T for"}, "no tag": {pdu.NoTag, 0, 512, "without a transfer tag"}, "beyond": {1, 256<<10 - 512, 1024, "R2T for"}, "wraps": {1, 0xfffffe00, 1024, "R2T for"}} {
			t.Run(name, writeDrops(c.why, func(r *raw, itt uint32) { r.r2t(itt, c.ttt, 0, c.off, c.n) }))
		}
		t.Run("unknown task", writeDrops("unknown task tag", func(r *raw, _ uint32) { r.r2t(0x00050003, 1, 0, 0, 512) }))
		t.Run("for a read", readDrops("writes nothing", func(r *raw, itt uint32) { r.r2t(itt, 1, 0, 0, 512) }))
	}},
	"WR07": {"skips an R2TSN", "drops", writeDrops("R2TSN", func(r *raw, itt uint32) { r.r2t(itt, 1, 1, 0, 512) })},
	"DG02": {"sends a wrong header digest", "drops at once", digestCase("header digest error", func(a []byte) { a[9] ^= 1 })},
	"DG03": {"sends a wrong data digest", "never delivers the data, drops", digestCase("data digest error", func(a []byte) { a[48+4+100] ^= 1 })},
}
