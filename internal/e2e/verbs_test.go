package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/realtarget"
	"github.com/stretchr/testify/require"
)

// TestVerbsOfARunningDaemon drives a daemon with a configuration by its
// commands: switch, reconfigure, resize, events, queue.
func TestVerbsOfARunningDaemon(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ports := [2]int{realtarget.FreePort(t), realtarget.FreePort(t)}
	iqn := "iqn.2026-01.io.mpathd:verbs"
	tg := exec.Command(binary, "target", "-size", "64M", "-target", iqn, "-portal", fmt.Sprintf("127.0.0.1:%d,127.0.0.1:%d", ports[0], ports[1]))
	require.NoError(t, tg.Start())
	t.Cleanup(func() { tg.Process.Kill(); tg.Wait() })
	conf, control := filepath.Join(dir, "m.conf"), filepath.Join(dir, "c")
	write := func(policy, rest string) {
		text := fmt.Sprintf("defaults {\n path_grouping_policy %s\n}\ninitiator {\n name iqn.2026-11.example:i\n", policy)
		for _, p := range ports {
			text += fmt.Sprintf(" target iscsi://127.0.0.1:%d/%s/0\n", p, iqn)
		}
		text += fmt.Sprintf("}\nnbd {\n listen unix:%s/n\n attach none\n}\n%s", dir, rest)
		require.NoError(t, os.WriteFile(conf, []byte(text), 0o600))
	}
	write("failover", "")
	d := exec.Command(binary, "run", "--config", conf, "--control", control)
	require.NoError(t, d.Start())
	s := &stack{t: t, control: control}
	s.await("both paths up", func(m daemon.Maps) bool { return len(m.Maps) == 1 && m.Maps[0].Paths.Usable == 2 })
	name := s.maps().Maps[0].Alias
	run := func(code int, want string, args ...string) {
		t.Helper()
		c := exec.Command(binary, append(args, "--control", control)...)
		out, _ := c.CombinedOutput()
		require.Equal(t, code, c.ProcessState.ExitCode(), "%v: %s", args, out)
		require.Contains(t, string(out), want, "%v", args)
	}
	active := func(i int) func(daemon.Maps) bool {
		return func(m daemon.Maps) bool { return m.Maps[0].Groups[i].State == "active" }
	}
	run(0, "", "switch", name, "2")
	s.await("switched", active(1))
	run(1, "groups 1 to 2", "switch", name, "7")
	run(0, "", "switch", name, "0")
	s.await("switched back", active(0))
	write("multibus", "")
	run(0, "", "reconfigure")
	s.await("one group of two", func(m daemon.Maps) bool { return m.Maps[0].Paths.Active == 2 })
	write("failover", "defaults {\n polling_interval often\n}\n")
	run(1, "nothing changed", "reconfigure")
	require.Equal(t, 2, s.maps().Maps[0].Paths.Active)
	write("failover", "")
	require.NoError(t, d.Process.Signal(syscall.SIGHUP))
	s.await("two groups again", func(m daemon.Maps) bool { return m.Maps[0].Paths.Active == 1 })
	run(0, "nothing to do", "resize", name)
	run(1, "no map", "queue", "nothing", "on")
	run(0, "", "queue", name, "off")
	ev := exec.Command(binary, "events", "--past", "--control", control)
	seen := filepath.Join(dir, "events")
	f, err := os.Create(seen)
	require.NoError(t, err)
	defer f.Close()
	ev.Stdout = f
	require.NoError(t, ev.Start())
	said := func() string { b, _ := os.ReadFile(seen); return string(b) }
	require.Eventually(t, func() bool { return strings.Contains(said(), "configuration-applied") }, 10*time.Second, 10*time.Millisecond)
	require.NoError(t, d.Process.Signal(syscall.SIGTERM))
	require.NoError(t, d.Wait())
	require.Error(t, ev.Wait(), "the stream ends with the daemon, and says so by its exit code")
	for _, want := range []string{"path-is-up", "path-group-switched", "configuration-applied", "configuration-refused,-the-old-one-stays-in-force"} {
		require.Contains(t, said(), want)
	}
}
