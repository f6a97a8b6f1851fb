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

// Two servers that use one target name cannot end each other's sessions. A
// login at the second with the ISID of the first succeeds and means nothing:
// the self-test must find that out, and the overlapping write must wait for the
// first server itself.
func TestSameTargetNameOnTwoServersIsNoFence(t *testing.T) {
	t.Parallel()
	lu, err := target.NewLU(16<<20, 512, target.DefaultIdentity("twins"))
	require.NoError(t, err)
	var servers []*target.Server
	var portals []*target.Portal
	var urls []string
	for range 2 {
		srv, err := target.New(target.Config{Targets: []*target.Target{{Name: "iqn.2026-11.example:twin", LUs: []*target.LU{lu}}}})
		require.NoError(t, err)
		t.Cleanup(srv.Kill)
		p, err := srv.Listen("127.0.0.1:0")
		require.NoError(t, err)
		servers, portals, urls = append(servers, srv), append(portals, p), append(urls, p.URL(0))
	}
	dir := t.TempDir()
	sock := filepath.Join(dir, "n")
	d, err := daemon.Start(daemon.Options{URLs: urls, InitiatorName: "iqn.2026-11.example:i", NBD: "unix:" + sock, Control: filepath.Join(dir, "c"),
		FailoverTime: 300 * time.Millisecond, Logger: slog.New(slog.DiscardHandler), Policy: paths.Config{Alias: "m", NoPathRetry: paths.Queue}})
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		d.Stop(ctx)
	})
	require.True(t, eventually(20*time.Second, func() bool { return usable(d) == 2 }))
	c, err := client.Dial("unix", sock, "m")
	require.NoError(t, err)
	defer c.Close()

	// The first server keeps a write for 2 s and executes it although its
	// connection is gone by then.
	var caught atomic.Bool
	servers[0].OnCommand(func(cmd *target.Cmd) target.Action {
		if cmd.Write && cmd.Op() == 0x8a && caught.CompareAndSwap(false, true) {
			return target.Action{Delay: 2 * time.Second, Orphan: true}
		}
		return target.Action{}
	})
	cut := make(chan struct{})
	go func() {
		for !caught.Load() {
			time.Sleep(time.Millisecond)
		}
		portals[0].Stop()
		portals[0].Drop()
		close(cut)
	}()
	_, err = c.WriteAt(bytes.Repeat([]byte{'a'}, 4096), 0)
	require.NoError(t, err)
	<-cut
	changed := make(chan time.Time, 1)
	go func() {
		c.WriteAt(bytes.Repeat([]byte{'b'}, 4096), 0)
		changed <- time.Now()
	}()
	_, err = c.WriteAt(bytes.Repeat([]byte{'c'}, 4096), 8192) // elsewhere: not held
	require.NoError(t, err)
	time.Sleep(2500 * time.Millisecond)
	select {
	case <-changed:
		t.Fatal("the overlapping write was not held although nothing had ended the old session")
	default:
	}
	st := d.Snapshot().Maps[0].Safety
	require.Equal(t, 1, st.Held)
	require.Len(t, st.Unfenced, 1)
	require.Zero(t, st.Fences["proven"])
	require.NoError(t, portals[0].Start())
	<-changed
	got := make([]byte, 4096)
	_, err = lu.ReadAt(got, 0)
	require.NoError(t, err)
	require.Equal(t, bytes.Repeat([]byte{'b'}, 4096), got)
	require.EqualValues(t, 1, d.Snapshot().Maps[0].Safety.Fences["proven"])
}
