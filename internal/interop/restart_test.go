package interop

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/realtarget"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/paths"
	"github.com/mpathd/mpathd/scsi"
)

// restarts kills the target under a map with a write under way, starts it
// again, and looks whether the map serves by itself with its data intact.
func (p *peer) restarts(t *testing.T) {
	g := realtarget.Start(t, p.kind, realtarget.Options{})
	dir := t.TempDir()
	sock := filepath.Join(dir, "n")
	d, err := daemon.Start(daemon.Options{URLs: []string{realtarget.URL(g, g.Portals()[0])}, InitiatorName: "iqn.2006-07.com.example.intra:hannibal", Lenient: p.k.lenient,
		NBD: "unix:" + sock, Control: filepath.Join(dir, "c"), FailoverTime: patience / 4, Logger: slog.New(slog.NewTextHandler(logs{t}, nil)),
		Policy: paths.Config{Alias: "m", NoPathRetry: paths.Queue, Merge: true, PollingInterval: time.Second}, Merge: merge(t, p, g)})
	require.NoError(t, err)
	t.Cleanup(func() {
		stop, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		d.Stop(stop)
	})
	var c *client.Client
	require.Eventually(t, func() bool {
		c, err = client.Dial("unix", sock, "m")
		return err == nil
	}, 60*time.Second, 50*time.Millisecond)
	defer c.Close()
	large := make([]byte, 16<<20)
	rand.NewChaCha8([32]byte{1}).Read(large)
	_, err = c.WriteAt(large, 1<<20)
	require.NoError(t, err)
	got := make([]byte, len(large))
	_, err = c.ReadAt(got, 1<<20)
	require.NoError(t, err)
	require.True(t, bytes.Equal(large, got))
	p.row["16 MiB on the map"] = "yes"
	require.NoError(t, c.Flush())
	g.Kill()
	small := bytes.Repeat([]byte("cannae.."), 1024)
	done := make(chan error, 1)
	go func() { _, err := c.WriteAt(small, 40<<20); done <- err }()
	time.Sleep(1500 * time.Millisecond)
	select {
	case err := <-done:
		t.Fatalf("a write without a target ended: %v", err)
	default:
	}
	began := time.Now()
	g.Start()
	up := time.Since(began)
	select {
	case err := <-done:
		require.NoError(t, err)
	case <-time.After(60 * time.Second):
		t.Fatal("the map does not serve again")
	}
	back := time.Since(began)
	_, err = c.ReadAt(got, 1<<20)
	require.NoError(t, err)
	require.True(t, bytes.Equal(large, got), "the data changed over the restart")
	_, err = c.ReadAt(got[:len(small)], 40<<20)
	require.NoError(t, err)
	require.Equal(t, small, got[:len(small)])
	t.Logf("started in %v, served after %v", up, back)
	p.row["restart"] = fmt.Sprintf("served %.1f s later", max(0, (back-up).Seconds()))
}

// merge names the disk, which several targets identify by number only.
func merge(t *testing.T, p *peer, g realtarget.Target) []string {
	s := open(t, p.config(g))
	info, err := initiator.Identify(context.Background(), s, scsi.LUNFromNumber(g.LUN()))
	require.NoError(t, err)
	require.NoError(t, s.Close(context.Background()))
	return []string{info.WWID}
}

type logs struct{ t *testing.T }

func (l logs) Write(b []byte) (int, error) {
	l.t.Logf("mpathd: %s", bytes.TrimSpace(b))
	return len(b), nil
}
