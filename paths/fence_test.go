package paths

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
)

// ambiguous kills A with a write of block 1 under way and lets B acknowledge it;
// A stays away.
func ambiguous(t *testing.T, g *Group, doors []*door, dn *done) {
	w := writeOf(dn, 1, 1)
	submit(g, w)
	doors[0].set(true)
	doors[0].session().Abort(errDoor)
	synctest.Wait()
	doors[1].session().end(0, "good")
	require.NoError(t, w.Err)
	require.Len(t, g.ledger.of("A"), 1)
}

func TestFenceCommandThatFailsRunsAgainUntilItSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var made []FenceRequest
		calls := func() []FenceRequest {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(made)
		}
		g, doors, d := newGroup(t, Config{NoPathRetry: Queue, FenceWait: 20 * time.Second, FenceCommand: func(ctx context.Context, r FenceRequest) error {
			mu.Lock()
			made = append(made, r)
			n := len(made)
			mu.Unlock()
			if n == 1 {
				return errors.New("no")
			}
			if n == 2 { // hangs: only its time ends it
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}}, 2, 8)
		defer closeGroup(g)
		synctest.Wait()
		dn := newDone()
		ambiguous(t, g, doors, dn)
		over := writeOf(dn, 1, 2)
		submit(g, over)
		time.Sleep(25 * time.Second)
		synctest.Wait()
		require.Len(t, calls(), 2)
		require.Zero(t, dn.count(over))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		require.Len(t, calls(), 3)
		require.Equal(t, FenceRequest{Map: "m", WWID: g.lu().WWID, Path: "A", Target: "iqn.t"}, calls()[2])
		endAll(doors[1].session())
		require.EqualValues(t, 2, d.data[fakeBlock])
		require.EqualValues(t, 1, g.Snapshot().Safety.Fences[fenceCommand])
		time.Sleep(time.Hour)
		require.Len(t, calls(), 3, "it fences what is fenced")
	})
}

// A map that does not queue for ever does not hold for ever either.
func TestHeldWriteFailsWhereTheMapDoesNotQueue(t *testing.T) {
	for _, c := range []struct {
		retry int
		fails time.Duration // 0: never
	}{{Fail, 10 * time.Second}, {5, 25 * time.Second}, {Queue, 0}} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, _ := newGroup(t, Config{NoPathRetry: c.retry, FenceWait: 10 * time.Second, PollingInterval: 5 * time.Second}, 2, 8)
			defer closeGroup(g)
			synctest.Wait()
			dn := newDone()
			ambiguous(t, g, doors, dn)
			over, elsewhere := writeOf(dn, 1, 2), writeOf(dn, 2, 2)
			submit(g, over)
			if c.fails == 0 {
				time.Sleep(time.Hour)
				require.Zero(t, dn.count(over))
				return
			}
			time.Sleep(c.fails - time.Second)
			require.Zero(t, dn.count(over))
			time.Sleep(2 * time.Second)
			synctest.Wait()
			require.ErrorIs(t, over.Err, block.ErrIO)
			again := writeOf(dn, 1, 3)
			submit(g, again, elsewhere)
			require.ErrorIs(t, again.Err, block.ErrIO)
			endAll(doors[1].session())
			require.NoError(t, elsewhere.Err)
			doors[0].set(false) // the fence
			time.Sleep(10 * time.Second)
			last := writeOf(dn, 1, 4)
			submit(g, last)
			for _, d := range doors {
				endAll(d.session())
			}
			require.NoError(t, last.Err)
		})
	}
}

// lazy is a session that its target serves no more after the next login, but
// closes only when it is spoken to.
type lazy struct {
	*fake
	over atomic.Bool
}

func (l *lazy) Do(ctx context.Context, c *initiator.Command) error {
	if l.over.Load() {
		l.Abort(errDoor)
		<-l.Done()
	}
	return l.fake.Do(ctx, c)
}

