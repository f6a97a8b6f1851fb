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

func TestDevicesThatNobodyServesAreFound(t *testing.T) {
	root, locks := t.TempDir(), t.TempDir()
	for nbd, backend := range map[string]string{"nbd3": "mpathd:3600\n", "nbd4": "mpathd:3601\n", "nbd5": "other\n"} {
		dir := filepath.Join(root, "sys/block", nbd)
		require.NoError(t, os.MkdirAll(dir, 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "backend"), []byte(backend), 0o644))
	}
	l, err := lock(locks, 3, 0)
	require.NoError(t, err)
	ds := unserved(root, locks)
	require.Len(t, ds, 1)
	require.Equal(t, "/dev/nbd4", ds[0].Path())
	require.Equal(t, "3601", ds[0].WWID())
	require.Equal(t, fmt.Sprint(os.Getpid()), server(locks, 3))
	require.Empty(t, server(locks, 4))
	l.Release()
	require.Len(t, unserved(root, locks), 2)
	require.Empty(t, server(locks, 3))
}
