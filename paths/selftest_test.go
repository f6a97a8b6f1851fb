package paths

import (
	"context"
	"maps"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
)

// port is a target's side of one path's ISID: a login ends the session before.
type port struct {
	door
	group  uint16
	before Session
}

type placedFake struct {
	*fake
	group uint16
}

func (p *placedFake) TargetPortalGroup() uint16 { return p.group }
func (p *placedFake) Redirected() string        { return "" }

func (p *port) open(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error) {
	s, err := p.door.open(ctx, onState, onRoom)
	if err != nil {
		return nil, err
	}
	if p.before != nil {
		p.before.Abort(errDoor)
	}
	p.before = &placedFake{s.(*fake), p.group}
	return p.before, nil
}

// twoPortals is a map over two portals of one target that ends sessions.
func twoPortals(t *testing.T, tested map[string]Tested, groups ...uint16) (*Group, []*port) {
	d := &disk{id: 1}
	first, err := initiator.Identify(t.Context(), &fake{d: d}, [8]byte{})
	require.NoError(t, err)
	g, err := NewGroup(Config{Alias: "m", Checker: "none", QueueDepth: 16, NoPathRetry: Queue, Tested: tested}, first)
	require.NoError(t, err)
	var ps []*port
	for i, group := range groups {
		p := &port{door: door{d: d, depth: 8}, group: group}
		ps = append(ps, p)
		_, err := g.AddPath(PathConfig{Name: string(rune('A' + i)), Target: "iqn.t", Portal: string(rune('a' + i)), Order: i, Open: p.open,
			OpenAt: func(ctx context.Context, _ string) (Session, error) {
				return p.open(ctx, func(initiator.State, error) {}, func(*block.Plug) {})
			}}, first)
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		synctest.Wait()
	}
	require.Equal(t, len(groups), g.Snapshot().Paths.Usable)
	return g, ps
}

// A portal leads to another portal group than when it proved able to end the path's
// session: a login there ends nothing, and proves nothing.
func TestFenceThroughAPortalThatMovedIsNoProof(t *testing.T) {
	for _, moved := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			g, ps := twoPortals(t, nil, 1, 1)
			defer closeGroup(g)
			a := g.paths[0]
			g.mu.Lock()
			a.Open = func(context.Context, func(initiator.State, error), func(*block.Plug)) (Session, error) {
				return nil, errDoor
			}
			at := a.OpenAt
			a.OpenAt = func(ctx context.Context, portal string) (Session, error) {
				if moved {
					ps[0].group = 2
				}
				return at(ctx, portal)
			}
			g.mu.Unlock()
			submit(g, writeOf(newDone(), 1, 1))
			ps[0].session().Abort(errDoor)
			rest(5 * time.Second)
			require.Equal(t, !moved, g.Snapshot().Safety.Fences[fenceProven] == 1)
			require.Equal(t, moved, len(g.ledger.of("A")) == 1)
		})
	}
}

func TestTheNextRunGoesOnWithWhatTheSelfTestsFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, ps := twoPortals(t, nil, 1, 1)
		require.Greater(t, ps[0].logins, 1)
		found := g.Tested()
		closeGroup(g)
		require.Equal(t, map[string]Tested{
			"A": {"iqn.t", "group 1", Reinstates, false, map[string]bool{"B": true}},
			"B": {"iqn.t", "group 1", Reinstates, false, map[string]bool{"A": true}},
		}, found)

		g, ps = twoPortals(t, found, 1, 1)
		require.Equal(t, []int{1, 1}, []int{ps[0].logins, ps[1].logins}, "a path was tested again")
		require.Equal(t, found, g.Tested(), "for the run after this one")
		// The fence needs no more than that: through the other portal, at once.
		dn := newDone()
		w, over := writeOf(dn, 1, 1), writeOf(dn, 1, 2)
		submit(g, w)
		ps[0].set(true)
		ps[0].before.Abort(errDoor)
		synctest.Wait()
		submit(g, over)
		ps[0].set(false)
		time.Sleep(time.Second)
		for range 4 {
			endAll(ps[1].session())
			synctest.Wait()
		}
		require.Equal(t, 1, dn.count(w))
		require.Equal(t, 1, dn.count(over))
		require.EqualValues(t, 1, g.Snapshot().Safety.Fences[fenceProven])
		closeGroup(g)

		for name, c := range map[string]struct {
			change func(map[string]Tested)
			groups []uint16
			logins []int
		}{
			"another nexus":         {nil, []uint16{1, 2}, []int{1, 2 + selfTests}},
			"a path is new":         {func(m map[string]Tested) { delete(m, "B") }, []uint16{1, 1}, []int{1, 2 + selfTests}},
			"another path knows it": {func(m map[string]Tested) { m["B"] = Tested{"iqn.t", "group 1", Reinstates, false, nil} }, []uint16{1, 1}, []int{1, 2 + selfTests}},
			"another target":        {func(m map[string]Tested) { m["A"] = Tested{"iqn.u", "group 1", Reinstates, false, nil} }, []uint16{1}, []int{1 + selfTests}},
			"untrusted":             {func(m map[string]Tested) { m["A"] = Tested{"iqn.t", "group 1", Untrusted, false, nil} }, []uint16{1}, []int{1}},
		} {
			m := maps.Clone(found)
			if c.change != nil {
				c.change(m)
			}
			g, ps := twoPortals(t, m, c.groups...)
			for i, p := range ps {
				require.Equal(t, c.logins[i], p.logins, "%s: path %d", name, i)
			}
			want := Reinstates
			if name == "untrusted" {
				want = Untrusted
			}
			synctest.Wait()
			require.Equal(t, want, g.paths[0].trust, name)
			closeGroup(g)
		}
	})
}

// What a run knew is no news a minute later.
func TestALatePathIsTestedAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		found := map[string]Tested{"A": {"iqn.t", "group 1", Untrusted, false, nil}}
		d := &disk{id: 1}
		first, err := initiator.Identify(t.Context(), &fake{d: d}, [8]byte{})
		require.NoError(t, err)
		g, err := NewGroup(Config{Alias: "m", Checker: "none", QueueDepth: 16, NoPathRetry: Queue, Tested: found}, first)
		require.NoError(t, err)
		defer closeGroup(g)
		time.Sleep(testedFor + time.Second)
		p := &port{door: door{d: d, depth: 8}, group: 1}
		_, err = g.AddPath(PathConfig{Name: "A", Target: "iqn.t", Portal: "a", Open: p.open, OpenAt: func(context.Context, string) (Session, error) { return nil, errDoor }}, first)
		require.NoError(t, err)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		require.Equal(t, Reinstates, g.paths[0].trust)
		require.Equal(t, 1+selfTests, p.logins)
	})
}
