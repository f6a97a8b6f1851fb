package attach

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestADeviceHasOneServer(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "mpathd")
	a, err := lock(dir, 3, 0)
	require.NoError(t, err)
	_, err = lock(dir, 3, 20*time.Millisecond)
	require.ErrorIs(t, err, errServed)
	require.ErrorContains(t, err, fmt.Sprintf("process %d serves it", os.Getpid()))
	other, err := lock(dir, 4, 0)
	require.NoError(t, err)
	other.release()

	// One that is about to end is waited for.
	time.AfterFunc(50*time.Millisecond, a.release)
	b, err := lock(dir, 3, 10*time.Second)
	require.NoError(t, err)
	b.release()
	b.release()
	(*deviceLock)(nil).release()

	require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	_, err = lock(filepath.Join(dir, "file"), 3, 0)
	require.Error(t, err)
	require.NotErrorIs(t, err, errServed)
}

// A process that was killed, and is still there, serves nothing.
func TestAKilledServerIsNoServer(t *testing.T) {
	dir := t.TempDir()
	held, err := lock(dir, 3, 0)
	require.NoError(t, err)
	defer held.release()
	server := exec.Command("sleep", "100")
	require.NoError(t, server.Start())
	require.NoError(t, os.WriteFile(filepath.Join(dir, "nbd3.lock"), fmt.Appendln(nil, server.Process.Pid), 0o600))
	_, err = lock(dir, 3, 0)
	require.ErrorIs(t, err, errServed)

	require.NoError(t, server.Process.Kill())
	require.Eventually(t, func() bool { _, err = lock(dir, 3, 0); return !errors.Is(err, errServed) }, 10*time.Second, time.Millisecond)
	require.ErrorContains(t, err, "was killed")
	require.Error(t, server.Wait())
	for _, pid := range []string{"", "none", "-1", "0", "4294967296", "1"} {
		require.False(t, ending(pid), pid)
	}
}
