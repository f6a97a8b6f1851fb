package target

import (
	"fmt"
	"sync"
	"sync/atomic"
)

const (
	chunkShift = 20
	chunkSize  = 1 << chunkShift
)

// chunk is one piece of a RAM disk. Its lock makes a read see a concurrent
// write whole or not at all, as long as both stay inside the chunk.
type chunk struct {
	mu   sync.RWMutex
	data [chunkSize]byte
}

// zeros is what a chunk never written reads as.
var zeros [chunkSize]byte

// LU is a logical unit: a sparse RAM disk with an identity. All methods may be
// called from any goroutine.
type LU struct {
	size      atomic.Uint64 // bytes
	blockSize int
	shift     uint // log2(blockSize)
	chunks    []atomic.Pointer[chunk]
	identity  atomic.Pointer[Identity]
	readOnly  atomic.Bool
	noCache   atomic.Bool
	access    atomic.Pointer[access] // nil: symmetric

	reserve    sync.Mutex
	registered []registration
	reserved   uint8 // type of the reservation, 0: none
}

// MaxSize is the largest RAM disk in bytes. Memory is used for written chunks
// of 1 MiB only.
const MaxSize = 64 << 40

// NewLU makes a RAM disk of size bytes in blocks of blockSize bytes (512 to
// 4096, a power of two).
func NewLU(size uint64, blockSize int, id Identity) (*LU, error) {
	l := &LU{blockSize: blockSize}
	l.size.Store(size)
	for blockSize>>l.shift > 1 {
		l.shift++
	}
	if blockSize < 512 || blockSize > 4096 || blockSize != 1<<l.shift {
		return nil, fmt.Errorf("target: block size %d: want 512, 1024, 2048 or 4096", blockSize)
	}
	if size == 0 || size > MaxSize || size%uint64(blockSize) != 0 {
		return nil, fmt.Errorf("target: size %d: want a multiple of the block size %d, at most %d", size, blockSize, uint64(MaxSize))
	}
	l.chunks = make([]atomic.Pointer[chunk], (size+chunkSize-1)>>chunkShift)
	l.SetIdentity(id)
	return l, nil
}

// Size is the capacity in bytes, BlockSize the logical block in bytes.
func (l *LU) Size() uint64   { return l.size.Load() }
func (l *LU) BlockSize() int { return l.blockSize }

// Resize changes the capacity, at most to what NewLU was given, and tells all
// sessions by UNIT ATTENTION.
func (s *Server) Resize(l *LU, size uint64) error {
	if most := uint64(len(l.chunks)) << chunkShift; size == 0 || size > most || size%uint64(l.blockSize) != 0 {
		return fmt.Errorf("target: size %d: want a multiple of %d, at most %d", size, l.blockSize, most)
	}
	l.size.Store(size)
	s.Attention(l, 0x2a, 0x09)
	return nil
}

// SetReadOnly sets the write protection that MODE SENSE reports and writes meet.
func (l *LU) SetReadOnly(ro bool) { l.readOnly.Store(ro) }

// SetWriteCache sets whether MODE SENSE reports a write cache (the default).
func (l *LU) SetWriteCache(on bool) { l.noCache.Store(!on) }

// Allocated is how many bytes of memory the disk's data takes.
func (l *LU) Allocated() uint64 {
	var n uint64
	for i := range l.chunks {
		if l.chunks[i].Load() != nil {
			n += chunkSize
		}
	}
	return n
}

// inside tells whether n bytes at off are on the disk.
func (l *LU) inside(off, n uint64) bool { return off <= l.size.Load() && n <= l.size.Load()-off }

// ReadAt fills p from byte off. Like WriteAt it fails only outside the disk.
func (l *LU) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || !l.inside(uint64(off), uint64(len(p))) {
		return 0, fmt.Errorf("target: read of %d bytes at %d: beyond %d", len(p), off, l.size.Load())
	}
	l.read(p, uint64(off))
	return len(p), nil
}

// WriteAt writes p at byte off.
func (l *LU) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || !l.inside(uint64(off), uint64(len(p))) {
		return 0, fmt.Errorf("target: write of %d bytes at %d: beyond %d", len(p), off, l.size.Load())
	}
	l.write(p, uint64(off))
	return len(p), nil
}

func (l *LU) read(p []byte, off uint64) {
	for len(p) > 0 {
		in := int(off & (chunkSize - 1))
		n := min(len(p), chunkSize-in)
		if c := l.chunks[off>>chunkShift].Load(); c != nil {
			c.mu.RLock()
			copy(p[:n], c.data[in:])
			c.mu.RUnlock()
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+uint64(n)
	}
}

func (l *LU) write(p []byte, off uint64) {
	for len(p) > 0 {
		in := int(off & (chunkSize - 1))
		n := min(len(p), chunkSize-in)
		c := l.at(off >> chunkShift)
		c.mu.Lock()
		copy(c.data[in:], p[:n])
		c.mu.Unlock()
		p, off = p[n:], off+uint64(n)
	}
}

// zero clears n bytes at off. Whole chunks are cleared in place rather than
// freed: a writer may hold the chunk already, and its data must not be lost.
func (l *LU) zero(off, n uint64) {
	for n > 0 {
		in := off & (chunkSize - 1)
		m := min(n, chunkSize-in)
		if c := l.chunks[off>>chunkShift].Load(); c != nil {
			c.mu.Lock()
			clear(c.data[in : in+m])
			c.mu.Unlock()
		}
		off, n = off+m, n-m
	}
}

// view is the memory behind up to n bytes at off, for a gathering write. It is
// not a snapshot: who reads and writes one block at once gets either.
func (l *LU) view(off uint64, n int) []byte {
	in := int(off & (chunkSize - 1))
	n = min(n, chunkSize-in)
	if c := l.chunks[off>>chunkShift].Load(); c != nil {
		return c.data[in : in+n]
	}
	return zeros[in : in+n]
}

func (l *LU) at(i uint64) *chunk {
	p := &l.chunks[i]
	if c := p.Load(); c != nil {
		return c
	}
	c := new(chunk)
	if p.CompareAndSwap(nil, c) {
		return c
	}
	return p.Load()
}
