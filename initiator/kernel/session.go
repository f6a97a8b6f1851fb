// Package kernel is the transport of paths that the kernel's SCSI layer
// serves: block devices that the host has already, and sessions of iscsi_tcp
// that this process logs in and hands over. Data goes through O_DIRECT, every
// other command through SG_IO.
//
// An I/O that hangs in the kernel cannot be cancelled. Each therefore works on
// memory of its own: when a session ends, its commands come back at once, and
// that memory stays with the kernel until it gives the I/O back. Until then no
// new session begins on the same device.
package kernel

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// Options are those of a session.
type Options struct {
	FailoverTime   time.Duration // silence that ends a busy session; default 1 s
	CommandTimeout time.Duration // after which a command that hangs ends the session, default 30 s
	QueueDepth     int           // commands in flight, default 128, at most 4096
	// OnState is told of Suspect, Up (again) and Dead, never with a lock held.
	// Dead comes before the outstanding commands are handed back.
	OnState func(st initiator.State, cause error)
	// OnRoom is told that a session that refused a command has room again.
	OnRoom func(p *block.Plug)
}

func (o Options) complete() Options {
	if o.FailoverTime <= 0 {
		o.FailoverTime = time.Second
	}
	if o.CommandTimeout <= 0 {
		o.CommandTimeout = 30 * time.Second
	}
	if o.QueueDepth <= 0 {
		o.QueueDepth = 128
	}
	o.QueueDepth = min(o.QueueDepth, 4096)
	return o
}

// Session is a block device in use as a path. Its methods are those of
// initiator.Session and safe for concurrent use.
type Session struct {
	o      Options
	dev    device
	device string  // as the operator knows it
	bs     int64   // logical block, bytes
	lun    [8]byte // of the path, for notices
	// teardown, if set, ends what the kernel holds beside the device: then hung
	// I/O comes back. Called once, after the commands were handed back.
	teardown func()

	onNotice atomic.Pointer[func(initiator.Notice)]
	state    atomic.Int32
	failed   sync.Once
	err      error         // set before dying is closed
	dying    chan struct{} // closed by the first fail
	done     chan struct{} // closed when all commands are handed back
	released chan struct{} // closed when the kernel holds nothing of this session any more
	life     atomic.Uint64 // commands that came back with an answer: signs of life

	mu       sync.Mutex
	work     sync.Cond // the queue is not empty, or the session is dead
	calm     sync.Cond // a worker is done with a command
	queue    []job     // ring
	head, n  int
	workers  []*worker
	idle     int
	seq      uint64
	inFlight int // queued or with a worker
	tick     uint32
	refused  bool
	closed   bool
	dead     bool
	gone     bool  // released is closed, or about to be
	torn     bool  // teardown is done
	calls    int   // under way in the kernel
	returned []job // by workers, for routineEnd
	pinging  bool
	unitAttn []byte // sense that a ping drew and the next command reports
}

// job is a command with its place in the order of submission.
type job struct {
	c        *initiator.Command
	seq      uint64
	tick     uint32 // of the watchdog, when it was submitted
	delivery initiator.Delivery
}

// maxWorkers bounds the commands that are in the kernel at once; each takes a
// thread and a buffer while it is there.
const maxWorkers = 32

var errClosed = errors.New("closed by us")

// newSession takes dev, which the session closes.
func newSession(o Options, dev device, name string, blockSize int) *Session {
	o = o.complete()
	s := &Session{o: o, dev: dev, device: name, bs: int64(blockSize), dying: make(chan struct{}), done: make(chan struct{}), released: make(chan struct{}),
		queue: make([]job, o.QueueDepth)}
	s.work.L, s.calm.L = &s.mu, &s.mu
	return s
}

// start sets the session going.
func (s *Session) start() {
	go s.routineWatch()
	go s.routineEnd()
}

// Device is the block device that serves, like /dev/sdb.
func (s *Session) Device() string { return s.device }

// State tells whether the session serves.
func (s *Session) State() initiator.State { return initiator.State(s.state.Load()) }

// Done is closed when the session has ended and every command was handed back.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err is why the session ended; nil while it lives.
func (s *Session) Err() error {
	select {
	case <-s.dying:
		return s.err
	default:
		return nil
	}
}

// Submit takes a command, or refuses it when QueueDepth are in flight or the
// session is over. It never blocks.
func (s *Session) Submit(c *initiator.Command, _ *block.Plug) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.dead {
		return false
	}
	if s.inFlight == len(s.queue) {
		s.refused = true
		return false
	}
	c.Result = initiator.Result{}
	s.seq++
	s.queue[(s.head+s.n)%len(s.queue)] = job{c: c, seq: s.seq, tick: s.tick}
	s.n++
	s.inFlight++
	switch {
	case s.idle >= s.n:
		s.work.Signal()
	case len(s.workers) < min(maxWorkers, len(s.queue)):
		w := &worker{s: s}
		s.workers = append(s.workers, w)
		go w.routine()
	default:
		s.work.Signal()
	}
	return true
}

// take gives the oldest queued command. Caller holds mu.
func (s *Session) take() job {
	j := s.queue[s.head]
	s.queue[s.head] = job{}
	s.head = (s.head + 1) % len(s.queue)
	s.n--
	return j
}

