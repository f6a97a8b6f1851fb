package drill

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/paths"
)

// With no_path_retry N a map without a path queues for N polling intervals, then
// fails what waits and what comes, and queues again once a path was back.
func TestNoPathRetryAndRecovery(t *testing.T) {
	t.Parallel()
	lu, err := target.NewLU(16<<20, 512, target.DefaultIdentity("recovery"))
	require.NoError(t, err)
	_, p := serverOf(t, "iqn.2026-11.example:recovery", lu)
	d, sock := running(t, daemon.Options{URLs: []string{p.URL(0)}, FailoverTime: 500 * time.Millisecond, Policy: paths.Config{NoPathRetry: 2, PollingInterval: time.Second}})
	c, err := client.Dial("unix", sock, "m")
	require.NoError(t, err)
	defer c.Close()
	buf := make([]byte, 4096)
	for round := range 2 {
		m := d.Snapshot().Maps[0]
		require.True(t, m.Queueing, "round %d", round)
		_, err = c.ReadAt(buf, 0)
		require.NoError(t, err)
		p.Stop()
		p.Drop()
		require.True(t, eventually(10*time.Second, func() bool { return d.Snapshot().Maps[0].State == "no_path" }), "queueing is visible")
		began := time.Now()
		_, err = c.ReadAt(buf, 0)
		require.Error(t, err)
		waited := time.Since(began)
		require.Greater(t, waited, time.Second, "it was queued")
		m = d.Snapshot().Maps[0]
		require.False(t, m.Queueing)
		require.Equal(t, "failed", m.State)
		began = time.Now()
		_, err = c.ReadAt(buf, 0)
		require.Error(t, err)
		require.Less(t, time.Since(began), time.Second, "it is not queued any more")
		require.NoError(t, p.Start())
		require.True(t, eventually(30*time.Second, func() bool { return usable(d) == 1 }))
		t.Logf("round %d: I/O failed after %v", round, waited.Round(10*time.Millisecond))
	}
	require.True(t, d.Snapshot().Maps[0].Queueing)
	_, err = c.ReadAt(buf, 0)
	require.NoError(t, err)
}
