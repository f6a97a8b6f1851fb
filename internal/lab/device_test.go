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

// TestKernelConnections gives a device two connections: one that dies, and those
// that the kernel cuts while the paths are away, are replaced under verified writes.
func TestKernelConnections(t *testing.T) {
	long(t)
	boot(t, "connections.sh", 300, "MPATHD="+built(t, "../../cmd/mpathd"))
}

// TestFencesBesideLargeWrites cuts one of two portals of one LIO target twenty times
// under large writes: no fence, and no write, may wait for another.
func TestFencesBesideLargeWrites(t *testing.T) {
	long(t)
	boot(t, "resets.sh", 500, "MPATHD="+built(t, "../../cmd/mpathd"))
}

// TestKernelDeviceOwners: a device that belongs to one map, to somebody else or to
// another daemon is nobody else's.
func TestKernelDeviceOwners(t *testing.T) {
	long(t)
	boot(t, "owners.sh", 360, "MPATHD="+built(t, "../../cmd/mpathd"))
}
