package paths

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
)

// twoServers is a group over two target names whose caches are their own; the
// unit does not know FUA.
func twoServers(t *testing.T, c Config) (*Group, []*door) {
	g, doors, _ := newGroup(t, c, 1, 8)
	b := &door{d: doors[0].d, depth: 8}
	_, err := g.AddPath(PathConfig{Name: "B", Target: "iqn.other", Order: 1, Open: b.open}, g.Info())
	require.NoError(t, err)
	synctest.Wait()
	return g, append(doors, b)
}

func ended(t *testing.T, f *fake, op byte) {
	t.Helper()
	require.NotEmpty(t, f.pending())
	require.Equal(t, op, f.pending()[0].CDB[0])
	f.end(0, "good")
}

// A server died with acknowledged writes in its cache: a flush cannot succeed
// before it is back, and nothing else may wait for that.
func TestFlushWaitsForTheServerThatHoldsTheWritesAndNothingElseDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors := twoServers(t, Config{NoPathRetry: Queue, MultibusServers: true})
		defer closeGroup(g)
		dn := newDone()
		submit(g, writeOf(dn, 1, 1))
		ended(t, doors[0].session(), 0x8a)
		doors[0].set(true)
		doors[0].session().Abort(errDoor)
		synctest.Wait()
		flush := &block.Request{Op: block.Flush, Owner: dn}
		submit(g, flush)
		for i := range 3 {
			w := writeOf(dn, 10+i, 2)
			submit(g, w)
			ended(t, doors[1].session(), 0x8a)
			require.Equal(t, 1, dn.count(w), "a write behind a parked flush")
		}
		require.Zero(t, dn.count(flush), "flushed only the server that was left")
		doors[0].set(false)
		time.Sleep(5 * time.Second)
		synctest.Wait() // A logged in and flushed by itself, as a control command
		for _, d := range doors {
			for len(d.session().pending()) > 0 {
				ended(t, d.session(), 0x91)
			}
		}
		require.Equal(t, 1, dn.count(flush))
		require.NoError(t, flush.Err)
	})
}

func TestFlushFailsWhenItsServerDoesNotComeBackInTime(t *testing.T) {
	for _, retry := range []int{Fail, 2} {
		synctest.Test(t, func(t *testing.T) {
			g, doors := twoServers(t, Config{NoPathRetry: retry, PollingInterval: time.Second})
			defer closeGroup(g)
			dn := newDone()
			submit(g, writeOf(dn, 1, 1))
			ended(t, doors[0].session(), 0x8a)
			doors[0].set(true)
			doors[0].session().Abort(errDoor)
			synctest.Wait()
			flush := &block.Request{Op: block.Flush, Owner: dn}
			submit(g, flush)
			time.Sleep(3 * time.Second)
			synctest.Wait()
			for len(doors[1].session().pending()) > 0 {
				ended(t, doors[1].session(), 0x91)
			}
			require.Equal(t, 1, dn.count(flush))
			require.ErrorIs(t, flush.Err, block.ErrIO)
		})
	}
}

// A flush is still under way: another one must not take the path for clean,
// because the first may yet fail.
func TestSecondFlushDoesNotTrustTheFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors := twoServers(t, Config{NoPathRetry: Queue, Policy: "multibus", Selector: "round-robin 0", MultibusServers: true})
		defer closeGroup(g)
		dn := newDone()
		for i := range 2 {
			submit(g, writeOf(dn, i, 1))
		}
		a, b := doors[0].session(), doors[1].session()
		ended(t, a, 0x8a)
		ended(t, b, 0x8a)
		first, second := &block.Request{Op: block.Flush, Owner: dn}, &block.Request{Op: block.Flush, Owner: dn}
		submit(g, first)
		submit(g, second)
		for len(b.pending()) > 0 {
			ended(t, b, 0x91)
		}
		require.Zero(t, dn.count(second), "flushed without the server whose flush is under way")
		doors[0].set(true)
		a.Abort(errDoor)
		synctest.Wait()
		for len(b.pending()) > 0 {
			ended(t, b, 0x91)
		}
		require.Zero(t, dn.count(first))
		require.Zero(t, dn.count(second))
		doors[0].set(false)
		time.Sleep(5 * time.Second)
		for range 3 {
			for _, d := range doors {
				for len(d.session().pending()) > 0 {
					ended(t, d.session(), 0x91)
				}
			}
		}
		require.Equal(t, 1, dn.count(first))
		require.Equal(t, 1, dn.count(second))
	})
}

