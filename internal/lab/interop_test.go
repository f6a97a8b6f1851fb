package lab

import (
	"flag"
	"testing"
)

var (
	interopTable = flag.String("interop-table", "", "file whose table of targets gets LIO's row")
	complete     = flag.Bool("complete", false, "run whole suites instead of a part of them")
)

// TestInteropOnLIO runs the suite of internal/interop on the kernel's target.
func TestInteropOnLIO(t *testing.T) {
	if !*complete && *interopTable == "" {
		t.Skip("run `make interop`")
	}
	args, limit := []string{"-test.run", "LIO", "-quick"}, 400
	if *complete {
		args, limit = append(args, "-complete"), 1500
	}
	inVM(t, "../interop", limit, *interopTable, "targets", 1, args...)
}
