package e2e

import (
	"bytes"
	"flag"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/faultnet"
	"github.com/mpathd/mpathd/internal/realtarget"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/paths"
)

var (
	ghostRounds = flag.Int("ghost-rounds", 1, "rounds of each late-write variant")
	ghostTable  = flag.String("ghost-table", "", "file whose table of late-write rounds gets the rows of each target")
	ghostBuild  = flag.String("ghost-build", "-", "commit and date for that table; underscores become spaces")
)

// variant is one way in which a write is under way when its path dies, and one
// way to change the same blocks afterwards.
type variant struct {
	name   string
	from   faultnet.Silent
	size   int
	slow   bool
	change func(c *client.Client, off int64, size int) error
	want   func(size int) []byte
}

func fill(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }

func overwrite(c *client.Client, off int64, n int) error {
	_, err := c.WriteAt(fill(n, 'b'), off)
	return err
}

var variants = []variant{
	{"sent", faultnet.HoldAll, 4096, false, overwrite, func(n int) []byte { return fill(n, 'b') }},
	{"data pending", faultnet.HoldData, 32 << 10, false, overwrite, func(n int) []byte { return fill(n, 'b') }},
	{"slow backend", faultnet.HoldNothing, 4096, true, overwrite, func(n int) []byte { return fill(n, 'b') }},
	{"overlap", faultnet.HoldAll, 8192, false, func(c *client.Client, off int64, n int) error { return overwrite(c, off+4096, n-4096) },
		func(n int) []byte { return append(fill(4096, 'a'), fill(n-4096, 'b')...) }},
	{"trim", faultnet.HoldAll, 4096, false, func(c *client.Client, off int64, n int) error { return c.Trim(off, uint32(n)) }, func(n int) []byte { return make([]byte, n) }},
	{"write zeroes", faultnet.HoldAll, 4096, false, func(c *client.Client, off int64, n int) error { return c.WriteZeroes(off, uint32(n)) },
		func(n int) []byte { return make([]byte, n) }},
}

// haunted is one target behind two portals that can fall silent, and mpathd.
type haunted struct {
	t       *testing.T
	target  realtarget.Target
	control string
	sock    string
	args    []string
	portals []*faultnet.Late
	cmd     *exec.Cmd
	client  *client.Client
	log     bytes.Buffer
}

func newHaunted(t *testing.T, kind, protection string, more ...string) *haunted {
	target := realtarget.Start(t, kind, realtarget.Options{Portals: 2, Thin: true, Slow: true, Timeout: 5})
	h := haunt(t, target.Portals(), func(_ int, portal string) string { return realtarget.URL(target, portal) }, append([]string{"--ghost-protection", protection}, more...)...)
	h.target = target
	return h
}

// haunt runs mpathd on portals that can fall silent; url names the unit behind the
// i-th one through its proxy, more are flags.
func haunt(t *testing.T, portals []string, url func(i int, portal string) string, more ...string) *haunted {
	dir := t.TempDir()
	h := &haunted{t: t, control: filepath.Join(dir, "c"), sock: filepath.Join(dir, "n")}
	h.args = append([]string{"run", "--attach", "none", "--control", h.control, "--nbd", "unix:" + h.sock, "--alias", "m", "--failover-time", "400ms",
		"--initiator", "iqn.2006-07.com.example.intra:hannibal", "--polling-interval", "1s"}, more...)
	for i, at := range portals {
		p, err := faultnet.NewLate(at)
		require.NoError(t, err)
		t.Cleanup(p.Close)
		h.portals = append(h.portals, p)
		h.args = append(h.args, url(i, p.Addr()))
	}
	h.start()
	t.Cleanup(func() {
		h.cmd.Process.Signal(syscall.SIGTERM)
		h.cmd.Wait()
		if t.Failed() || testing.Verbose() {
			t.Logf("mpathd says:\n%s", h.log.String())
		}
	})
	h.settled()
	h.dial()
	return h
}

func (h *haunted) start() {
	h.cmd = exec.Command(binary, h.args...)
	h.cmd.Stderr = &h.log
	require.NoError(h.t, h.cmd.Start())
}

func (h *haunted) dial() {
	var err error
	require.Eventually(h.t, func() bool {
		h.client, err = client.Dial("unix", h.sock, "m")
		return err == nil
	}, 20*time.Second, 20*time.Millisecond)
	c := h.client
	h.t.Cleanup(func() { c.Close() })
}

// settled waits until all paths are up, the first one serves, and nothing is at risk.
func (h *haunted) settled() {
	h.await("all paths up", func(m paths.MapStatus) bool {
		return m.Paths.Usable == len(h.portals) && m.Groups[0].Paths[0].Serving && len(m.Safety.Unfenced) == 0
	})
}

// await waits until the map is as it should.
func (h *haunted) await(what string, ok func(m paths.MapStatus) bool) (got paths.MapStatus) {
	s := &stack{t: h.t, control: h.control}
	s.await(what, func(m daemon.Maps) bool {
		if len(m.Maps) == 1 {
			got = m.Maps[0]
		}
		return len(m.Maps) == 1 && ok(got)
	})
	return got
}

