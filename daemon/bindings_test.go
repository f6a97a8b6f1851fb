package daemon

import (
	"os"
	"path/filepath"
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