func TestTargetThatClosesAnEndedSessionOnlyWhenSpokenToReinstates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue}, 1, 8)
		defer closeGroup(g)
		b := &door{d: doors[0].d, depth: 8}
		var before *lazy
		_, err := g.AddPath(PathConfig{Name: "B", Target: "iqn.lazy", Order: -1,
			Open: func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error) {
				s, err := b.open(ctx, onState, onRoom)
				if err != nil {
					return nil, err
				}
				if before != nil {
					before.over.Store(true)
				}
				before = &lazy{fake: s.(*fake)}
				return before, nil
			},
			OpenAt: func(context.Context, string) (Session, error) { return nil, errDoor }}, g.Info())
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		require.Equal(t, "B", g.table.Load().paths[0].Name, "the path is not up")
		require.Equal(t, Reinstates, g.paths[0].trust)
		require.Equal(t, 1+selfTests, b.logins)
	})
}

// A target whose login ends nothing: what the operator configured decides when
// its old sessions are over, not its word.
func TestWordOfAnUntrustedTargetDoesNotEndTheQuarantine(t *testing.T) {
	for _, quarantine := range []time.Duration{0, time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Quarantine: quarantine}, 1, 8)
			defer closeGroup(g)
			b := &door{d: doors[0].d, depth: 8}
			_, err := g.AddPath(PathConfig{Name: "B", Target: "iqn.liar", Order: -1, Open: b.open,
				OpenAt: func(context.Context, string) (Session, error) { return nil, errDoor }}, g.Info())
			require.NoError(t, err)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			require.Equal(t, Untrusted, g.paths[0].trust)
			require.Equal(t, "B", g.table.Load().paths[0].Name)
			dn := newDone()
			w, over := writeOf(dn, 1, 1), writeOf(dn, 1, 2)
			submit(g, w)
			b.session().Abort(errDoor)
			synctest.Wait()
			endAll(doors[0].session())
			submit(g, over)
			time.Sleep(10 * time.Second)
			st := g.Snapshot()
			if quarantine == 0 {
				require.EqualValues(t, 1, st.Safety.Fences[fenceUnproven])
				return
			}
			require.Zero(t, dn.count(over))
			require.Equal(t, 1, st.Safety.Held)
			require.Equal(t, 1, st.Paths.Usable, "the path serves although its old session may still write")
			time.Sleep(time.Minute)
			st = g.Snapshot()
			require.EqualValues(t, 1, st.Safety.Fences[fenceTimed])
			require.Equal(t, 2, st.Paths.Usable)
		})
	}
}

// A quarantine that is taken back does not leave the path waiting for its end.
func TestPathComesBackWhenTheQuarantineIsTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Quarantine: time.Hour}, 1, 8)
		defer closeGroup(g)
		b := &door{d: doors[0].d, depth: 8}
		_, err := g.AddPath(PathConfig{Name: "B", Target: "iqn.liar", Order: -1, Open: b.open,
			OpenAt: func(context.Context, string) (Session, error) { return nil, errDoor }}, g.Info())
		require.NoError(t, err)
		rest(5 * time.Second)
		submit(g, writeOf(newDone(), 1, 1))
		b.session().Abort(errDoor)
		rest(time.Minute)
		require.Equal(t, 1, g.Snapshot().Paths.Usable)
		c := g.Config()
		c.Quarantine = 0
		require.NoError(t, g.Reconfigure(c))
		rest(time.Minute)
		require.Equal(t, 2, g.Snapshot().Paths.Usable)
		require.EqualValues(t, 1, g.Snapshot().Safety.Fences[fenceUnproven])
	})
}

// One path of two servers failed and came back: unasked, I/O stays where it is.
func TestTwoServersAreStickyUnlessFailbackIsAskedFor(t *testing.T) {
	for _, failback := range []string{"", Immediate} {
		synctest.Test(t, func(t *testing.T) {
			g, doors := twoServers(t, Config{NoPathRetry: Queue, Failback: failback})
			defer closeGroup(g)
			time.Sleep(settleTime + time.Second)
			require.Equal(t, "A", g.table.Load().paths[0].Name)
			doors[0].session().Abort(errDoor)
			time.Sleep(5 * time.Second)
			require.Equal(t, 2, g.Snapshot().Paths.Usable)
			want := map[string]string{"": "B", Immediate: "A"}[failback]
			require.Equal(t, want, g.table.Load().paths[0].Name)
			require.Equal(t, map[string]string{"": Manual, Immediate: Immediate}[failback], g.Snapshot().Failback)
		})
	}
}

