package initiator

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/coalesce"
	"github.com/mpathd/mpathd/internal/links"
	"github.com/mpathd/mpathd/internal/sys"
)

// Detection in ticks of a tenth of FailoverTime: ping after one tick of
// silence, suspect after three, dead after ten; an idle session is pinged
// every forty. Counting ticks rather than clock differences keeps a daemon that
// was itself stopped from declaring its paths dead.
const (
	ticksPing    = 1
	ticksSuspect = 3
	ticksDead    = 10
	ticksIdle    = 4 * ticksDead
	ticksScan    = 5 // between looks for commands that hang

	// A command window that is shut although nothing is in flight: pinged at each
	// silent tick, since the answer tells the window, suspect after ticksDead,
	// ended after ticksShut.
	ticksShut = 5 * ticksDead
)

var (
	errStalled = errors.New("the target acknowledges nothing of what was sent again")
	errShut    = errors.New("the target keeps its command window shut although no command is in flight")
)

// ackWithin is how long the status of a command stays unacknowledged on a
// session that has nothing else to send; the target keeps it until then.
const ackWithin = time.Second

func (s *Session) tickTime() time.Duration { return s.cfg.FailoverTime / ticksDead }

// watch looks for signs of life by a timer: once a tick while something is
// under way, every ticksIdle else, so that idle sessions cost next to nothing. Between ticks it has no goroutine. Guarded by Session.mu but for
// what only the running tick uses.
type watch struct {
	timer   *time.Timer
	ticking sync.WaitGroup // the running tick
	running bool
	pace    uint32    // ticks that the timer runs for
	due     time.Time // when it has run so long: events may wake it before
	ended   bool
	lost    error // what the link lost, for the next tick
	probe   bool  // the next tick pings

	// the running tick:
	seen    uint64             // value of rx
	taken   uint64             // bytes of ours that the target's TCP had acknowledged, 0: not looked
	silent  int                // ticks without a sign of life
	shutFor int                // ticks that the window was shut, see shut
	cause   error              // what was lost since the last sign of life
	acked   uint32             // value of ackedSN
	owedFor uint32             // ticks that it stood still although there was more to acknowledge
	info    *sys.TCPInfoReader // nil without TCP
}

func (s *Session) startWatch() {
	s.mu.Lock()
	s.pace = s.nextPace()
	s.due = time.Now().Add(s.paceTime())
	s.timer = time.AfterFunc(time.Until(s.due), s.tick)
	s.mu.Unlock()
}

// stopWatch returns when no tick runs and none will.
func (s *Session) stopWatch() {
	s.mu.Lock()
	s.ended = true
	s.timer.Stop()
	s.mu.Unlock()
	s.ticking.Wait()
}

// watchClosely makes the timer run by ticks from now on. Caller holds mu.
func (s *Session) watchClosely() {
	if s.pace > 1 && !s.ended {
		s.pace = 1
		s.due = time.Now().Add(s.paceTime())
		s.timer.Reset(time.Until(s.due))
	}
}

// busy tells whether a sign of life is due. Caller holds mu.
func (s *Session) busy() bool { return s.ping != 0 || s.inFlight() || s.shut() }

func (s *Session) inFlight() bool { return len(s.free) < len(s.slots) }

// shut tells whether no command may be sent although none is in flight whose
// answer could change that. Caller holds mu.
func (s *Session) shut() bool {
	return !s.inFlight() && pdu.SerialLess(s.maxCmdSN.Load(), s.cmdSN) && s.cfg.TargetName != "" && !s.closed
}

// owes tells whether the target has not heard yet that a status arrived. Caller
// holds mu.
func (s *Session) owes() bool { return s.ackedSN != s.expStatSN.Load() }

// nextPace is how many ticks may pass now. Caller holds mu.
func (s *Session) nextPace() uint32 {
	switch {
	case s.busy():
		return 1
	case s.owes():
		return s.ackTicks()
	}
	return ticksIdle
}

func (s *Session) ackTicks() uint32 { return uint32(max(2, min(ackWithin/s.tickTime(), ticksDead))) }

// paceTime is how long the timer runs; idle sessions are looked at together.
func (s *Session) paceTime() time.Duration {
	return coalesce.Delay(time.Duration(s.pace) * s.tickTime())
}

// moment is what a tick finds.
type moment struct {
	rested, busy, pinged, shut, owes bool // rested: the timer ran for more than a tick
	dead                             int  // ticks without a sign of life that end the session
}

