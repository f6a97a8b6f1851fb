package daemon

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/paths"
)

// shelf is a target with a unit for each serial, behind two portals.
func shelf(t *testing.T, serials ...string) (*target.Server, []*target.LU, []string) {
	lus := units(t, serials...)
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: iqn, LUs: lus}}})
	require.NoError(t, err)
	t.Cleanup(srv.Kill)
	var urls []string
	for range 2 {
		p, err := srv.Listen("127.0.0.1:0")
		require.NoError(t, err)
		urls = append(urls, "iscsi://"+p.Addr()+"/"+iqn)
	}
	return srv, lus, urls
}

func units(t *testing.T, serials ...string) (lus []*target.LU) {
	for _, s := range serials {
		if s == "" {
			lus = append(lus, nil)
			continue
		}
		lu, err := target.NewLU(8<<20, 512, target.DefaultIdentity(s))
		require.NoError(t, err)
		lus = append(lus, lu)
	}
	return lus
}

// has tells the usable paths of each map, by the serial of its disk.
func has(d *Daemon) map[string]int {
	out := map[string]int{}
	for _, m := range d.Snapshot().Maps {
		for _, s := range []string{"a", "b", "c", "z"} {
			if m.WWID == target.WWID(s) {
				out[s] = m.Paths.Usable
			}
		}
	}
	return out
}

func awaitMaps(t *testing.T, d *Daemon, want map[string]int) {
	t.Helper()
	var got map[string]int
	require.Eventually(t, func() bool {
		got = has(d)
		if len(got) != len(want) {
			return false
		}
		for k, v := range want {
			if got[k] != v {
				return false
			}
		}
		return true
	}, patience, 10*time.Millisecond, "want %v", want)
}

func TestUnitsThatAppearBecomeMaps(t *testing.T) {
	t.Parallel()
	srv, lus, urls := shelf(t, "a")
	d, _ := begin(t, Options{URLs: urls, Policy: paths.Config{PollingInterval: 100 * time.Millisecond}}) // no interval: what the target tells is enough
	awaitMaps(t, d, map[string]int{"a": 2})
	more := append(slices.Clone(lus), units(t, "b")...)
	srv.SetUnits(iqn, more, true)
	awaitMaps(t, d, map[string]int{"a": 2, "b": 2})
}

func TestUnitsAreLookedForFromTimeToTime(t *testing.T) {
	t.Parallel()
	srv, lus, urls := shelf(t, "a")
	d, _ := begin(t, Options{URLs: urls, RescanInterval: 100 * time.Millisecond})
	awaitMaps(t, d, map[string]int{"a": 2})
	srv.SetUnits(iqn, append(slices.Clone(lus), units(t, "b", "c")...), false)
	awaitMaps(t, d, map[string]int{"a": 2, "b": 2, "c": 2})
}

// A unit that goes away leaves its map waiting, and comes back as it was.
func TestAUnitThatVanishesAndReturns(t *testing.T) {
	t.Parallel()
	srv, lus, urls := shelf(t, "a", "b")
	d, log := begin(t, Options{URLs: urls, RescanInterval: 100 * time.Millisecond, Policy: paths.Config{PollingInterval: 100 * time.Millisecond, NoPathRetry: paths.Queue}})
	awaitMaps(t, d, map[string]int{"a": 2, "b": 2})
	srv.SetUnits(iqn, []*target.LU{lus[0], nil}, true)
	awaitMaps(t, d, map[string]int{"a": 2, "b": 0})
	says(t, log, "unit is gone")
	srv.SetUnits(iqn, lus, true)
	awaitMaps(t, d, map[string]int{"a": 2, "b": 2})
}

// Another disk behind a known LUN is never served as the old one, and becomes a
// map of its own.
func TestAnotherDiskBehindALUNIsAnotherMap(t *testing.T) {
	t.Parallel()
	srv, lus, urls := shelf(t, "a", "b")
	d, _ := begin(t, Options{URLs: urls, RescanInterval: 100 * time.Millisecond, Policy: paths.Config{PollingInterval: 100 * time.Millisecond, NoPathRetry: paths.Queue}})
	awaitMaps(t, d, map[string]int{"a": 2, "b": 2})
	srv.SetUnits(iqn, []*target.LU{lus[0], units(t, "z")[0]}, true)
	awaitMaps(t, d, map[string]int{"a": 2, "b": 0, "z": 2})
	srv.SetUnits(iqn, []*target.LU{lus[0], lus[1]}, true)
	awaitMaps(t, d, map[string]int{"a": 2, "b": 2, "z": 0})
}

func TestAUnitThatHangsHoldsUpNoOther(t *testing.T) {
	t.Parallel()
	srv, _, urls := shelf(t, "a", "b", "c")
	srv.OnCommand(func(c *target.Cmd) target.Action {
		if c.LUN[1] == 1 {
			return target.Action{Silent: true}
		}
		return target.Action{}
	})
	began := time.Now()
	d, _ := begin(t, Options{URLs: urls})
	awaitMaps(t, d, map[string]int{"a": 2, "c": 2})
	require.Less(t, time.Since(began), 5*time.Second)
	shows := time.Now()
	d.Snapshot()
	require.Less(t, time.Since(shows), time.Second)
	srv.OnCommand(nil)
	awaitMaps(t, d, map[string]int{"a": 2, "b": 2, "c": 2})
}

