package daemon

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/internal/faultnet"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/paths"
)

// How long an overlapping write waits is the fence's round trips times the
// distance of the target: those are counted, from the path's death until the
// reset that releases the write.
func TestFenceTakesFourRoundTripsAndTheConnection(t *testing.T) {
	lu, err := target.NewLU(8<<20, 512, target.DefaultIdentity("far"))
	require.NoError(t, err)
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: iqn, LUs: []*target.LU{lu}}}, PowerOnUA: true})
	require.NoError(t, err)
	t.Cleanup(srv.Kill)
	ways := map[string]*faultnet.Proxy{} // by the portal that they lead to
	var urls []string
	for range 2 {
		at, err := srv.Listen("127.0.0.1:0")
		require.NoError(t, err)
		p, err := faultnet.New("127.0.0.1:0", at.Addr())
		require.NoError(t, err)
		t.Cleanup(func() { p.Close() })
		p.Delay(20 * time.Millisecond)
		ways[at.Addr()] = p
		urls = append(urls, "iscsi://"+p.Addr()+"/"+iqn+"/0")
	}
	trips := make(chan int, 1)
	srv.OnTask(func(task target.Task) target.TaskAction {
		select {
		case trips <- ways[task.Portal.Addr()].RoundTrips():
		default:
		}
		return target.TaskAction{}
	})
	d, _ := begin(t, Options{URLs: urls, FailoverTime: 500 * time.Millisecond, Policy: paths.Config{Alias: "m", PollingInterval: time.Minute}})
	await(t, d, "up", usable(2))
	srv.OnCommand(func(c *target.Cmd) target.Action {
		if c.Write {
			c.Portal.Hang()
			srv.OnCommand(nil)
		}
		return target.Action{}
	})
	write(t, d, "m", 0)
	m := await(t, d, "fenced", func(m paths.MapStatus) bool { return m.Safety.Fences["proven"] == 1 })
	require.EqualValues(t, 1, m.Safety.Ambiguous)
	require.Equal(t, 4, <-trips, "two stages of login, one flight of questions, the reset")
	srv.Resume()
}
