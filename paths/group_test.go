package paths

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
)

func submit(g *Group, rs ...*block.Request) {
	var p block.Plug
	for _, r := range rs {
		g.Submit(r, &p)
	}
	p.Flush()
}

func writeOf(dn *done, blk int, fill byte) *block.Request {
	b := make([]byte, fakeBlock)
	for i := range b {
		b[i] = fill
	}
	return &block.Request{Op: block.Write, Off: int64(blk * fakeBlock), Len: fakeBlock, Data: b, Owner: dn}
}

func newDone() *done { return &done{n: map[*block.Request]int{}} }

func TestLostCommandsMoveToTheOtherPathInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue}, 2, 8)
		defer closeGroup(g)
		synctest.Wait()
		dn := newDone()
		var rs []*block.Request
		for i := range 5 {
			rs = append(rs, writeOf(dn, i, 1))
		}
		submit(g, rs...)
		a, b := doors[0].session(), doors[1].session()
		require.Len(t, a.pending(), 5)
		require.Empty(t, b.pending())
		doors[0].set(true)
		a.Abort(errDoor)
		synctest.Wait()
		require.Len(t, b.pending(), 5)
		for i, c := range b.pending() {
			require.Equal(t, byte(i), c.CDB[9], "commands moved out of order")
		}
		for range 5 {
			b.end(0, "good")
		}
		for _, r := range rs {
			require.Equal(t, 1, dn.count(r))
			require.NoError(t, r.Err)
		}
	})
}

func TestRequestsWaitOldestFirstWhileNoPathIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue}, 1, 2)
		defer closeGroup(g)
		synctest.Wait()
		doors[0].set(true)
		doors[0].session().Abort(errDoor)
		synctest.Wait()
		dn := newDone()
		var rs []*block.Request
		for i := range 9 {
			rs = append(rs, writeOf(dn, i, 1))
			submit(g, rs[i])
			time.Sleep(time.Millisecond)
		}
		require.EqualValues(t, 9, g.waiting.Load())
		require.Equal(t, "no_path", g.Snapshot().State)
		doors[0].set(false)
		time.Sleep(5 * time.Second)
		s := doors[0].session()
		require.Len(t, s.pending(), 2)
		for i := range rs {
			require.Equal(t, byte(i), s.pending()[0].CDB[9], "a younger request overtook")
			s.end(0, "good")
		}
		require.Len(t, dn.in, 9)
		require.Zero(t, g.waiting.Load())
	})
}

// Room that appears without a word (the target opened its command window) must
// go to the request that waits longest, not to the one that asks next.
func TestNewRequestsDoNotOvertakeWaitingOnes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue}, 1, 1)
		defer closeGroup(g)
		synctest.Wait()
		dn := newDone()
		s := doors[0].session()
		for i := range 40 {
			if i%2 == 1 {
				s.depth++
			}
			submit(g, writeOf(dn, i, 1))
			time.Sleep(time.Microsecond)
		}
		for i := 0; i < 40; i++ {
			require.Equal(t, byte(i), s.pending()[0].CDB[9], "a younger request overtook")
			s.end(0, "good")
		}
	})
}

func TestNoPathRetryFailsAfterItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: 3, PollingInterval: time.Second}, 1, 2)
		defer closeGroup(g)
		synctest.Wait()
		doors[0].set(true)
		doors[0].session().Abort(errDoor)
		synctest.Wait()
		dn := newDone()
		r := writeOf(dn, 0, 1)
		submit(g, r)
		time.Sleep(2900 * time.Millisecond)
		require.Zero(t, dn.count(r))
		time.Sleep(200 * time.Millisecond)
		require.Equal(t, 1, dn.count(r))
		require.ErrorIs(t, r.Err, block.ErrNoPath)
		require.Equal(t, "failed", g.Snapshot().State)
		late := writeOf(dn, 1, 1)
		submit(g, late)
		require.ErrorIs(t, late.Err, block.ErrNoPath)
		doors[0].set(false)
		time.Sleep(5 * time.Second)
		again := writeOf(dn, 2, 1)
		submit(g, again)
		doors[0].session().end(0, "good")
		require.NoError(t, again.Err)
	})
}

func TestQueueingOffAnswersWhatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue}, 1, 2)
		defer closeGroup(g)
		synctest.Wait()
		doors[0].set(true)
		doors[0].session().Abort(errDoor)
		synctest.Wait()
		dn := newDone()
		r := writeOf(dn, 0, 1)
		submit(g, r)
		time.Sleep(time.Hour)
		require.Zero(t, dn.count(r))
		g.SetQueueing(false)
		require.ErrorIs(t, r.Err, block.ErrNoPath)
	})
}