// tick is what the timer runs.
func (s *Session) tick() {
	s.mu.Lock()
	if s.ended || s.running {
		s.mu.Unlock()
		return
	}
	s.running = true
	s.ticking.Add(1)
	m := moment{rested: s.pace > 1, busy: s.busy(), pinged: s.ping != 0, shut: s.shut(), dead: ticksDead}
	if s.tmf != nil && s.tmf.patient {
		m.dead = max(m.dead, int(resetPatience/s.tickTime()))
	}
	passed := s.pace
	if m.owes = s.owes() && s.acked == s.ackedSN; m.owes {
		s.owedFor += passed
	} else {
		s.acked, s.owedFor = s.ackedSN, 0
	}
	lost, probe := s.lost, s.probe
	s.lost, s.probe = nil, false
	between := time.Now().Before(s.due)
	s.mu.Unlock()
	defer s.ticking.Done()

	switch {
	case lost != nil:
		s.seen, s.taken = s.rx.Load(), 0
		s.silent, s.cause = max(s.silent, ticksDead-ticksSuspect), lost
		s.suspect(lost)
		s.sendPing()
	case probe:
		s.sendPing()
	}
	if !between { // however many events came before, it is neither put off nor early
		if s.ticks.Add(passed)%ticksScan == 0 && m.busy {
			s.scan()
		}
		s.look(m)
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	s.running = false
	if s.ended {
		return
	}
	s.pace = s.nextPace()
	if next := time.Now().Add(s.paceTime()); !between || next.Before(s.due) {
		s.due = next
	}
	if s.lost != nil || s.probe {
		s.timer.Reset(0)
	} else {
		s.timer.Reset(time.Until(s.due))
	}
}

// watchLink lets what happens to the interface, the address and the route of
// the connection count at once: it is suspect and pinged, and dead after
// ticksSuspect instead of ticksDead. It returns what ends that.
func (s *Session) watchLink() (stop func()) {
	tc, ok := s.conn.(*net.TCPConn)
	if !ok {
		return func() {}
	}
	// Without netlink, silence still tells.
	stop, _ = links.Watch(tc, func(e links.Event) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.ended {
			return
		}
		if e.Lost {
			s.lost = e.Cause
		} else {
			s.probe = true
		}
		s.timer.Reset(0)
	})
	return stop
}

// suspect tells the owner, once.
func (s *Session) suspect(cause error) {
	if s.state.CompareAndSwap(int32(Up), int32(Suspect)) && s.cfg.OnState != nil {
		s.cfg.OnState(Suspect, cause)
	}
}

// stalled judges what the kernel knows of a connection that was silent for some
// ticks: nothing that we sent was acknowledged although it was sent again.
func stalled(in sys.TCPInfo, silent int, tick time.Duration) bool {
	return in.Unacked > 0 && (in.Retransmits >= 2 || in.Retransmits == 1 && silent >= 2 && in.LastAck >= 2*tick)
}

// look judges what came since the last tick: any bytes are a sign of life, and so
// are bytes of ours that get through.
func (s *Session) look(m moment) {
	if m.rested && !m.busy || m.owes && s.owedFor >= s.ackTicks() {
		s.sendPing()
	}
	opened := s.lookAtWindow(m.shut)
	if rx := s.rx.Load(); rx != s.seen || opened {
		s.seen, s.taken = rx, 0
		s.lives()
		return
	}
	if !m.busy {
		return
	}
	in, known := s.info.Read()
	if known && s.moves(in) {
		s.lives()
		return
	}
	if s.silent++; s.silent >= ticksPing && !m.pinged {
		s.sendPing()
	}
	switch {
	case s.silent >= ticksDead && s.cause != nil:
		s.fail(s.ending(fmt.Errorf("%w: %w", errSilent, s.cause)))
	case s.silent >= m.dead:
		s.fail(s.ending(fmt.Errorf("%w for %v", errSilent, time.Duration(s.silent)*s.tickTime())))
	case s.silent >= ticksSuspect:
		s.suspect(errSilent)
	case known && s.State() == Up && stalled(in, s.silent, s.tickTime()):
		s.suspect(errStalled)
	}
}

// moves tells whether the target takes in what we send, as it does on a slow line:
// it acknowledged more of it since the last tick and more is on its way. Without
// more, silence counts: the kernel of a target that hangs acknowledges too.
func (s *Session) moves(in sys.TCPInfo) bool {
	before := s.taken
	s.taken = in.Acked
	return in.Pending && before > 0 && in.Acked > before
}

// lives takes a sign of life.
func (s *Session) lives() {
	s.silent, s.cause = 0, nil
	if s.shutFor >= ticksDead {
		return
	}
	if s.state.CompareAndSwap(int32(Suspect), int32(Up)) && s.cfg.OnState != nil {
		s.cfg.OnState(Up, nil)
	}
}

// lookAtWindow counts how long the window is shut, and reports whether one that
// made the session suspect is open again.
func (s *Session) lookAtWindow(shut bool) (opened bool) {
	if !shut {
		opened = s.shutFor >= ticksDead
		s.shutFor = 0
		return opened
	}
	switch s.shutFor++; {
	case s.shutFor >= ticksShut:
		s.fail(s.ending(errShut))
	case s.shutFor >= ticksDead:
		s.suspect(errShut)
	}
	return false
}

// scan looks for a command that hangs and lets a goroutine of its own end it.
func (s *Session) scan() {
	if _, _, found := s.overdue(); found && s.escalating.CompareAndSwap(false, true) {
		s.alive.Add(1)
		go s.routineEscalate()
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
	s.listPing()
	s.watchClosely()
	s.mu.Unlock()
	s.Kick()
}

// listPing lists the ping in flight. Caller holds mu.
func (s *Session) listPing() {
	it := s.urgent.push()
	it.hdr[0], it.hdr[1] = uint8(pdu.OpNopOut)|pdu.Immediate, pdu.Final
	it.hdr.SetITT(s.ping)
	it.hdr.SetTTT(pdu.NoTag)
}