// A path that is suspect takes no new I/O, but it may hold writes that a flush
// has to reach.
func TestFlushReachesAPathThatIsOnlySuspect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors := twoServers(t, Config{NoPathRetry: Queue})
		defer closeGroup(g)
		dn := newDone()
		submit(g, writeOf(dn, 1, 1))
		a, b := doors[0].session(), doors[1].session()
		ended(t, a, 0x8a)
		a.onState(initiator.Suspect, errDoor)
		f := &block.Request{Op: block.Flush, Owner: dn}
		submit(g, f)
		for len(b.pending()) > 0 {
			ended(t, b, 0x91)
		}
		require.Zero(t, dn.count(f), "success without the server that holds the write")
		ended(t, a, 0x91)
		for len(b.pending()) > 0 {
			ended(t, b, 0x91)
		}
		require.Equal(t, 1, dn.count(f))
	})
}

// A write that may yet be executed by a server that went silent is acknowledged
// by the other one. Its late copy would be the newest, in a cache that a flush
// through the other does not reach.
func TestFlushWaitsForTheFenceOfAServerWithACacheOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors := twoServers(t, Config{NoPathRetry: Queue})
		defer closeGroup(g)
		dn := newDone()
		w := writeOf(dn, 1, 1)
		submit(g, w)
		require.Len(t, doors[0].session().pending(), 1)
		doors[0].set(true)
		doors[0].session().Abort(errDoor)
		synctest.Wait()
		b := doors[1].session()
		ended(t, b, 0x8a)
		require.Equal(t, 1, dn.count(w), "the retry waits")
		flush := &block.Request{Op: block.Flush, Owner: dn}
		submit(g, flush)
		for len(b.pending()) > 0 {
			ended(t, b, 0x91)
		}
		require.Zero(t, dn.count(flush), "success although the late copy is not flushed")
		doors[0].set(false)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		require.Contains(t, doors[0].controls(), byte(0x91), "its server was not flushed")
		for len(b.pending()) > 0 {
			ended(t, b, 0x91)
		}
		require.Equal(t, 1, dn.count(flush))
		require.NoError(t, flush.Err)
	})
}

// through makes the servers of g know FUA.
func through(g *Group) *initiator.LUInfo {
	l := *g.lu()
	l.DPOFUA = true
	g.info.Store(&l)
	g.mu.Lock()
	g.decideThrough()
	g.mu.Unlock()
	return &l
}

// A server that does not know FUA comes to two that do: a write is sent with FUA, or
// a flush goes where it went.
func TestWriteWithoutFUALeavesItsPathDirtyWhileTheWayToWriteChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		changing := func() {}
		log := slog.New(hearing{func(m string) {
			if strings.HasPrefix(m, "a path's server says otherwise of its cache") {
				changing()
			}
		}})
		g, doors := twoServers(t, Config{NoPathRetry: Queue, Logger: log})
		defer closeGroup(g)
		old := *through(g)
		require.True(t, g.through.Load())
		dn := newDone()
		w := writeOf(dn, 1, 1)
		fua := false
		changing = func() {
			submit(g, w)
			fua = doors[0].session().pending()[0].CDB[1]&8 != 0
			ended(t, doors[0].session(), 0x8a)
		}
		old.DPOFUA = false
		g.learnCache(&old)
		require.Equal(t, 1, dn.count(w))
		require.True(t, fua || g.paths[0].dirty.Load(), "it may be lost, and no flush will tell")
	})
}

// WRITE SAME knows no FUA and is flushed at once; it is done again only for a server
// that went away meanwhile.
func TestWriteZeroesThroughTheCacheIsDoneOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors := twoServers(t, Config{NoPathRetry: Queue})
		defer closeGroup(g)
		doors[1].session().Abort(errDoor)
		rest(5 * time.Second)
		require.NotZero(t, g.losses.Load())
		through(g)
		dn := newDone()
		for _, dies := range []bool{false, true} {
			z := &block.Request{Op: block.WriteZeroes, Len: 8 * fakeBlock, Owner: dn}
			submit(g, z)
			a := doors[0].session()
			ended(t, a, 0x93)
			if dies {
				doors[1].session().Abort(errDoor)
				synctest.Wait()
			}
			ended(t, a, 0x91)
			if dies {
				ended(t, a, 0x93)
				ended(t, a, 0x91)
			}
			require.Empty(t, a.pending())
			require.Equal(t, 1, dn.count(z))
		}
	})
}

