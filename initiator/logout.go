package initiator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
)

const (
	logoutWait = 2 * time.Second // for the answer to a Logout Request
	maxDrain   = 3 * time.Second // for commands in flight when the target asks for a logout

	// maxTime2Wait bounds what a target may ask us to wait before the next
	// login: RFC 7143 13.15 allows an hour.
	maxTime2Wait = time.Minute
)

// time2Wait is a wait that the target asked for when it ended the session.
type time2Wait struct{ d time.Duration }

// Time2Wait is how long the target wants to be left alone, from the end of the
// session to the next login with its ISID, at most a minute. announced tells
// that it said so when it ended the session (Async Message events 2 and 3,
// Logout Response; RFC 7143 11.9.1, 11.15.3); else it is the negotiated
// DefaultTime2Wait, meant for connections that break unexpectedly.
func (s *Session) Time2Wait() (wait time.Duration, announced bool) {
	if w := s.wait.Load(); w != nil {
		return w.d, true
	}
	return min(time.Duration(s.params.Time2Wait)*time.Second, maxTime2Wait), false
}

func (s *Session) announceWait(seconds uint16) {
	s.wait.Store(&time2Wait{min(time.Duration(seconds)*time.Second, maxTime2Wait)})
}

// Close logs out (RFC 7143 11.14), waits at most two seconds for the answer,
// closes the connection and waits until all commands are handed back. When ctx ends
// first, the answer is not waited for. The error is always nil.
func (s *Session) Close(ctx context.Context) error {
	s.logout(ctx, errClosed)
	<-s.done
	return nil
}

// logout sends the Logout Request and ends the session with cause, after the
// answer or when that does not come.
func (s *Session) logout(ctx context.Context, cause error) {
	s.mu.Lock()
	if !s.closed {
		s.closed, s.closing = true, cause
		it := s.list(nil, -1)
		it.hdr[0] = uint8(pdu.OpLogoutReq) | pdu.Immediate
		it.hdr[1] = pdu.Final // reason 0: close the session
		it.hdr.SetITT(logoutITT)
	}
	s.mu.Unlock()
	s.Kick()
	t := time.NewTimer(logoutWait)
	defer t.Stop()
	select {
	case <-s.dying:
	case <-t.C:
	case <-ctx.Done():
	}
	s.fail(cause)
}

// logoutResponse takes the answer to our logout (RFC 7143 11.15). Whatever it
// says, the session is over.
func (rc *receiver) logoutResponse(h *pdu.Header) error {
	s := rc.s
	s.mu.Lock()
	asked := s.closed
	s.mu.Unlock()
	if !asked || h.ITT() != logoutITT {
		return breach("answer to a logout that was not sent, tag %#08x", h.ITT())
	}
	if err := rc.status(h); err != nil {
		return err
	}
	s.announceWait(h.Time2Wait())
	switch h.Response() {
	case 0:
		s.orderly.Store(true)
		return errLoggedOut
	case 1:
		return errors.New("the target does not know the connection that logs out")
	case 2:
		return errors.New("the target does not support the logout")
	case 3:
		return errors.New("the target could not clean up after the session")
	}
	return fmt.Errorf("the target answered the logout with response %d", h.Response())
}

var errLoggedOut = errors.New("logged out")

// ending is the cause that the session ends with when its reader stops at err:
// once the Logout Request is out, any end is the one that was wanted.
func (s *Session) ending(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closing == nil || errors.Is(err, ErrProtocol):
		return err
	case s.closing == errClosed || err == errLoggedOut:
		return s.closing
	}
	return fmt.Errorf("%w (%w)", s.closing, err)
}

// leave answers a target that wants the session to end: no new commands, a
// while for those in flight, but less than limit, then a logout. The reader
// calls it and goes on reading.
func (s *Session) leave(cause error, limit time.Duration) {
	if !s.leaving.CompareAndSwap(false, true) {
		return
	}
	for {
		st := s.state.Load()
		if State(st) == Dead {
			return
		}
		if s.state.CompareAndSwap(st, int32(Leaving)) {
			break
		}
	}
	s.alive.Add(1)
	go s.routineLeave(cause, min(limit*3/4, maxDrain))
}

func (s *Session) routineLeave(cause error, limit time.Duration) {
	defer s.alive.Done()
	if s.cfg.OnState != nil {
		s.cfg.OnState(Leaving, cause)
	}
	end := time.NewTimer(limit)
	defer end.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		s.mu.Lock()
		empty := len(s.free) == len(s.slots)
		s.mu.Unlock()
		if empty {
			break
		}
		select {
		case <-tick.C:
			continue
		case <-s.dying:
			return
		case <-end.C:
		}
		break
	}
	s.logout(context.Background(), cause)
}
