package lab

import (
	"flag"
	"testing"
)

var all = flag.Bool("all", false, "run the long ones too")

func long(t *testing.T) {
	if !*all {
		t.Skip("run `make lab`")
	}
}

// TestKernelDevice: the module missing, a device of somebody else's, partitions, a
// crash loop, a changed configuration,
// growth under a mount, and the stock nbd-client.
func TestKernelDevice(t *testing.T) {
	long(t)
	boot(t, "device.sh", 360, "MPATHD="+built(t, "../../cmd/mpathd"))
}
