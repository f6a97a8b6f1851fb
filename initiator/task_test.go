package initiator_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/scsi"
)

func aWrite(owner initiator.Doner) *initiator.Command {
	c := &initiator.Command{Dir: initiator.DataOut, Data: make([]byte, 4096), Owner: owner}
	scsi.Write(&c.CDB, 64, 8, false, true)
	return c
}

func submit(t *testing.T, s *initiator.Session, c *initiator.Command) {
	var p block.Plug
	require.True(t, s.Submit(c, &p))
	p.Flush()
}

// A command that hangs while pings are answered is aborted; the session lives.
func TestAHangingCommandIsAborted(t *testing.T) {
	hang := func(act target.Action) (*target.Server, *initiator.Session) {
		srv, _, s, _ := start(t, target.Config{}, initiator.Config{FailoverTime: 500 * time.Millisecond, CommandTimeout: time.Second})
		srv.OnCommand(func(c *target.Cmd) target.Action {
			if c.CDB[0] == 0x88 || c.CDB[0] == 0x8a {
				return act
			}
			return target.Action{}
		})
		return srv, s
	}
	t.Run("a read that the target forgot", func(t *testing.T) {
		srv, s := hang(target.Action{Silent: true})
		var n count
		require.Equal(t, 1, reads(s, 1, &n))
		require.Eventually(t, func() bool { return n.n.Load() == 1 }, 10*time.Second, time.Millisecond)
		require.Equal(t, []error{initiator.ErrTimeout}, n.errs)
		require.EqualValues(t, 1, srv.Stats().TaskMgmt)
		srv.OnCommand(nil)
		require.NoError(t, initiator.TestUnitReady(context.Background(), s, [8]byte{}))
	})
	t.Run("a write that the backend holds", func(t *testing.T) {
		srv, s := hang(target.Action{Delay: time.Hour})
		var n count
		submit(t, s, aWrite(&n))
		require.Eventually(t, func() bool { return n.n.Load() == 1 }, 10*time.Second, time.Millisecond)
		require.Equal(t, []error{initiator.ErrTimeout}, n.errs)
		require.Zero(t, srv.Stats().Writes)
		require.NoError(t, s.Err())
	})
	t.Run("a write of which the target says that there is no such task", func(t *testing.T) {
		// ABORT TASK is not believed, LOGICAL UNIT RESET is.
		srv, s := hang(target.Action{Silent: true})
		var n count
		submit(t, s, aWrite(&n))
		require.Eventually(t, func() bool { return n.n.Load() == 1 }, 10*time.Second, time.Millisecond)
		require.Equal(t, []error{initiator.ErrAborted}, n.errs)
		require.EqualValues(t, 2, srv.Stats().TaskMgmt)
		require.NoError(t, s.Err())
	})
}

func TestACommandThatIsSlowerThanTheLinkIsNotAborted(t *testing.T) {
	srv, _, s, ev := start(t, target.Config{}, initiator.Config{FailoverTime: 300 * time.Millisecond, CommandTimeout: 5 * time.Second})
	srv.OnCommand(func(*target.Cmd) target.Action { return target.Action{Delay: 2 * time.Second} })
	var n count
	submit(t, s, aWrite(&n))
	require.Eventually(t, func() bool { return n.n.Load() == 1 }, 10*time.Second, time.Millisecond)
	require.Equal(t, []error{nil}, n.errs)
	require.Zero(t, srv.Stats().TaskMgmt)
	require.NotContains(t, ev.list(), initiator.Dead)
	require.False(t, errors.Is(s.Err(), initiator.ErrTimeout))
}

// slowOwner takes its time to take a command back.
type slowOwner struct{ waited }

func (o *slowOwner) Done(c *initiator.Command, p *block.Plug) {
	time.Sleep(300 * time.Millisecond)
	o.waited.Done(c, p)
}

// What a task management request ends has ended when its answer counts:
// a command that is about to be handed back does not hang any more.
func TestAnAnswerToTaskManagementCountsWhenItsTasksHaveEnded(t *testing.T) {
	s := watches(t, impatient, func(r *raw) {
		if !r.login() {
			return
		}
		first, _, _ := r.command()
		r.command() // hangs
		r.dataIn(first.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
		r.command() // takes the slot of the first, before the one that hangs
		a, _, _ := r.next(pdu.OpTaskMgmtReq, nil)
		r.tmfResponse(a, pdu.TMFNotSupported)
		b, _, _ := r.next(pdu.OpTaskMgmtReq, nil)
		r.tmfResponse(b, pdu.TMFComplete)
		if more := r.answerAll(0, 0); len(more) > 0 {
			t.Errorf("more than two requests: %x", more)
		}
	})
	first, hanging := read8(t, s.Session), read8(t, s.Session)
	first.result(t)
	time.Sleep(200 * time.Millisecond) // two ticks: the other one has hung for longer
	young := &slowOwner{waited{done: make(chan struct{})}}
	young.c = aWrite(young)
	submit(t, s.Session, young.c)
	require.ErrorIs(t, hanging.result(t).Err, initiator.ErrAborted)
	require.ErrorIs(t, young.result(t).Err, initiator.ErrAborted)
	time.Sleep(100 * time.Millisecond) // for the end of a session that should not end
	require.NoError(t, s.Err())
}

// A write whose abort was asked for gets no more data; if the target then says
// GOOD all the same, it cannot have what it asked for.
func TestGoodForAWriteThatWasStarvedIsNoSuccess(t *testing.T) {
	s := hangs(t, nil, func(r *raw, cmd pdu.Header) {
		a, _, _ := r.next(pdu.OpTaskMgmtReq, nil)
		r.r2t(cmd.ITT(), 1, 0, 0, 4096)
		r.good(cmd.ITT(), nil)
		r.tmfResponse(a, pdu.TMFNoTask)
		r.answerAll(0, 0)
	})
	require.ErrorIs(t, write(t, s.Session, 4096).result(t).Err, initiator.ErrAborted)
	require.NoError(t, s.Err())
}
