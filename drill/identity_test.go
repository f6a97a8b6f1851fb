package drill

import (
	"bytes"
	"context"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/paths"
)

// running is a daemon with one map, m, over the URLs. It queues unless o says
// after how many intervals it gives up.
func running(t *testing.T, o daemon.Options) (*daemon.Daemon, string) {
	t.Helper()
	dir := t.TempDir()
	sock := filepath.Join(dir, "n")
	o.InitiatorName, o.NBD, o.Control = "iqn.2026-11.example:i", "unix:"+sock, filepath.Join(dir, "c")
	o.Logger = slog.New(slog.DiscardHandler)
	o.Policy.Alias = "m"
	if o.Policy.NoPathRetry == 0 {
		o.Policy.NoPathRetry = paths.Queue
	}
	d, err := daemon.Start(o)
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		d.Stop(ctx)
	})
	require.True(t, eventually(30*time.Second, func() bool { return usable(d) == len(o.URLs) }))
	return d, sock
}

// serverOf serves one unit at one portal.
func serverOf(t *testing.T, name string, lu *target.LU) (*target.Server, *target.Portal) {
	t.Helper()
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: name, LUs: []*target.LU{lu}}}})
	require.NoError(t, err)
	t.Cleanup(srv.Kill)
	p, err := srv.Listen("127.0.0.1:0")
	require.NoError(t, err)
	return srv, p
}

// A LUN becomes another disk while requests are queued, with a unit attention
// or in silence over a new login: from then on it gets no byte.
func TestLUNThatBecomesAnotherDiskNeverGetsAByte(t *testing.T) {
	for _, how := range []string{"inquiry data changed", "LUN map changed", "silently"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			lu, err := target.NewLU(16<<20, 512, target.DefaultIdentity("right"))
			require.NoError(t, err)
			srv, p := serverOf(t, "iqn.2026-11.example:swap", lu)
			d, sock := running(t, daemon.Options{URLs: []string{p.URL(0)}, FailoverTime: time.Second})
			c, err := client.Dial("unix", sock, "m")
			require.NoError(t, err)
			defer c.Close()
			// All writes are late, so that they are queued when it happens, and far from
			// their end when it is found out. The target's window has room for one
			// command more, which meets the attention.
			const queued = 24
			var swapped atomic.Bool
			var before, after atomic.Int64
			srv.OnCommand(func(cmd *target.Cmd) target.Action {
				if !cmd.Write {
					return target.Action{}
				}
				if swapped.Load() {
					after.Add(1)
					return target.Action{}
				}
				before.Add(1)
				return target.Action{Delay: 10 * time.Second}
			})
			var acked atomic.Int64
			for i := range queued {
				go func() {
					if _, err := c.WriteAt(bytes.Repeat([]byte{'x'}, 4096), int64(i)*8192); err == nil {
						acked.Add(1)
					}
				}()
			}
			require.True(t, eventually(10*time.Second, func() bool { return before.Load() == queued }))
			if how == "silently" {
				p.Stop() // nothing of the old session is executed any more
				p.Drop()
				time.Sleep(300 * time.Millisecond)
			}
			lu.SetIdentity(target.DefaultIdentity("wrong"))
			switch how {
			case "inquiry data changed":
				srv.Attention(lu, 0x3f, 0x03)
			case "LUN map changed":
				srv.Attention(lu, 0x3f, 0x0e)
			default:
				require.NoError(t, p.Start())
			}
			if how != "silently" {
				go c.ReadAt(make([]byte, 4096), 1<<20)
				require.True(t, eventually(10*time.Second, func() bool { return usable(d) == 0 }))
			}
			swapped.Store(true)
			require.True(t, eventually(20*time.Second, func() bool {
				return bytes.Contains([]byte(d.Snapshot().Maps[0].Groups[0].Paths[0].LastError), []byte("identity changed"))
			}))
			time.Sleep(time.Second)
			require.Zero(t, after.Load(), "the other disk was written")
			require.Zero(t, acked.Load(), "a write to the other disk was acknowledged")
		})
	}
}

// The writes of the server that is left hang for far longer than failover takes,
// as DRBD's do while it waits for its peer, but it answers pings: it is slow,
// not dead, and nothing of it is aborted.
func TestSlowSurvivorIsNotShot(t *testing.T) {
	t.Parallel()
	lu, err := target.NewLU(16<<20, 512, target.DefaultIdentity("survivor"))
	require.NoError(t, err)
	_, pa := serverOf(t, "iqn.2026-11.example:a", lu)
	sb, pb := serverOf(t, "iqn.2026-11.example:b", lu)
	d, sock := running(t, daemon.Options{URLs: []string{pa.URL(0), pb.URL(0)}, FailoverTime: 200 * time.Millisecond})
	c, err := client.Dial("unix", sock, "m")
	require.NoError(t, err)
	defer c.Close()
	_, err = c.WriteAt(bytes.Repeat([]byte{'a'}, 4096), 0)
	require.NoError(t, err)
	const hang = 4 * time.Second // twenty times the failover time
	sb.OnCommand(func(cmd *target.Cmd) target.Action {
		if cmd.Write {
			return target.Action{Delay: hang}
		}
		return target.Action{}
	})
	before := sb.Stats().TaskMgmt
	pa.Stop()
	pa.Drop()
	began := time.Now()
	_, err = c.WriteAt(bytes.Repeat([]byte{'b'}, 4096), 0)
	require.NoError(t, err)
	require.GreaterOrEqual(t, time.Since(began), hang)
	require.Equal(t, before, sb.Stats().TaskMgmt, "task management on a healthy session")
	for _, g := range d.Snapshot().Maps[0].Groups {
		for _, p := range g.Paths {
			if p.Target == "iqn.2026-11.example:b" {
				require.Zero(t, p.Failures, "shot")
			}
		}
	}
}
