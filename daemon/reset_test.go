package daemon

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/paths"
)

// A target whose LOGICAL UNIT RESET ends every other session of the initiator,
// as istgt's does: a fence there must not be the reason for the next one, not
// even with two maps over the target whose writes never pause.
func TestResetThatEndsSessionsDoesNotCallForTheNextOne(t *testing.T) {
	t.Parallel()
	const maps, writers = 2, 4
	var lus []*target.LU
	for i := range maps {
		lu, err := target.NewLU(8<<20, 512, target.DefaultIdentity(fmt.Sprint("istgt", i)))
		require.NoError(t, err)
		lus = append(lus, lu)
	}
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: iqn, LUs: lus}}, ResetEndsSessions: 350 * time.Millisecond})
	require.NoError(t, err)
	t.Cleanup(srv.Kill)
	var ps []*target.Portal
	var urls []string
	for range 3 {
		p, err := srv.Listen("127.0.0.1:0")
		require.NoError(t, err)
		ps = append(ps, p)
		for lun := range maps {
			urls = append(urls, p.URL(lun))
		}
	}
	// Every write takes a while, so that there are always some under way.
	srv.OnCommand(func(c *target.Cmd) target.Action {
		if c.Write {
			return target.Action{Delay: 20 * time.Millisecond}
		}
		return target.Action{}
	})
	d, l := begin(t, Options{URLs: urls, FailoverTime: 300 * time.Millisecond, Policy: paths.Config{Policy: "multibus", PollingInterval: time.Second}})
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(l.String())
		}
	})
	up := func(n int) func() bool {
		return func() bool {
			s := d.Snapshot()
			for _, m := range s.Maps {
				if m.Paths.Usable < n || len(m.Safety.Unfenced) > 0 {
					return false
				}
			}
			return len(s.Maps) == maps
		}
	}
	require.Eventually(t, up(3), 30*time.Second, 10*time.Millisecond)
	ctx, stop := context.WithCancel(context.Background())
	var all sync.WaitGroup
	var written atomic.Int64
	kind, addr, _ := strings.Cut(d.o.NBD, ":")
	for _, m := range d.Snapshot().Maps {
		for w := range writers {
			all.Go(func() {
				c, err := client.Dial(kind, addr, m.Alias)
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				for ctx.Err() == nil {
					if _, err := c.WriteAt(make([]byte, 4096), int64(w)<<16); err != nil {
						t.Errorf("a write failed: %v", err)
						return
					}
					written.Add(1)
				}
			})
		}
	}
	defer all.Wait()
	defer stop()
	silent := func() (n int) { // paths through the first portal that are down
		for _, m := range d.Snapshot().Maps {
			for _, g := range m.Groups {
				for _, p := range g.Paths {
					if p.Portal == ps[0].Addr() && p.State == "down" {
						n++
					}
				}
			}
		}
		return n
	}
	known := 0 // bytes of the log when the target was known
	for _, round := range []string{"unknown", "known"} {
		known = len(l.String())
		before := written.Load()
		require.Eventually(t, func() bool { return written.Load() > before+10*maps*writers }, 30*time.Second, time.Millisecond)
		ps[0].Hang()
		require.Eventually(t, func() bool { return silent() == maps }, 30*time.Second, time.Millisecond)
		require.Eventually(t, up(2), 60*time.Second, 10*time.Millisecond, "%s: fenced and back", round)
		ps[0].Resume()
		require.Eventually(t, up(3), 60*time.Second, 10*time.Millisecond)
	}
	require.Empty(t, endedInUse(l.String()[known:], ps[0].Addr()), "sessions that a reset ended had writes under way: the next reset is for them")
	require.NotContains(t, l.String()[known:], "through="+ps[0].Addr(), "the hung portal had a turn while others answer")
	says(t, l, "ends other sessions when a unit is reset", iqn)
	for _, m := range d.Snapshot().Maps {
		require.Equal(t, paths.Drops, m.Groups[0].Paths[0].Trust)
		require.Zero(t, m.Safety.Fences["unproven"])
		require.NotZero(t, m.Safety.Fences["proven"])
	}
}

// endedInUse are the paths, but for those through one portal, whose session the
// target ended with writes under way.
func endedInUse(log, but string) (names []string) {
	ended := map[string]bool{}
	for line := range strings.Lines(log) {
		_, name, _ := strings.Cut(line, " path=")
		name, _, _ = strings.Cut(name, " ")
		switch {
		case strings.Contains(line, `msg="path failed"`):
			ended[name] = strings.Contains(line, "closed by the target") || strings.Contains(line, "reset by peer")
		case strings.Contains(line, "a session died with writes under way") && ended[name] && !strings.HasPrefix(name, but+"/"):
			names = append(names, name)
		}
	}
	return names
}

// A target that says that it reset a unit, and did not, is found out by what its
// other sessions do not hear.
func TestResetThatNobodyHeardOfIsNoProof(t *testing.T) {
	for _, lies := range []bool{false, true} {
		srv, ps := disk(t, "liar", 2)
		srv.OnTask(func(target.Task) target.TaskAction { return target.TaskAction{Lie: lies} })
		d, l := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, FailoverTime: 300 * time.Millisecond, Policy: paths.Config{Alias: "m", PollingInterval: time.Second}})
		await(t, d, "up", usable(2))
		serving := serves(d.Snapshot().Maps[0])[0]
		srv.OnCommand(func(c *target.Cmd) target.Action {
			if c.Write && c.Portal.Addr() == serving {
				c.Portal.Hang()
			}
			return target.Action{}
		})
		write(t, d, "m", 0)
		m := await(t, d, "fenced", func(m paths.MapStatus) bool { return m.Safety.Ambiguous == 1 && len(m.Safety.Unfenced) == 0 })
		how := map[bool]string{false: "proven", true: "unproven"}[lies]
		require.EqualValues(t, 1, m.Safety.Fences[how], "%v", m.Safety.Fences)
		if lies {
			says(t, l, "no other session heard of a reset")
		}
		srv.Resume()
	}
}

// A fence's login ends a session of the same path that is just being made: that
// is no sign of a reset that ends sessions.
func TestFenceThatEndsItsOwnPathsLoginIsNoReset(t *testing.T) {
	t.Parallel()
	srv, ps := disk(t, "crossed", 2)
	srv.OnTask(func(target.Task) target.TaskAction { time.Sleep(50 * time.Millisecond); return target.TaskAction{} })
	d, l := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, FailoverTime: 300 * time.Millisecond, Policy: paths.Config{Alias: "m", PollingInterval: time.Second}})
	await(t, d, "up", usable(2))
	kind, addr, _ := strings.Cut(d.o.NBD, ":")
	c, err := client.Dial(kind, addr, "m")
	require.NoError(t, err)
	defer c.Close()
	for range 5 {
		srv.Hang()
		written := make(chan error, 1)
		go func() { _, err := c.WriteAt(make([]byte, 4096), 0); written <- err }()
		// Where the second path is found dead before the write is sent again on it, only one is unfenced.
		await(t, d, "both down", func(m paths.MapStatus) bool { return m.Paths.Usable == 0 && len(m.Safety.Unfenced) > 0 })
		srv.Resume()
		require.NoError(t, <-written)
		await(t, d, "back", usable(2))
	}
	require.NotContains(t, l.String(), "ends other sessions")
}
