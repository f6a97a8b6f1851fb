package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/paths"
)

// BenchmarkShow is what `mpathd show` costs with 256 maps of 4 paths, but for the
// start of its process and the daemon's look at its maps: what a daemon says of
// one map, 256 times over, is encoded, sent, read and printed.
func BenchmarkShow(b *testing.B) {
	const maps, portals = 256, 4
	lu, err := target.NewLU(1<<20, 512, target.DefaultIdentity("show"))
	require.NoError(b, err)
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: "iqn.2026-11.example:show", LUs: []*target.LU{lu}}}})
	require.NoError(b, err)
	defer srv.Kill()
	dir := b.TempDir()
	o := daemon.Options{InitiatorName: "iqn.2026-11.example:i", NBD: "unix:" + filepath.Join(dir, "n"), Control: filepath.Join(dir, "c"), Policy: paths.Config{NoPathRetry: paths.Queue}}
	for range portals {
		p, err := srv.Listen("127.0.0.1:0")
		require.NoError(b, err)
		o.URLs = append(o.URLs, p.URL(0))
	}
	d, err := daemon.Start(o)
	require.NoError(b, err)
	require.Eventually(b, func() bool {
		m := d.Snapshot().Maps
		return len(m) == 1 && m[0].Paths.Usable == portals
	}, time.Minute, 50*time.Millisecond)
	all := d.Snapshot()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	require.NoError(b, d.Stop(ctx))
	for i := range maps {
		m := all.Maps[0]
		m.Alias = fmt.Sprint("map", i)
		all.Maps = append(all.Maps, m)
	}
	all.Maps = all.Maps[1:]

	ln, err := net.Listen("unix", o.Control)
	require.NoError(b, err)
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if as := r.FormValue("as"); as != "" {
			daemon.Text{As: as}.Write(w, &all)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(all)
	})}
	go s.Serve(ln)
	defer s.Close()
	was, stdout := control, os.Stdout
	defer func() { control, os.Stdout = was, stdout }()
	control = o.Control
	os.Stdout, err = os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	require.NoError(b, err)
	for _, args := range [][]string{{"topology"}, {"maps"}, {"paths"}, {"maps", "--json"}} {
		b.Run(fmt.Sprint(args), func(b *testing.B) {
			for b.Loop() {
				root := rootCommand()
				root.SetArgs(append([]string{"show"}, args...))
				require.NoError(b, root.Execute())
			}
		})
	}
}
