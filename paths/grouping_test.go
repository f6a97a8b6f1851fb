package paths

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
)

// steer answers everything that waits on the sessions for a while: what is on
// a door in bad fails, the rest is good.
func steer(doors []*door, bad map[int]bool, long time.Duration) {
	for end := time.Now().Add(long); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		for i, d := range doors {
			s := d.session()
			if s == nil {
				continue
			}
			for s.session() && len(s.pending()) > 0 {
				if bad[i] {
					s.end(0, "fail")
				} else {
					s.end(0, "good")
				}
			}
		}
	}
}

func (f *fake) session() bool { return !f.isDead() }

// multipath-tools #54: a path whose checker is content but whose I/O fails was
// reinstated at every check, and failed I/O at every reinstatement.
func TestAPathWhoseIOFailsIsNotReinstatedAgainAndAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Policy: "multibus", PollingInterval: time.Second}, 2, 8)
		defer closeGroup(g)
		synctest.Wait()
		dn := newDone()
		stop := time.Now().Add(5 * time.Minute)
		done := make(chan int)
		go func() {
			n := 0
			for ; time.Now().Before(stop); time.Sleep(100 * time.Millisecond) {
				r := &block.Request{Op: block.Read, Len: fakeBlock, Data: make([]byte, fakeBlock), Owner: dn}
				submit(g, r)
				n++
			}
			done <- n
		}()
		steer(doors, map[int]bool{0: true}, 5*time.Minute+time.Second)
		n := <-done
		synctest.Wait()
		steer(doors, map[int]bool{0: true}, time.Second)
		require.Len(t, dn.in, n)
		for _, r := range dn.in {
			require.NoError(t, r.Err)
		}
		m := g.Snapshot()
		bad := m.Groups[0].Paths[0]
		require.Equal(t, "A", bad.Name)
		require.LessOrEqual(t, bad.Errors, int64(12), "in five minutes of load with 3000 I/Os")
		require.GreaterOrEqual(t, bad.Errors, int64(4), "it is tried now and then")
		require.GreaterOrEqual(t, m.Groups[0].Paths[1].IOs, int64(n))
	})
}

// A delayed path serves if nothing else is left.
func TestADelayedPathServesIfItIsTheLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, PollingInterval: time.Second}, 2, 8)
		defer closeGroup(g)
		synctest.Wait()
		dn := newDone()
		for range 3 { // fail A until it is delayed
			submit(g, writeOf(dn, 1, 1))
			steer(doors, map[int]bool{0: true}, 500*time.Millisecond)
		}
		require.Equal(t, "delayed", g.Snapshot().Groups[0].Paths[0].State)
		doors[1].set(true)
		doors[1].session().Abort(errDoor)
		synctest.Wait()
		r := writeOf(dn, 2, 2)
		submit(g, r)
		steer(doors, nil, 100*time.Millisecond)
		require.Equal(t, 1, dn.count(r))
		require.NoError(t, r.Err)
	})
}

func serving(g *Group) string {
	t := g.table.Load()
	if len(t.paths) == 0 {
		return ""
	}
	return t.paths[0].Name
}

func TestFailbackAfterSecondsWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, FailbackAfter: 10 * time.Second}, 2, 8)
		defer closeGroup(g)
		synctest.Wait()
		require.Equal(t, "A", serving(g))
		doors[0].set(true)
		doors[0].session().Abort(errDoor)
		synctest.Wait()
		require.Equal(t, "B", serving(g))
		doors[0].set(false)
		time.Sleep(5 * time.Second)
		require.Equal(t, "B", serving(g), "5 s after the path came back")
		time.Sleep(10 * time.Second)
		require.Equal(t, "A", serving(g))
		doors[0].set(true)
		doors[0].session().Abort(errDoor)
		synctest.Wait()
		doors[0].set(false)
		time.Sleep(5 * time.Second)
		doors[0].session().Abort(errDoor) // fails again: the wait is over
		synctest.Wait()
		time.Sleep(9 * time.Second)
		require.Equal(t, "B", serving(g), "a new path restarts the wait")
		time.Sleep(10 * time.Second)
		require.Equal(t, "A", serving(g))
	})
}

func TestFollowoverGoesBackOnlyAfterItsOwnFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Failback: Followover}, 2, 8)
		defer closeGroup(g)
		synctest.Wait()
		require.NoError(t, g.Switch(2)) // a peer of the cluster moved the unit
		require.Equal(t, "B", serving(g))
		require.Equal(t, g.paths[1], g.switched)
		g.mu.Lock()
		g.switched = nil
		g.publish()
		g.mu.Unlock()
		require.Equal(t, "B", serving(g), "the best group is up, but it did not fail here")
		doors[0].session().Abort(errDoor)
		synctest.Wait()
		time.Sleep(5 * time.Second)
		require.Equal(t, "A", serving(g), "its first path came back")
	})
}

func TestGroupsByPolicy(t *testing.T) {
	mk := func(policy string, servers bool) *Group {
		g := &Group{}
		g.policy.Store(&policiesOf(policy, servers)[0])
		for i, q := range []*Path{
			{prio: 50, serial: "x", portGroup: 1, up: true}, {prio: 10, serial: "x", portGroup: 1, up: true},
			{prio: 50, serial: "y", portGroup: 2, up: true}, {prio: unknownPrio, serial: "y", portGroup: 2},
		} {
			q.Name = string(rune('A' + i))
			q.Target = "iqn." + string("aabb"[i])
			g.paths = append(g.paths, q)
		}
		return g
	}
	names := func(g *Group) (out []string) {
		for _, pg := range g.grouping((*Path).usable) {
			s := ""
			for _, p := range pg.paths {
				s += p.Name
			}
			out = append(out, s)
		}
		return out
	}
	require.Equal(t, []string{"A", "C", "B", "D"}, names(mk("failover", false)))
	require.Equal(t, []string{"ABCD"}, names(mk("multibus", false)))
	require.Equal(t, []string{"CD", "AB"}, names(mk("group_by_serial", false)))
	require.Equal(t, []string{"A", "C", "B", "D"}, names(mk("group_by_prio", false)), "two target names do not share I/O unasked")
	require.Equal(t, []string{"AC", "B", "D"}, names(mk("group_by_prio", true)))
	require.Equal(t, []string{"CD", "AB"}, names(mk("group_by_node_name", false)))
	require.Equal(t, []string{"CD", "AB"}, names(mk("group_by_tpg", true)))
	groups := mk("group_by_serial", false).grouping((*Path).usable)
	require.Equal(t, 50, groups[0].prio, "D is down and unknown")
	require.Equal(t, 30, groups[1].prio)
	require.Equal(t, groups[0], best(groups))

	g := mk("group_by_node_name", false)
	for i, p := range g.paths {
		p.prio, p.Target = 1, "iqn."+string("abbb"[i])
	}
	require.Equal(t, []string{"BCD", "A"}, names(g), "of equal ones, the group of more paths")
	g.paths[1].up, g.paths[2].up = false, false
	require.Equal(t, []string{"BCD", "A"}, names(g), "whatever happens to them: operators count groups")
}

func policiesOf(name string, servers bool) []policy {
	return []policy{{Config: Config{Policy: name, MultibusServers: servers}}}
}
