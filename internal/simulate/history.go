package simulate

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/mpathd/mpathd/block"
)

// history is what happened to each block, as the guest saw it.
type history struct {
	blocks  [][]porcupine.Operation
	flushes []int64 // when each was submitted
	cuts    bool
	told    int  // power cuts that the server tells of
	untold  int  // of whose reports never arrived
	failed  int  // flushes
	shadow  bool // memory shows what it keeps as often as it is told to
}

func newHistory(blocks int) history { return history{blocks: make([][]porcupine.Operation, blocks)} }

// add books an acknowledged request.
func (h *history) add(r *request, end int64) {
	op := porcupine.Operation{ClientId: r.id, Call: r.call, Return: end}
	switch r.op {
	case block.Flush:
		h.flush(op, actFlush)
		return
	case block.Read:
		for i, v := range r.seenAt {
			op.Input, op.Output = input{act: actRead}, v
			h.blocks[r.at+i] = append(h.blocks[r.at+i], op)
		}
		return
	}
	for i := r.at; i < r.at+r.n; i++ {
		op.Input = input{act: actWrite, v: r.value, fua: r.fua}
		h.blocks[i] = append(h.blocks[i], op)
	}
}

// flush books a flush of all blocks.
func (h *history) flush(op porcupine.Operation, how act) {
	op.Input = input{act: how}
	h.flushes = append(h.flushes, op.Call)
	for i := range h.blocks {
		h.blocks[i] = append(h.blocks[i], op)
	}
}

// power books a power cut.
func (h *history) power(call, end int64, two, told bool) {
	h.cuts = true
	if told {
		h.told++
	}
	for i := range h.blocks {
		h.blocks[i] = append(h.blocks[i], porcupine.Operation{ClientId: int(call), Input: input{act: actPower, two: two, told: told}, Call: call, Return: end})
	}
}

// check looks for an order that explains each block. unsure counts the blocks
// for which time was too short.
func (h *history) check(d *disk, limit time.Duration) (err error, unsure int) {
	m := register(h.cuts)
	slices.Sort(h.flushes)
	for i, ops := range h.blocks {
		var all []porcupine.Operation
		for _, op := range ops {
			in := op.Input.(input)
			switch in.act {
			case actFlush, actFlushFailed:
				if !h.cuts {
					continue
				}
				n, _ := slices.BinarySearch(h.flushes, op.Call)
				in.nth = uint16(n)
			case actPower:
				in.told = in.told && h.untold == 0
			case actWrite:
				n, _ := slices.BinarySearch(h.flushes, op.Return)
				in.nth = uint16(n)
			}
			op.Input = in
			again := 0
			if in.act == actWrite {
				again = min(d.execs[exec{i, in.v}]-1, 3)
				if in.v == 0 || h.shadow { // zeroes of all requests look alike, and memory counts nothing
					again = 2
				}
			}
			for range again {
				x := op
				x.Input = input{act: actMaybe, v: in.v, nth: in.nth}
				all = append(all, x)
			}
			all = append(all, op)
		}
		switch porcupine.CheckOperationsTimeout(m, all, limit) {
		case porcupine.Illegal:
			return fmt.Errorf("block %d: no order explains it:\n%s", i, tell(ops)), unsure
		case porcupine.Unknown:
			unsure++
		}
	}
	return nil, unsure
}

// tell lists a history for a human.
func tell(ops []porcupine.Operation) string {
	var b strings.Builder
	for _, op := range ops {
		end := fmt.Sprint(op.Return)
		if op.Return == math.MaxInt64 {
			end = "never"
		}
		fmt.Fprintf(&b, "  %d to %s: %v", op.Call, end, op.Input)
		if op.Output != nil {
			fmt.Fprintf(&b, " = %v", op.Output)
		}
		b.WriteByte('\n')
	}
	return b.String()
}
