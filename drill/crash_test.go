package drill

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/paths"
)

// The run before crashed while it used two servers, and one of them is not
// there: nothing is known of what it may still write, so every write waits for
// it, and reads do not.
func TestWritesAfterACrashWaitForTheServerThatIsAway(t *testing.T) {
	t.Parallel()
	lu, err := target.NewLU(16<<20, 512, target.DefaultIdentity("crash"))
	require.NoError(t, err)
	_, a := serverOf(t, "iqn.2026-11.example:ca", lu)
	_, b := serverOf(t, "iqn.2026-11.example:cb", lu)
	dir := t.TempDir()
	state, sock := filepath.Join(dir, "state"), filepath.Join(dir, "n")
	o := daemon.Options{URLs: []string{a.URL(0), b.URL(0)}, FailoverTime: 500 * time.Millisecond, State: state, InitiatorName: "iqn.2026-11.example:i",
		NBD: "unix:" + sock, Control: filepath.Join(dir, "c"), Logger: slog.New(slog.DiscardHandler), Policy: paths.Config{Alias: "m", NoPathRetry: paths.Queue}}
	stop := func(d *daemon.Daemon) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		d.Stop(ctx)
	}
	d, err := daemon.Start(o)
	require.NoError(t, err)
	require.True(t, eventually(30*time.Second, func() bool { return usable(d) == 2 }))
	crashed, err := os.ReadFile(state) // what a crash leaves
	require.NoError(t, err)
	stop(d)
	clean, err := os.ReadFile(state)
	require.NoError(t, err)
	var left struct{ Maps map[string]any }
	require.NoError(t, json.Unmarshal(clean, &left))
	require.Empty(t, left.Maps, "a clean stop leaves something at risk")
	require.NoError(t, os.WriteFile(state, crashed, 0o600))

	a.Stop()
	a.Drop()
	d, err = daemon.Start(o)
	require.NoError(t, err)
	t.Cleanup(func() { stop(d) })
	require.True(t, eventually(30*time.Second, func() bool { return usable(d) == 1 }))
	c, err := client.Dial("unix", sock, "m")
	require.NoError(t, err)
	defer c.Close()
	_, err = c.ReadAt(make([]byte, 4096), 0)
	require.NoError(t, err)
	written := make(chan error, 1)
	go func() { _, err := c.WriteAt(bytes.Repeat([]byte{'w'}, 4096), 0); written <- err }()
	time.Sleep(2 * time.Second)
	select {
	case <-written:
		t.Fatal("a write went out although the server that is away may still write over it")
	default:
	}
	st := d.Snapshot().Maps[0].Safety
	require.Len(t, st.Unfenced, 1)
	require.True(t, st.Unfenced[0].Whole)
	require.Equal(t, 1, st.Held)
	require.NoError(t, a.Start())
	require.NoError(t, <-written)
	require.True(t, eventually(30*time.Second, func() bool { return usable(d) == 2 && len(d.Snapshot().Maps[0].Safety.Unfenced) == 0 }))
}
