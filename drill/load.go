// Package drill drives a running stack: verified load, faults, a verdict.
package drill

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// Disk is what a load runs on.
type Disk interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Flush() error
}

const blockSize = 4096

// Load writes and reads blocks of which each holds its own number and a
// version, and knows the version that was acknowledged last. Each worker owns
// the blocks whose number is its own modulo the workers, so that order is clear,
// and walks over them at a fixed pace: a block is written anew only after a
// whole round, which outlasts a fault. Copies of a write that a hung target
// executes late are thus not what this load looks for.
type Load struct {
	disk       Disk
	blocks     uint64
	versions   []uint64
	ios        atomic.Int64
	errors     atomic.Int64
	mismatches atomic.Int64
	longest    atomic.Int64 // ns, since the last Mark
	firstErr   atomic.Pointer[error]
	stop       chan struct{}
	wg         sync.WaitGroup
	flight     [workers]atomic.Int64 // start of the I/O in flight, 0 for none
}

const workers = 8

// Start loads the first bytes of a disk, which must be zero.
func Start(d Disk, bytes int64) *Load {
	l := &Load{disk: d, blocks: uint64(bytes / blockSize), stop: make(chan struct{})}
	l.versions = make([]uint64, l.blocks)
	for w := range workers {
		l.wg.Add(1)
		go l.work(w)
	}
	return l
}

func fill(b []byte, block, version uint64) {
	if version == 0 {
		clear(b)
		return
	}
	for i := 0; i < len(b); i += 16 {
		binary.LittleEndian.PutUint64(b[i:], block)
		binary.LittleEndian.PutUint64(b[i+8:], version)
	}
}

func (l *Load) work(w int) {
	defer l.wg.Done()
	rng := rand.New(rand.NewPCG(uint64(w), 1))
	pace := time.NewTicker(time.Millisecond)
	defer pace.Stop()
	write := uint64(w)
	buf, want := make([]byte, blockSize), make([]byte, blockSize)
	for n := 0; ; n++ {
		select {
		case <-l.stop:
			return
		case <-pace.C:
		}
		b := rng.Uint64N(l.blocks/workers)*workers + uint64(w)
		if n%2 == 0 {
			b = write
			if write += workers; write >= l.blocks {
				write = uint64(w)
			}
		}
		begin := time.Now()
		l.flight[w].Store(begin.UnixNano())
		var err error
		switch {
		case n%512 == 511:
			err = l.disk.Flush()
		case n%2 == 0:
			fill(buf, b, l.versions[b]+1)
			if _, err = l.disk.WriteAt(buf, int64(b)*blockSize); err == nil {
				l.versions[b]++
			}
		default:
			_, err = l.disk.ReadAt(buf, int64(b)*blockSize)
			if err == nil {
				fill(want, b, l.versions[b])
				if string(buf) != string(want) {
					l.mismatches.Add(1)
				}
			}
		}
		l.flight[w].Store(0)
		l.took(time.Since(begin))
		l.ios.Add(1)
		if err != nil {
			l.errors.Add(1)
			l.firstErr.CompareAndSwap(nil, &err)
			return // the block's content is unknown now
		}
	}
}

func (l *Load) took(d time.Duration) {
	for {
		old := l.longest.Load()
		if int64(d) <= old || l.longest.CompareAndSwap(old, int64(d)) {
			return
		}
	}
}

// Mark returns the longest I/O since the last Mark, those still in flight
// included, with the errors and mismatches so far.
func (l *Load) Mark() (longest time.Duration, errors, mismatches int64) {
	for w := range l.flight {
		if at := l.flight[w].Load(); at != 0 {
			l.took(time.Duration(time.Now().UnixNano() - at))
		}
	}
	return time.Duration(l.longest.Swap(0)), l.errors.Load(), l.mismatches.Load()
}

// IOs counts what was done.
func (l *Load) IOs() int64 { return l.ios.Load() }

// Stop ends the load and verifies every block through read, which may bypass
// the stack.
func (l *Load) Stop(read func(p []byte, off int64) (int, error)) error {
	close(l.stop)
	l.wg.Wait()
	if e := l.firstErr.Load(); e != nil {
		return fmt.Errorf("an I/O failed: %w", *e)
	}
	buf, want := make([]byte, blockSize), make([]byte, blockSize)
	for b := range l.blocks {
		if _, err := read(buf, int64(b)*blockSize); err != nil {
			return err
		}
		fill(want, b, l.versions[b])
		if string(buf) != string(want) {
			l.mismatches.Add(1)
		}
	}
	if n := l.mismatches.Load(); n > 0 {
		return fmt.Errorf("%d blocks do not hold what was acknowledged", n)
	}
	return nil
}
