package sys

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

func TestALockHasOneHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	a, err := LockFile(path, 0)
	require.NoError(t, err)
	_, err = LockFile(path, 20*time.Millisecond)
	require.Equal(t, &HeldError{fmt.Sprint(os.Getpid())}, err)

	// One that is about to end is waited for.
	time.AfterFunc(50*time.Millisecond, a.Release)
	b, err := LockFile(path, 10*time.Second)
	require.NoError(t, err)
	b.Release()
	b.Release()
	(*Lock)(nil).Release()

	_, err = LockFile(filepath.Join(path, "of a file"), 0)
	require.Error(t, err)
}

// A process that was killed, and is still there, has nothing.
func TestAKilledHolderIsNoHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	held, err := LockFile(path, 0)
	require.NoError(t, err)
	defer held.Release()
	holder := exec.Command("sleep", "100")
	require.NoError(t, holder.Start())
	require.NoError(t, os.WriteFile(path, fmt.Appendln(nil, holder.Process.Pid), 0o600))
	_, err = LockFile(path, 0)
	var by *HeldError
	require.ErrorAs(t, err, &by)

	require.NoError(t, holder.Process.Kill())
	require.Eventually(t, func() bool { _, err = LockFile(path, 0); return !errors.As(err, &by) }, 10*time.Second, time.Millisecond)
	require.ErrorContains(t, err, "was killed")
	require.Error(t, holder.Wait())
	for _, pid := range []string{"", "none", "-1", "0", "4294967296", "1"} {
		require.False(t, ending(pid), pid)
	}
}
