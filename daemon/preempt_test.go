package daemon

import (
	"bytes"
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/paths"
)

// twoTargets are two targets of one disk, which know nothing of each other's sessions
// but share its reservations.
func twoTargets(t *testing.T) (*target.Server, *target.LU, []string) {
	lu, err := target.NewLU(8<<20, 512, target.DefaultIdentity("shared"))
	require.NoError(t, err)
	names := []string{iqn + "1", iqn + "2"}
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: names[0], LUs: []*target.LU{lu}}, {Name: names[1], LUs: []*target.LU{lu}}}})
	require.NoError(t, err)
	t.Cleanup(srv.Kill)
	var urls []string
	for _, n := range names {
		p, err := srv.Listen("127.0.0.1:0", n)
		require.NoError(t, err)
		urls = append(urls, p.URL(0))
	}
	return srv, lu, urls
}

func usable(n int) func(m paths.MapStatus) bool {
	return func(m paths.MapStatus) bool { return m.Paths.Usable == n && len(m.Safety.Unfenced) == 0 }
}

// Behind another target name no login can end the old session; the key can.
func TestPreemptFencesWhereNoLoginCan(t *testing.T) {
	for _, by := range []string{paths.ByReset, paths.ByPreempt} {
		t.Run(by, func(t *testing.T) {
			t.Parallel()
			srv, lu, urls := twoTargets(t)
			d, l := begin(t, Options{URLs: urls, FailoverTime: 300 * time.Millisecond, Policy: paths.Config{Alias: "m", FenceBy: by, PollingInterval: time.Second}})
			t.Cleanup(func() {
				if t.Failed() {
					t.Log(l.String())
				}
			})
			await(t, d, "up", usable(2))
			kind, addr, _ := strings.Cut(d.o.NBD, ":")
			c, err := client.Dial(kind, addr, "m")
			require.NoError(t, err)
			defer c.Close()
			// The first write reaches the disk three seconds late, whatever becomes of its connection.
			var late atomic.Bool
			late.Store(true)
			srv.OnCommand(func(cmd *target.Cmd) target.Action {
				if cmd.Write && cmd.Op() == 0x8a && cmd.Length > 0 && late.Swap(false) {
					cmd.Portal.Hang()
					return target.Action{Delay: 3 * time.Second, Orphan: true}
				}
				return target.Action{}
			})
			_, err = c.WriteAt(bytes.Repeat([]byte{'a'}, 4096), 0)
			require.NoError(t, err)
			began := time.Now()
			over := make(chan error, 1)
			go func() { _, err := c.WriteAt(bytes.Repeat([]byte{'b'}, 4096), 0); over <- err }()
			if by == paths.ByReset {
				select {
				case err := <-over:
					t.Fatalf("the overwrite did not wait: %v", err)
				case <-time.After(time.Second):
				}
				srv.Resume()
				require.NoError(t, <-over)
				return
			}
			require.NoError(t, <-over)
			require.Less(t, time.Since(began), time.Second)
			says(t, l, "old session fenced", "how=proven", "preempt=")
			keys, reserved := lu.Keys()
			require.Len(t, keys, 1, "the dead path's key is gone")
			require.True(t, reserved)
			time.Sleep(3 * time.Second) // the late write
			got := make([]byte, 4096)
			_, err = c.ReadAt(got, 0)
			require.NoError(t, err)
			require.Equal(t, bytes.Repeat([]byte{'b'}, 4096), got, "the overwrite was reverted")
			srv.Resume()
			await(t, d, "back, with its key", func(m paths.MapStatus) bool { k, _ := lu.Keys(); return usable(2)(m) && len(k) == 2 })
			_, err = c.WriteAt(got, 8192)
			require.NoError(t, err)
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			d.Stop(ctx)
			keys, reserved = lu.Keys()
			require.Empty(t, keys, "a clean stop leaves no key")
			require.False(t, reserved)
		})
	}
}

