package main

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/nbd/proto"
	"github.com/mpathd/mpathd/paths"
)

// stack runs target, session, group and NBD server in this process and returns
// a client connection in transmission.
func stack(t testing.TB) net.Conn {
	lu, err := target.NewLU(64<<20, 512, target.DefaultIdentity("bench"))
	require.NoError(t, err)
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: "iqn.2026-11.example:b", LUs: []*target.LU{lu}}}})
	require.NoError(t, err)
	portal, err := srv.Listen("127.0.0.1:0")
	require.NoError(t, err)
	dir := t.TempDir()
	sock := filepath.Join(dir, "n")
	d, err := daemon.Start(daemon.Options{URLs: []string{portal.URL(0)}, InitiatorName: "iqn.2026-11.example:i", NBD: "unix:" + sock,
		Control: filepath.Join(dir, "c"), Policy: paths.Config{Alias: "b", NoPathRetry: paths.Queue}})
	require.NoError(t, err)
	require.Eventually(t, func() bool { m := d.Snapshot().Maps; return len(m) == 1 && m[0].Paths.Usable == 1 }, 10*time.Second, 10*time.Millisecond)
	c, err := net.Dial("unix", sock)
	require.NoError(t, err)
	t.Cleanup(func() {
		c.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		d.Stop(ctx)
		srv.Kill()
	})
	var b [152]byte
	_, err = io.ReadFull(c, b[:18])
	require.NoError(t, err)
	out := binary.BigEndian.AppendUint32(nil, 3)
	out = binary.BigEndian.AppendUint64(out, proto.OptionMagic)
	out = binary.BigEndian.AppendUint32(out, proto.OptExportName)
	out = binary.BigEndian.AppendUint32(out, 1)
	_, err = c.Write(append(out, 'b'))
	require.NoError(t, err)
	_, err = io.ReadFull(c, b[:10])
	require.NoError(t, err)
	return c
}

// roundTrips does n requests at a depth, without allocating.
func roundTrips(c net.Conn, write bool, depth, n int, buf []byte) error {
	const size = 4096
	one := proto.RequestLen
	if write {
		one += size
	}
	for n > 0 {
		k := min(depth, n)
		for i := range k {
			r := proto.Request{Type: proto.CmdRead, Cookie: uint64(i), Offset: uint64(i) * size, Length: size}
			if write {
				r.Type = proto.CmdWrite
			}
			proto.PutRequest(buf[i*one:], r)
		}
		if _, err := c.Write(buf[:k*one]); err != nil {
			return err
		}
		back := proto.ReplyLen
		if !write {
			back += size
		}
		if _, err := io.ReadFull(c, buf[:k*back]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// TestNoAllocationPerIO: from NBD header to NBD reply, targets included.
func TestNoAllocationPerIO(t *testing.T) {
	c := stack(t)
	buf := make([]byte, 64*(4096+proto.RequestLen))
	for _, write := range []bool{false, true} {
		require.NoError(t, roundTrips(c, write, 32, 20000, buf)) // buffers and lists reach their size
		const n = 50000
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		require.NoError(t, roundTrips(c, write, 32, n, buf))
		runtime.ReadMemStats(&after)
		got := float64(after.Mallocs-before.Mallocs) / n
		t.Logf("write %v: %.4f allocations per I/O", write, got)
		require.Less(t, got, 0.01, "timers of the watchdogs allocate a little; an I/O must not")
	}
}

func benchmark(b *testing.B, write bool, depth int) {
	c := stack(b)
	buf := make([]byte, 64*(4096+proto.RequestLen))
	require.NoError(b, roundTrips(c, write, depth, 5000, buf))
	b.ReportAllocs()
	b.SetBytes(4096)
	b.ResetTimer()
	require.NoError(b, roundTrips(c, write, depth, b.N, buf))
}

func BenchmarkStackRead4KDepth1(b *testing.B)   { benchmark(b, false, 1) }
func BenchmarkStackRead4KDepth32(b *testing.B)  { benchmark(b, false, 32) }
func BenchmarkStackWrite4KDepth32(b *testing.B) { benchmark(b, true, 32) }
