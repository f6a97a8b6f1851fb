package main

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// laterWriter takes messages without waiting for whoever reads them: a journal
// that stands still, perhaps because its disk is one of ours, must not hold up
// a failover. What does not fit is left out, and counted.
type laterWriter struct {
	to io.Writer

	mu      sync.Mutex
	change  sync.Cond
	buf     []byte // taken, not yet being written
	spare   []byte
	lost    int
	writing bool
}

const (
	laterBytes = 256 << 10
	flushTime  = 2 * time.Second
)

func newLaterWriter(to io.Writer) *laterWriter {
	w := &laterWriter{to: to, buf: make([]byte, 0, laterBytes), spare: make([]byte, 0, laterBytes)}
	w.change.L = &w.mu
	go w.run()
	return w
}

// Write takes one message.
func (w *laterWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.buf)+len(b) > laterBytes {
		w.lost++
		return len(b), nil
	}
	w.buf = append(w.buf, b...)
	w.change.Broadcast()
	return len(b), nil
}

func (w *laterWriter) run() {
	w.mu.Lock()
	for {
		for len(w.buf) == 0 && w.lost == 0 {
			w.change.Wait()
		}
		out, lost := w.buf, w.lost
		w.buf, w.lost, w.writing = w.spare[:0], 0, true
		w.mu.Unlock()
		w.to.Write(out)
		if lost > 0 {
			fmt.Fprintf(w.to, "mpathd: %d messages were left out: nobody read them\n", lost)
		}
		w.mu.Lock()
		w.spare, w.writing = out, false
		w.change.Broadcast()
	}
}

// flush waits until everything is written, or nobody reads.
func (w *laterWriter) flush() {
	late := false
	t := time.AfterFunc(flushTime, func() { w.mu.Lock(); late = true; w.mu.Unlock(); w.change.Broadcast() })
	defer t.Stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	for (len(w.buf) > 0 || w.lost > 0 || w.writing) && !late {
		w.change.Wait()
	}
}