func TestATargetThatIsDroppedStaysDropped(t *testing.T) {
	t.Parallel()
	_, _, urls := shelf(t, "a")
	var targets []initiator.URL
	for _, s := range append(urls, "iscsi://"+unusedAddress(t)+"/"+iqn) {
		u, err := initiator.ParseURL(s)
		require.NoError(t, err)
		targets = append(targets, u)
	}
	keep := targets
	d, _ := begin(t, Options{Targets: targets, RescanInterval: 50 * time.Millisecond, Reload: func() (Reloaded, error) {
		return Reloaded{Targets: keep, Resolve: func(*initiator.LUInfo) (paths.Config, string, error) { return paths.Config{}, "", nil }}, nil
	}})
	awaitMaps(t, d, map[string]int{"a": 2})
	keep = targets[:1]
	require.NoError(t, d.Reconfigure())
	awaitMaps(t, d, map[string]int{"a": 1})
	time.Sleep(300 * time.Millisecond) // several rescans
	s := d.Snapshot()
	require.Equal(t, 1, s.Maps[0].Paths.Total)
	require.Empty(t, s.Pending, "the one that never answered is forgotten too")
}

// A portal that names other targets each time, as those do that make one for each
// volume, leaves no more to follow than it names and than there are paths to.
func TestTargetsThatPortalsNameNoLongerAreForgotten(t *testing.T) {
	t.Parallel()
	_, _, urls := shelf(t, "a")
	real, err := initiator.ParseURL(urls[0])
	require.NoError(t, err)
	d, _ := begin(t, Options{})
	one, two := Discovery{Address: "192.0.2.1:3260"}, Discovery{Address: "192.0.2.2:3260"}
	dead := unusedAddress(t)
	names := func(targets ...string) (found initiator.Discovered) {
		for _, name := range targets {
			at := dead
			if name == real.Target {
				at = real.Address
			}
			found.Targets = append(found.Targets, initiator.DiscoveredTarget{Name: name, Portals: []initiator.Portal{{Address: at, Group: -1}}})
		}
		return found
	}
	rescan := func(p Discovery, found initiator.Discovered) { d.add(p, found); d.forget(p, found) }
	rescan(one, names(real.Target, "iqn.2026-11.example:v0", "iqn.2026-11.example:both"))
	rescan(two, names("iqn.2026-11.example:both"))
	awaitMaps(t, d, map[string]int{"a": 1})
	for i := range 50 {
		rescan(one, names(fmt.Sprint("iqn.2026-11.example:v", i)))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	require.Len(t, d.following, 3)
	require.Len(t, d.urls, 3)
	require.Len(t, d.foundAt, 3)
	require.Len(t, d.pending, 2)
	require.Contains(t, d.pending, "iscsi://"+dead+"/iqn.2026-11.example:v49")
	require.Contains(t, d.pending, "iscsi://"+dead+"/iqn.2026-11.example:both")
}

func TestPortalsThatAreDroppedTakeTheirTargetsAlong(t *testing.T) {
	t.Parallel()
	_, _, urls := shelf(t, "a")
	_, _, others := shelf(t, "b")
	address := func(s string) Discovery {
		u, err := initiator.ParseURL(s)
		require.NoError(t, err)
		return Discovery{Address: u.Address}
	}
	dead := Discovery{Address: unusedAddress(t)}
	static, err := initiator.ParseURL(others[0])
	require.NoError(t, err)
	next := Reloaded{Resolve: func(*initiator.LUInfo) (paths.Config, string, error) { return paths.Config{}, "", nil }}
	d, _ := begin(t, Options{Discover: []Discovery{address(urls[0]), address(others[0]), dead}, Reload: func() (Reloaded, error) { return next, nil }})
	awaitMaps(t, d, map[string]int{"a": 2, "b": 2}) // a portal names all portals of its target
	next.Discover, next.Targets = []Discovery{address(urls[0])}, []initiator.URL{static}
	require.NoError(t, d.Reconfigure())
	awaitMaps(t, d, map[string]int{"a": 2, "b": 1})
	require.Eventually(t, func() bool { return len(d.Snapshot().Pending) == 0 }, 10*time.Second, 10*time.Millisecond, "the portal that never answered is forgotten")
	next.Discover, next.Targets = []Discovery{address(urls[0]), address(others[1])}, nil
	require.NoError(t, d.Reconfigure())
	awaitMaps(t, d, map[string]int{"a": 2, "b": 2})
}

// Of two secrets of one name the target's own counts, not that of the portal which
// names the target.
func TestATargetsOwnSecretComesFirst(t *testing.T) {
	own, portals := initiator.Credentials{User: "u", Secret: "the target's"}, initiator.Credentials{User: "u", Secret: "the portal's"}
	u, err := initiator.ParseURL("iscsi://u@" + unusedAddress(t) + "/" + iqn + "/0")
	require.NoError(t, err)
	u.Credentials = own
	d, _ := begin(t, Options{Targets: []initiator.URL{u}})
	whole, unit := u, u
	whole.HasLUN, whole.Credentials, unit.Credentials = false, portals, portals
	d.addURL(whole)
	require.Equal(t, own, d.sessionConfig(unit, "i").Credentials)
	d.mu.Lock()
	d.o.Targets = nil
	d.mu.Unlock()
	d.addURL(whole)
	require.Equal(t, portals, d.sessionConfig(u, "i").Credentials)
}
