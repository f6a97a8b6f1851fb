package kernel

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/scsi"
)

// Detection in ticks of a tenth of FailoverTime, as on a session of our own: a
// busy unit that is silent is pinged after one tick with TEST UNIT READY, is
// suspect after three and dead after ten; an idle one is pinged every ten.
const (
	ticksPing    = 1
	ticksSuspect = 3
	ticksDead    = 10
)

var errSilent = errors.New("no sign of life from the kernel's device")

// routineWatch looks for signs of life: any command that comes back counts.
func (s *Session) routineWatch() {
	tick := time.NewTicker(s.o.FailoverTime / ticksDead)
	defer tick.Stop()
	limit := uint32(s.o.CommandTimeout / (s.o.FailoverTime / ticksDead))
	var seen uint64
	silent, idle := 0, 0
	for {
		select {
		case <-s.dying:
			return
		case <-tick.C:
		}
		s.mu.Lock()
		s.tick++
		busy, pinging, hangs := s.inFlight > 0 || s.pinging, s.pinging, s.oldest() > limit
		s.mu.Unlock()
		if hangs {
			s.fail(fmt.Errorf("%s: %w: no answer in %v", s.device, initiator.ErrTimeout, s.o.CommandTimeout))
			return
		}
		if n := s.life.Load(); n != seen {
			seen, silent, idle = n, 0, 0
			if s.state.CompareAndSwap(int32(initiator.Suspect), int32(initiator.Up)) && s.o.OnState != nil {
				s.o.OnState(initiator.Up, nil)
			}
			continue
		}
		if !busy {
			if idle++; idle >= ticksDead {
				idle = 0
				s.ping()
			}
			continue
		}
		silent++
		switch {
		case silent >= ticksDead:
			s.fail(fmt.Errorf("%s: %w for %v", s.device, errSilent, s.o.FailoverTime))
			return
		case silent >= ticksSuspect:
			if s.state.CompareAndSwap(int32(initiator.Up), int32(initiator.Suspect)) && s.o.OnState != nil {
				s.o.OnState(initiator.Suspect, errSilent)
			}
		case silent >= ticksPing && !pinging:
			s.ping()
		}
	}
}

// oldest is the age in ticks of the oldest command with a worker. Caller holds mu.
func (s *Session) oldest() (age uint32) {
	for _, w := range s.workers {
		if w.phase == inKernel {
			age = max(age, s.tick-w.job.tick)
		}
	}
	return age
}

// ping sends TEST UNIT READY, past the workers.
func (s *Session) ping() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead || s.pinging {
		return
	}
	s.pinging = true
	s.calls++
	go func() {
		rq := new(sys.SGRequest)
		prepare(rq, scsi.TestUnitReady(), s.o)
		o := read(rq, s.dev.sg(rq), s.device)
		if o.lost != nil {
			s.fail(o.lost)
		} else {
			s.life.Add(1)
		}
		s.mu.Lock()
		s.pinging = false
		// The unit tells an attention once: the next command passes it on.
		if o.res.Status == scsi.StatusCheckCondition && scsi.ParseSense(o.res.SenseData()).Key == scsi.KeyUnitAttention {
			s.unitAttn = slices.Clone(o.res.SenseData())
		}
		s.mu.Unlock()
		s.notice(&o.res)
		s.leave()
	}()
}
