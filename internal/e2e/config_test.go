package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/nbd/client"
)

// TestReferenceSetup runs a multipath.conf of 2009 as it stands, with the
// initiator section added, through a failover and back.
func TestReferenceSetup(t *testing.T) {
	t.Parallel()
	var id [16]byte
	copy(id[:], "149455403f160c00")
	lu, err := target.NewLU(16<<20, 512, target.IETIdentity(id))
	require.NoError(t, err)
	b, err := os.ReadFile("../../docs/examples/reference.conf")
	require.NoError(t, err)
	text := string(b)
	var portals []*target.Portal
	for i, was := range []string{"192.168.1.250:3260", "192.168.1.252:3260"} {
		srv, err := target.New(target.Config{Targets: []*target.Target{{Name: fmt.Sprintf("iqn.2009-01.nl.pref:storage.xensan%d", i+1), LUs: []*target.LU{lu}}}})
		require.NoError(t, err)
		t.Cleanup(srv.Kill)
		p, err := srv.Listen("127.0.0.1:0")
		require.NoError(t, err)
		portals = append(portals, p)
		text = strings.ReplaceAll(text, was, p.Addr())
	}
	dir := t.TempDir()
	file, control, sock := filepath.Join(dir, "multipath.conf"), filepath.Join(dir, "c"), filepath.Join(dir, "n")
	text = strings.ReplaceAll(text, "unix:/run/mpathd/nbd.sock", "unix:"+sock)
	text = strings.ReplaceAll(text, "attach auto", "attach none")
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	var log bytes.Buffer
	cmd := exec.Command(binary, "run", "--config", file, "--control", control)
	cmd.Stderr = &log
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		require.NoError(t, cmd.Wait())
		if t.Failed() {
			t.Logf("mpathd says:\n%s", log.String())
		}
	})
	s := &stack{t: t, control: control}
	up := func(n int, serving int) func(m daemon.Maps) bool {
		return func(m daemon.Maps) bool {
			return len(m.Maps) == 1 && m.Maps[0].Paths.Usable == n && m.Maps[0].Groups[serving].Paths[0].Serving
		}
	}
	s.await("both paths up", up(2, 0))
	m := s.maps().Maps[0]
	require.Equal(t, "xensan", m.Alias)
	require.Equal(t, "1494554000000000031343934353534303366313630633030", m.WWID)
	require.Equal(t, "readsector0", m.Groups[0].Paths[0].Checker)
	require.Equal(t, "round-robin 0", m.Groups[0].Selector)
	require.True(t, m.Queueing)
	c, err := client.Dial("unix", sock, "xensan")
	require.NoError(t, err)
	defer c.Close()
	_, err = c.WriteAt(fill(4096, 'a'), 0)
	require.NoError(t, err)
	portals[0].Stop()
	portals[0].Drop()
	_, err = c.WriteAt(fill(4096, 'b'), 4096)
	require.NoError(t, err)
	s.await("second path serves", up(1, 1))
	require.NoError(t, portals[0].Start())
	s.await("first path serves again", up(2, 0))
	got := make([]byte, 8192)
	_, err = c.ReadAt(got, 0)
	require.NoError(t, err)
	require.Equal(t, append(fill(4096, 'a'), fill(4096, 'b')...), got)
	out, err := exec.Command(binary, "show", "config", "--control", control).Output()
	require.NoError(t, err)
	require.Contains(t, string(out), `alias "xensan"`)
}

func TestCheckCommand(t *testing.T) {
	out, err := exec.Command(binary, "check", "../../docs/examples/reference.conf", "--json").Output()
	require.NoError(t, err)
	var r struct {
		Version  int
		Errors   []struct{ Line int }
		Warnings []struct {
			File, Text string
			Line       int
		}
		Config struct {
			Defaults   map[string]string
			Multipaths []map[string]string
		}
	}
	require.NoError(t, json.Unmarshal(out, &r))
	require.Equal(t, 1, r.Version)
	require.Empty(t, r.Errors)
	require.Len(t, r.Warnings, 2)
	require.Equal(t, "xensan", r.Config.Multipaths[0]["alias"])
	require.Equal(t, "5", r.Config.Defaults["polling_interval"])
	bad := filepath.Join(t.TempDir(), "bad.conf")
	require.NoError(t, os.WriteFile(bad, []byte("defaults\n{\n}\n"), 0o600))
	cmd := exec.Command(binary, "check", bad)
	text, _ := cmd.CombinedOutput()
	require.Equal(t, 1, cmd.ProcessState.ExitCode())
	require.Contains(t, string(text), bad+":1: error: `{` is missing behind defaults")
	// What check prints reads back as the same.
	printed, err := exec.Command(binary, "check", "../../docs/examples/reference.conf").Output()
	require.NoError(t, err)
	again := filepath.Join(t.TempDir(), "again.conf")
	require.NoError(t, os.WriteFile(again, printed, 0o600))
	twice, err := exec.Command(binary, "check", again).Output()
	require.NoError(t, err)
	require.Equal(t, string(printed), string(twice))
}

func TestSecretFilesMustBePrivate(t *testing.T) {
	dir := t.TempDir()
	secret, conf := filepath.Join(dir, "secret"), filepath.Join(dir, "c.conf")
	require.NoError(t, os.WriteFile(secret, []byte("topsecretword\n"), 0o644))
	require.NoError(t, os.WriteFile(conf, []byte("initiator {\n chap_user u\n chap_secret_file "+secret+"\n target iscsi://127.0.0.1:1/iqn.a:b/0\n}\n"), 0o600))
	cmd := exec.Command(binary, "run", "--config", conf, "--control", filepath.Join(dir, "c"), "--nbd", "unix:"+filepath.Join(dir, "n"))
	done := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
	defer done.Stop()
	out, _ := cmd.CombinedOutput()
	require.Equal(t, 1, cmd.ProcessState.ExitCode())
	require.Contains(t, string(out), "lets others at it: chmod 600")
	require.NotContains(t, string(out), "topsecretword")
}