// flushing is a session whose SYNCHRONIZE CACHE as a control command the test plays.
type flushing struct {
	*fake
	on func()
}

func (f flushing) Do(ctx context.Context, c *initiator.Command) error {
	if c.CDB[0] == 0x91 {
		f.on()
	}
	return f.fake.Do(ctx, c)
}

// A path proves itself anew while a write of before is under way: the flush that
// belongs to it need not cover that write.
func TestWriteThatEndsDuringAFlushOfThePathsOwnStaysToBeFlushed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors := twoServers(t, Config{NoPathRetry: Queue})
		defer closeGroup(g)
		x := &door{d: doors[0].d, depth: 8}
		dn := newDone()
		var w *block.Request
		p, err := g.AddPath(PathConfig{Name: "X", Target: "iqn.x", Order: -1, Open: func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error) {
			s, err := x.open(ctx, onState, onRoom)
			if err != nil {
				return nil, err
			}
			return flushing{s.(*fake), func() {
				if w != nil && dn.count(w) == 0 {
					x.session().end(0, "good") // the unit did it behind the flush
				}
			}}, nil
		}}, g.Info())
		require.NoError(t, err)
		synctest.Wait()
		submit(g, writeOf(dn, 1, 1))
		endAll(x.session())
		require.True(t, p.unflushed())
		w = writeOf(dn, 2, 1)
		submit(g, w)
		require.Len(t, x.session().pending(), 1)
		p.doubt()
		rest(time.Second)
		require.Equal(t, 1, dn.count(w))
		x.set(true) // its server loses its power
		x.session().Abort(errDoor)
		rest(time.Second)
		flush := flushOf(dn)
		submit(g, flush)
		all(doors)
		require.Zero(t, dn.count(flush), "a flush that cannot have reached the write")
		x.set(false)
		rest(5 * time.Second)
		all(append(doors, x))
		require.Equal(t, 1, dn.count(flush))
		require.NoError(t, flush.Err)
	})
}

// A flush has all of no_path_retry to wait for its server, whatever an earlier one
// has used of its own.
func TestParkedFlushWaitsItsOwnTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors := twoServers(t, Config{NoPathRetry: 5, PollingInterval: 5 * time.Second, MultibusServers: true, Failback: Immediate})
		defer closeGroup(g)
		dn := newDone()
		park := func() *block.Request {
			w := writeOf(dn, 1, 1)
			submit(g, w)
			ended(t, doors[0].session(), 0x8a)
			doors[0].set(true)
			doors[0].session().Abort(errDoor)
			synctest.Wait()
			flush := flushOf(dn)
			submit(g, flush)
			all(doors)
			require.Zero(t, dn.count(flush))
			return flush
		}
		first := park()
		doors[0].set(false)
		rest(10 * time.Second)
		all(doors)
		require.Equal(t, 1, dn.count(first))
		require.NoError(t, first.Err)
		rest(10 * time.Second)
		second := park()
		rest(20 * time.Second)
		require.Zero(t, dn.count(second), "it failed when the time of the first one was over")
		third := flushOf(dn)
		submit(g, third)
		rest(6 * time.Second)
		require.Equal(t, 1, dn.count(second))
		require.ErrorIs(t, second.Err, block.ErrIO)
		require.Zero(t, dn.count(third))
		rest(20 * time.Second)
		require.ErrorIs(t, third.Err, block.ErrIO)
		require.Equal(t, 1, dn.count(third))
		// And what is decided meanwhile counts.
		fourth := flushOf(dn)
		submit(g, fourth)
		c := g.Config()
		c.NoPathRetry = Queue
		require.NoError(t, g.Reconfigure(c))
		rest(time.Hour)
		require.Zero(t, dn.count(fourth))
		c.NoPathRetry = 1
		require.NoError(t, g.Reconfigure(c))
		rest(4 * time.Second)
		require.Zero(t, dn.count(fourth), "the new time begins when it is configured")
		rest(2 * time.Second)
		require.ErrorIs(t, fourth.Err, block.ErrIO)
	})
}
