package initiator_test

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

var conformanceDoc = flag.String("conformance", "", "file to write the table of conformance cases to")

// conformanceCase is one thing that a target does, and what the initiator must
// do then. `make conformance` makes docs/conformance.md out of them.
type conformanceCase struct {
	target    string // "the target ..."
	initiator string // "the initiator ..."
	run       func(t *testing.T)
}

// caseGroups are the ids that there are: a prefix, and how many.
var caseGroups = []struct {
	prefix, name string
	count        int
}{
	{"LG", "Login", 31}, {"TX", "Text and discovery", 6}, {"FF", "Numbering and command window", 14}, {"DI", "Data-In", 15}, {"WR", "Writes and R2T", 16}, {"NP", "NOP", 6},
	{"AS", "Asynchronous messages", 6}, {"TM", "Task management", 9}, {"LO", "Logout", 3}, {"RJ", "Reject", 5}, {"DG", "Digests", 5}, {"CH", "CHAP", 10}, {"SC", "SCSI", 7}, {"HM", "Hostile and malformed", 11},
}

// uncovered are cases without a test here, and why.
var uncovered = map[string]string{
	"SC07": "late writes: see write-safety.md and `make ghost`",
}

var caseMaps = []map[string]conformanceCase{loginCases, chapCases, discoveryCases, nexusCases, windowCases, idleCases, depthCases, lunCases, nopCases, flowCases, errorCases, asyncCases, taskCases, rejectCases, mapCases, scsiCases, dataCases, writeCases, hostileCases, digestCases}

func conformanceCases() map[string]conformanceCase {
	all := map[string]conformanceCase{}
	for _, group := range caseMaps {
		maps.Copy(all, group)
	}
	return all
}

func TestConformanceHasEachCaseOnce(t *testing.T) {
	have := slices.Collect(maps.Keys(uncovered))
	for _, group := range caseMaps {
		have = slices.AppendSeq(have, maps.Keys(group))
	}
	var want []string
	for _, g := range caseGroups {
		for n := 1; n <= g.count; n++ {
			want = append(want, fmt.Sprintf("%s%02d", g.prefix, n))
		}
	}
	require.ElementsMatch(t, want, have)
}

func TestConformance(t *testing.T) {
	results := &outcomes{m: map[string]bool{}}
	all := conformanceCases()
	t.Cleanup(func() { results.write(t, all) })
	for _, id := range slices.Sorted(maps.Keys(all)) {
		c := all[id]
		t.Run(id+" target "+c.target, func(t *testing.T) {
			t.Parallel()
			t.Cleanup(func() { results.set(id, !t.Failed()) }) // after its parallel parts
			c.run(t)
		})
	}
}

// outcomes collects the results of TestConformance.
type outcomes struct {
	mu sync.Mutex
	m  map[string]bool
}

func (o *outcomes) set(id string, passed bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.m[id] = passed
}

func (o *outcomes) write(t *testing.T, all map[string]conformanceCase) {
	if *conformanceDoc == "" {
		return
	}
	var b strings.Builder
	fmt.Fprint(&b, "# Conformance\n\n`make conformance` plays these cases of RFC 7143 with a scripted target and writes this page. \"Drops\" means: the connection ends with\n"+
		"a reset and a reason, the path fails, and each command is given back once, none of them completed wrongly.\n")
	b.WriteString(departures)
	passed, total := 0, 0
	for _, g := range caseGroups {
		fmt.Fprintf(&b, "\n## %s\n\n| case | the target | the initiator | result |\n|---|---|---|---|\n", g.name)
		for n := 1; n <= g.count; n++ {
			id := fmt.Sprintf("%s%02d", g.prefix, n)
			total++
			c, ok := all[id]
			result := "passed"
			switch {
			case !ok && uncovered[id] != "":
				result = uncovered[id]
			case !ok:
				result = "**no test**"
			case !o.m[id]:
				result = "**failed**"
			default:
				passed++
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", id, c.target, c.initiator, result)
		}
	}
	fmt.Fprintf(&b, "\n%d of %d cases passed.\n", passed, total)
	require.NoError(t, os.WriteFile(*conformanceDoc, []byte(b.String()), 0o644))
}
