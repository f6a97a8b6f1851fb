package attach

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestInUseNamesTheHolder(t *testing.T) {
	put := func(root, at, text string) {
		at = filepath.Join(root, at)
		require.NoError(t, os.MkdirAll(filepath.Dir(at), 0o755))
		require.NoError(t, os.WriteFile(at, []byte(text), 0o644))
	}
	fresh := func() string {
		root := t.TempDir()
		put(root, "sys/block/nbd3/dev", "43:48\n")
		put(root, "sys/block/nbd3/nbd3p1/dev", "43:49\n")
		put(root, "sys/block/nbd3/holders/.keep", "")
		require.NoError(t, os.Remove(filepath.Join(root, "sys/block/nbd3/holders/.keep")))
		put(root, "proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
		put(root, "proc/swaps", "Filename Type Size Used Priority\n/dev/nbd33 partition 1 0 -2\n")
		return root
	}
	require.Empty(t, inUse(fresh(), "nbd3"))

	root := fresh()
	put(root, "proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n40 22 43:49 / /srv rw,relatime - ext4 /dev/nbd3p1 rw\n")
	require.Equal(t, "nbd3p1 is mounted on /srv", inUse(root, "nbd3"))

	root = fresh() // in a container alone
	put(root, "proc/812/mountinfo", "40 22 43:48 / /data rw,relatime - ext4 /dev/nbd3 rw\n")
	require.Equal(t, "nbd3 is mounted on /data", inUse(root, "nbd3"))

	root = fresh()
	put(root, "sys/block/nbd3/holders/dm-0", "")
	require.Equal(t, "nbd3 is part of dm-0", inUse(root, "nbd3"))

	root = fresh()
	put(root, "proc/swaps", "/dev/nbd3 partition 1 0 -2\n")
	require.Equal(t, "nbd3 is swapped on", inUse(root, "nbd3"))

	root = fresh()
	put(root, "sys/bus/xen-backend/devices/vbd-4-51712/physical_device", "2b:30\n")
	require.Equal(t, "nbd3 is a guest's disk (vbd-4-51712)", inUse(root, "nbd3"))

	root = fresh()
	put(root, "proc/77/comm", "qemu\n")
	require.NoError(t, os.MkdirAll(filepath.Join(root, "proc/77/fd"), 0o755))
	require.NoError(t, os.Symlink("/dev/nbd3", filepath.Join(root, "proc/77/fd/9")))
	require.Equal(t, "nbd3 is open in process 77 (qemu)", inUse(root, "nbd3"))
}
