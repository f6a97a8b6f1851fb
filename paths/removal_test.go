package paths

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
)

func removeA(g *Group) { g.RemovePaths(func(pc PathConfig) bool { return pc.Name == "A" }) }

// A path is removed under load: the target's last answers count, and no epoch is
// left that nobody would fence any more.
func TestRemovedPathHasItsAnswersFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors := twoServers(t, Config{NoPathRetry: Queue})
		defer closeGroup(g)
		dn := newDone()
		w := writeOf(dn, 1, 1)
		submit(g, w)
		a, b := doors[0].session(), doors[1].session()
		go removeA(g)
		rest(100 * time.Millisecond)
		later := writeOf(dn, 2, 1)
		submit(g, later)
		require.Len(t, b.pending(), 1, "new I/O went to the path that leaves")
		require.Equal(t, 1, len(a.pending()), "a write under way was given up")
		endAll(a)
		rest(time.Second)
		endAll(b)
		require.Equal(t, 1, dn.count(w))
		require.Zero(t, w.Route.Tries)
		require.Empty(t, g.ledger.of("A"))
		require.True(t, a.isDead())
		require.Len(t, g.Snapshot().Groups, 1)
		asked := doors[0].controls()
		require.EqualValues(t, 0x91, asked[len(asked)-1], "not flushed at the end")
		over, flush := writeOf(dn, 1, 2), flushOf(dn)
		submit(g, over, flush)
		endAll(b)
		require.Equal(t, 1, dn.count(over), "held, and nobody will ever fence")
		require.NoError(t, flush.Err)
		require.Equal(t, 1, dn.count(flush))
	})
}

// unflushing is a session whose unit refuses SYNCHRONIZE CACHE of control commands.
type unflushing struct{ *fake }

func (u unflushing) Do(ctx context.Context, c *initiator.Command) error {
	if c.CDB[0] == 0x91 {
		return errors.New("no")
	}
	return u.fake.Do(ctx, c)
}

// What the server of a removed path did not flush no later flush can reach.
func TestFlushFailsAfterThePathWithTheWritesWasRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var saved []bool
		var risks risks
		g, doors, d := newGroup(t, Config{NoPathRetry: Queue, OnLoss: func(lost bool) { saved = append(saved, lost) }, OnRisk: risks.set}, 1, 8)
		defer closeGroup(g)
		x := &door{d: d, depth: 8}
		_, err := g.AddPath(PathConfig{Name: "X", Target: "iqn.x", Order: -1, Open: func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error) {
			s, err := x.open(ctx, onState, onRoom)
			if err != nil {
				return nil, err
			}
			return unflushing{s.(*fake)}, nil
		}}, g.Info())
		require.NoError(t, err)
		synctest.Wait()
		dn := newDone()
		w := writeOf(dn, 1, 1)
		submit(g, w)
		require.Len(t, x.session().pending(), 1)
		go g.RemovePaths(func(pc PathConfig) bool { return pc.Name == "X" })
		rest(100 * time.Millisecond)
		endAll(x.session())
		require.Equal(t, 1, dn.count(w))
		rest(10 * time.Second)
		require.Len(t, g.Snapshot().Groups, 1)
		flush := flushOf(dn)
		submit(g, flush)
		all(doors)
		require.Equal(t, 1, dn.count(flush))
		require.ErrorIs(t, flush.Err, block.ErrIO, "a flush that reached another server only")
		require.Equal(t, []bool{true}, saved)
		require.Equal(t, []string{"A"}, risks.now(), "the next run would wait for a session that is over")
	})
}

// slow is a session whose logout takes until the test lets it.
type slow struct {
	*fake
	let chan struct{}
}

func (s slow) Close(ctx context.Context) error {
	<-s.let
	return s.fake.Close(ctx)
}

// Paths that come and go meanwhile do not make a path be forgotten that is being removed.
func TestFlushGoesToThePathThatIsBeingRemoved(t *testing.T) {
	for _, meanwhile := range []string{"nothing", "add", "remove"} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, d := newGroup(t, Config{NoPathRetry: Queue}, 2, 8)
			defer closeGroup(g)
			let := make(chan struct{})
			x := &door{d: d, depth: 8}
			_, err := g.AddPath(PathConfig{Name: "X", Target: "iqn.x", Order: -1, Open: func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error) {
				s, err := x.open(ctx, onState, onRoom)
				if err != nil {
					return nil, err
				}
				return slow{s.(*fake), let}, nil
			}}, g.Info())
			require.NoError(t, err)
			synctest.Wait()
			dn := newDone()
			w := writeOf(dn, 1, 1)
			submit(g, w)
			require.Len(t, x.session().pending(), 1)
			go g.RemovePaths(func(pc PathConfig) bool { return pc.Name == "X" })
			synctest.Wait()
			switch meanwhile {
			case "add":
				c := &door{d: d, depth: 8}
				p, err := g.AddPath(PathConfig{Name: "C", Target: "iqn.t", Order: 5, Open: c.open}, g.Info())
				require.NoError(t, err)
				for _, q := range *g.everyPath.Load() {
					require.True(t, p == q || p.index != q.index, "two paths share a bit of flushes")
				}
				doors = append(doors, c)
			case "remove":
				removeA(g)
			}
			synctest.Wait()
			x.session().end(0, "good")
			require.Equal(t, 1, dn.count(w))
			flush := flushOf(dn)
			submit(g, flush)
			all(doors)
			require.Zero(t, dn.count(flush), "%s: it did not go to the server that has the write in its cache", meanwhile)
			ended(t, x.session(), 0x91)
			all(doors)
			require.Equal(t, 1, dn.count(flush))
			require.NoError(t, flush.Err)
			close(let)
			rest(time.Minute)
			require.Len(t, *g.everyPath.Load(), len(g.paths))
		})
	}
}

