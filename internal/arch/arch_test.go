// The floor plan is that of docs/architecture.md.
package arch

import (
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/mpathd/mpathd/"

// floor of each package; a package imports only what is on a lower floor, or
// a named neighbour.
var floors = map[string]int{
	"cmd/mpathd": 50, "drill": 42, "daemon": 41, "paths": 30, "config": 28, "checker": 25, "initiator": 20, "initiator/kernel": 21, "nbd/client": 21, "nbd/attach": 21, "nbd": 20, "selector": 20, "selector/prio": 25,
	"block": 10, "scsi": 0, "initiator/pdu": 0, "nbd/proto": 0, "internal/sys": 0, "internal/links": 0, "internal/coalesce": 0, "internal/target": 19, "internal/faultnet": 19,
	"internal/e2e": 60, "internal/interop": 60, "internal/realtarget": 55, "internal/lab": 60, "internal/lab/gonbd": 60, "internal/arch": 60, "internal/simulate": 60, "compat": 32, "bench": 55, "bench/proc": 0, "bench/scale": 55,
}

func TestImportsGoDown(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", "{{.ImportPath}}:{{join .Imports \" \"}}", module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		pkg, imports, _ := strings.Cut(strings.TrimSpace(line), ":")
		name := strings.TrimPrefix(pkg, module)
		floor, ok := floors[name]
		if !ok {
			t.Errorf("%s has no floor: give it one", name)
		}
		for _, imp := range strings.Fields(imports) {
			if imp == "golang.org/x/sys/unix" && name != "internal/sys" {
				t.Errorf("%s imports %s: only internal/sys may", name, imp)
			}
			if dep, ours := strings.CutPrefix(imp, module); ours && floors[dep] >= floor {
				t.Errorf("%s (floor %d) imports %s (floor %d)", name, floor, dep, floors[dep])
			}
		}
	}
}
