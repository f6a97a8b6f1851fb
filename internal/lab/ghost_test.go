package lab

import (
	"flag"
	"fmt"
	"testing"
)

var (
	ghostRounds = flag.Int("ghost-rounds", 0, "rounds of each late-write variant on LIO; 0: none")
	ghostTable  = flag.String("ghost-table", "", "file whose table of late-write rounds gets LIO's rows")
	ghostBuild  = flag.String("ghost-build", "-", "commit and date for that table; underscores become spaces")
)

// TestLateWritesOnLIO runs the rounds of internal/e2e on the kernel's target, one boot
// for each mode.
func TestLateWritesOnLIO(t *testing.T) {
	if *ghostRounds == 0 {
		t.Skip("run `make ghost-lab`")
	}
	for _, protection := range []string{"hold", "strict", "shadow", "waits", "preempt", "off"} {
		t.Run(protection, func(t *testing.T) {
			inVM(t, "../e2e", 200+25**ghostRounds, *ghostTable, "late writes", 2, "-test.run", "LateWritesOnLIO/"+protection, "-test.parallel", "3", "-ghost-rounds", fmt.Sprint(*ghostRounds), "-ghost-build", *ghostBuild)
		})
	}
}
