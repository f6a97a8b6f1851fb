package paths

import (
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
)

// traffic keeps depth reads in flight for a while over doors that take their
// own time for each, in steps of 5 ms, and gives how long each request took.
func traffic(g *Group, doors []*door, takes func(i int) time.Duration, depth int, long time.Duration) (took []time.Duration) {
	dn := newDone()
	began := map[*block.Request]time.Time{}
	came := map[*initiator.Command]time.Time{}
	flying := 0
	for end := time.Now().Add(long); time.Now().Before(end) || flying > 0; time.Sleep(5 * time.Millisecond) {
		for ; flying < depth && time.Now().Before(end); flying++ {
			r := &block.Request{Op: block.Read, Len: fakeBlock, Data: make([]byte, fakeBlock), Owner: dn}
			began[r] = time.Now()
			submit(g, r)
		}
		for i, d := range doors {
			s := d.session()
			if s == nil {
				continue
			}
			for at := 0; at < len(s.pending()); {
				c := s.pending()[at]
				if _, ok := came[c]; !ok {
					came[c] = time.Now()
				}
				if time.Since(came[c]) < takes(i) {
					at++
					continue
				}
				delete(came, c)
				s.end(at, "good")
			}
		}
		dn.mu.Lock()
		for _, r := range dn.in {
			took = append(took, time.Since(began[r]))
			delete(began, r)
			flying--
		}
		dn.in = dn.in[:0]
		dn.mu.Unlock()
	}
	return took
}

func percentile(took []time.Duration, p int) time.Duration {
	slices.Sort(took)
	return took[len(took)*p/100]
}

func statusOf(g *Group, name string) PathStatus {
	for _, pg := range g.Snapshot().Groups {
		for _, p := range pg.Paths {
			if p.Name == name {
				return p
			}
		}
	}
	return PathStatus{}
}

// bounce lets a path fail and come back.
func bounce(d *door) {
	d.session().Abort(errDoor)
	time.Sleep(2 * time.Second)
}

// san_path_err: more than the threshold of failures keeps the path back for the
// recovery time, good checks forget, and a new failure restarts the wait.
func TestAPathThatComesAndGoesIsDelayed(t *testing.T) {
	for _, marginal := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Policy: "multibus", PollingInterval: time.Second, MaxPollingInterval: time.Second, MarginalGroups: marginal,
				PathErrors: PathErrors{Threshold: 2, ForgetRate: 10, Recovery: time.Minute}}, 2, 8)
			defer closeGroup(g)
			synctest.Wait()
			state := map[bool]string{false: "delayed", true: "shaky"}[marginal]
			bounce(doors[0])
			bounce(doors[0])
			require.Equal(t, "up", statusOf(g, "A").State, "two failures are forgiven")
			time.Sleep(25 * time.Second) // 25 good checks forget both
			bounce(doors[0])
			bounce(doors[0])
			require.Equal(t, "up", statusOf(g, "A").State, "what was forgotten does not count")
			bounce(doors[0])
			require.Equal(t, state, statusOf(g, "A").State)
			require.Equal(t, "failed too often", statusOf(g, "A").Gray)
			require.Len(t, g.table.Load().paths, 1)
			require.Equal(t, marginal, slices.ContainsFunc(g.Snapshot().Groups, func(pg GroupStatus) bool { return pg.Marginal }))
			time.Sleep(50 * time.Second)
			bounce(doors[0])
			time.Sleep(30 * time.Second)
			require.Equal(t, state, statusOf(g, "A").State, "a new failure restarts the wait")
			doors[1].set(true)
			doors[1].session().Abort(errDoor)
			synctest.Wait()
			require.Equal(t, "A", serving(g), "it serves when nothing else is left")
			doors[1].set(false)
			time.Sleep(5 * time.Second)
			require.Equal(t, "B", serving(g))
			require.Equal(t, state, statusOf(g, "A").State)
			time.Sleep(30 * time.Second)
			require.Equal(t, "up", statusOf(g, "A").State)
			require.Len(t, g.table.Load().paths, 2)
		})
	}
}

// Who rehearses a failover by hand takes a path out, which is no failure of its own.
func TestWhatTheOperatorFailsIsNotGray(t *testing.T) {
	for _, c := range []Config{{PathErrors: PathErrors{Threshold: 2, ForgetRate: 100, Recovery: time.Minute}}, {Sampling: Sampling{DoubleFailed: time.Hour, Sample: time.Hour, Recheck: time.Hour, Rate: 10}}} {
		synctest.Test(t, func(t *testing.T) {
			c.NoPathRetry, c.PollingInterval = Queue, time.Second
			g, doors, _ := newGroup(t, c, 2, 8)
			defer closeGroup(g)
			synctest.Wait()
			for range 5 {
				require.NoError(t, g.FailPath("A"))
				time.Sleep(2 * time.Second)
				require.Equal(t, "down", statusOf(g, "A").State)
				require.NoError(t, g.ReinstatePath("A"))
				time.Sleep(2 * time.Second)
				require.Equal(t, "up", statusOf(g, "A").State)
			}
			for range 3 {
				bounce(doors[0])
			}
			require.Equal(t, "delayed", statusOf(g, "A").State, "its own failures count as ever")
			require.NoError(t, g.FailPath("A"))
			time.Sleep(2 * time.Minute)
			require.NoError(t, g.ReinstatePath("A"))
			time.Sleep(2 * time.Second)
			require.Equal(t, "delayed", statusOf(g, "A").State, "nor does the operator's end what it is delayed for")
			if c.PathErrors.on() {
				time.Sleep(time.Minute)
				require.Equal(t, "up", statusOf(g, "A").State)
			}
		})
	}
}