// patient panics when the test goes on for much longer than any fence may take.
func (h *haunted) patient(what string) (stop func() bool) {
	return time.AfterFunc(2*time.Minute, func() { panic(what + "; mpathd says:\n" + h.log.String()) }).Stop
}

// round cuts the serving path under a write, lets the write fail over, changes
// its blocks, delivers the old bytes late, and looks. valid tells that there
// was something to deliver.
func (h *haunted) round(v variant, i int) (reverted, valid bool, took, changed time.Duration) {
	t, off := h.t, int64(1+i)<<20
	a := h.portals[0]
	_, err := h.client.WriteAt(fill(v.size, '0'), off)
	require.NoError(t, err)
	if v.slow {
		h.target.Slow()
	}
	a.Silence(v.from)
	began := time.Now()
	defer h.patient("a request hangs")()
	_, err = h.client.WriteAt(fill(v.size, 'a'), off)
	require.NoError(t, err)
	took = time.Since(began)
	valid = a.Held() > 0 || v.slow
	require.NoError(t, v.change(h.client, off, v.size))
	changed = time.Since(began) - took
	if v.slow { // until the slow write has certainly happened
		time.Sleep(time.Until(began.Add(2500 * time.Millisecond)))
	}
	a.Deliver()
	time.Sleep(200 * time.Millisecond)
	got := make([]byte, v.size)
	_, err = h.client.ReadAt(got, off)
	require.NoError(t, err)
	reverted = !bytes.Equal(got, v.want(v.size))
	a.Heal()
	h.settled()
	return reverted, valid, took, changed
}

// serial are targets whose units execute one command after the other: nothing
// overtakes a write that their backend is slow with, or that waits for data.
var serial = map[string]bool{"istgt": true}

// withCommand is how many bytes some targets let a write carry with its command.
var withCommand = map[string]int{"istgt": 256 << 10, "LIO": 64 << 10}

func TestLateWritesOnTgtd(t *testing.T)  { lateWrites(t, "tgtd") }
func TestLateWritesOnIstgt(t *testing.T) { lateWrites(t, "istgt") }
func TestLateWritesOnLIO(t *testing.T)   { lateWrites(t, "LIO") }

// modes are those of protection; waits is hold with a fence that trusts the
// login alone, preempt is hold with reservation keys.
var modes = []string{"hold", "strict", "shadow", "waits", "preempt", "off"}

var modeArgs = map[string][]string{"waits": {"--reinstatement-waits"}, "preempt": {"--fence-by", "preempt"}}

// loginWaits are targets whose login waits for what the old session's backend still does.
var loginWaits = map[string]bool{"istgt": true, "LIO": true}

// lateWrites is the hazard itself on a real target: with protection no
// acknowledged write is reverted, and without it the same rounds revert. Each
// variant has a target and a mpathd of its own and waits beside the others; one
// round of each is played on a single one.
func lateWrites(t *testing.T, kind string) {
	for _, protection := range modes {
		t.Run(protection, func(t *testing.T) {
			quick := *ghostRounds == 1
			if quick && (modeArgs[protection] != nil || serial[kind] && protection != "hold") {
				t.Skip("one round proves nothing new: run `make ghost`")
			}
			t.Parallel() // most of the time they wait
			mode := protection
			if modeArgs[mode] != nil {
				mode = "hold"
			}
			start := func(t *testing.T) *haunted { return newHaunted(t, kind, mode, modeArgs[protection]...) }
			results := make([]result, len(variants))
			if quick {
				h := start(t)
				for k, v := range variants {
					if k == 0 || !serial[kind] {
						results[k].play(t, h, v, kind, protection)
					}
				}
			} else {
				t.Cleanup(func() {
					if !t.Failed() && !slices.ContainsFunc(results, func(r result) bool { return !r.played }) {
						putLateWrites(t, kind, protection, results)
					}
				})
				for k, v := range variants {
					t.Run(v.name, func(t *testing.T) {
						t.Parallel()
						results[k].play(t, start(t), v, kind, protection)
					})
				}
			}
		})
	}
}

// result is what came of the rounds of one variant.
type result struct {
	played            bool
	reverted, valid   int
	failover, changed []time.Duration
}

