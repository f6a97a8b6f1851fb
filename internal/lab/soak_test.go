package lab

import (
	"flag"
	"fmt"
	"testing"
)

var soak = flag.Int("soak", 0, "seconds of verified writes on /dev/nbd0 under kills, half of them on ext4 and half on xfs")

// TestSoak kills the daemon every few seconds under verified writes and file
// operations on ext4 and xfs.
func TestSoak(t *testing.T) {
	if *soak == 0 {
		t.Skip("run `make soak-kernel`")
	}
	boot(t, "soak.sh", *soak*3/2+240, "MPATHD="+built(t, "../../cmd/mpathd"), fmt.Sprintf("SECONDS_EACH=%d", *soak/2))
}