func TestFailbackImmediateAndManual(t *testing.T) {
	for _, manual := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Failback: map[bool]string{true: Manual}[manual]}, 2, 4)
			defer closeGroup(g)
			synctest.Wait()
			doors[0].session().Abort(errDoor)
			time.Sleep(10 * time.Second)
			serving := g.table.Load().paths[0].Name
			require.Equal(t, map[bool]string{true: Manual, false: Immediate}[manual], g.Snapshot().Failback)
			if manual {
				require.Equal(t, "B", serving)
				require.NoError(t, g.FailPath("B"))
				require.Equal(t, "A", g.table.Load().paths[0].Name)
			} else {
				require.Equal(t, "A", serving)
			}
		})
	}
}

// A path that is down for long knocks more seldom while another one serves, and
// at once when that one is lost.
func TestALongDeadPathKnocksSeldomUntilItIsNeeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue}, 2, 4)
		defer closeGroup(g)
		synctest.Wait()
		knocks := func(d time.Duration) int {
			before := doors[0].knocks()
			time.Sleep(d)
			return doors[0].knocks() - before
		}
		doors[0].set(true)
		doors[0].session().Abort(errDoor)
		require.Greater(t, knocks(longAfter), 30, "about once a second")
		time.Sleep(10 * time.Second)
		n := knocks(10 * time.Minute)
		require.Greater(t, n, 60)
		require.Less(t, n, 180, "about every five seconds")
		doors[1].set(true)
		doors[1].session().Abort(errDoor)
		require.Positive(t, knocks(backoffMin), "it is needed now")
		require.Greater(t, knocks(time.Minute), 30)
		doors[0].set(false)
		time.Sleep(2 * backoffMax)
		require.Equal(t, 1, g.Snapshot().Paths.Usable)
	})
}

// A path that comes back as another disk must never get a byte.
func TestPathThatBecameAnotherDiskStaysOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue}, 1, 4)
		defer closeGroup(g)
		synctest.Wait()
		doors[0].set(true)
		doors[0].session().Abort(errDoor)
		synctest.Wait()
		doors[0].d = &disk{id: 2}
		doors[0].set(false)
		dn := newDone()
		submit(g, writeOf(dn, 0, 9))
		time.Sleep(time.Hour)
		require.Zero(t, doors[0].d.data[0])
		require.Empty(t, dn.in)
		st := g.Snapshot().Groups[0].Paths[0]
		require.Contains(t, st.LastError, "identity changed")
		require.LessOrEqual(t, doors[0].logins, 3, "it keeps knocking")
	})
}

func TestSuspectPathGetsNoNewIO(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue}, 2, 4)
		defer closeGroup(g)
		synctest.Wait()
		dn := newDone()
		submit(g, writeOf(dn, 0, 1))
		a, b := doors[0].session(), doors[1].session()
		a.onState(initiator.Suspect, errDoor)
		submit(g, writeOf(dn, 1, 1))
		require.Len(t, a.pending(), 1)
		require.Len(t, b.pending(), 1)
		a.onState(initiator.Up, nil)
		submit(g, writeOf(dn, 2, 1))
		require.Len(t, a.pending(), 2)
		a.end(0, "good")
		a.end(0, "good")
		b.end(0, "good")
	})
}

func TestFlushReachesEveryDirtyPath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Policy: "multibus", Selector: "round-robin 0"}, 2, 4)
		defer closeGroup(g)
		synctest.Wait()
		dn := newDone()
		for i := range 4 {
			submit(g, writeOf(dn, i, 1))
		}
		a, b := doors[0].session(), doors[1].session()
		require.NotEmpty(t, a.pending())
		require.NotEmpty(t, b.pending())
		for _, s := range []*fake{a, b} {
			for len(s.pending()) > 0 {
				s.end(0, "good")
			}
		}
		f := &block.Request{Op: block.Flush, Owner: dn}
		submit(g, f)
		for range 2 {
			for _, s := range []*fake{a, b} {
				if len(s.pending()) > 0 {
					require.EqualValues(t, 0x91, s.pending()[0].CDB[0])
					require.Zero(t, dn.count(f))
					s.end(0, "good")
				}
			}
		}
		require.Equal(t, 1, dn.count(f))
		require.NoError(t, f.Err)
	})
}

func TestNoAllocationFromSubmitToComplete(t *testing.T) {
	g, doors, _ := newGroup(t, Config{NoPathRetry: Queue}, 2, 8)
	defer closeGroup(g)
	require.Eventually(t, func() bool { return doors[0].session() != nil && len(g.table.Load().all) == 2 }, 5*time.Second, time.Millisecond)
	s := doors[0].session()
	for _, op := range []block.Op{block.Read, block.Write, block.Flush} {
		var p block.Plug
		r := &block.Request{Op: op, Data: make([]byte, fakeBlock), Len: fakeBlock, Owner: nobody{}}
		if op == block.Flush {
			r.Data, r.Len = nil, 0
		}
		require.Zero(t, testing.AllocsPerRun(200, func() {
			g.Submit(r, &p)
			for len(s.out) > 0 {
				c := s.out[0]
				s.out = s.out[:0]
				c.Owner.Done(c, &p)
			}
			p.Flush()
		}), "%v", op)
	}
}

