package daemon

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/paths"
)

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}
func (s *safeBuffer) String() string { s.mu.Lock(); defer s.mu.Unlock(); return s.b.String() }

func TestFenceCommandKnowsWhatToFenceAndItsOutputIsLogged(t *testing.T) {
	var log safeBuffer
	f := FenceCommand(slog.New(slog.NewTextHandler(&log, nil)), `echo "$MPATHD_MAP $MPATHD_WWID $MPATHD_PATH $MPATHD_TARGET $MPATHD_PORTAL"; echo trouble >&2; exit $((MPATHD_PATH == 7))`)
	r := paths.FenceRequest{Map: "m", WWID: "36", Path: "5", Target: "iqn.t", Portal: "10.0.0.1:3260"}
	require.NoError(t, f(context.Background(), r))
	require.Contains(t, log.String(), `text="m 36 5 iqn.t 10.0.0.1:3260"`)
	require.Contains(t, log.String(), "text=trouble")
	r.Path = "7"
	require.ErrorContains(t, f(context.Background(), r), "exit status 1")
}

func TestFenceCommandThatHangsIsKilledWithItsChildren(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	f := FenceCommand(slog.New(slog.DiscardHandler), "sleep 1000 & echo $! >"+pids+"; sleep 1000")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			if b, _ := os.ReadFile(pids); len(b) > 1 {
				break
			}
		}
		cancel()
	}()
	require.Error(t, f(ctx, paths.FenceRequest{}))
	b, err := os.ReadFile(pids)
	require.NoError(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		return syscall.Kill(pid, 0) != nil || err != nil || strings.Contains(string(stat), ") Z")
	}, 10*time.Second, 10*time.Millisecond, "a child of the command lives on")
	ctx, stop := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer stop()
	require.ErrorContains(t, FenceCommand(slog.New(slog.DiscardHandler), "sleep 1000")(ctx, paths.FenceRequest{}), "hung for")
}

func TestFenceCommandOutputIsBounded(t *testing.T) {
	var log safeBuffer
	f := FenceCommand(slog.New(slog.NewTextHandler(&log, nil)), "head -c 100000 /dev/zero | tr '\\0' x")
	require.NoError(t, f(context.Background(), paths.FenceRequest{}))
	require.Less(t, len(log.String()), 3*fenceOutput)
}