// resettable is a fake session with LOGICAL UNIT RESET.
type resettable struct {
	*fake
	resets *atomic.Int64
}

func (r resettable) LUReset(context.Context, [8]byte) error {
	r.resets.Add(1)
	if len(r.pending()) > 0 || len(r.issued) > 0 {
		panic("a fence reset the unit on a session that carries I/O")
	}
	return nil
}

// A portal may lead elsewhere since the self-test: a login there ends nothing.
func TestPortalThatLeadsToAnotherDiskIsNoFence(t *testing.T) {
	for _, same := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, d := newGroup(t, Config{NoPathRetry: Queue}, 2, 8)
			defer closeGroup(g)
			synctest.Wait()
			there := &door{d: d, depth: 8}
			if !same {
				there.d = &disk{id: 2}
			}
			var resets atomic.Int64
			a, b := g.paths[0], g.paths[1]
			g.mu.Lock()
			a.via[b] = true
			a.OpenAt = func(ctx context.Context, _ string) (Session, error) {
				s, err := there.open(ctx, a.onState, a.onRoom)
				if err != nil {
					return nil, err
				}
				return resettable{s.(*fake), &resets}, nil
			}
			a.trust = Reinstates
			g.mu.Unlock()
			dn := newDone()
			w := writeOf(dn, 1, 1)
			submit(g, w)
			doors[0].set(true)
			doors[0].session().Abort(errDoor)
			time.Sleep(5 * time.Second)
			if same {
				require.Empty(t, g.ledger.of("A"))
				require.EqualValues(t, 1, resets.Load())
			} else {
				require.Len(t, g.ledger.of("A"), 1, "another disk's portal counted as the fence")
				require.Zero(t, resets.Load(), "it reset a disk that is not its own")
			}
			endAll(doors[1].session())
		})
	}
}

// listening is a fake session that could tell of a reset.
type listening struct{ *fake }

func (listening) OnNotice(func(initiator.Notice)) {}

// resetting is a fake session whose LOGICAL UNIT RESET the test plays.
type resetting struct {
	*fake
	reset func()
}

func (r resetting) LUReset(context.Context, [8]byte) error { r.reset(); return nil }

// A write that waits for its data must not meet a reset: LIO drops it, and waits
// for it. Nor may a unit that is slow with both hold everything up.
func TestResetMeetsNoWriteOfOurs(t *testing.T) {
	for _, stuck := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, d := newGroup(t, Config{NoPathRetry: Queue}, 2, 8)
			defer closeGroup(g)
			synctest.Wait()
			a, b := g.paths[0], g.paths[1]
			there := &door{d: d, depth: 8}
			dn := newDone()
			under, later := writeOf(dn, 3, 1), writeOf(dn, 4, 1)
			var met atomic.Int64
			met.Store(-1)
			answer := make(chan struct{})
			answered := sync.OnceFunc(func() { close(answer) })
			defer answered()
			g.mu.Lock()
			a.via[b] = true
			a.OpenAt = func(ctx context.Context, _ string) (Session, error) {
				s, err := there.open(ctx, a.onState, a.onRoom)
				if err != nil {
					return nil, err
				}
				return resetting{s.(*fake), func() { met.Store(int64(len(doors[1].session().pending()))); <-answer }}, nil
			}
			a.trust = Reinstates
			g.mu.Unlock()
			w := writeOf(dn, 1, 1)
			submit(g, w)
			doors[0].set(true)
			doors[0].session().Abort(errDoor)
			rest(100 * time.Millisecond)
			submit(g, under, later)
			rest(10 * time.Millisecond)
			require.Len(t, doors[1].session().pending(), 1, "only the retry, which was under way")
			require.EqualValues(t, -1, met.Load())
			if stuck {
				rest(pauseTime - 200*time.Millisecond)
				require.EqualValues(t, -1, met.Load())
				rest(time.Second)
				require.EqualValues(t, 1, met.Load())
				require.Len(t, doors[1].session().pending(), 3, "with the unit stuck the reset goes ahead, and so does I/O")
			} else {
				endAll(doors[1].session())
				rest(10 * time.Millisecond)
				require.Zero(t, met.Load())
				require.Empty(t, doors[1].session().pending())
				rest(pauseReset)
				require.Len(t, doors[1].session().pending(), 2, "a reset that takes its time")
			}
			answered()
			rest(time.Second)
			require.Empty(t, g.ledger.of("A"))
			require.Empty(t, g.quiet)
			endAll(doors[1].session())
			for _, r := range []*block.Request{w, under, later} {
				require.Equal(t, 1, dn.count(r))
				require.NoError(t, r.Err)
			}
		})
	}
}

