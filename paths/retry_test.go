package paths

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
)

// without is a map of one path, which it has lost, with a write that waits.
func without(t *testing.T, retry int) (g *Group, doors []*door, w *block.Request) {
	g, doors, _ = newGroup(t, Config{NoPathRetry: retry, PollingInterval: time.Second}, 1, 4)
	synctest.Wait()
	doors[0].set(true)
	doors[0].session().Abort(errDoor)
	synctest.Wait()
	w = writeOf(newDone(), 0, 1)
	submit(g, w)
	return g, doors, w
}

func answers(w *block.Request) int { return w.Owner.(*done).count(w) }

// What the operator says ends or begins the wait of no_path_retry, and what was
// said before is not carried out any more.
func TestTheOperatorsWordReplacesNoPathRetry(t *testing.T) {
	for name, x := range map[string]struct {
		retry int
		say   func(g *Group)
		fails time.Duration // after what was said; 0: never
	}{
		"on":                  {3, func(g *Group) { g.SetQueueing(true) }, 0},
		"off":                 {3, func(g *Group) { g.SetQueueing(false) }, 1},
		"on and restored":     {3, func(g *Group) { g.SetQueueing(true); time.Sleep(time.Hour); g.RestoreQueueing() }, 3 * time.Second},
		"restored":            {Queue, func(g *Group) { g.SetQueueing(true); g.RestoreQueueing() }, 0},
		"restored to failure": {Fail, func(g *Group) { g.RestoreQueueing() }, 1},
		"reconfigured to queue": {3, func(g *Group) {
			c := g.Config()
			c.NoPathRetry = Queue
			require.NoError(t, g.Reconfigure(c))
		}, 0},
		"reconfigured to failure": {Queue, func(g *Group) {
			c := g.Config()
			c.NoPathRetry = Fail
			require.NoError(t, g.Reconfigure(c))
		}, 1},
		"reconfigured to a number": {Queue, func(g *Group) {
			c := g.Config()
			c.NoPathRetry = 5
			require.NoError(t, g.Reconfigure(c))
		}, 5 * time.Second},
		"reconfigured to the same": {3, func(g *Group) {
			time.Sleep(time.Second)
			require.NoError(t, g.Reconfigure(g.Config()))
		}, 2 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, _, w := without(t, x.retry)
				defer closeGroup(g)
				x.say(g)
				synctest.Wait()
				if x.fails == 0 {
					time.Sleep(time.Hour)
					require.Zero(t, answers(w))
					s := g.Snapshot()
					require.Equal(t, "queue", s.Retry)
					require.Zero(t, s.GiveUpMS)
					require.Zero(t, s.Totals.QueueTimeouts)
					return
				}
				if x.fails > 1 {
					time.Sleep(x.fails - time.Millisecond)
					require.Zero(t, answers(w))
					time.Sleep(2 * time.Millisecond)
				}
				synctest.Wait()
				require.ErrorIs(t, w.Err, block.ErrNoPath)
				require.Zero(t, g.Snapshot().GiveUpMS)
			})
		})
	}
}

// A map that gave up queues again when it is told to, and gives up again.
func TestQueueingIsRestoredAfterItWasUsedUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, w := without(t, 3)
		defer closeGroup(g)
		time.Sleep(4 * time.Second)
		synctest.Wait()
		require.ErrorIs(t, w.Err, block.ErrNoPath)
		g.RestoreQueueing()
		again := writeOf(newDone(), 1, 1)
		submit(g, again)
		time.Sleep(2 * time.Second)
		require.Zero(t, answers(again))
		time.Sleep(2 * time.Second)
		synctest.Wait()
		require.ErrorIs(t, again.Err, block.ErrNoPath)
		require.EqualValues(t, 2, g.Snapshot().Totals.QueueTimeouts)
		doors[0].set(false)
		time.Sleep(5 * time.Second)
		require.True(t, g.Snapshot().Queueing)
	})
}

// A flush that waits for a server keeps waiting where the operator says so.
func TestAParkedFlushWaitsWhereQueueingIsSwitchedOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors := twoServers(t, Config{NoPathRetry: 2, PollingInterval: time.Second})
		defer closeGroup(g)
		dn := newDone()
		submit(g, writeOf(dn, 1, 1))
		ended(t, doors[0].session(), 0x8a)
		doors[0].set(true)
		doors[0].session().Abort(errDoor)
		synctest.Wait()
		flush := &block.Request{Op: block.Flush, Owner: dn}
		submit(g, flush)
		g.SetQueueing(true)
		time.Sleep(time.Minute)
		require.Zero(t, dn.count(flush))
		g.RestoreQueueing()
		time.Sleep(1900 * time.Millisecond)
		require.Zero(t, dn.count(flush))
		time.Sleep(200 * time.Millisecond)
		require.Equal(t, 1, dn.count(flush))
		require.ErrorIs(t, flush.Err, block.ErrIO)
	})
}
