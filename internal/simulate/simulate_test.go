package simulate

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/paths"
)

var (
	simTime = flag.Duration("sim-time", 4*time.Second, "real time to simulate for")
	simSeed = flag.Uint64("sim-seed", 1, "first seed")
)

// report shrinks a script that failed, and says how to keep it.
func report(t *testing.T, s Script, err error) {
	t.Helper()
	short, again := Shrink(t, s, time.Minute)
	text, _ := json.Marshal(short)
	t.Errorf("seed %d: %v\nshortest script found (%v):\n%vkeep it as internal/simulate/testdata/NAME.json:\n%s", s.Seed, err, again, short, text)
}

// No script of faults makes a block hold what it should not, loses a flushed
// write, or leaves a request unanswered.
func TestSimulationFindsNothing(t *testing.T) {
	var sum Tally
	verdict := "nothing reverted, nothing lost, nothing unanswered"
	begun, told := time.Now(), time.Now()
	for seed := *simSeed; time.Since(begun) < *simTime; seed++ {
		s := Draw(seed, Options{})
		tally, err := Run(t, s)
		sum.Add(tally)
		if err != nil {
			verdict = "FAILED"
			report(t, s, err)
		}
		if time.Since(told) > time.Minute {
			told = time.Now()
			t.Logf("seed %d: %v", seed, sum)
		}
	}
	t.Logf("%v\nverdict: %s", sum, verdict)
}

// What the simulation found once stays mended.
func TestScriptsThatFoundBugs(t *testing.T) {
	files, err := filepath.Glob("testdata/*.json")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, f := range files {
		t.Run(filepath.Base(f), func(t *testing.T) {
			_, err := Run(t, load(t, f))
			require.NoError(t, err)
		})
	}
}

// A target that ends no old session is never trusted, whatever the network
// does during the self-test.
func TestLiarIsUntrusted(t *testing.T) {
	for seed := range uint64(60) {
		s := Draw(seed, Options{Target: "liar"})
		if _, err := Run(t, s); err != nil {
			report(t, s, err)
			return
		}
	}
}

// A unit that says at every login that it lost its power says nothing: no flush
// fails for it. (After a crash of mpathd one may, until the self-test has found
// that out anew.)
func TestUnitThatTellsOfPowerAtEveryLogin(t *testing.T) {
	for seed := range uint64(60) {
		s := Draw(seed, Options{Protection: paths.Hold})
		s.Setup.LoginPower, s.Setup.TellsPower, s.Setup.WriteCache = true, false, true
		s.Steps = slices.DeleteFunc(s.Steps, func(st step) bool { return strings.HasPrefix(st.Do, "crash") })
		_, err := Run(t, s)
		require.NoError(t, err, "seed %d", seed)
	}
}

// The simulation must find late writes when nothing is protected, and when the
// ledger leaves out any one of its rules: else it proves nothing. Each begins
// where one is known to be near. The same script with all rules must pass: else
// something else was found.
func TestSimulationFindsWhatIsLeftOut(t *testing.T) {
	const seeds = 600
	for _, c := range []struct {
		name string
		from uint64
		o    Options
	}{
		{"protection off", 0, Options{Protection: paths.Off}},
		{"classify", 0, Options{Protection: paths.Hold, LeaveOut: paths.RuleClassify, Servers: 2}},
		{"overlap", 0, Options{Protection: paths.Hold, LeaveOut: paths.RuleOverlap, Servers: 2}},
		{"in flight", 740, Options{Protection: paths.Hold, LeaveOut: paths.RuleInFlight, Servers: 2, Policy: "multibus"}},
		{"forget", 150, Options{Protection: paths.Hold, LeaveOut: paths.RuleForget, Servers: 2}},
		{"fence", 0, Options{Protection: paths.Hold, LeaveOut: paths.RuleFence, Servers: 2}},
		{"rewrite", 0, Options{Protection: paths.Shadow, LeaveOut: paths.RuleRewrite, Servers: 2}},
		{"shadow read", 10, Options{Protection: paths.Shadow, LeaveOut: paths.RuleShadowRead, Servers: 2}},
		{"loss", 0, Options{LeaveOut: paths.RuleLoss}},
		{"whole", 150, Options{Protection: paths.Hold, LeaveOut: paths.RuleWhole, Servers: 2}},
		{"kept", 220, Options{Protection: paths.Shadow, LeaveOut: paths.RuleKept, Servers: 2}},
		{"locked", 310, Options{Protection: paths.Shadow, LeaveOut: paths.RuleLocked, Servers: 2}},
		{"flush all", 60, Options{LeaveOut: paths.RuleFlushAll, Servers: 2}},
		{"strict", 290, Options{Protection: paths.Hold, OtherHost: true}},
		{"a reset that waits for nothing", 10, Options{Target: "hasty", Protection: paths.Hold, Servers: 2}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for seed := c.from; seed < c.from+seeds; seed++ {
				s := Draw(seed, c.o)
				if _, err := Run(t, s); err != nil {
					t.Logf("seed %d: %v", seed, err)
					if s.Setup.LeaveOut = 0; s.Setup.Protection == paths.Off {
						s.Setup.Protection = paths.Hold
					}
					if s.Setup.OtherHost {
						s.Setup.Protection = paths.Strict
					}
					if s.Setup.Target == "hasty" {
						s.Setup.Target = "tgt"
					}
					_, err = Run(t, s)
					require.NoError(t, err, "with all rules")
					return
				}
			}
			t.Errorf("not noticed in %d runs", seeds)
		})
	}
	t.Run("caches", func(t *testing.T) {
		s := load(t, "testdata/late-write-in-the-cache-of-another-server.json")
		s.Setup.LeaveOut = paths.RuleCaches
		_, err := Run(t, s)
		require.ErrorContains(t, err, "no order explains it")
	})
}

func load(t *testing.T, file string) (s Script) {
	t.Helper()
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &s))
	return s
}