// Only a session that was there before a reset must hear of it.
func TestSessionThatBeginsDuringAResetIsNoWitness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, d := newGroup(t, Config{NoPathRetry: Queue}, 2, 8)
		defer closeGroup(g)
		synctest.Wait()
		a, b := g.paths[0], g.paths[1]
		there := &door{d: d, depth: 8}
		g.mu.Lock()
		b.Open = func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error) {
			s, err := doors[1].open(ctx, onState, onRoom)
			if err != nil {
				return nil, err
			}
			return listening{s.(*fake)}, nil
		}
		a.via[b] = true
		a.OpenAt = func(ctx context.Context, _ string) (Session, error) {
			s, err := there.open(ctx, a.onState, a.onRoom)
			if err != nil {
				return nil, err
			}
			return resetting{s.(*fake), func() {
				endAll(doors[1].session())
				doors[1].session().Abort(errDoor)
				time.Sleep(time.Second)
				require.NotNil(t, b.current.Load(), "B has to be back")
			}}, nil
		}
		a.trust = Reinstates
		g.mu.Unlock()
		w := writeOf(newDone(), 1, 1)
		submit(g, w)
		doors[0].set(true)
		doors[0].session().Abort(errDoor)
		time.Sleep(5 * time.Second)
		require.Equal(t, map[string]int64{fenceProven: 1}, g.Snapshot().Safety.Fences)
	})
}

// lapsing is an opener of paths whose target ends a session when its initiator
// logs in anew.
func lapsing(d *door, resets *atomic.Int64) Opener {
	return func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error) {
		if old := d.session(); old != nil {
			old.Abort(errDoor)
			<-old.Done()
		}
		s, err := d.open(ctx, onState, onRoom)
		if err != nil {
			return nil, err
		}
		return resettable{s.(*fake), resets}, nil
	}
}

// What the self-test finds is told, remembered for while it cannot be asked, and
// decides whether a fence needs a reset.
func TestClassOfATargetIsTestedRememberedAndUsed(t *testing.T) {
	for _, waits := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			told := map[string]Trust{}
			g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Waits: waits, Classes: map[string]Trust{"iqn.known": Untrusted}, OnClass: func(n string, c Trust) { told[n] = c }}, 1, 8)
			defer closeGroup(g)
			var resets atomic.Int64
			a := &door{d: doors[0].d, depth: 8}
			away := &door{d: doors[0].d, closed: true}
			at := func(context.Context, string) (Session, error) { return nil, errDoor }
			for name, d := range map[string]*door{"iqn.good": a, "iqn.known": away} {
				_, err := g.AddPath(PathConfig{Name: name, Target: name, Order: -1, Open: lapsing(d, &resets), OpenAt: at}, g.Info())
				require.NoError(t, err)
			}
			time.Sleep(5 * time.Second)
			want := Reinstates
			if waits {
				want = Waits
			}
			synctest.Wait()
			require.Equal(t, map[string]Trust{"iqn.good": want}, told)
			class := func(name string) (c Trust) {
				for _, pg := range g.Snapshot().Groups {
					for _, p := range pg.Paths {
						if p.Name == name {
							c = p.Trust
						}
					}
				}
				return c
			}
			require.Equal(t, want, class("iqn.good"))
			require.Equal(t, Untrusted, class("iqn.known"))
			require.Zero(t, resets.Load(), "a reset at bring-up")

			require.Equal(t, "iqn.good", g.table.Load().paths[0].Name)
			dn := newDone()
			w := writeOf(dn, 1, 1)
			submit(g, w)
			a.session().Abort(errDoor)
			time.Sleep(5 * time.Second)
			require.EqualValues(t, 1, g.Snapshot().Safety.Fences[fenceProven])
			require.Equal(t, map[bool]int64{false: 1, true: 0}[waits], resets.Load())
			endAll(doors[0].session())
			require.NoError(t, w.Err)
		})
	}
}

