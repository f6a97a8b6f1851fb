package compat

import (
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// fakeDaemon notes what it is asked to do.
type fakeDaemon struct {
	view View
	err  error
	did  []string
}

func (d *fakeDaemon) note(format string, a ...any) error {
	d.did = append(d.did, fmt.Sprintf(format, a...))
	return d.err
}

func (d *fakeDaemon) View() View                        { return d.view }
func (d *fakeDaemon) Config(bool) string                { return "defaults {\n}\n" }
func (d *fakeDaemon) Blacklist() string                 { return NoBlacklist }
func (d *fakeDaemon) FailPath(n string) error           { return d.note("fail %s", n) }
func (d *fakeDaemon) ReinstatePath(n string) error      { return d.note("reinstate %s", n) }
func (d *fakeDaemon) SwitchGroup(n string, g int) error { return d.note("switch %s %d", n, g) }
func (d *fakeDaemon) StopQueueing(n string) error       { return d.note("stop %s", n) }
func (d *fakeDaemon) RestoreQueueing(n string) error    { return d.note("restore %s", n) }
func (d *fakeDaemon) Resize(n string) error             { return d.note("resize %s", n) }
func (d *fakeDaemon) Reconfigure() error                { return d.note("reconfigure") }
func (d *fakeDaemon) Shutdown() error                   { return d.note("shutdown") }
func serve(t *testing.T, run func(string) string) (addr string) {
	t.Helper()
	addr = filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", addr)
	require.NoError(t, err)
	s := &Server{Run: run, Log: slog.New(slog.DiscardHandler)}
	done := make(chan struct{})
	go func() { s.Serve(ln); close(done) }()
	t.Cleanup(func() { ln.Close(); s.Close(); <-done })
	return addr
}

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", addr)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

func message(text string) []byte {
	return append(append(binary.NativeEndian.AppendUint64(nil, uint64(len(text)+1)), text...), 0)
}

func answer(c net.Conn) (string, error) {
	var head [8]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return "", err
	}
	b := make([]byte, binary.NativeEndian.Uint64(head[:]))
	_, err := io.ReadFull(c, b)
	return strings.TrimSuffix(string(b), "\x00"), err
}

func TestManyCommandsOnOneConnection(t *testing.T) {
	c := dial(t, serve(t, func(cmd string) string { return "<" + cmd + ">" }))
	for _, cmd := range []string{"show maps", "fail path a", ""} { // the test is root
		_, err := c.Write(message(cmd))
		require.NoError(t, err)
		got, err := answer(c)
		require.NoError(t, err)
		require.Equal(t, "<"+cmd+">", got)
	}
}

func TestFailureIsAWordOfItsOwn(t *testing.T) {
	c := dial(t, serve(t, func(string) string { return "fail\nbecause\n" }))
	c.Write(message("fail path a"))
	got, err := answer(c)
	require.NoError(t, err)
	require.Equal(t, "fail\n", got)
}

func TestHostileClients(t *testing.T) {
	addr := serve(t, func(cmd string) string { return "ok\n" })
	for name, b := range map[string][]byte{
		"no length": {1, 2, 3}, "nothing": make([]byte, 8), "everything": {255, 255, 255, 255, 255, 255, 255, 255}, "more than a command": binary.NativeEndian.AppendUint64(nil, maxCommand+1),
		"text": []byte("show maps\n"), "less than said": append(binary.NativeEndian.AppendUint64(nil, 100), "show"...),
	} {
		c := dial(t, addr)
		c.Write(b)
		c.(*net.UnixConn).CloseWrite()
		_, err := answer(c)
		require.Error(t, err, name) // closed, not answered
	}
	// Those who hold connections and say nothing take no more than their share,
	// and give it back.
	var idle []net.Conn
	for range maxClients {
		idle = append(idle, dial(t, addr))
	}
	require.Eventually(t, func() bool { // the server has seen them all
		c, err := net.Dial("unix", addr)
		if err != nil {
			return false
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Second))
		c.Write(message("show maps"))
		_, err = answer(c)
		return err != nil
	}, 5*time.Second, 10*time.Millisecond)
	for _, c := range idle {
		c.Close()
	}
	require.Eventually(t, func() bool {
		c, err := net.Dial("unix", addr)
		if err != nil {
			return false
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Second))
		c.Write(message("show maps"))
		got, err := answer(c)
		return err == nil && got == "ok\n"
	}, 5*time.Second, 10*time.Millisecond)
}

func TestAClientThatDoesNotReadHoldsUpNobody(t *testing.T) {
	big := strings.Repeat("x", 8<<20)
	addr := serve(t, func(cmd string) string { return big })
	slow := dial(t, addr)
	slow.Write(message("show maps"))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			c, err := net.Dial("unix", addr)
			if !assert.NoError(t, err) {
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			c.Write(message("show maps"))
			got, err := answer(c)
			assert.NoError(t, err)
			assert.Len(t, got, len(big))
		})
	}
	wg.Wait()
}

// TestOnlyRootChangesAnything asks as another user, in a process of its own.
func TestOnlyRootChangesAnything(t *testing.T) {
	perl, err := exec.LookPath("perl")
	if os.Geteuid() != 0 || err != nil {
		t.Skip("needs root, and perl to be somebody else")
	}
	dir, err := os.MkdirTemp("/tmp", "compat")
	require.NoError(t, err)
	defer os.RemoveAll(dir)
	require.NoError(t, os.Chmod(dir, 0o755))
	ln, err := net.Listen("unix", filepath.Join(dir, "s"))
	require.NoError(t, err)
	require.NoError(t, os.Chmod(filepath.Join(dir, "s"), 0o666))
	var did sync.Map
	s := &Server{Run: func(cmd string) string { did.Store(cmd, true); return "ok\n" }, Log: slog.New(slog.DiscardHandler)}
	go s.Serve(ln)
	defer func() { ln.Close(); s.Close() }()
	for cmd, want := range map[string]string{"show maps": "ok\n", "fail path a": Denied, "shutdown": Denied, "\x01": Denied} {
		c := exec.Command(perl, "-e", `use Socket; socket(S, PF_UNIX, SOCK_STREAM, 0); connect(S, sockaddr_un($ARGV[0])) or die $!;
			$m = pack("Q", 1 + length $ARGV[1]) . $ARGV[1] . "\0"; syswrite(S, $m); sysread(S, $h, 8); sysread(S, $r, unpack("Q", $h)); chop $r; print $r`, filepath.Join(dir, "s"), cmd)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := c.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Equal(t, want, string(out), cmd)
		_, ran := did.Load(cmd)
		require.Equal(t, want == "ok\n", ran, cmd)
	}
}