// marginal_path: two failures in a short time, then reads that must succeed.
func TestAPathThatFailedTwiceIsSampled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Policy: "multibus", PollingInterval: time.Second, MarginalGroups: true,
			Sampling: Sampling{DoubleFailed: time.Minute, Sample: 2 * time.Minute, Recheck: 5 * time.Minute, Rate: 10}}, 2, 8)
		defer closeGroup(g)
		synctest.Wait()
		bounce(doors[0])
		time.Sleep(2 * time.Minute)
		bounce(doors[0])
		require.Equal(t, "up", statusOf(g, "A").State, "two failures, but far apart")
		var n atomic.Int64
		doors[0].mu.Lock()
		doors[0].probe = func() error { // 2% of the reads fail
			if n.Add(1)%50 == 0 {
				return errors.New("read error of the test")
			}
			return nil
		}
		doors[0].mu.Unlock()
		bounce(doors[0])
		require.Equal(t, "shaky", statusOf(g, "A").State)
		require.Equal(t, "failed twice in a short time", statusOf(g, "A").Gray)
		time.Sleep(3 * time.Minute)
		require.InDelta(t, 1200, n.Load(), 30, "ten reads a second for two minutes")
		require.Equal(t, "shaky", statusOf(g, "A").State, "too many errors")
		doors[0].mu.Lock()
		doors[0].probe = func() error { return nil }
		doors[0].mu.Unlock()
		time.Sleep(3 * time.Minute)
		require.Equal(t, "shaky", statusOf(g, "A").State, "it waits for the next samples")
		time.Sleep(4 * time.Minute)
		require.Equal(t, "up", statusOf(g, "A").State)
		require.Len(t, g.table.Load().paths, 2)
	})
}

// A session that ends under sampling takes the reads with it, and the next one
// begins anew.
func TestSamplingSurvivesFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Policy: "multibus", PollingInterval: time.Second, CheckTimeout: 5 * time.Second,
			Sampling: Sampling{DoubleFailed: time.Minute, Sample: time.Minute, Recheck: 5 * time.Minute, Rate: 10}}, 2, 8)
		defer closeGroup(g)
		synctest.Wait()
		doors[0].mu.Lock()
		doors[0].probe = func() error { time.Sleep(4 * time.Second); return nil } // 32 are in flight
		doors[0].mu.Unlock()
		for range 5 {
			bounce(doors[0])
			time.Sleep(20 * time.Second)
		}
		require.Equal(t, "delayed", statusOf(g, "A").State)
		time.Sleep(time.Minute)
		require.Equal(t, "up", statusOf(g, "A").State)
	})
}

// A slow path leaves the rotation, and its latency the application.
func TestASlowPathIsMovedAside(t *testing.T) {
	for _, how := range []string{GrayOff, GrayGroup} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Policy: "multibus", Selector: "round-robin 0", GrayPaths: how}, 3, 16)
			defer closeGroup(g)
			synctest.Wait()
			var slow atomic.Int64
			slow.Store(int64(200 * time.Millisecond))
			takes := func(i int) time.Duration {
				if i == 0 {
					return time.Duration(slow.Load())
				}
				return 5 * time.Millisecond
			}
			probe := func() error { time.Sleep(time.Duration(slow.Load())); return nil }
			doors[0].mu.Lock()
			doors[0].probe = probe
			doors[0].mu.Unlock()
			before := traffic(g, doors, takes, 8, 4*time.Second)
			after := traffic(g, doors, takes, 8, 10*time.Second)
			t.Logf("gray_paths %s: p99 %v in the first 4 s, %v in the next 10 s, %d and %d reads", how, percentile(before, 99), percentile(after, 99), len(before), len(after))
			require.GreaterOrEqual(t, percentile(before, 99), 200*time.Millisecond)
			if how == GrayOff {
				require.GreaterOrEqual(t, percentile(after, 99), 200*time.Millisecond)
				require.Equal(t, "up", statusOf(g, "A").State)
				return
			}
			require.Less(t, percentile(after, 99), 20*time.Millisecond)
			require.Equal(t, "shaky", statusOf(g, "A").State)
			require.Equal(t, "worse than its siblings", statusOf(g, "A").Gray)
			require.True(t, g.Snapshot().Groups[1].Marginal)
			traffic(g, doors, takes, 8, time.Minute)
			require.Equal(t, "shaky", statusOf(g, "A").State, "as long as its probes are slow")
			slow.Store(int64(2 * time.Millisecond))
			traffic(g, doors, takes, 8, 10*time.Second)
			require.Equal(t, "shaky", statusOf(g, "A").State, "one good probe is not enough")
			traffic(g, doors, takes, 8, 10*time.Second)
			require.Equal(t, "up", statusOf(g, "A").State)
			ios := statusOf(g, "A").IOs
			traffic(g, doors, takes, 8, time.Second)
			require.Greater(t, statusOf(g, "A").IOs, ios)
		})
	}
}

