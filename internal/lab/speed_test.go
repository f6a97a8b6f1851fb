package lab

import (
	"flag"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var speed = flag.Bool("speed", false, "measure /dev/nbd0 in turns with dm-multipath")

// sample is one run of fio.
type sample struct {
	load, device string
	iops, mib    float64
}

// samples are the rows that speed.sh printed.
func samples(out string) (s []sample) {
	for line := range strings.Lines(out) {
		f := strings.Split(strings.TrimSpace(line), "|")
		if len(f) != 5 || f[0] != "row" {
			continue
		}
		iops, _ := strconv.ParseFloat(f[3], 64)
		mib, _ := strconv.ParseFloat(f[4], 64)
		s = append(s, sample{f[1], f[2], iops, mib})
	}
	return s
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// TestKernelSpeed prints a table of /dev/nbd0 beside open-iscsi and
// dm-multipath on the same targets in one boot. The ratios are taken turn by
// turn: the machine is never equally fast for long.
func TestKernelSpeed(t *testing.T) {
	if !*speed {
		t.Skip("run `make bench-kernel`")
	}
	type turns struct{ iops, peerIOPS, mib, peerMiB, ratio []float64 }
	byLoad, loads := map[string]*turns{}, []string{}
	rows := samples(boot(t, "speed.sh", 280, "MPATHD="+built(t, "../../cmd/mpathd")))
	require.Zero(t, len(rows)%2)
	for pair := range slices.Chunk(rows, 2) {
		peer, ours := pair[0], pair[1]
		l := byLoad[ours.load]
		if l == nil {
			l = &turns{}
			byLoad[ours.load] = l
			loads = append(loads, ours.load)
		}
		l.iops, l.peerIOPS = append(l.iops, ours.iops), append(l.peerIOPS, peer.iops)
		l.mib, l.peerMiB = append(l.mib, ours.mib), append(l.peerMiB, peer.mib)
		l.ratio = append(l.ratio, ours.iops/max(peer.iops, 1))
	}
	var b strings.Builder
	b.WriteString("\n| load | dm-multipath IOPS | /dev/nbd0 IOPS | MiB/s, both | ratio | of each turn |\n|---|---|---|---|---|---|\n")
	for _, load := range loads {
		l := byLoad[load]
		var each []string
		for _, r := range l.ratio {
			each = append(each, fmt.Sprintf("%.2f", r))
		}
		fmt.Fprintf(&b, "| %s | %.0f | %.0f | %.0f, %.0f | %.2f | %s |\n", load, median(l.peerIOPS), median(l.iops), median(l.peerMiB), median(l.mib), median(l.ratio), strings.Join(each, ", "))
	}
	t.Log(b.String())
}

// TestKernelSettings prints what queue settings and more connections would
// give /dev/nbdX, one after the other in one boot.
func TestKernelSettings(t *testing.T) {
	if !*speed {
		t.Skip("run `make bench-kernel`")
	}
	var b strings.Builder
	b.WriteString("\n| /dev/nbdX | load | IOPS | MiB/s |\n|---|---|---|---|\n")
	for _, s := range samples(boot(t, "speed.sh", 280, "SETTINGS=1", "MPATHD="+built(t, "../../cmd/mpathd"))) {
		fmt.Fprintf(&b, "| %s | %s | %.0f | %.0f |\n", s.device, s.load, s.iops, s.mib)
	}
	t.Log(b.String())
}