// doubting is a session that can be told of a reset.
type doubting struct {
	*fake
	doubts *atomic.Int64
}

func (d doubting) Doubt([8]byte) { d.doubts.Add(1) }

// The fence of a path goes on when the path is removed, or was not configured again
// after a crash: what its reset ends on other paths to the same target is resolved
// all the same.
func TestFenceOfAPathThatIsGoneTellsOthersOfItsReset(t *testing.T) {
	for _, removed := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			var resets, doubts atomic.Int64
			d := &disk{id: 1}
			there := &door{d: d, depth: 8, closed: true}
			fence := func(ctx context.Context) (Session, error) {
				s, err := there.open(ctx, func(initiator.State, error) {}, nil)
				if err != nil {
					return nil, err
				}
				return resettable{s.(*fake), &resets}, nil
			}
			first, err := initiator.Identify(t.Context(), &fake{d: d}, [8]byte{})
			require.NoError(t, err)
			c := Config{Alias: "m", Checker: "none", NoPathRetry: Queue, QueueDepth: 16}
			if !removed {
				c.Unfenced = []Unfenced{{Path: "A", Target: "iqn.t", Via: map[string]func(context.Context) (Session, error){"b": fence}}}
			}
			g, err := NewGroup(c, first)
			require.NoError(t, err)
			defer closeGroup(g)
			b := &door{d: d, depth: 8}
			p, err := g.AddPath(PathConfig{Name: "B", Target: "iqn.t", Order: 1, Open: func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error) {
				s, err := b.open(ctx, onState, onRoom)
				if err != nil {
					return nil, err
				}
				return doubting{s.(*fake), &doubts}, nil
			}}, first)
			require.NoError(t, err)
			synctest.Wait()
			if removed {
				a := &door{d: d, depth: 8}
				q, err := g.AddPath(PathConfig{Name: "A", Target: "iqn.t", Open: a.open}, first)
				require.NoError(t, err)
				synctest.Wait()
				g.mu.Lock()
				q.via[p], q.trust = true, Reinstates
				q.OpenAt = func(ctx context.Context, _ string) (Session, error) { return fence(ctx) }
				g.mu.Unlock()
				w := writeOf(newDone(), 1, 1)
				submit(g, w)
				a.set(true)
				a.session().Abort(errDoor)
				rest(time.Second)
				flush := flushOf(newDone())
				submit(g, flush)
				endAll(b.session())
				require.NoError(t, w.Err)
				removeA(g)
				require.Len(t, g.Snapshot().Groups, 1)
			}
			require.Len(t, g.ledger.of("A"), 1)
			there.set(false)
			rest(10 * time.Second)
			require.Empty(t, g.ledger.of("A"))
			require.EqualValues(t, 1, resets.Load())
			require.EqualValues(t, 1, doubts.Load(), "B waits for answers that the reset has ended")
		})
	}
}

// A flush that waits for a path which is on its way out keeps nothing else waiting.
func TestFlushThatWaitsForAPathThatIsBeingRemovedIsParked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, d := newGroup(t, Config{NoPathRetry: Queue}, 1, 8)
		defer closeGroup(g)
		let := make(chan struct{})
		x := &door{d: d, depth: 8}
		var once bool
		_, err := g.AddPath(PathConfig{Name: "X", Target: "iqn.x", Order: -1, Open: func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error) {
			s, err := x.open(ctx, onState, onRoom)
			if err != nil {
				return nil, err
			}
			return flushing{s.(*fake), func() { once = true; x.session().Abort(errDoor); <-let }}, nil
		}}, g.Info())
		require.NoError(t, err)
		synctest.Wait()
		dn := newDone()
		w := writeOf(dn, 1, 1)
		submit(g, w)
		go g.RemovePaths(func(pc PathConfig) bool { return pc.Name == "X" })
		synctest.Wait()
		x.session().end(0, "good")
		rest(time.Second)
		require.True(t, once)
		flush, read := flushOf(dn), readOf(dn, 5)
		submit(g, flush)
		require.Zero(t, dn.count(flush))
		submit(g, read)
		all(doors)
		require.Equal(t, 1, dn.count(read), "a read behind a parked flush")
		close(let)
		rest(time.Minute)
		all(doors)
		require.Equal(t, 1, dn.count(flush))
		require.ErrorIs(t, flush.Err, block.ErrIO)
	})
}
