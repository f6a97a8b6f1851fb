package block

import (
	"math/bits"
	"sync"
	"time"

	"github.com/mpathd/mpathd/internal/sys"
)

// Arena hands out I/O buffers from one reservation of memory outside the Go
// heap. Buffers come in powers of two from 4 KiB; those given back are kept for
// their class until another class needs the room (a buddy system). Who waits is
// served in order, so that small buffers never starve a large one.
type Arena struct {
	// Starved, if set before the first Get, is called once per second while
	// somebody waits. It holds no lock of the arena.
	Starved func()

	mu     sync.Mutex
	room   sync.Cond
	size   int
	region []byte // mapped by the first Get or Populate
	quick  [classes][][]byte
	// free blocks of the region, by class: offsets, and for each page where a
	// free block begins its class + 1.
	blocks [classes][]int
	starts []uint8

	out          int    // bytes in use
	turn, next   uint64 // tickets of those that wait
	big          bool   // the one buffer beyond the region is in use
	ticking      bool
	closed, gone bool
}

const (
	minShift = 12
	classes  = 14 // 4 KiB to 32 MiB
	// MaxBuffer is the largest buffer in bytes.
	MaxBuffer = 1 << (minShift + classes - 1)
)

// NewArena returns an arena of budget bytes. A buffer larger than the budget is
// mapped for its use alone, one at a time.
func NewArena(budget int) *Arena {
	a := &Arena{size: max(budget, 1<<minShift) &^ (1<<minShift - 1)}
	a.room.L = &a.mu
	return a
}

func class(n int) int {
	if n <= 1<<minShift {
		return 0
	}
	return bits.Len(uint(n-1)) - minShift
}

// Populate makes the kernel give all of the memory now: no Get and no use of a
// buffer needs more of it later, but for buffers larger than the budget.
func (a *Arena) Populate() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.reserve(); err != nil {
		return err
	}
	return sys.Populate(a.region)
}

// reserve maps the region. Caller holds mu.
func (a *Arena) reserve() error {
	if a.region != nil {
		return nil
	}
	b, err := sys.Map(a.size)
	if err != nil {
		return err
	}
	a.region, a.starts = b, make([]uint8, a.size>>minShift)
	for off, k := 0, classes-1; off < a.size; {
		if n := 1 << (minShift + k); a.size-off < n {
			k--
		} else {
			a.free(off, k)
			off += n
		}
	}
	return nil
}

// Get returns n bytes (at most MaxBuffer), page aligned, waiting while there is
// no room; nil after Close. The caller owns the buffer until Put.
func (a *Arena) Get(n int) []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	k := class(n)
	if a.turn == a.next {
		if b := a.take(k); b != nil || a.closed {
			return b[:min(n, cap(b))]
		}
	}
	mine := a.next
	a.next++
	a.tick()
	for !a.closed {
		if a.turn == mine {
			if b := a.take(k); b != nil {
				a.turn++
				a.room.Broadcast()
				return b[:n]
			}
		}
		a.room.Wait()
	}
	return nil
}

// TryGet is Get without waiting: nil if there is no room now.
func (a *Arena) TryGet(n int) []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.turn != a.next {
		return nil
	}
	b := a.take(class(n))
	return b[:min(n, cap(b))]
}

// take is a buffer of a class, or nil. Caller holds mu.
func (a *Arena) take(k int) []byte {
	if a.closed || a.reserve() != nil {
		return nil
	}
	size := 1 << (minShift + k)
	if size > a.size {
		if a.big {
			return nil
		}
		b, err := sys.Map(size)
		if err != nil {
			return nil
		}
		a.big = true
		return b
	}
	if l := len(a.quick[k]); l > 0 {
		b := a.quick[k][l-1]
		a.quick[k] = a.quick[k][:l-1]
		a.out += size
		return b
	}
	off := a.split(k)
	if off < 0 && a.size-a.out >= size { // what other classes keep may make room
		for c := range a.quick {
			for _, b := range a.quick[c] {
				a.merge(a.offset(b), c)
			}
			a.quick[c] = a.quick[c][:0]
		}
		off = a.split(k)
	}
	if off < 0 {
		return nil
	}
	a.out += size
	return a.region[off : off+size : off+size]
}

func (a *Arena) offset(b []byte) int { return sys.Distance(a.region, b) }

func (a *Arena) free(off, k int) {
	a.blocks[k] = append(a.blocks[k], off)
	a.starts[off>>minShift] = uint8(k + 1)
}

// split takes the smallest free block that holds class k and frees the rest of
// it. It returns -1 if there is none.
func (a *Arena) split(k int) int {
	for c := k; c < classes; c++ {
		l := len(a.blocks[c])
		if l == 0 {
			continue
		}
		off := a.blocks[c][l-1]
		a.blocks[c] = a.blocks[c][:l-1]
		a.starts[off>>minShift] = 0
		for c > k {
			c--
			a.free(off+1<<(minShift+c), c)
		}
		return off
	}
	return -1
}

// merge frees a block, as one with its buddy where that is free.
func (a *Arena) merge(off, k int) {
	for k < classes-1 {
		buddy := off ^ 1<<(minShift+k)
		if buddy+1<<(minShift+k) > a.size || a.starts[buddy>>minShift] != uint8(k+1) {
			break
		}
		a.starts[buddy>>minShift] = 0
		for i, have := range a.blocks[k] {
			if have == buddy {
				last := len(a.blocks[k]) - 1
				a.blocks[k][i] = a.blocks[k][last]
				a.blocks[k] = a.blocks[k][:last]
				break
			}
		}
		off = min(off, buddy)
		k++
	}
	a.free(off, k)
}

// Put gives a buffer of Get back.
func (a *Arena) Put(b []byte) {
	b = b[:cap(b)]
	a.mu.Lock()
	if len(b) > a.size {
		sys.Unmap(b)
		a.big = false
	} else {
		k := class(len(b))
		a.quick[k] = append(a.quick[k], b)
		a.out -= len(b)
		a.unmap()
	}
	waiting := a.turn != a.next
	a.mu.Unlock()
	if waiting {
		a.room.Broadcast()
	}
}

// tick calls Starved for as long as somebody waits. Caller holds mu.
func (a *Arena) tick() {
	if a.Starved == nil || a.ticking {
		return
	}
	a.ticking = true
	time.AfterFunc(time.Second, func() {
		a.mu.Lock()
		a.ticking = false
		waiting := a.turn != a.next && !a.closed
		if waiting {
			a.tick()
		}
		a.mu.Unlock()
		if waiting {
			a.Starved()
		}
	})
}

// Close ends all waiting; the memory goes when the last buffer is back.
func (a *Arena) Close() {
	a.mu.Lock()
	a.closed = true
	a.unmap()
	a.mu.Unlock()
	a.room.Broadcast()
}

func (a *Arena) unmap() {
	if a.closed && a.out == 0 && a.region != nil && !a.gone {
		a.gone = true
		sys.Unmap(a.region)
	}
}

// Out is how many bytes are in buffers that are not back.
func (a *Arena) Out() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.out
}
