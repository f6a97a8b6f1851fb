package daemon

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/paths"
)

// Since Linux 6.9 a resize freezes the queue of the kernel device, that is, it
// waits for the requests in flight. Those may wait for a path, which must come all
// the same.
func TestAResizeThatWaitsForRequestsHoldsUpNoPath(t *testing.T) {
	srv, lu, ps := array(t, false, map[uint16]target.Access{1: {}, 2: {}})
	require.NoError(t, srv.Resize(lu, 4<<20))
	frozen, thawed := make(chan int64, 9), make(chan struct{})
	d, l := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, FailoverTime: time.Second, Policy: paths.Config{Alias: "m", PollingInterval: 200 * time.Millisecond},
		Attach: func(_ *Daemon, _, _, _ string, g block.Geometry) (Kernel, error) {
			return Kernel{Path: "/dev/nbd9", Size: g.Size, Resize: func(n int64) error { frozen <- n; <-thawed; return nil }}, nil
		}})
	await(t, d, "up", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 && m.NBD.Device == "/dev/nbd9" })
	kind, addr, _ := strings.Cut(d.o.NBD, ":")
	c, err := client.Dial(kind, addr, "m")
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, srv.Resize(lu, 8<<20))
	_, err = c.WriteAt(make([]byte, 512), 0) // hears of it
	require.NoError(t, err)
	require.Equal(t, int64(8<<20), <-frozen)

	for _, p := range ps {
		p.Stop()
	}
	written := make(chan error, 1)
	go func() { _, err := c.WriteAt(make([]byte, 512), 0); written <- err }()
	await(t, d, "without a path", func(m paths.MapStatus) bool { return m.Paths.Usable == 0 })
	for _, p := range ps {
		require.NoError(t, p.Start())
	}
	select {
	case err := <-written:
		require.NoError(t, err)
	case <-time.After(patience):
		t.Error("no path came back while the kernel waited for the request")
	}
	close(thawed)
	says(t, l, "the kernel device has its new size", "8388608")
}

// The kernel device of a map that is resized while it is attached, or with which
// an earlier run had attached it, gets the size that the map has by then.
func TestAMapIsResizedWhileItsDeviceIsAttached(t *testing.T) {
	srv, lu, ps := array(t, false, map[uint16]target.Access{1: {}, 2: {}})
	require.NoError(t, srv.Resize(lu, 4<<20))
	asked, goOn := make(chan struct{}), make(chan struct{})
	var size atomic.Int64
	d, _ := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, Policy: paths.Config{Alias: "m", PollingInterval: 200 * time.Millisecond},
		Attach: func(_ *Daemon, _, _, _ string, g block.Geometry) (Kernel, error) {
			close(asked)
			<-goOn
			size.Store(g.Size)
			return Kernel{Path: "/dev/nbd9", Size: g.Size, Resize: func(n int64) error { size.Store(n); return nil }}, nil
		}})
	<-asked
	await(t, d, "up", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 })
	require.NoError(t, srv.Resize(lu, 8<<20))
	write(t, d, "m", 0) // hears of it
	await(t, d, "grown", func(m paths.MapStatus) bool { return m.Size == 8<<20 })
	close(goOn)
	await(t, d, "attached", func(m paths.MapStatus) bool { return m.NBD.Device == "/dev/nbd9" })
	require.Eventually(t, func() bool { return size.Load() == 8<<20 }, 10*time.Second, 5*time.Millisecond)
}

// A unit that shrank while no daemon ran is as one that shrank under a running one:
// the kernel device of the run before is not cut, and its I/O waits.
func TestAUnitThatShrankBetweenTwoRunsDoesNotCutItsDevice(t *testing.T) {
	srv, lu, ps := array(t, false, map[uint16]target.Access{1: {}, 2: {}})
	require.NoError(t, srv.Resize(lu, 4<<20))
	var size atomic.Int64
	size.Store(8 << 20)
	d, _ := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, Policy: paths.Config{Alias: "m", PollingInterval: 200 * time.Millisecond},
		Attached: func(string) int64 { return size.Load() },
		Attach: func(_ *Daemon, _, _, _ string, g block.Geometry) (Kernel, error) {
			return Kernel{Path: "/dev/nbd9", Size: size.Load(), Adopted: true, Resize: func(n int64) error { size.Store(n); return nil }}, nil
		}})
	m := await(t, d, "both paths are out", func(m paths.MapStatus) bool {
		return m.NBD.Device == "/dev/nbd9" && m.Paths.Total == 2 && m.Paths.Usable == 0 && strings.Contains(m.Groups[0].Paths[0].LastError, "it shrank")
	})
	require.Equal(t, int64(8<<20), m.Size)
	require.Equal(t, int64(8<<20), size.Load())
	require.NoError(t, d.Resize("m", true))
	await(t, d, "cut by hand", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 && m.Size == 4<<20 })
	require.Equal(t, int64(4<<20), size.Load())
}