// Do submits c and waits for its end; see initiator.Session.Do.
func (s *Session) Do(ctx context.Context, c *initiator.Command) error {
	w := make(waiter, 1)
	c.Owner = w
	for !s.Submit(c, nil) {
		select {
		case <-s.dying:
			return fmt.Errorf("%w: %w", initiator.ErrSessionLost, s.err)
		case <-ctx.Done():
			return fmt.Errorf("%s takes no more commands: %w", s.device, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
	select {
	case <-w:
		if c.Result.Err == initiator.ErrSessionLost {
			return fmt.Errorf("%w: %w", initiator.ErrSessionLost, s.Err())
		}
		return c.Result.Err
	case <-ctx.Done():
		return fmt.Errorf("%s: no answer from the kernel: %w", s.device, ctx.Err())
	}
}

type waiter chan struct{}

func (w waiter) Done(*initiator.Command, *block.Plug) { w <- struct{}{} }

// OnNotice sets who is told of unit attentions and deferred errors, whatever
// command met them; f must not block. Those that meet READ and WRITE the kernel
// keeps to itself.
func (s *Session) OnNotice(f func(initiator.Notice)) { s.onNotice.Store(&f) }

// notice passes on what a command met.
func (s *Session) notice(r *initiator.Result) {
	if r.Status != scsi.StatusCheckCondition {
		return
	}
	sense := scsi.ParseSense(r.SenseData())
	if f := s.onNotice.Load(); f != nil && (sense.Key == scsi.KeyUnitAttention || sense.Deferred) {
		(*f)(initiator.Notice{LUN: s.lun, Sense: sense})
	}
}

// LUReset asks for LOGICAL UNIT RESET and waits until the kernel reports its
// end (SAM-5 7.7). A unit or driver that does not do it is a
// *initiator.TaskError.
func (s *Session) LUReset(ctx context.Context, _ [8]byte) error {
	if !s.enter() {
		return fmt.Errorf("LOGICAL UNIT RESET: %w: %w", initiator.ErrSessionLost, s.Err())
	}
	answer := make(chan error, 1)
	go func() {
		defer s.leave()
		answer <- s.dev.reset()
	}()
	select {
	case err := <-answer:
		if err != nil {
			return fmt.Errorf("%s: %w: %w", s.device, err, &initiator.TaskError{Function: luResetFunction, Response: notSupported})
		}
		return nil
	case <-s.dying:
		return fmt.Errorf("LOGICAL UNIT RESET: %w: %w", initiator.ErrSessionLost, s.err)
	case <-ctx.Done():
		return fmt.Errorf("LOGICAL UNIT RESET: no answer: %w", ctx.Err())
	}
}

// As RFC 7143 11.5.1 and 11.6.1 number them.
const (
	luResetFunction = 5
	notSupported    = 5
)

// Abort ends the session at once; commands come back with ErrSessionLost.
func (s *Session) Abort(cause error) { s.fail(cause) }

// Close waits at most two seconds for the commands in flight, ends the session
// and waits until the kernel holds nothing of it, or ctx ends.
func (s *Session) Close(ctx context.Context) error {
	calm, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	wake := context.AfterFunc(calm, func() { s.mu.Lock(); s.calm.Broadcast(); s.mu.Unlock() })
	defer wake()
	s.mu.Lock()
	s.closed = true
	for s.inFlight > 0 && !s.dead && calm.Err() == nil {
		s.calm.Wait()
	}
	s.mu.Unlock()
	s.fail(errClosed)
	<-s.done
	select {
	case <-s.released:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: I/O is still in the kernel: %w", s.device, ctx.Err())
	}
}

// fail ends the session: the first cause counts. It never waits.
func (s *Session) fail(cause error) {
	s.failed.Do(func() {
		s.err = cause
		s.state.Store(int32(initiator.Dead))
		s.mu.Lock()
		s.dead = true
		s.work.Broadcast()
		s.calm.Broadcast()
		s.mu.Unlock()
		close(s.dying)
	})
}

// routineEnd hands the outstanding commands back, in the order of submission.
// What is in the kernel is abandoned there: it works on the worker's memory.
func (s *Session) routineEnd() {
	<-s.dying
	if s.o.OnState != nil {
		s.o.OnState(initiator.Dead, s.err)
	}
	s.mu.Lock()
	var lost []job
	for s.n > 0 {
		lost = append(lost, s.take())
	}
	for {
		busy := false
		for _, w := range s.workers {
			switch w.phase {
			case inKernel:
				w.job.delivery = initiator.Sent
				lost = append(lost, w.job)
				w.job, w.phase = job{}, abandoned
			case loading, finishing:
				busy = true
			}
		}
		if !busy {
			break
		}
		s.calm.Wait()
	}
	lost = append(lost, s.returned...)
	s.returned = nil
	s.inFlight = 0
	s.mu.Unlock()
	slices.SortFunc(lost, func(a, b job) int { return int(int64(a.seq - b.seq)) })
	var p block.Plug
	for _, j := range lost {
		j.c.Result.Err, j.c.Result.Delivery = initiator.ErrSessionLost, j.delivery
		j.c.Owner.Done(j.c, &p)
	}
	p.Flush()
	close(s.done)
	if s.teardown != nil {
		s.teardown()
	}
	s.mu.Lock()
	s.torn = true
	s.release()
	s.mu.Unlock()
}

// enter counts a call into the kernel; false if the session is over.
func (s *Session) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return false
	}
	s.calls++
	return true
}

// leave ends a call. The last of a dead session closes the device.
func (s *Session) leave() {
	s.mu.Lock()
	s.calls--
	s.release()
	s.mu.Unlock()
}

// release closes the device once nobody is in the kernel. Caller holds mu.
func (s *Session) release() {
	if s.dead && s.torn && s.calls == 0 && !s.gone {
		s.gone = true
		go func() { // close(2) may wait
			s.dev.close()
			close(s.released)
		}()
	}
}

// stuck is how many calls the kernel has not given back.
func (s *Session) stuck() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls
}
