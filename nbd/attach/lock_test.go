package attach

import (
	"fmt"
	"os"
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
	other.Release()
	a.Release()
	b, err := lock(dir, 3, 0)
	require.NoError(t, err)
	b.Release()

	require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	_, err = lock(filepath.Join(dir, "file"), 3, 0)
	require.Error(t, err)
	require.NotErrorIs(t, err, errServed)
}

// Who served a device that was taken away by hand has no say over the next one of
// its number.
func TestANewDeviceHasALockOfItsOwn(t *testing.T) {
	dir := t.TempDir()
	gone, err := lockNew(dir, 3)
	require.NoError(t, err)
	a, err := lockNew(dir, 3)
	require.NoError(t, err)
	gone.Release()
	_, err = lock(dir, 3, 0)
	require.ErrorIs(t, err, errServed)
	a.Release()
	b, err := lock(dir, 3, 0)
	require.NoError(t, err)
	b.Release()
}
