package attach

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestRefusalsNameTheReason(t *testing.T) {
	root := t.TempDir()
	put := func(at, text string) {
		at = filepath.Join(root, at)
		require.NoError(t, os.MkdirAll(filepath.Dir(at), 0o755))
		require.NoError(t, os.WriteFile(at, []byte(text), 0o644))
	}
	put("proc/sys/kernel/osrelease", "5.10.0-33-amd64\n")
	require.ErrorContains(t, tooOld(root, 0, "mpathd:3600"), "too old (5.10.0-33-amd64)")
	put("sys/block/nbd0/backend", "mpathd:3600\n")
	require.NoError(t, tooOld(root, 0, "mpathd:3600"))
	require.True(t, (&Device{index: 0, backend: "mpathd:3600"}).ours(root))
	require.False(t, (&Device{index: 0, backend: "mpathd:3601"}).ours(root), "another disk's by now")
	require.False(t, (&Device{index: 1, backend: "mpathd:3600"}).ours(root), "taken away by hand, and somebody else's by now")

	require.Empty(t, holder(root, 1))
	put("sys/block/nbd1/pid", "812\n")
	require.Equal(t, " by something that does not run any more", holder(root, 1))
	put("proc/812/comm", "nbd-client\n")
	require.Equal(t, " by process 812 (nbd-client)", holder(root, 1))
	require.Equal(t, " as the backend mpathd:3600", holder(root, 0))

	_, err := Connect(Options{Device: "/dev/sda"})
	require.ErrorContains(t, err, "want /dev/nbdX")

	put("sys/block/nbd2/size", "0\n")
	for device, want := range map[string]string{
		"/dev/nbd1": "/dev/nbd1 is not attached by mpathd but by process 812 (nbd-client): end that, or `nbd-client -d /dev/nbd1`", "/dev/nbd2": "/dev/nbd2 is free",
		"/dev/nbd3": "there is no such device", "/dev/nbd": "want /dev/nbdX", "/dev/nbd0p1": "want /dev/nbdX",
	} {
		_, err := open(root, device)
		require.ErrorContains(t, err, want)
	}
	d, err := open(root, "/dev/nbd0")
	require.NoError(t, err)
	require.Equal(t, "3600", d.WWID())
}

func TestADeviceHasOneName(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "mpath")
	_, err := linkIn(dir, "old", "/dev/nbd0")
	require.NoError(t, err)
	_, err = linkIn(dir, "neighbour", "/dev/nbd1")
	require.NoError(t, err)
	remove, err := linkIn(dir, "new", "/dev/nbd0") // the run before died, and the alias changed
	require.NoError(t, err)
	names := func() (out []string) {
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		for _, e := range entries {
			to, _ := os.Readlink(filepath.Join(dir, e.Name()))
			out = append(out, e.Name()+" "+to)
		}
		return out
	}
	require.Equal(t, []string{"neighbour /dev/nbd1", "new /dev/nbd0"}, names())

	_, err = linkIn(dir, "new", "/dev/nbd2") // somebody else's by now
	require.NoError(t, err)
	remove()
	require.Equal(t, []string{"neighbour /dev/nbd1", "new /dev/nbd2"}, names())
	_, err = linkIn(dir, "../x", "/dev/nbd0")
	require.ErrorContains(t, err, "not a file name")
}

// A device that belongs to another map is not free, even before that one has it.
func TestOthersDevicesAreNotTakenForFree(t *testing.T) {
	inUse := map[int]bool{1: true}
	var asked []int
	connect := func(index int) (*Device, error) {
		asked = append(asked, index)
		if inUse[index] {
			return nil, fmt.Errorf("attach: %w", errInUse)
		}
		return &Device{index: index}, nil
	}
	d, err := choose(-1, []string{"/dev/nbd0", "/dev/nbd3"}, connect)
	require.NoError(t, err)
	require.Equal(t, "/dev/nbd2", d.Path())
	require.Equal(t, []int{1, 2}, asked)
	_, err = choose(1, []string{"/dev/nbd0"}, connect)
	require.ErrorIs(t, err, errInUse, "one that was asked for is not replaced by another")
	d, err = choose(0, []string{"/dev/nbd0"}, connect)
	require.NoError(t, err)
	require.Equal(t, "/dev/nbd0", d.Path(), "its own")
	d, err = choose(-1, nil, connect)
	require.NoError(t, err)
	require.Equal(t, -1, d.index, "the kernel chooses")
}
