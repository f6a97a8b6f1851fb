package simulate

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/anishathalye/porcupine"
)

// A block is a register:
//
//   - a read sees the last write; write zeroes and trim are writes of zeroes;
//   - a write that was executed more than once, or kept in memory (shadow), may
//     take effect more than once, but only between its submission and its
//     acknowledgement;
//   - a flush covers what was acknowledged before it was submitted, nothing else
//     (nbd proto.md, NBD_CMD_FLUSH: "all write commands … that it completes …
//     prior to" it): a write under way may be seen by a read and yet be lost;
//   - a power cut of a server may bring back any value since the last write that
//     a flush covers, and nothing older. A write with FUA is there at once;
//   - where the server tells of the power cut (unit attention 29/01), a flush
//     after it must not succeed if it covers a write that is lost and was not
//     replaced since: the first one fails. Where it does not tell (SPC-4 table
//     "UNIT ATTENTION": 29/00 at every login looks the same), no initiator can
//     know.

type act uint8

const (
	actRead act = iota
	actWrite
	actMaybe // a write that may have no effect
	actFlush
	actFlushFailed
	actPower
)

// input is one thing that happens to one block.
type input struct {
	act act
	v   uint16
	fua bool
	// nth is the place of a flush in the order in which flushes were submitted;
	// for a write, that of the first flush that covers it.
	nth uint16
	// two says that a power cut may have been that of a server which did not hold
	// the block, told that the server tells of it.
	two, told bool
}

func (i input) String() string {
	s := [...]string{"read", "write", "write again", "flush", "flush failed", "power cut"}[i.act]
	if i.act == actWrite || i.act == actMaybe {
		s += fmt.Sprint(" ", i.v)
	}
	if i.fua {
		s += " FUA"
	}
	if i.told {
		s += ", told"
	}
	return s
}

const never = math.MaxUint16 // no flush

// cell is the state of a block.
type cell struct {
	now uint16
	// lost is the first flush that covers a write which a power cut undid, never
	// if none is known.
	lost uint16
	// may is what a power cut may leave: ages, oldest first, each a length, the
	// first flush that leaves nothing older, and values in ascending order.
	may string
}

// age is the values written between two writes that flushes tell apart.
type age struct {
	from   uint16 // the first flush that ends all ages before this
	values []uint16
}

func (c cell) ages() (out []age) {
	b := []byte(c.may)
	for len(b) > 0 {
		n := int(binary.BigEndian.Uint16(b))
		a := age{from: binary.BigEndian.Uint16(b[2:])}
		for b = b[4:]; n > 0; n-- {
			a.values = append(a.values, binary.BigEndian.Uint16(b))
			b = b[2:]
		}
		out = append(out, a)
	}
	return out
}

func pack(ages ...age) string {
	var b []byte
	for _, a := range ages {
		b = binary.BigEndian.AppendUint16(b, uint16(len(a.values)))
		b = binary.BigEndian.AppendUint16(b, a.from)
		for _, v := range a.values {
			b = binary.BigEndian.AppendUint16(b, v)
		}
	}
	return string(b)
}

// only is a block that holds a value for certain.
func only(v uint16) cell { return cell{v, never, pack(age{0, []uint16{v}})} }

// write has v on top; nth is the first flush that covers it.
func (c cell) write(v, nth uint16, fua, cuts bool) cell {
	switch {
	case !cuts:
		return cell{now: v}
	case fua:
		return only(v)
	}
	var out []age
	carry := uint16(never) // of an age whose only value was v: its flushes end what is older just the same
	for _, a := range c.ages() {
		a.values = without(a.values, v)
		if carry != never && len(out) > 0 {
			a.from = min(a.from, carry)
		}
		carry = never
		if len(a.values) == 0 {
			carry = a.from
			continue
		}
		if len(out) > 0 && a.from >= nth { // any flush that ends what is before a leaves only v
			last := &out[len(out)-1]
			for _, x := range a.values {
				last.values = with(last.values, x)
			}
			continue
		}
		out = append(out, a)
	}
	if len(out) == 0 {
		return cell{v, never, pack(age{0, []uint16{v}})}
	}
	return cell{v, never, pack(append(out, age{min(nth, carry), []uint16{v}})...)}
}

// flush leaves the last age that it ends, and what is younger.
func (c cell) flush(nth uint16) cell {
	ages := c.ages()
	for k := len(ages) - 1; k > 0; k-- {
		if ages[k].from <= nth {
			ages = ages[k:]
			ages[0].from = 0
			break
		}
	}
	return cell{c.now, c.lost, pack(ages...)}
}

// cut is a power cut: one cell for each value that it may leave.
func (c cell) cut(told bool) (out []any) {
	ages := c.ages()
	for k, a := range ages {
		for _, v := range a.values {
			x := only(v)
			if x.lost = c.lost; told && k+1 < len(ages) {
				x.lost = min(x.lost, ages[k+1].from)
			}
			out = append(out, x)
		}
	}
	return out
}

func with(vs []uint16, v uint16) []uint16 {
	at := 0
	for at < len(vs) && vs[at] < v {
		at++
	}
	if at < len(vs) && vs[at] == v {
		return vs
	}
	out := append([]uint16{}, vs[:at]...)
	return append(append(out, v), vs[at:]...)
}

func without(vs []uint16, v uint16) (out []uint16) {
	for _, x := range vs {
		if x != v {
			out = append(out, x)
		}
	}
	return out
}

// register is the model; without power cuts nothing needs to be remembered of
// what is durable.
func register(cuts bool) porcupine.Model {
	return (&porcupine.NondeterministicModel{
		Init: func() []any {
			if cuts {
				return []any{only(0)}
			}
			return []any{cell{}}
		},
		Step: func(state, in, out any) []any {
			c, i := state.(cell), in.(input)
			switch i.act {
			case actMaybe:
				return []any{c, c.write(i.v, i.nth, false, cuts)}
			case actWrite:
				return []any{c.write(i.v, i.nth, i.fua, cuts)}
			case actFlush:
				if c.lost <= i.nth {
					return nil
				}
				return []any{c.flush(i.nth)}
			case actFlushFailed:
				if c.lost <= i.nth {
					c.lost = never
				}
				return []any{c}
			case actPower:
				all := c.cut(i.told)
				if i.two {
					all = append(all, c)
				}
				return all
			}
			if c.now == out.(uint16) {
				return []any{c}
			}
			return nil
		},
	}).ToModel()
}
