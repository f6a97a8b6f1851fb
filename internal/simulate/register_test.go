package simulate

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/anishathalye/porcupine"
	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
)

// plain is what cell packs: every write since the block was certain, in order.
type plain []struct{ v, nth uint16 }

func (p plain) flush(nth uint16) plain {
	for i := len(p) - 1; i >= 0; i-- {
		if p[i].nth <= nth {
			return p[i:]
		}
	}
	return p
}

func (p plain) values() (out []uint16) {
	for _, w := range p {
		out = with(out, w.v)
	}
	return out
}

// A packed block must leave to a power cut exactly what the whole list of its
// writes leaves.
func TestPackedBlockIsTheListOfItsWrites(t *testing.T) {
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 0))
		c, p := only(0), plain{{0, 0}}
		flushes := uint16(0)
		for range 12 {
			v := uint16(r.IntN(4))
			switch r.IntN(8) {
			case 0:
				nth := flushes - min(flushes, uint16(r.IntN(2))) // they overtake each other
				c, p = c.flush(nth), p.flush(nth)
				flushes++
			case 1:
				c, p = c.write(v, 0, true, true), plain{{v, 0}}
			default:
				nth := flushes + uint16(r.IntN(3)) // acknowledged soon or later
				c, p = c.write(v, nth, false, true), append(p, struct{ v, nth uint16 }{v, nth})
			}
			var got []uint16
			for _, x := range c.cut(true) {
				got = with(got, x.(cell).now)
			}
			require.Equal(t, p.values(), got, "seed %d: %v", seed, p)
			require.Equal(t, p[len(p)-1].v, c.now)
			for _, x := range c.cut(true) { // lost as soon as a flush would have ended it
				x := x.(cell)
				for nth := range flushes + 4 {
					require.Equal(t, !slices.Contains(p.flush(nth).values(), x.now), x.lost <= nth, "seed %d: %d of %v, flush %d", seed, x.now, p, nth)
				}
			}
		}
	}
}

// What a flush promises, and what it does not.
func TestHistories(t *testing.T) {
	const write, read, flush, failed, cut, told = "write", "read", "flush", "failed", "cut", "told"
	type op struct {
		do        string
		v         uint16
		call, end int64
	}
	for _, c := range []struct {
		name  string
		ops   []op
		legal bool
	}{
		{"an unflushed write may be lost", []op{{write, 1, 1, 2}, {cut, 0, 3, 4}, {read, 0, 5, 6}}, true},
		{"a flushed write is there", []op{{write, 1, 1, 2}, {flush, 0, 3, 4}, {cut, 0, 5, 6}, {read, 0, 7, 8}}, false},
		{"a flush does not cover a write under way", []op{{write, 1, 1, 9}, {read, 1, 2, 3}, {flush, 0, 4, 5}, {cut, 0, 6, 7}, {read, 0, 8, 10}}, true},
		{"a flush says nothing of a loss that nobody told", []op{{write, 1, 1, 2}, {cut, 0, 3, 4}, {flush, 0, 5, 6}, {read, 0, 7, 8}}, true},
		{"a flush after a told loss does not succeed", []op{{write, 1, 1, 2}, {told, 0, 3, 4}, {flush, 0, 5, 6}, {read, 0, 7, 8}}, false},
		{"it fails", []op{{write, 1, 1, 2}, {told, 0, 3, 4}, {failed, 0, 5, 6}, {flush, 0, 7, 8}, {read, 0, 9, 10}}, true},
		{"a write that replaced the lost one is flushed", []op{{write, 1, 1, 2}, {told, 0, 3, 4}, {write, 2, 5, 6}, {flush, 0, 7, 8}, {read, 2, 9, 10}}, true},
		{"a flush submitted before the lost write was acknowledged does not tell its loss", []op{{failed, 0, 1, 9}, {write, 1, 2, 3}, {told, 0, 4, 5}, {flush, 0, 10, 11}, {read, 0, 12, 13}}, false},
		{"old data does not come back by itself", []op{{write, 1, 1, 2}, {write, 2, 3, 4}, {read, 1, 5, 6}}, false},
	} {
		h := newHistory(1)
		for i, o := range c.ops {
			rq := &request{n: 1, value: o.v, call: o.call, id: i}
			switch o.do {
			case write:
				rq.op = block.Write
				h.add(rq, o.end)
			case read:
				rq.op, rq.seenAt = block.Read, []uint16{o.v}
				h.add(rq, o.end)
			case flush:
				rq.op = block.Flush
				h.add(rq, o.end)
			case failed:
				h.flush(porcupine.Operation{ClientId: i, Call: o.call, Return: o.end}, actFlushFailed)
			default:
				h.power(o.call, o.end, false, o.do == told)
			}
		}
		err, _ := h.check(&disk{execs: map[exec]int{}}, checkTime)
		require.Equal(t, c.legal, err == nil, "%s: %v", c.name, err)
	}
}
