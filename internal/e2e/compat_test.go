package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
)

// peer is a file of a Debian package that internal/deps unpacked.
func peer(t *testing.T, pkg, file string) string {
	dir := os.Getenv("MPATHD_PEERS")
	if dir == "" {
		cache, err := os.UserCacheDir()
		require.NoError(t, err)
		dir = filepath.Join(cache, "mpathd-peers")
	}
	name := filepath.Join(dir, pkg, file)
	if _, err := os.Stat(name); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s: run internal/deps/install.sh", name)
		}
		t.Skipf("%s: run internal/deps/install.sh", name)
	}
	return name
}

// network is a network namespace of our own: abstract sockets belong to one.
func network(t *testing.T) (in func(name string, args ...string) *exec.Cmd) {
	if os.Geteuid() != 0 {
		t.Skip("a network namespace needs root")
	}
	holder := exec.Command("unshare", "-n", "sh", "-c", "ip link set lo up && echo ready && exec sleep 300")
	out, err := holder.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, holder.Start())
	t.Cleanup(func() { holder.Process.Kill(); holder.Wait() })
	b := make([]byte, 6)
	_, err = out.Read(b)
	require.NoError(t, err)
	return func(name string, args ...string) *exec.Cmd {
		return exec.Command("nsenter", append([]string{"-t", fmt.Sprint(holder.Process.Pid), "-n", name}, args...)...)
	}
}

