package block

import (
	"math/bits"
	"sync"

	"github.com/mpathd/mpathd/internal/sys"
)

// Arena hands out I/O buffers from memory outside the Go heap, within a budget
// of bytes. Buffers come in powers of two from 4 KiB; freed ones are kept for
// their class until another class needs the budget.
type Arena struct {
	mu     sync.Mutex
	room   sync.Cond
	budget int
	mapped int
	free   [classes][][]byte
	closed bool
}

const (
	minShift = 12
	classes  = 14 // 4 KiB to 32 MiB
	// MaxBuffer is the largest buffer in bytes.
	MaxBuffer = 1 << (minShift + classes - 1)
)

// NewArena returns an arena of at most budget bytes (at least one MaxBuffer).
func NewArena(budget int) *Arena {
	a := &Arena{budget: max(budget, MaxBuffer)}
	a.room.L = &a.mu
	return a
}

func class(n int) int {
	if n <= 1<<minShift {
		return 0
	}
	return bits.Len(uint(n-1)) - minShift
}

// Get returns n bytes (at most MaxBuffer), page aligned, waiting while the
// budget is used up; nil after Close. The caller owns the buffer until Put.
func (a *Arena) Get(n int) []byte {
	k := class(n)
	size := 1 << (minShift + k)
	a.mu.Lock()
	defer a.mu.Unlock()
	for !a.closed {
		if l := len(a.free[k]); l > 0 {
			b := a.free[k][l-1]
			a.free[k] = a.free[k][:l-1]
			return b[:n]
		}
		for c := classes - 1; c >= 0 && a.mapped+size > a.budget; c-- {
			for l := len(a.free[c]); l > 0 && a.mapped+size > a.budget; l-- {
				b := a.free[c][l-1]
				a.free[c] = a.free[c][:l-1]
				a.mapped -= cap(b)
				sys.Unmap(b[:cap(b)])
			}
		}
		if a.mapped+size <= a.budget {
			if b, err := sys.Map(size); err == nil {
				a.mapped += size
				return b[:n:size]
			}
		}
		a.room.Wait()
	}
	return nil
}

// Put gives a buffer of Get back.
func (a *Arena) Put(b []byte) {
	b = b[:cap(b)]
	a.mu.Lock()
	if a.closed {
		a.mapped -= len(b)
		sys.Unmap(b)
	} else {
		k := class(len(b))
		a.free[k] = append(a.free[k], b)
	}
	a.mu.Unlock()
	a.room.Broadcast()
}

// Close ends all waiting and unmaps what is free; buffers still out are
// unmapped by their Put.
func (a *Arena) Close() {
	a.mu.Lock()
	a.closed = true
	for k := range a.free {
		for _, b := range a.free[k] {
			a.mapped -= len(b)
			sys.Unmap(b)
		}
		a.free[k] = nil
	}
	a.mu.Unlock()
	a.room.Broadcast()
}
