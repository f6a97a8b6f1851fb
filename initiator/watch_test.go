package initiator

import (
	"errors"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/internal/sys"
)

func TestStalledIsSentAgainAndNotAcknowledged(t *testing.T) {
	const tick = 100 * time.Millisecond
	for _, c := range []struct {
		name   string
		in     sys.TCPInfo
		silent int
		want   bool
	}{
		{"all acknowledged: the target thinks", sys.TCPInfo{LastAck: time.Hour}, 9, false},
		{"in flight for the first time after a long pause", sys.TCPInfo{Unacked: 1, LastAck: time.Hour}, 2, false},
		{"sent again twice", sys.TCPInfo{Unacked: 1, Retransmits: 2}, 1, true},
		{"sent again once, just now", sys.TCPInfo{Unacked: 1, Retransmits: 1, LastAck: 150 * time.Millisecond}, 2, false},
		{"sent again once, silent for two ticks", sys.TCPInfo{Unacked: 3, Retransmits: 1, LastAck: 250 * time.Millisecond}, 2, true},
		{"sent again, then acknowledged", sys.TCPInfo{Retransmits: 2, LastAck: time.Second}, 5, false},
	} {
		require.Equal(t, c.want, stalled(c.in, c.silent, tick), c.name)
	}
}

func TestWhatGetsThroughIsASignOfLifeWhileMoreWaits(t *testing.T) {
	var s Session
	for _, c := range []struct {
		name string
		in   sys.TCPInfo
		want bool
	}{
		{"nothing to compare with", sys.TCPInfo{Acked: 1000, Pending: true}, false},
		{"some got through, more waits", sys.TCPInfo{Acked: 2000, Pending: true}, true},
		{"nothing got through", sys.TCPInfo{Acked: 2000, Pending: true}, false},
		{"the last got through: a ping, say", sys.TCPInfo{Acked: 2048}, false},
	} {
		require.Equal(t, c.want, s.moves(c.in), c.name)
	}
}

// watched is a session whose ticks the test makes; nothing is sent. It tells the
// states that it told.
func watched(t *testing.T) (*Session, *[]State) {
	conn, peer := net.Pipe()
	t.Cleanup(func() { conn.Close(); peer.Close() })
	var told []State
	s := &Session{conn: conn, dying: make(chan struct{}), sending: true, slots: make([]slot, 1)}
	s.cfg = Config{TargetName: "iqn", FailoverTime: time.Second, OnState: func(st State, _ error) { told = append(told, st) }}
	s.pace = 1
	return s, &told
}

// silence makes ticks without a sign of life until the session has ended, at most
// n, and tells the tick of each event.
func (s *Session) silence(n int, m moment) (ping, suspect, dead int) {
	at := func(tick *int, happened bool, now int) {
		if happened && *tick == 0 {
			*tick = now
		}
	}
	m.busy = true
	for i := 1; i <= n; i++ {
		m.pinged = s.ping != 0
		s.look(m)
		at(&ping, s.ping != 0, i)
		at(&suspect, s.State() == Suspect, i)
		at(&dead, s.State() == Dead, i)
		if dead > 0 {
			break
		}
	}
	return ping, suspect, dead
}

func TestSilenceTickByTick(t *testing.T) {
	events := func(a, b, c int) [3]int { return [3]int{a, b, c} }
	s, told := watched(t)
	require.Equal(t, [3]int{ticksPing, ticksSuspect, ticksDead}, events(s.silence(100, moment{dead: ticksDead})))
	require.Equal(t, []State{Suspect}, *told)
	require.ErrorIs(t, s.Err(), errSilent)

	s, told = watched(t)
	s.silence(ticksDead-1, moment{dead: ticksDead})
	s.rx.Add(1)
	s.look(moment{busy: true, dead: ticksDead})
	require.Equal(t, []State{Suspect, Up}, *told, "a byte is a sign of life")
	_, suspect, dead := s.silence(100, moment{dead: ticksDead})
	require.Equal(t, []int{ticksSuspect, ticksDead}, []int{suspect, dead})

	s, _ = watched(t)
	require.Equal(t, [3]int{ticksPing, ticksSuspect, 25}, events(s.silence(100, moment{dead: 25})), "a unit that is reset takes its time")
	s, _ = watched(t)
	s.cause = errStalled
	_, _, dead = s.silence(100, moment{dead: 25})
	require.Equal(t, ticksDead, dead, "unless the link was lost")
	require.ErrorIs(t, s.Err(), errStalled)
}

// A network that has something to tell all the time, as it does while its routes
// settle anew, changes nothing about when silence is death.
func TestEventsOfTheNetworkNeitherDelayNorHurryAnEnd(t *testing.T) {
	for _, every := range []time.Duration{time.Millisecond, 100 * time.Microsecond} {
		s, _ := watched(t)
		s.cfg.FailoverTime = 200 * time.Millisecond
		s.startWatch()
		began := time.Now()
		s.sendPing()
		tell := time.NewTicker(every)
		for s.Err() == nil && time.Since(began) < 20*time.Second {
			<-tell.C
			s.mu.Lock()
			s.probe = true
			s.timer.Reset(0)
			s.mu.Unlock()
		}
		tell.Stop()
		s.stopWatch()
		require.ErrorIs(t, s.Err(), errSilent)
		require.GreaterOrEqual(t, time.Since(began), s.cfg.FailoverTime)
		require.Less(t, time.Since(began), 3*time.Second)
	}
}