// While an old session is not fenced the log says what to set: that must count for
// this one, and what is decided later about queueing too.
func TestFenceFollowsTheConfigurationAndTheOperator(t *testing.T) {
	none := func(*Group, *Config) {}
	for _, c := range []struct {
		name   string
		retry  int
		change func(g *Group, c *Config)
		how    string // it ends so
		undo   func(g *Group, c *Config)
		err    error // of a request that is held; one that comes after undo waits
	}{
		{"quarantine", Queue, func(_ *Group, c *Config) { c.Quarantine = 20 * time.Second }, fenceTimed, none, nil},
		{"quarantine that is over", Queue, func(_ *Group, c *Config) { c.Quarantine = time.Second }, fenceTimed, none, nil},
		{"command", Queue, func(_ *Group, c *Config) {
			c.FenceCommand = func(context.Context, FenceRequest) error { return nil }
		}, fenceCommand, none, nil},
		{"queue", Fail, func(_ *Group, c *Config) { c.NoPathRetry = Queue }, "", none, nil},
		{"queue by hand", Fail, func(g *Group, _ *Config) { g.SetQueueing(true) }, "", none, nil},
		{"fail", Queue, func(_ *Group, c *Config) { c.NoPathRetry = Fail }, "", func(_ *Group, c *Config) { c.NoPathRetry = Queue }, block.ErrIO},
		{"fail by hand", Queue, func(g *Group, _ *Config) { g.SetQueueing(false) }, "", func(g *Group, _ *Config) { g.SetQueueing(true) }, block.ErrIO},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g, doors, _ := newGroup(t, Config{NoPathRetry: c.retry}, 2, 8)
				defer closeGroup(g)
				synctest.Wait()
				dn := newDone()
				ambiguous(t, g, doors, dn)
				over := writeOf(dn, 1, 2)
				submit(g, over)
				rest(10 * time.Second)
				apply := func(f func(*Group, *Config)) {
					conf := g.Config()
					f(g, &conf)
					require.NoError(t, g.Reconfigure(conf))
					synctest.Wait()
				}
				apply(c.change)
				rest(time.Minute)
				endAll(doors[1].session())
				require.ErrorIs(t, over.Err, c.err)
				if c.how != "" {
					require.EqualValues(t, 1, g.Snapshot().Safety.Fences[c.how])
					require.Equal(t, 1, dn.count(over))
					return
				}
				require.Equal(t, c.err != nil, dn.count(over) == 1)
				apply(c.undo)
				last := writeOf(dn, 1, 3)
				submit(g, last)
				rest(time.Minute)
				require.Zero(t, dn.count(last), last.Err)
				doors[0].set(false)
				rest(10 * time.Second)
				all(doors)
				require.Equal(t, 1, dn.count(last))
				require.NoError(t, last.Err)
			})
		})
	}
}