// play plays the rounds of a variant and judges them.
func (r *result) play(t *testing.T, h *haunted, v variant, kind, protection string) {
	r.played = true
	if n := withCommand[kind]; v.from == faultnet.HoldData && n > 0 {
		v.size = 2 * n
	}
	if v.name == "trim" && !h.client.Trims() {
		return
	}
	for i := 0; r.valid < *ghostRounds && i < 2**ghostRounds; i++ {
		reverted, ok, f, c := h.round(v, i%60)
		if !ok { // the path lost its session by itself just before
			continue
		}
		r.valid++
		if reverted {
			r.reverted++
		}
		r.failover, r.changed = append(r.failover, f), append(r.changed, c)
	}
	t.Logf("%s: %d/%d reverted, failover %s, change %s", v.name, r.reverted, r.valid, spread(r.failover), spread(r.changed))
	require.Equal(t, *ghostRounds, r.valid, "%s: rounds in which nothing was late prove nothing", v.name)
	switch {
	case (v.slow || v.from == faultnet.HoldData) && serial[kind]:
		require.Zero(t, r.reverted, "%s: nothing overtakes such a write there", v.name)
	case protection == "waits" && v.slow && !loginWaits[kind]: // what the operator says of it is wrong
		require.NotZero(t, r.reverted, "%s: this target's login does not wait", v.name)
	case protection == "off":
		require.NotZero(t, r.reverted, "%s: the control must revert, or the test proves nothing", v.name)
	default:
		require.Zero(t, r.reverted, "%s", v.name)
	}
}

// putLateWrites puts the row of a mode into the table.
func putLateWrites(t *testing.T, kind, protection string, results []result) {
	row := fmt.Sprintf("| %s | %s |", kind, protection)
	var failovers, changes, slow []time.Duration
	for k, r := range results {
		if r.valid == 0 {
			row += " - |"
			continue
		}
		row += fmt.Sprintf(" %d/%d |", r.reverted, r.valid)
		if !variants[k].slow {
			failovers, changes = append(failovers, r.failover...), append(changes, r.changed...)
			continue
		}
		for i, f := range r.failover {
			slow = append(slow, f+r.changed[i])
		}
	}
	putRow(t, "late writes", row+fmt.Sprintf(" %s | %s | %s |", spread(failovers), spread(changes), spread(slow)), 2)
}

// putRow prints a row with the build that it is of, and puts it into its table.
func putRow(t *testing.T, table, row string, key int) {
	row += " " + strings.ReplaceAll(*ghostBuild, "_", " ") + " |"
	t.Log(realtarget.RowPrefix + row)
	if *ghostTable != "" {
		tableMu.Lock()
		defer tableMu.Unlock()
		require.NoError(t, realtarget.PutRow(*ghostTable, table, row, key))
	}
}

// passed puts a row about a test into its table when the test has passed; it does
// nothing where one round is played.
func passed(t *testing.T, test, targets, rounds, found string) {
	if *ghostRounds == 1 {
		return
	}
	t.Cleanup(func() {
		if !t.Failed() && !t.Skipped() {
			putRow(t, "late tests", fmt.Sprintf("| `%s` | %s | %s | %s |", test, targets, rounds, found), 2)
		}
	})
}

// beside lets the rounds of a test run beside those of others: most of the time
// they wait.
func beside(t *testing.T) { t.Parallel() }

var tableMu sync.Mutex

// spread is the median and the longest of some durations, in milliseconds.
func spread(d []time.Duration) string {
	if len(d) == 0 {
		return "-"
	}
	slices.Sort(d)
	ms := func(d time.Duration) string {
		return strings.TrimSuffix(fmt.Sprintf("%.1f", float64(d.Microseconds())/1000), ".0")
	}
	return ms(d[len(d)/2]) + " / " + ms(d[len(d)-1]) + " ms"
}

// TestCrashWithWritesUnderWay kills the daemon while a write is on its way, and
// lets it come back to a disk of which one portal is silent: the new run must
// end the old session before it writes.
func TestCrashWithWritesUnderWay(t *testing.T) {
	for protection, found := range map[string]string{"hold": "none reverted", "off": "all reverted"} {
		t.Run(protection, func(t *testing.T) {
			beside(t)
			passed(t, "CrashWithWritesUnderWay", "tgtd, "+protection, fmt.Sprint(*ghostRounds), found)
			h := newHaunted(t, "tgtd", protection)
			for i := range *ghostRounds {
				h.crash(protection, int64(1+i%60)<<20)
			}
		})
	}
}

// crash is one round.
func (h *haunted) crash(protection string, off int64) {
	t, a := h.t, h.portals[0]
	_, err := h.client.WriteAt(fill(4096, '0'), off)
	require.NoError(t, err)
	a.Silence(faultnet.HoldAll)
	old := h.client
	go old.WriteAt(fill(4096, 'a'), off)
	require.Eventually(t, func() bool { return a.Held() >= 4096 }, 5*time.Second, time.Millisecond)
	h.cmd.Process.Kill()
	h.cmd.Wait()
	h.start()
	h.dial()
	began := time.Now()
	defer h.patient("the first write hangs")()
	require.NoError(t, overwrite(h.client, off, 4096))
	t.Logf("%s: first write of the new run after %v", protection, time.Since(began).Round(time.Millisecond))
	a.Deliver()
	time.Sleep(200 * time.Millisecond)
	got := make([]byte, 4096)
	_, err = h.client.ReadAt(got, off)
	require.NoError(t, err)
	if protection == "off" {
		require.Equal(t, fill(4096, 'a'), got, "the control must revert, or the test proves nothing")
	} else {
		require.Equal(t, fill(4096, 'b'), got, "an acknowledged write was reverted")
	}
	a.Heal()
	h.settled()
}
