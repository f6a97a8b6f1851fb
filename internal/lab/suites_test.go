package lab

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mpathd/mpathd/internal/realtarget"
)

// inVM runs a suite of another package on LIO in the emulated machine, and puts
// the rows it prints into a table, if file names one.
func inVM(t *testing.T, pkg string, seconds int, file, table string, key int, args ...string) {
	suite := filepath.Join(t.TempDir(), "suite")
	if out, err := exec.Command("go", "test", "-c", "-o", suite, pkg).CombinedOutput(); err != nil {
		t.Fatalf("build the tests of %s: %v: %s", pkg, err, out)
	}
	out := boot(t, "suite.sh", seconds, "MPATHD="+built(t, "../../cmd/mpathd"), "SUITE="+suite,
		fmt.Sprintf("ARGS='-test.v -test.timeout %ds %s'", seconds-20, strings.Join(args, " ")))
	if t.Failed() {
		return
	}
	for line := range strings.Lines(out) {
		if _, row, ok := strings.Cut(strings.TrimSpace(line), realtarget.RowPrefix); ok && file != "" {
			if err := realtarget.PutRow(file, table, row, key); err != nil {
				t.Error(err)
			}
		}
	}
}
