package drill

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/paths"
)

// inProcess is a daemon as a Stack.
type inProcess struct{ *daemon.Daemon }

func (d inProcess) Maps() (*daemon.Maps, error) {
	m := d.Snapshot()
	return &m, nil
}

// A drill takes each serving path out and in again, and no read of the map
// fails; with one path left it does nothing.
func TestDrillOnALiveMap(t *testing.T) {
	t.Parallel()
	lu, err := target.NewLU(16<<20, 512, target.DefaultIdentity("drill"))
	require.NoError(t, err)
	_, a := serverOf(t, "iqn.2026-11.example:a", lu)
	_, b := serverOf(t, "iqn.2026-11.example:b", lu)
	d, sock := running(t, daemon.Options{URLs: []string{a.URL(0), b.URL(0)}, FailoverTime: 5 * time.Second, Policy: paths.Config{Failback: paths.Immediate, NoPathRetry: paths.Queue}})
	require.True(t, eventually(10*time.Second, func() bool { return usable(d) == 2 }))
	c, err := client.Dial("unix", sock, "m")
	require.NoError(t, err)
	defer c.Close()
	s := inProcess{d}
	before := d.Snapshot().Maps[0].Totals.GroupSwitches
	steps, err := Live(context.Background(), s, c, c.Size(), "m", nil, 200*time.Millisecond)
	require.NoError(t, err)
	require.Len(t, steps, 1, "one path serves")
	require.Zero(t, steps[0].Errors, steps[0].Cause)
	require.Positive(t, steps[0].Reads)
	require.GreaterOrEqual(t, steps[0].BackMS, int64(0))
	require.Equal(t, before+2, d.Snapshot().Maps[0].Totals.GroupSwitches, "there and back")
	require.True(t, steps[0].Serves)

	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(300*time.Millisecond, cancel)
	_, err = Live(ctx, s, c, c.Size(), "m", []string{steps[0].Path}, time.Hour)
	require.ErrorIs(t, err, context.Canceled)
	require.True(t, eventually(10*time.Second, func() bool { return usable(d) == 2 }), "an interrupted drill leaves no path out")

	require.NoError(t, d.FailPath(steps[0].Path))
	_, err = Live(context.Background(), s, c, c.Size(), "m", nil, time.Hour)
	require.ErrorContains(t, err, "is the last usable one")
	_, err = Live(context.Background(), s, c, c.Size(), "m", []string{steps[0].Path}, time.Hour)
	require.ErrorContains(t, err, "not up")
	_, err = Live(context.Background(), s, c, c.Size(), "m", []string{"nope"}, time.Hour)
	require.ErrorContains(t, err, "has no path")
	_, err = Live(context.Background(), s, c, c.Size(), "nope", nil, time.Hour)
	require.ErrorContains(t, err, "no map")
}
