package initiator

import (
	"fmt"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// Detection in ticks of a tenth of FailoverTime: ping after one tick of
// silence, suspect after three, dead after ten; an idle session is pinged
// every ten. Counting ticks rather than clock differences keeps a daemon that
// was itself stopped from declaring its paths dead.
const (
	ticksPing    = 1
	ticksSuspect = 3
	ticksDead    = 10
	ticksScan    = 5 // between looks for commands that hang
)

// routineWatch looks for signs of life: any bytes received count.
func (s *Session) routineWatch() {
	defer s.alive.Done()
	tick := time.NewTicker(s.cfg.FailoverTime / ticksDead)
	defer tick.Stop()
	var seen uint64
	silent, idle := 0, 0
	for {
		select {
		case <-s.dying:
			return
		case <-tick.C:
		}
		if s.ticks.Add(1)%ticksScan == 0 {
			s.scan()
		}
		if rx := s.rx.Load(); rx != seen {
			seen, silent, idle = rx, 0, 0
			if s.state.CompareAndSwap(int32(Suspect), int32(Up)) && s.cfg.OnState != nil {
				s.cfg.OnState(Up, nil)
			}
			continue
		}
		s.mu.Lock()
		busy := len(s.free) < len(s.slots) || s.ping != 0
		pinged := s.ping != 0
		s.mu.Unlock()
		if !busy {
			if idle++; idle >= ticksDead {
				idle = 0
				s.sendPing()
			}
			continue
		}
		silent++
		switch {
		case silent >= ticksDead:
			s.fail(fmt.Errorf("%w for %v", errSilent, s.cfg.FailoverTime))
			return
		case silent >= ticksSuspect:
			if s.state.CompareAndSwap(int32(Up), int32(Suspect)) && s.cfg.OnState != nil {
				s.cfg.OnState(Suspect, errSilent)
			}
		case silent >= ticksPing && !pinged:
			s.sendPing()
		}
	}
}

// scan looks for the oldest command that hangs for longer than CommandTimeout.
func (s *Session) scan() {
	limit := uint32(s.cfg.CommandTimeout / (s.cfg.FailoverTime / ticksDead))
	now, oldest, found, gen := s.ticks.Load(), limit, -1, uint16(0)
	s.mu.Lock()
	if len(s.free) < len(s.slots) {
		for i := range s.slots {
			sl := &s.slots[i]
			if age := now - sl.tick; sl.cmd != nil && !sl.finished && age > oldest {
				oldest, found, gen = age, i, sl.gen
			}
		}
	}
	s.mu.Unlock()
	if found >= 0 && s.escalating.CompareAndSwap(false, true) {
		s.alive.Add(1)
		go s.escalate(uint16(found), gen)
	}
}

// sendPing sends a NOP-Out that asks for an answer (RFC 7143 11.18).
func (s *Session) sendPing() {
	s.mu.Lock()
	if s.ping != 0 || s.closed {
		s.mu.Unlock()
		return
	}
	s.pingSeq = (s.pingSeq + 1) & 0x3fffffff
	s.ping = pingITT | s.pingSeq
	it := s.list(nil, -1)
	it.hdr[0], it.hdr[1] = uint8(pdu.OpNopOut)|pdu.Immediate, pdu.Final
	it.hdr.SetITT(s.ping)
	it.hdr.SetTTT(pdu.NoTag)
	it.hdr.SetCmdSN(s.cmdSN)
	it.hdr.SetExpStatSN(s.expStatSN.Load())
	s.mu.Unlock()
	s.Kick()
}