type nobody struct{}

func (nobody) Complete(*block.Request, *block.Plug) {}

// Two who each see that another path is left take only one of them out.
func TestTheLastPathIsNoSpare(t *testing.T) {
	for range 20 {
		g, _, _ := newGroup(t, Config{}, 2, 1)
		var removed atomic.Int32
		var wg sync.WaitGroup
		for _, p := range g.Snapshot().Groups[0].Paths {
			wg.Go(func() {
				if g.RemoveSparePath(p.Name) {
					removed.Add(1)
				}
			})
		}
		wg.Wait()
		require.EqualValues(t, 1, removed.Load())
		require.Equal(t, 1, g.Snapshot().Paths.Total)
		closeGroup(g)
	}
}

// What is decided about queueing while no path is left counts for what waits already.
func TestNoPathRetryThatChangesWhileNoPathIsLeft(t *testing.T) {
	for _, c := range []struct {
		name   string
		before int
		change func(g *Group, c *Config)
		fails  bool
	}{
		{"to queue", 5, func(_ *Group, c *Config) { c.NoPathRetry = Queue }, false},
		{"to more", 5, func(_ *Group, c *Config) { c.NoPathRetry = 1000 }, false},
		{"to a number", Queue, func(_ *Group, c *Config) { c.NoPathRetry = 5 }, true},
		{"on by hand", 5, func(g *Group, _ *Config) { g.SetQueueing(true) }, false},
		{"not at all", 5, func(*Group, *Config) {}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, doors, _ := newGroup(t, Config{NoPathRetry: c.before, PollingInterval: 5 * time.Second, FenceWait: time.Hour}, 2, 8)
				defer closeGroup(g)
				synctest.Wait()
				dn := newDone()
				ambiguous(t, g, doors, dn)
				held, queued := writeOf(dn, 1, 2), writeOf(dn, 5, 1)
				submit(g, held)
				doors[1].set(true)
				doors[1].session().Abort(errDoor)
				synctest.Wait()
				submit(g, queued)
				rest(10 * time.Second)
				conf := g.Config()
				c.change(g, &conf)
				require.NoError(t, g.Reconfigure(conf))
				rest(14 * time.Second)
				require.Zero(t, dn.count(held)+dn.count(queued))
				rest(2 * time.Minute)
				if c.fails {
					require.ErrorIs(t, queued.Err, block.ErrNoPath)
					require.ErrorIs(t, held.Err, block.ErrNoPath)
					require.EqualValues(t, 1, g.Snapshot().Totals.QueueTimeouts)
					return
				}
				require.Zero(t, dn.count(held)+dn.count(queued), "%v %v", held.Err, queued.Err)
				for _, d := range doors {
					d.set(false)
				}
				rest(10 * time.Second)
				all(doors)
				for _, r := range []*block.Request{held, queued} {
					require.Equal(t, 1, dn.count(r))
					require.NoError(t, r.Err)
				}
			})
		})
	}
}

// The time that a request waited for a path is not time that a unit refused it: one that
// is just getting ready after its server came back has as long as ever.
func TestUnitThatGetsReadyAfterAnOutageHasItsTime(t *testing.T) {
	for _, ready := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, _ := newGroup(t, Config{NoPathRetry: 60, PollingInterval: 5 * time.Second}, 1, 8)
			defer closeGroup(g)
			synctest.Wait()
			doors[0].set(true)
			doors[0].session().Abort(errDoor)
			synctest.Wait()
			dn := newDone()
			w := writeOf(dn, 1, 1)
			submit(g, w)
			rest(295 * time.Second)
			doors[0].set(false)
			rest(2 * time.Second)
			for range 20 {
				require.Len(t, doors[0].session().pending(), 1)
				doors[0].session().end(0, "retry")
				rest(2 * time.Second)
			}
			require.Zero(t, dn.count(w), "%v", w.Err)
			if ready {
				endAll(doors[0].session())
				require.NoError(t, w.Err)
				return
			}
			for range 140 {
				if len(doors[0].session().pending()) > 0 {
					doors[0].session().end(0, "retry")
				}
				rest(2 * time.Second)
			}
			require.Equal(t, 1, dn.count(w))
			require.ErrorIs(t, w.Err, block.ErrIO)
		})
	}
}
