package e2e

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/faultnet"
	"github.com/mpathd/mpathd/internal/realtarget"
	"github.com/mpathd/mpathd/paths"
)

// A write lies unread in the socket of a server that is stopped (SIGSTOP), and is
// executed when that goes on: the socket outlives our reset. Of the two servers of
// the disk, only the one that stands still could end its session.
func TestWriteInTheSocketOfAStoppedServer(t *testing.T) {
	for _, protection := range []string{"hold", "off"} {
		t.Run(protection, func(t *testing.T) {
			beside(t)
			found := "none reverted; each was held until the server went on"
			if protection == "off" {
				found = "all reverted"
			}
			passed(t, "WriteInTheSocketOfAStoppedServer", "two tgtd of one disk, "+protection, fmt.Sprint(*ghostRounds), found)
			image := filepath.Join(t.TempDir(), "image")
			require.NoError(t, os.WriteFile(image, nil, 0o600))
			require.NoError(t, os.Truncate(image, 64<<20))
			var servers []realtarget.Target
			var portals []string
			for _, name := range []string{"one", "two"} {
				s := realtarget.Start(t, "tgtd", realtarget.Options{Image: image, Name: "iqn.2009-01.nl.pref:storage." + name})
				servers, portals = append(servers, s), append(portals, s.Portals()[0])
			}
			h := haunt(t, portals, func(i int, portal string) string { return realtarget.URL(servers[i], portal) }, "--ghost-protection", protection, "--failback", "immediate")
			for i := range *ghostRounds {
				h.stopped(servers[0].Process().Signal, protection, int64(1+i%60)<<20)
			}
		})
	}
}

// stopped is one round: signal is for the first server.
func (h *haunted) stopped(signal func(os.Signal) error, protection string, off int64) {
	t := h.t
	_, err := h.client.WriteAt(fill(4096, '0'), off)
	require.NoError(t, err)
	require.NoError(t, signal(syscall.SIGSTOP))
	defer signal(syscall.SIGCONT)
	defer h.patient("a request hangs")()
	_, err = h.client.WriteAt(fill(4096, 'a'), off)
	require.NoError(t, err)
	over := make(chan error, 1)
	go func() { over <- overwrite(h.client, off, 4096) }()
	read := func() byte {
		got := make([]byte, 4096)
		_, err := h.client.ReadAt(got, off)
		require.NoError(t, err)
		return got[0]
	}
	if protection == "off" {
		require.NoError(t, <-over)
		signal(syscall.SIGCONT)
		require.Eventually(t, func() bool { return read() == 'a' }, 20*time.Second, 10*time.Millisecond, "the control must revert, or the test proves nothing")
	} else {
		h.await("the overwrite waits", func(m paths.MapStatus) bool { return m.Safety.Held == 1 })
		h.says("show", "maps")(`the old session of path \S+ may still execute 1 writes \(8 blocks\), for \S+; 1 requests wait for its fence`)
		h.says("show", "status")(`ghost_protection hold, .*1 wait now`)
		signal(syscall.SIGCONT)
		require.NoError(t, <-over)
	}
	h.settled()
	if protection != "off" {
		require.Equal(t, byte('b'), read(), "an acknowledged write was reverted")
		h.says("show", "status")(`[1-9]\d* writes were ambiguous, [1-9]\d* requests waited for [1-9]\S+ \(longest [1-9]\S+\), 0 wait now; fences: [1-9]\d* proven, by [1-9]\d* reset`)
		h.says("events", "--past")(`a-session-died-with-writes-under-way map=m path=\S+ blocks_at_risk=8 whole_device=false writes_at_risk=1`,
			`old-session-fenced map=m path=\S+ blocks_at_risk=8 by=reset how=proven longest_hold=\d\S+ requests_released=1 reset=\S+ through=\S+ took=\d\S+ writes_at_risk=1`)
		require.Regexp(t, `msg="old session fenced" map=m path=\S+ how=proven by=reset took=\S+ writes_at_risk=1 blocks_at_risk=8 requests_released=1 longest_hold=`, h.log.String())
	}
}

// says runs a command of mpathd's until its output has a line for each of the
// patterns, and ends it.
func (h *haunted) says(args ...string) func(patterns ...string) {
	return func(patterns ...string) {
		h.t.Helper()
		out, w, err := os.Pipe()
		require.NoError(h.t, err)
		defer out.Close()
		cmd := exec.Command(binary, append(args, "--control", h.control)...)
		cmd.Stdout = w
		require.NoError(h.t, cmd.Start())
		w.Close()
		defer cmd.Wait()
		defer cmd.Process.Kill()
		out.SetReadDeadline(time.Now().Add(20 * time.Second))
		var said string
		for lines := bufio.NewScanner(out); len(patterns) > 0 && lines.Scan(); {
			said += lines.Text() + "\n"
			patterns = slices.DeleteFunc(patterns, func(p string) bool { return regexp.MustCompile(p).MatchString(lines.Text()) })
		}
		require.Empty(h.t, patterns, "mpathd %v says:\n%s", args, said)
	}
}

// gotgt answers a login with a known identity as if it reinstated that session,
// and LOGICAL UNIT RESET as if it reset the unit: it does neither.
func TestGotgtIsUntrusted(t *testing.T) {
	beside(t)
	passed(t, "GotgtIsUntrusted", "gotgt", fmt.Sprint(*ghostRounds), "`untrusted`; all fences *unproven*")
	target := realtarget.Start(t, "gotgt", realtarget.Options{})
	h := haunt(t, target.Portals(), func(_ int, portal string) string { return realtarget.URL(target, portal) }, "--lenient")
	for i := range *ghostRounds {
		require.Equal(t, paths.Untrusted, h.await("up", func(m paths.MapStatus) bool { return m.Paths.Usable == 1 }).Groups[0].Paths[0].Trust)
		h.portals[0].Silence(faultnet.HoldAll)
		done := make(chan error, 1)
		go func() { _, err := h.client.WriteAt(fill(4096, 'a'), 1<<20); done <- err }()
		h.await("at risk", func(m paths.MapStatus) bool { return len(m.Safety.Unfenced) == 1 })
		h.portals[0].Heal()
		require.NoError(t, <-done)
		m := h.await("over", func(m paths.MapStatus) bool { return len(m.Safety.Unfenced) == 0 })
		require.EqualValues(t, i+1, m.Safety.Fences["unproven"], "%v", m.Safety.Fences)
		require.Zero(t, m.Safety.Fences["proven"])
	}
}

// A new run ends the sessions of the one before because it logs in with their
// identity, whatever became of the old process and in whatever order its paths come.
func TestISIDOfAPathIsThatOfTheRunBefore(t *testing.T) {
	const runs = 3
	beside(t)
	passed(t, "ISIDOfAPathIsThatOfTheRunBefore", "tgtd", fmt.Sprint(runs), "the same, paths in either order")
	h := newHaunted(t, "tgtd", "hold")
	urls := slices.Clone(h.args[len(h.args)-2:])
	for run := range runs {
		for i, p := range h.portals {
			u, err := initiator.ParseURL(urls[i])
			require.NoError(t, err)
			require.Contains(t, p.ISIDs(), initiator.PathISID("iqn.2006-07.com.example.intra:hannibal", h.target.Name(), u.PathName()), "run %d, portal %d", run, i)
		}
		h.cmd.Process.Kill()
		h.cmd.Wait()
		slices.Reverse(h.args[len(h.args)-2:])
		h.start()
		h.await("all paths up", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 })
	}
}