// TestClientsOfMultipathd lets multipathd and multipathc of Debian command
// mpathd through their own socket, and compares what they print with what
// mpathd's own entry points print.
func TestClientsOfMultipathd(t *testing.T) {
	t.Parallel()
	multipathd, multipathc := peer(t, "multipath-tools", "sbin/multipathd"), peer(t, "multipath-tools", "sbin/multipathc")
	libs := filepath.Join(filepath.Dir(filepath.Dir(multipathd)), "lib")
	in, dir := network(t), t.TempDir()
	const iqn = "iqn.2026-01.io.mpathd:ram"
	tg := in(binary, "target", "-size", "64M", "-portal", "127.0.0.1:3260,127.0.0.2:3260")
	require.NoError(t, tg.Start())
	t.Cleanup(func() { tg.Process.Kill(); tg.Wait() })
	control := filepath.Join(dir, "c")
	d := in(binary, "run", "--attach", "none", "--nbd", "unix:"+dir+"/n", "--control", control, "--initiator", "iqn.2026-11.example:i", "--alias", "xensan", "--polling-interval", "1h",
		"--multipathd-socket", "@/org/kernel/linux/storage/multipathd", "iscsi://127.0.0.1/"+iqn+"/0", "iscsi://127.0.0.2/"+iqn+"/0")
	d.Stderr = os.Stderr
	require.NoError(t, d.Start())
	t.Cleanup(func() { d.Process.Signal(syscall.SIGTERM); d.Wait() })
	s := &stack{t: t, control: control}
	s.await("both paths up", func(m daemon.Maps) bool { return len(m.Maps) == 1 && m.Maps[0].Paths.Usable == 2 })

	theirs := func(name string, stdin string, args ...string) (string, int) {
		c := in(name, args...)
		c.Env = append(os.Environ(), "LD_LIBRARY_PATH="+libs)
		c.Stdin = strings.NewReader(stdin)
		out, _ := c.CombinedOutput()
		return string(out), c.ProcessState.ExitCode()
	}
	ours := func(args ...string) (string, int) {
		link := filepath.Join(dir, "multipathd")
		os.Symlink(binary, link)
		c := exec.Command(link, args...)
		c.Env = append(os.Environ(), "MPATHD_CONTROL="+control)
		out, _ := c.CombinedOutput()
		return string(out), c.ProcessState.ExitCode()
	}
	for _, cmd := range []string{"show paths", "show maps", "list multipaths", "show maps status", "show maps stats", "show topology", "list maps topo", "show map xensan topology", "show status", "show daemon",
		"show maps json", "show map xensan json", "show wildcards", "show blacklist", "show devices", "li ma", "bogus", "show path 127.0.0.1:3260/0", "show config"} {
		want, rcWant := ours(strings.Fields(cmd)...)
		got, rc := theirs(multipathd, "", strings.Fields(cmd)...)
		level := func(s string) string {
			return regexp.MustCompile(`[X.]{10} \d+/\d+ *|: not found|^.*\n\n?: not`).ReplaceAllString(s, "")
		}
		require.Equal(t, strings.Fields(level(want)), strings.Fields(level(got)), cmd)
		require.Equal(t, rcWant, rc, cmd)
	}
	got, rc := theirs(multipathd, "", "show", "paths", "raw", "format", "%d %t %m")
	require.Equal(t, "127.0.0.1:3260/0 active xensan\n127.0.0.2:3260/0 active xensan\n", got)
	require.Zero(t, rc)
	// As scripts that are about call it.
	for cmd, want := range map[string]string{
		"show topo": s.maps().Maps[0].WWID, "show multipaths status": "active", `show maps raw format "%n_%d_"`: "xensan_-_\n", `show paths format "%t %T"`: "active ready",
		`show maps raw format "%n|%w|%d|%N|%t"`: "|-|2|active\n", `show paths raw format "%m|%d|%t|%o"`: "xensan|127.0.0.1:3260/0|active|running\n", `show paths format "%d %t %i %p %P"`: "scsi:iscsi",
	} {
		got, rc := theirs(multipathd, "", "-k"+cmd)
		require.Contains(t, got, want, cmd)
		require.Zero(t, rc, cmd)
		got, rc = ours("-k" + cmd)
		require.Contains(t, got, want, cmd)
		require.Zero(t, rc, cmd)
	}
	got, _ = theirs(multipathd, "", "-kshow maps raw format %N")
	require.Equal(t, "2\n", got)
	got, _ = theirs(multipathc, "show maps raw format \"%n %S\"\nquit\n")
	require.Contains(t, got, "xensan 64M\n")

	ok := func(cmd string) {
		t.Helper()
		got, rc := theirs(multipathd, "", strings.Fields(cmd)...)
		require.Equal(t, "ok\n", got, cmd)
		require.Zero(t, rc, cmd)
	}
	ok("fail path 127.0.0.1:3260/0")
	got, _ = theirs(multipathd, "", "show", "paths", "raw", "format", "%t")
	require.Equal(t, "failed\nactive\n", got)
	got, rc = theirs("python3", "", "testdata/dmmp.py", libs)
	require.Zero(t, rc, got)
	require.Equal(t, "map xensan "+s.maps().Maps[0].WWID+" -\ngroup 1 0 disabled\npath 127.0.0.1:3260/0 faulty\ngroup 2 1 active\npath 127.0.0.2:3260/0 ready\n", got)
	ok("reinstate path 127.0.0.1:3260/0")
	s.await("both paths up again", func(m daemon.Maps) bool { return m.Maps[0].Paths.Usable == 2 })
	ok("switchgroup map xensan group 2")
	require.Equal(t, "active", s.maps().Maps[0].Groups[1].State)
	ok("disablequeueing map xensan")
	require.False(t, s.maps().Maps[0].Queueing)
	ok("restorequeueing maps")
	require.True(t, s.maps().Maps[0].Queueing)
	ok("resize map xensan")
	for _, cmd := range []string{"fail path nosuch", "switch map xensan group 7", "resize map nosuch", "reconfigure"} {
		got, rc := theirs(multipathd, "", strings.Fields(cmd)...)
		require.Equal(t, "fail\n", got, cmd)
		require.Equal(t, 1, rc, cmd)
		got, rc = ours(strings.Fields(cmd)...)
		require.Equal(t, 1, rc, cmd)
		require.Greater(t, len(got), len("fail\n")+5, "says why")
	}

	// multipath itself.
	link := filepath.Join(dir, "multipath")
	require.NoError(t, os.Symlink(binary, link))
	c := exec.Command(link, "-ll")
	c.Env = append(os.Environ(), "MPATHD_CONTROL="+control)
	out, err := c.Output()
	require.NoError(t, err)
	topology, _ := theirs(multipathd, "", "show", "topology")
	require.Equal(t, topology, string(out))
	require.False(t, bytes.Contains(out, []byte("\x1b")), "no colours in a pipe")
	for _, x := range []struct {
		args, says string
		code       int
	}{
		{"-v1 -ll", "xensan\n", 0}, {"-ll xensan", topology, 0}, {"-v4 -ll", topology, 0}, {"-ll nosuch", "", 1}, {"-c 127.0.0.1:3260/0", "DM_MULTIPATH_DEVICE_PATH=\"1\"\n", 0},
		{"-u sdz", "DM_MULTIPATH_DEVICE_PATH=\"0\"\n", 1}, {"-C xensan", "", 0}, {"-C nosuch", "", 1}, {"-v0", "", 0}, {"-F", "", 1},
	} {
		c := exec.Command(link, strings.Fields(x.args)...)
		c.Env = append(os.Environ(), "MPATHD_CONTROL="+control)
		out, _ := c.Output()
		require.Equal(t, x.says, string(out), x.args)
		require.Equal(t, x.code, c.ProcessState.ExitCode(), x.args)
	}
}