// A path that becomes slow as soon as it carries I/O comes back ever more
// seldom.
func TestAGrayPathThatRelapsesComesBackMoreSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Policy: "multibus", Selector: "round-robin 0"}, 2, 16)
		defer closeGroup(g)
		synctest.Wait()
		takes := func(i int) time.Duration { return []time.Duration{100 * time.Millisecond, 5 * time.Millisecond}[i] }
		changes, was := 0, "up"
		for range 10 * 60 {
			traffic(g, doors, takes, 4, time.Second)
			if is := statusOf(g, "A").State; is != was {
				changes++
				was = is
			}
		}
		t.Logf("%d changes in 10 minutes", changes)
		require.LessOrEqual(t, changes, 9)
		require.GreaterOrEqual(t, changes, 5, "it got chances")
	})
}

// All paths of a unit that is slow are left where they are.
func TestASlowUnitMakesNoPathGray(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Policy: "multibus", Selector: "round-robin 0"}, 3, 16)
		defer closeGroup(g)
		synctest.Wait()
		traffic(g, doors, func(i int) time.Duration { return time.Duration(200+50*i) * time.Millisecond }, 16, time.Minute)
		for _, p := range []string{"A", "B", "C"} {
			require.Equal(t, "up", statusOf(g, p).State)
		}
	})
}

// Over groups only probes compare: a slow path yields to one of the next group.
func TestASlowPathYieldsToTheNextGroup(t *testing.T) {
	for _, how := range []string{GrayGroup, GrayMap} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Failback: Manual, GrayPaths: how}, 2, 16)
			defer closeGroup(g)
			time.Sleep(time.Minute)
			var slow atomic.Int64
			slow.Store(int64(100 * time.Millisecond))
			doors[0].mu.Lock()
			doors[0].probe = func() error { time.Sleep(time.Duration(slow.Load())); return nil }
			doors[0].mu.Unlock()
			takes := func(i int) time.Duration { return []time.Duration{time.Duration(slow.Load()), 5 * time.Millisecond}[i] }
			traffic(g, doors, takes, 4, 10*time.Second)
			if how == GrayGroup {
				require.Equal(t, "A", serving(g))
				return
			}
			require.Equal(t, "B", serving(g), "a gray path is left whatever failback says")
			require.Equal(t, "shaky", statusOf(g, "A").State)
			slow.Store(int64(2 * time.Millisecond))
			traffic(g, doors, takes, 4, 2*time.Minute)
			require.Equal(t, "up", statusOf(g, "A").State)
			require.Equal(t, "B", serving(g), "failback manual")
		})
	}
}

// A move that makes nothing better is taken back, and not tried again at once.
func TestAMoveThatHelpsNothingIsTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Failback: Immediate, GrayPaths: GrayMap}, 2, 16)
		defer closeGroup(g)
		synctest.Wait()
		load := 0 // whichever carries the load answers probes late
		for i, d := range doors {
			d.mu.Lock()
			d.probe = func() error {
				if i == load {
					time.Sleep(100 * time.Millisecond)
				}
				return nil
			}
			d.mu.Unlock()
		}
		moves := 0
		for range 300 {
			traffic(g, doors, func(int) time.Duration { return 100 * time.Millisecond }, 4, time.Second)
			if now := int(serving(g)[0] - 'A'); now != load {
				load, moves = now, moves+1
			}
		}
		t.Logf("%d moves in 5 minutes", moves)
		require.GreaterOrEqual(t, moves, 2)
		require.LessOrEqual(t, moves, 12)
	})
}

// Errors count as well as latency.
func TestAPathWithMoreErrorsThanItsSiblingsIsMovedAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Policy: "multibus", Selector: "round-robin 0"}, 2, 16)
		defer closeGroup(g)
		synctest.Wait()
		dn := newDone()
		n := 0
		for range 60 {
			for range 50 {
				submit(g, &block.Request{Op: block.Read, Len: fakeBlock, Data: make([]byte, fakeBlock), Owner: dn})
				time.Sleep(20 * time.Millisecond)
				for i, d := range doors {
					for s := d.session(); s != nil && len(s.pending()) > 0; {
						if n++; i == 0 && n%5 == 0 {
							s.end(0, "busy")
						} else {
							s.end(0, "good")
						}
					}
				}
			}
			if statusOf(g, "A").State == "shaky" {
				require.Equal(t, "up", statusOf(g, "B").State)
				steer(doors, nil, time.Second)
				return
			}
		}
		t.Fatal("never noticed")
	})
}