// After a crash the whole disk waits for a path that another portal can fence: that
// goes on if the path's own portal takes logins but does not get further.
func TestFenceOfTheRunBeforeGoesOnWhereThePathsOwnLoginGetsNowhere(t *testing.T) {
	for _, spoilt := range []string{"identity", "self-test"} {
		t.Run(spoilt, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := &disk{id: 1}
				first, err := initiator.Identify(t.Context(), &fake{d: d}, [8]byte{})
				require.NoError(t, err)
				there := &door{d: d, depth: 8, closed: true}
				g, err := NewGroup(Config{Alias: "m", Checker: "none", NoPathRetry: Queue, QueueDepth: 16, Unfenced: []Unfenced{{Path: "A", Via: map[string]func(context.Context) (Session, error){
					"there": func(ctx context.Context) (Session, error) {
						return there.open(ctx, func(initiator.State, error) {}, nil)
					},
				}}}}, first)
				require.NoError(t, err)
				defer closeGroup(g)
				a, b := &door{d: d, depth: 8}, &door{d: d, depth: 8}
				pc := PathConfig{Name: "A", Target: "iqn.t", Open: a.open}
				if spoilt == "identity" {
					a.d = &disk{id: 2}
				} else {
					pc.OpenAt = func(context.Context, string) (Session, error) { return nil, errDoor }
					pc.Open = func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error) {
						if a.knocks()%2 == 1 { // the second one of each test
							a.set(true)
							defer a.set(false)
						}
						return a.open(ctx, onState, onRoom)
					}
				}
				_, err = g.AddPath(pc, first)
				require.NoError(t, err)
				_, err = g.AddPath(PathConfig{Name: "B", Target: "iqn.t", Order: 1, Open: b.open}, first)
				require.NoError(t, err)
				rest(10 * time.Second)
				require.NotZero(t, a.logins)
				dn := newDone()
				w := writeOf(dn, 1, 1)
				submit(g, w)
				require.Len(t, g.ledger.of("A"), 1)
				there.set(false)
				rest(5 * time.Second)
				endAll(b.session())
				require.Empty(t, g.ledger.of("A"), "nobody asks the other portal any more")
				require.Equal(t, 1, dn.count(w))
			})
		})
	}
}

// The operator takes a path out of service under load, to rehearse a failover: it
// fences its own old session, and then stays away.
func TestPathFailedByHandFencesItsOldSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors := twoServers(t, Config{NoPathRetry: Queue})
		defer closeGroup(g)
		dn := newDone()
		w := writeOf(dn, 1, 1)
		submit(g, w)
		require.Len(t, doors[0].session().pending(), 1)
		require.NoError(t, g.FailPath("A"))
		synctest.Wait()
		require.Len(t, g.ledger.of("A"), 1)
		rest(5 * time.Second)
		endAll(doors[1].session())
		require.Equal(t, 1, dn.count(w))
		over := writeOf(dn, 1, 2)
		submit(g, over)
		endAll(doors[1].session())
		require.Equal(t, 1, dn.count(over), "held until the path is reinstated")
		require.Nil(t, doors[0].session())
		knocks := doors[0].knocks()
		rest(time.Hour)
		require.Equal(t, knocks, doors[0].knocks(), "it does not stay away")
		require.Equal(t, errByHand.Error(), g.paths[0].lastError)
		require.NoError(t, g.ReinstatePath("A"))
		rest(5 * time.Second)
		require.Equal(t, 2, g.Snapshot().Paths.Usable)
	})
}

// A WRITE SAME was under way when its server died, and the other server does not know
// the command: the zeroes that are written instead are no other bytes, and need not
// wait for a fence that may not come.
func TestZeroesWrittenInPiecesAreTheRetryOfTheirWriteSame(t *testing.T) {
	for _, protection := range []string{Hold, Strict} {
		synctest.Test(t, func(t *testing.T) {
			g, doors := twoServers(t, Config{NoPathRetry: Queue, MaxIO: 4 * fakeBlock, Protection: protection})
			defer closeGroup(g)
			dn := newDone()
			z := &block.Request{Op: block.WriteZeroes, Off: 2 * fakeBlock, Len: 16 * fakeBlock, Owner: dn}
			submit(g, z)
			require.EqualValues(t, 0x93, doors[0].session().pending()[0].CDB[0])
			doors[0].set(true)
			doors[0].session().Abort(errDoor)
			synctest.Wait()
			b := doors[1].session()
			if protection == Strict {
				require.Empty(t, b.pending())
				return
			}
			require.EqualValues(t, 0x93, b.pending()[0].CDB[0])
			b.answer(sense(5, 0x20, 0))
			for range 4 {
				ended(t, b, 0x8a)
			}
			require.Equal(t, 1, dn.count(z))
			require.NoError(t, z.Err)
			over := writeOf(dn, 9, 1)
			submit(g, over)
			require.Empty(t, b.pending(), "the old WRITE SAME may still come")
			doors[0].set(false)
			rest(5 * time.Second)
			all(doors)
			require.Equal(t, 1, dn.count(over))
		})
	}
}
