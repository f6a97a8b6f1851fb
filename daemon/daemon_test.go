package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/paths"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(runDir); dir != "" {
		if err := runAsProcess(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

const iqn = "iqn.2026-11.example:d"

// patience is for what must happen, however busy the machine is.
const patience = time.Minute

// logText is what the daemon said.
type logText struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// disk is a target with one unit behind n portals.
func disk(t *testing.T, serial string, n int) (*target.Server, []*target.Portal) {
	lu, err := target.NewLU(8<<20, 512, target.DefaultIdentity(serial))
	require.NoError(t, err)
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: iqn, LUs: []*target.LU{lu}}}})
	require.NoError(t, err)
	t.Cleanup(srv.Kill)
	var ps []*target.Portal
	for range n {
		p, err := srv.Listen("127.0.0.1:0")
		require.NoError(t, err)
		ps = append(ps, p)
	}
	return srv, ps
}

func begin(t *testing.T, o Options) (*Daemon, *logText) {
	l := &logText{}
	dir := t.TempDir()
	if o.NBD == "" {
		o.NBD = "unix:" + filepath.Join(dir, "n")
	}
	if o.Control == "" {
		o.Control = filepath.Join(dir, "c")
	}
	o.InitiatorName, o.Logger = "iqn.2026-11.example:i", slog.New(slog.NewTextHandler(l, nil))
	o.Policy.NoPathRetry = paths.Queue
	d, err := Start(o)
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		d.Stop(ctx)
	})
	return d, l
}

func says(t *testing.T, l *logText, parts ...string) {
	t.Helper()
	require.Eventually(t, func() bool {
		for _, line := range strings.Split(l.String(), "\n") {
			all := true
			for _, p := range parts {
				all = all && strings.Contains(line, p)
			}
			if all {
				return true
			}
		}
		return false
	}, patience, 10*time.Millisecond, "no line with %q", parts)
}

// unusedAddress refuses connections: no test listens at this address for long,
// so that nobody is given the port meanwhile.
func unusedAddress(t *testing.T) string {
	ln, err := net.Listen("tcp", "127.0.0.2:0")
	require.NoError(t, err)
	defer ln.Close()
	return ln.Addr().String()
}

func TestComesUpWithThePathsThatAnswerAndKeepsTryingTheOthers(t *testing.T) {
	t.Parallel()
	_, ps := disk(t, "a", 2)
	ps[1].Stop()
	d, l := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}})
	says(t, l, "path not usable yet", ps[1].Addr(), "connection refused")
	require.Eventually(t, func() bool { m := d.Snapshot().Maps; return len(m) == 1 && m[0].Paths.Usable == 1 }, 10*time.Second, 10*time.Millisecond)
	require.NoError(t, ps[1].Start())
	require.Eventually(t, func() bool { m := d.Snapshot().Maps; return m[0].Paths.Usable == 2 }, 20*time.Second, 10*time.Millisecond)
}

func TestEachReasonIsOneLine(t *testing.T) {
	srv, ps := disk(t, "a", 1)
	_, missing := begin(t, Options{URLs: []string{"iscsi://" + ps[0].Addr() + "/" + iqn + "/7"}})
	says(t, missing, "path not usable yet", "LUN 7", "does not exist")
	_, unknown := begin(t, Options{URLs: []string{"iscsi://" + ps[0].Addr() + "/iqn.2026-11.example:other/0"}})
	says(t, unknown, "path not usable yet", "iqn.2026-11.example:other", "does not exist there")
	srv.RejectLogin(2, 1)
	_, refused := begin(t, Options{URLs: []string{ps[0].URL(0)}})
	says(t, refused, "path not usable yet", "authentication failed")
	_, unreachable := begin(t, Options{URLs: []string{"iscsi://" + unusedAddress(t) + "/" + iqn + "/0"}})
	says(t, unreachable, "path not usable yet", "connection refused")
}

func TestTwoDisksWithOneIDAreNotMerged(t *testing.T) {
	_, a := disk(t, "same", 1)
	lu, err := target.NewLU(16<<20, 512, target.DefaultIdentity("same"))
	require.NoError(t, err)
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: iqn + "2", LUs: []*target.LU{lu}}}})
	require.NoError(t, err)
	t.Cleanup(srv.Kill)
	b, err := srv.Listen("127.0.0.1:0")
	require.NoError(t, err)
	d, l := begin(t, Options{URLs: []string{a[0].URL(0)}})
	require.Eventually(t, func() bool { return len(d.Snapshot().Maps) == 1 }, 10*time.Second, 10*time.Millisecond)
	d.Stop(context.Background())
	d, l = begin(t, Options{URLs: []string{a[0].URL(0), b.URL(0)}})
	says(t, l, "two disks must not share an ID")
	require.Len(t, d.Snapshot().Maps, 1)
	require.Equal(t, 1, d.Snapshot().Maps[0].Paths.Total)
}

func TestSocketsBelongToTheirOwnerAndAreNotTakenFromARunningDaemon(t *testing.T) {
	_, ps := disk(t, "a", 1)
	dir := t.TempDir()
	n, c := filepath.Join(dir, "run", "n"), filepath.Join(dir, "run", "c")
	begin(t, Options{URLs: []string{ps[0].URL(0)}, NBD: "unix:" + n, Control: c})
	for _, p := range []string{n, c} {
		st, err := os.Stat(p)
		require.NoError(t, err)
		require.Equal(t, fs.FileMode(0o600), st.Mode().Perm(), p)
	}
	st, err := os.Stat(filepath.Dir(n))
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o700), st.Mode().Perm())
	_, err = Start(Options{URLs: []string{ps[0].URL(0)}, NBD: "unix:" + n, Control: c + "2"})
	require.ErrorContains(t, err, "NBD socket")
	require.ErrorContains(t, err, "in use by a running daemon")
	_, err = Start(Options{URLs: []string{ps[0].URL(0)}, NBD: "unix:" + n + "2", Control: c})
	require.ErrorContains(t, err, "control socket")
	_, err = os.Stat(n + "2")
	require.True(t, errors.Is(err, fs.ErrNotExist), "a failed start leaves its socket behind")
}

func TestSocketOfADeadDaemonIsReplaced(t *testing.T) {
	_, ps := disk(t, "a", 1)
	dir := t.TempDir()
	n := filepath.Join(dir, "n")
	ln, err := net.Listen("unix", n)
	require.NoError(t, err)
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	ln.Close()
	begin(t, Options{URLs: []string{ps[0].URL(0)}, NBD: "unix:" + n})
}

func TestSecretsAppearInNoLogAndNoStatus(t *testing.T) {
	srv, ps := disk(t, "a", 1)
	srv.RejectLogin(2, 1)
	d, l := begin(t, Options{URLs: []string{"iscsi://user%25topsecretword@" + ps[0].Addr() + "/" + iqn + "/0", "iscsi://user%topsecretword@" + ps[0].Addr() + "/" + iqn + "/0"}})
	says(t, l, "path not usable yet")
	time.Sleep(100 * time.Millisecond)
	require.NotContains(t, l.String(), "topsecretword")
	st := d.Snapshot()
	for _, p := range st.Pending {
		require.NotContains(t, p.URL+p.Cause, "topsecretword")
	}
}
