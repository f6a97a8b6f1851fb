package e2e

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/internal/target"
)

var (
	fenceRounds = flag.Int("fence-rounds", 0, "failovers whose fence is timed; 0: none")
	fenceMost   = flag.Duration("fence-most", time.Hour, "how much longer than the failover an overlapping write may take")
)

// TestFenceTime measures, on a target behind two portals of which one falls
// silent under a write, how much longer than the failover an overlapping write
// takes, what of that is the fence, and what the same write takes at any other
// time. The target's disk is in memory, where the system has such a file system:
// how long a disk takes is its own affair.
func TestFenceTime(t *testing.T) {
	if *fenceRounds == 0 {
		t.Skip("run `make bench-fence`")
	}
	if dir, err := os.MkdirTemp("/dev/shm", "fence-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(dir) })
		t.Setenv("TMPDIR", dir)
	}
	t.Run("tgtd", func(t *testing.T) { fenceTime(t, newHaunted(t, "tgtd", "hold")) })
	t.Run("mpathd target", func(t *testing.T) {
		lu, err := target.NewLU(64<<20, 512, target.DefaultIdentity("fence"))
		require.NoError(t, err)
		srv, err := target.New(target.Config{Targets: []*target.Target{{Name: "iqn.2026-11.example:fence", LUs: []*target.LU{lu}}}})
		require.NoError(t, err)
		t.Cleanup(srv.Kill)
		var portals []string
		for range 2 {
			p, err := srv.Listen("127.0.0.1:0")
			require.NoError(t, err)
			portals = append(portals, p.Addr())
		}
		fenceTime(t, haunt(t, portals, func(_ int, portal string) string { return "iscsi://" + portal + "/iqn.2026-11.example:fence/0" }))
	})
}

var tookOf = regexp.MustCompile(`old session fenced" .* took=(\S+)`)

func fenceTime(t *testing.T, h *haunted) {
	var plain, failovers, more []time.Duration
	for i := range *fenceRounds {
		began := time.Now()
		require.NoError(t, overwrite(h.client, 0, variants[0].size))
		plain = append(plain, time.Since(began))
		_, valid, took, changed := h.round(variants[0], i%60)
		if valid {
			failovers, more = append(failovers, took), append(more, changed)
		}
	}
	var fences []time.Duration
	for _, m := range tookOf.FindAllStringSubmatch(h.log.String(), -1) {
		d, err := time.ParseDuration(m[1])
		require.NoError(t, err)
		fences = append(fences, d)
	}
	load, _ := os.ReadFile("/proc/loadavg")
	t.Logf("%d rounds, load %s\nplain write    %s\nfailover       %s\nfence          %s\noverlap, more  %s", len(more), strings.TrimSpace(string(load)), quantiles(plain), quantiles(failovers), quantiles(fences), quantiles(more))
	require.GreaterOrEqual(t, len(fences), len(more))
	require.Less(t, slices.Max(more), *fenceMost, "an overlapping write waits too long")
}

// quantiles are median, 99th percentile and longest of some durations.
func quantiles(d []time.Duration) string {
	if len(d) == 0 {
		return "-"
	}
	slices.Sort(d)
	round := func(d time.Duration) time.Duration { return d.Round(10 * time.Microsecond) }
	return fmt.Sprintf("p50 %v  p99 %v  max %v", round(d[len(d)/2]), round(d[(len(d)*99-1)/100]), round(d[len(d)-1]))
}