// A key that a crash left, and one of a path that is not there at the stop, do
// not keep the disk from others.
func TestKeysAreCleanedUp(t *testing.T) {
	t.Parallel()
	srv, lu, urls := twoTargets(t)
	lu.Register("iqn.2026-11.example:i", reservationKey("iqn.2026-11.example:i", "10.0.0.9:3260/0"), 7)
	d, _ := begin(t, Options{URLs: urls, FailoverTime: 300 * time.Millisecond, Policy: paths.Config{Alias: "m", FenceBy: paths.ByPreempt, PollingInterval: time.Second}})
	await(t, d, "up", usable(2))
	require.Eventually(t, func() bool { k, _ := lu.Keys(); return len(k) == 2 }, 5*time.Second, 10*time.Millisecond, "the left key is removed")
	srv.Portals()[0].Hang()
	await(t, d, "one down", usable(1))
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	d.Stop(ctx)
	keys, reserved := lu.Keys()
	require.Empty(t, keys)
	require.False(t, reserved)
}

// Reservations of others are theirs: mpathd keeps its hands off, and fences by reset.
func TestPreemptIsNotUsedWhereOthersUseReservations(t *testing.T) {
	for _, typ := range []uint8{0, 5} {
		_, lu, urls := twoTargets(t)
		lu.Register("iqn.2026-11.example:other", 0x1234, typ)
		d, l := begin(t, Options{URLs: urls, Policy: paths.Config{Alias: "m", FenceBy: paths.ByPreempt}})
		await(t, d, "up", usable(2))
		says(t, l, "fence_by preempt is not possible here", "keys of others")
		keys, _ := lu.Keys()
		require.Equal(t, []uint64{0x1234}, keys)
	}
}

// Somebody preempts this host's keys by hand: it registers again as long as
// nobody else holds the disk, and refuses with the reservation's own error else.
func TestPreemptedPathRegistersAgain(t *testing.T) {
	t.Parallel()
	for _, taken := range []bool{false, true} {
		_, lu, urls := twoTargets(t)
		d, _ := begin(t, Options{URLs: urls, Policy: paths.Config{Alias: "m", FenceBy: paths.ByPreempt}})
		await(t, d, "up", usable(2))
		require.Eventually(t, func() bool { k, r := lu.Keys(); return len(k) == 2 && r }, 5*time.Second, 10*time.Millisecond)
		if taken {
			lu.Unregister(0)
			lu.Register("iqn.2026-11.example:other", 0x1234, 7)
		} else {
			for _, g := range d.Snapshot().Maps[0].Groups {
				for _, p := range g.Paths {
					if p.Serving {
						lu.Unregister(reservationKey(d.o.InitiatorName, p.Name))
					}
				}
			}
			k, _ := lu.Keys()
			require.Len(t, k, 1)
		}
		kind, addr, _ := strings.Cut(d.o.NBD, ":")
		c, err := client.Dial(kind, addr, "m")
		require.NoError(t, err)
		_, err = c.WriteAt(make([]byte, 4096), 0)
		if taken {
			require.Error(t, err)
		} else {
			require.NoError(t, err)
			require.Eventually(t, func() bool { k, r := lu.Keys(); return len(k) == 2 && r }, 5*time.Second, 10*time.Millisecond)
		}
		c.Close()
	}
}

// A unit that cannot keep registrations serves all the same, fenced by reset.
func TestPathServesWhereRegistrationsFail(t *testing.T) {
	for _, sense := range []target.Sense{{Key: 2, ASC: 0x08}, {Key: 5, ASC: 0x20}} {
		srv, lu, urls := twoTargets(t)
		srv.OnCommand(func(c *target.Cmd) target.Action {
			if c.Op() == 0x5f {
				return target.Action{Status: 2, Sense: sense}
			}
			return target.Action{}
		})
		d, l := begin(t, Options{URLs: urls, Policy: paths.Config{Alias: "m", FenceBy: paths.ByPreempt}})
		await(t, d, "up", usable(2))
		says(t, l, "fence_by preempt is not possible here")
		write(t, d, "m", 0)
		keys, reserved := lu.Keys()
		require.Empty(t, keys)
		require.False(t, reserved)
	}
}
