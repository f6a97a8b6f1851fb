// Package simulate runs the whole stack (NBD connection, group, iSCSI
// sessions) over simulated targets and a simulated network in fake time, from
// a seed, and checks the history of every block. docs/write-safety.md,
// "Simulated", says what it covers.
//
// The product's code is the real one and runs in its own goroutines. Everything
// around it (packets, targets, the script) happens in the goroutine of
// world.run, one event at a time, after the product has come to rest: that
// makes a run repeatable as far as the scheduler lets it.
package simulate

import (
	"container/heap"
	"math/rand/v2"
	"testing/synctest"
	"time"
)

// event is something that happens at a time. f runs on the goroutine of run.
type event struct {
	at  time.Time
	seq uint64
	f   func()
}

type eventHeap []event

func (h eventHeap) Len() int { return len(h) }
func (h eventHeap) Less(i, j int) bool {
	return h[i].at.Before(h[j].at) || h[i].at.Equal(h[j].at) && h[i].seq < h[j].seq
}
func (h eventHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *eventHeap) Push(x any)   { *h = append(*h, x.(event)) }
func (h *eventHeap) Pop() any {
	old := *h
	x := old[len(old)-1]
	*h = old[:len(old)-1]
	return x
}

// world is one run: the product's processes, the guest, the network and the
// targets. Fields are the run goroutine's, unless they say otherwise.
type world struct {
	seed   uint64
	set    setup
	net    *network
	disk   *disk
	srv    []*server
	guest  *guest
	proc   *process
	procs  []*process // all that ever were
	state  stateFile
	events eventHeap
	seq    uint64
	wake   chan struct{} // something happened outside run: look
	tally  Tally
}

// rand is the generator of one entity, so that what one does changes nothing
// for another.
func (w *world) rand(kind, n uint64) *rand.Rand {
	return rand.New(rand.NewPCG(w.seed, kind<<32|n))
}

// after schedules f. Call it from run only.
func (w *world) after(d time.Duration, f func()) {
	w.seq++
	heap.Push(&w.events, event{time.Now().Add(d), w.seq, f})
}

// nudge makes run look at what the product did.
func (w *world) nudge() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// run lets d pass, or less if done says so.
func (w *world) run(d time.Duration, done func() bool) bool {
	until := time.Now().Add(d)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		synctest.Wait()
		w.succeed()
		w.net.collect()
		if done != nil && done() {
			return true
		}
		next := until
		if len(w.events) > 0 && w.events[0].at.Before(until) {
			next = w.events[0].at
		}
		if wait := time.Until(next); wait > 0 {
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-w.wake:
			}
			continue
		}
		if len(w.events) == 0 || w.events[0].at.After(time.Now()) {
			return false
		}
		heap.Pop(&w.events).(event).f()
	}
}
