package lab

import "testing"

// TestKernelAndOwnSessionsInOneMap boots a kernel and makes one map out of a
// session of its initiator and one of our own, cutting each under a verified load.
func TestKernelAndOwnSessionsInOneMap(t *testing.T) {
	boot(t, "kernel.sh", 400, "MPATHD="+built(t, "../../cmd/mpathd"))
}
