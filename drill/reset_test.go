package drill

import (
	"bytes"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/nbd/client"
)

// The reset that ends the old session of one path swallows what the healthy
// paths have in flight (no answer, control mode page TAS 0): it is issued again,
// long before a command that hangs would be looked at.
func TestCommandsThatTheFenceSwallowedAreIssuedAgain(t *testing.T) {
	t.Parallel()
	lu, err := target.NewLU(16<<20, 512, target.DefaultIdentity("swallow"))
	require.NoError(t, err)
	srv, a := serverOf(t, "iqn.2026-11.example:swallow", lu)
	b, err := srv.Listen("127.0.0.1:0")
	require.NoError(t, err)
	d, sock := running(t, daemon.Options{URLs: []string{a.URL(0), b.URL(0)}, FailoverTime: 500 * time.Millisecond})
	c, err := client.Dial("unix", sock, "m")
	require.NoError(t, err)
	defer c.Close()
	serving := func() string {
		for _, g := range d.Snapshot().Maps[0].Groups {
			for _, p := range g.Paths {
				if p.Serving {
					return p.Portal
				}
			}
		}
		return ""
	}
	require.True(t, eventually(10*time.Second, func() bool { return serving() == a.Addr() }))
	var onA, onB atomic.Int64
	srv.OnCommand(func(cmd *target.Cmd) target.Action {
		if op := cmd.Op(); op != 0x8a && op != 0x88 {
			return target.Action{}
		}
		if cmd.Portal == a {
			onA.Add(1)
			return target.Action{Delay: time.Minute, Orphan: true}
		}
		if onB.Add(1) <= 2 { // in flight on the healthy path when the fence comes
			return target.Action{Delay: time.Minute}
		}
		return target.Action{}
	})
	began := time.Now()
	done := make(chan error, 2)
	go func() { _, err := c.WriteAt(bytes.Repeat([]byte{'w'}, 4096), 0); done <- err }()
	go func() { _, err := c.ReadAt(make([]byte, 4096), 1<<20); done <- err }()
	require.True(t, eventually(10*time.Second, func() bool { return onA.Load() == 2 }))
	a.Stop()
	a.Drop()
	for range 2 {
		select {
		case err := <-done:
			require.NoError(t, err)
		case <-time.After(20 * time.Second):
			t.Fatalf("a swallowed command was not issued again (%d on B)", onB.Load())
		}
	}
	require.GreaterOrEqual(t, onB.Load(), int64(4), "nothing was swallowed: this proves nothing")
	require.Positive(t, d.Snapshot().Maps[0].Safety.Fences["proven"])
	t.Logf("both answered after %v", time.Since(began).Round(time.Millisecond))
}
