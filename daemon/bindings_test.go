package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestBindingsStay(t *testing.T) {
	dir := t.TempDir()
	b := &Bindings{File: filepath.Join(dir, "d", "bindings"), Inherited: filepath.Join(dir, "old")}
	require.NoError(t, os.WriteFile(b.Inherited, []byte("# comment\nmpathb 3600b\nmpatha 3600a # x\n"), 0o600))
	alias := func(want string, ids ...string) {
		t.Helper()
		got, err := b.Alias("mpath", ids, []string{"mpathc"})
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	alias("mpathb", "3600b")
	alias("mpatha", "other-spelling", "3600a")
	alias("mpathd", "3600new") // c is given away by the configuration
	alias("mpathe", "3600newer")
	alias("mpathd", "3600new")
	require.NoError(t, os.Remove(b.Inherited))
	alias("mpathd", "3600new")
	require.Equal(t, []string{"a", "z", "aa", "az", "ba", "zz", "aaa"}, []string{letters(0), letters(25), letters(26), letters(51), letters(52), letters(701), letters(702)})
}

// A file that was cut, holds garbage, or gives one name twice: every unit has
// one name, no two the same, and those that can be read stay.
func TestBindingsSurviveABadFile(t *testing.T) {
	b := &Bindings{File: filepath.Join(t.TempDir(), "bindings")}
	require.NoError(t, os.WriteFile(b.File, []byte("mpatha 3600a\nmpatha 3600twice\nmpathx 3600a\n\x00\xff garbage\n../etc 3600evil\nmpathb 3600b\nmpathc 3600"), 0o600))
	names := map[string]bool{}
	for _, id := range []string{"3600a", "3600twice", "3600evil", "3600b", "3600cut"} {
		a, err := b.Alias("mpath", []string{id}, nil)
		require.NoError(t, err)
		require.False(t, names[a], "%s twice", a)
		require.NotContains(t, a, "/")
		names[a] = true
		again, err := b.Alias("mpath", []string{id}, nil)
		require.NoError(t, err)
		require.Equal(t, a, again)
	}
	require.True(t, names["mpatha"] && names["mpathb"])
	require.False(t, names["mpathc"], "its line may be cut: the name is not given to another")
}

// Where nothing can be written, known units keep their names, and new ones get
// an error, not a name that changes.
func TestBindingsThatCannotBeWritten(t *testing.T) {
	dir := t.TempDir()
	b := &Bindings{File: filepath.Join(dir, "bindings")}
	a, err := b.Alias("mpath", []string{"3600a"}, nil)
	require.NoError(t, err)
	b.Inherited, b.File = b.File, "/proc/nowhere/bindings"
	again, err := b.Alias("mpath", []string{"3600a"}, nil)
	require.NoError(t, err)
	require.Equal(t, a, again)
	_, err = b.Alias("mpath", []string{"3600b"}, nil)
	require.ErrorContains(t, err, "/proc/nowhere/bindings")
	// A file that is none.
	b.File = dir
	_, err = b.Alias("mpath", []string{"3600b"}, nil)
	require.Error(t, err)
}

// Processes that allocate at the same time never give one name twice, and lose
// no line of each other's.
func TestBindingsOfSeveralProcesses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "bindings")
	const each = 20
	got := make([][each]string, 4)
	var wg sync.WaitGroup
	for p := range got {
		wg.Go(func() {
			b := &Bindings{File: file} // as in a process of its own: only the file is shared
			for i := range got[p] {
				a, err := b.Alias("mpath", []string{fmt.Sprintf("3600-%d-%d", p, i)}, nil)
				if err != nil {
					t.Error(err)
				}
				got[p][i] = a
			}
		})
	}
	wg.Wait()
	names := map[string]bool{}
	for p := range got {
		for i, a := range got[p] {
			require.False(t, names[a], "%s twice", a)
			names[a] = true
			again, err := (&Bindings{File: file}).Alias("mpath", []string{fmt.Sprintf("3600-%d-%d", p, i)}, nil)
			require.NoError(t, err)
			require.Equal(t, a, again)
		}
	}
}

// A full disk or one that became read-only costs no name that was given: known
// units keep theirs, new ones get an error and nothing is half written; when
// there is room again they get a name.
func TestBindingsOnAFullOrReadOnlyDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts a file system: needs root")
	}
	dir := t.TempDir()
	mount := func(flags uintptr, options string) {
		require.NoError(t, syscall.Mount("tmpfs", dir, "tmpfs", flags, options))
	}
	mount(0, "size=64k")
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	b := &Bindings{File: filepath.Join(dir, "bindings")}
	known, err := b.Alias("mpath", []string{"3600a"}, nil)
	require.NoError(t, err)
	before, err := os.ReadFile(b.File)
	require.NoError(t, err)

	refused := func(cause error) {
		t.Helper()
		_, err := b.Alias("mpath", []string{"3600b"}, nil)
		require.ErrorIs(t, err, cause)
		require.ErrorContains(t, err, b.File)
		again, err := b.Alias("mpath", []string{"3600a"}, nil)
		require.NoError(t, err)
		require.Equal(t, known, again)
		after, err := os.ReadFile(b.File)
		require.NoError(t, err)
		require.Equal(t, before, after)
		left, err := filepath.Glob(filepath.Join(dir, ".bindings*"))
		require.NoError(t, err)
		require.Empty(t, left, "nothing is left over")
	}
	filler := filepath.Join(dir, "filler")
	require.ErrorIs(t, os.WriteFile(filler, make([]byte, 128<<10), 0o600), syscall.ENOSPC)
	refused(syscall.ENOSPC)
	require.NoError(t, os.Remove(filler))
	mount(syscall.MS_REMOUNT|syscall.MS_RDONLY, "")
	refused(syscall.EROFS)
	mount(syscall.MS_REMOUNT, "")
	other, err := b.Alias("mpath", []string{"3600b"}, nil)
	require.NoError(t, err)
	require.NotEqual(t, known, other)
}