func TestALostLinkCountsAtOnce(t *testing.T) {
	s, told := watched(t)
	s.timer = time.AfterFunc(time.Hour, func() {})
	defer s.timer.Stop()
	s.lost, s.due = errors.New("no carrier"), time.Now().Add(time.Hour)
	s.tick()
	require.Equal(t, []State{Suspect}, *told)
	require.NotZero(t, s.ping)
	_, _, dead := s.silence(100, moment{dead: ticksDead})
	require.Equal(t, ticksSuspect, dead)
	require.ErrorContains(t, s.Err(), "no carrier")
}

func TestIdleTicksCountNothing(t *testing.T) {
	s, told := watched(t)
	for range 2 * ticksDead {
		s.look(moment{dead: ticksDead})
	}
	require.Zero(t, s.silent)
	require.Zero(t, s.ping)
	require.Empty(t, *told)
	s.look(moment{rested: true, dead: ticksDead})
	require.NotZero(t, s.ping, "a ping after a long rest")

	s, _ = watched(t)
	s.look(moment{rested: true, busy: true, dead: ticksDead})
	require.NotZero(t, s.ping, "a command that nobody answers")
	s, _ = watched(t)
	s.rx.Add(1)
	s.look(moment{rested: true, busy: true, dead: ticksDead})
	require.Zero(t, s.ping, "nothing to ask")
	s.look(moment{owes: true, dead: ticksDead})
	require.Zero(t, s.ping, "what is owed can wait")
	s.owedFor = s.ackTicks()
	s.look(moment{owes: true, dead: ticksDead})
	require.NotZero(t, s.ping)
}

func TestAWindowThatStaysShut(t *testing.T) {
	s, told := watched(t)
	tick := func(n int, shut bool) {
		for range n {
			s.rx.Add(1) // pings are answered
			s.look(moment{busy: true, shut: shut, dead: ticksDead})
		}
	}
	tick(ticksDead-1, true)
	require.Empty(t, *told)
	tick(1, true)
	require.Equal(t, []State{Suspect}, *told)
	tick(5, true)
	require.Equal(t, []State{Suspect}, *told, "signs of life do not open it")
	tick(1, false)
	require.Equal(t, []State{Suspect, Up}, *told)
	tick(ticksShut-1, true)
	require.Equal(t, Suspect, s.State())
	tick(1, true)
	require.Equal(t, Dead, s.State())
	require.ErrorIs(t, s.Err(), errShut)
}

func TestWhatASessionWaitsFor(t *testing.T) {
	s, _ := watched(t)
	s.free = append(s.free, 0)
	require.EqualValues(t, ticksIdle, s.nextPace(), "nothing")
	s.expStatSN.Store(7)
	require.Equal(t, s.ackTicks(), s.nextPace(), "an acknowledgement that is owed")
	s.ackedSN = 7
	s.cmdSN, s.free = 1, nil
	require.False(t, s.shut(), "a command in flight may open the window")
	require.EqualValues(t, 1, s.nextPace())
	s.free = append(s.free, 0)
	require.True(t, s.shut())
	require.EqualValues(t, 1, s.nextPace())
	s.maxCmdSN.Store(1)
	require.False(t, s.shut(), "there is room")
	s.cmdSN, s.closed = 2, true
	require.False(t, s.shut(), "nothing follows a logout")
	s.closed, s.cfg.TargetName = false, ""
	require.False(t, s.shut(), "a discovery session has no commands")
	s.ping = pingITT
	require.EqualValues(t, 1, s.nextPace(), "the answer to a ping")
}

// The kernel tells an abort's error to one system call only: a reader that finds
// the end of the stream leaves it to the sender to say why.
func TestReaderLeavesTheCauseOfAnAbortToTheSender(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer ln.Close()
	conn, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(t, err)
	peer, err := ln.Accept()
	require.NoError(t, err)
	require.NoError(t, peer.(*net.TCPConn).SetLinger(0))
	peer.Close()
	_, err = conn.Read(make([]byte, 1)) // in the sender's place
	require.ErrorIs(t, err, syscall.ECONNRESET)

	s := &Session{conn: conn, dying: make(chan struct{}), sending: true}
	s.idle.L = &s.mu
	s.alive.Add(1)
	go s.routineReceive()
	select {
	case <-s.dying:
		t.Error("the reader did not wait")
	case <-time.After(50 * time.Millisecond):
	}
	s.fail(syscall.ETIMEDOUT)
	s.mu.Lock()
	s.sending = false
	s.idle.Broadcast()
	s.mu.Unlock()
	s.alive.Wait()
	require.Equal(t, syscall.ETIMEDOUT, s.Err())
}
