package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/mpathd/mpathd/internal/sys"
)

// Bindings give user-friendly names (mpatha, mpathb, ...) that stay. They are
// kept in File, in the format of multipath-tools; names that Inherited (theirs)
// gives are taken over.
type Bindings struct {
	File, Inherited string
	mu              sync.Mutex
}

const maxBindings = 1 << 20 // bytes of a bindings file

// read gives WWID -> alias and the set of aliases in use.
func read(path string, byID map[string]string, taken map[string]bool) error {
	if path == "" {
		return nil
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && len(b) > maxBindings {
		err = fmt.Errorf("larger than %d bytes", maxBindings)
	}
	if err != nil {
		return fmt.Errorf("bindings %s: %w", path, err)
	}
	for line := range strings.Lines(string(b)) {
		line, _, _ = strings.Cut(line, "#")
		if f := strings.Fields(line); len(f) == 2 && !strings.Contains(f[0], "/") {
			if _, have := byID[f[1]]; !have && !taken[f[0]] {
				byID[f[1]] = f[0]
			}
			taken[f[0]] = true
		}
	}
	return nil
}

// Alias is the name of a unit, allocated and kept at first sight. reserved are
// names that the configuration gives to others.
func (b *Bindings) Alias(prefix string, ids, reserved []string) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	byID, taken := map[string]string{}, map[string]bool{}
	for _, r := range reserved {
		taken[r] = true
	}
	for _, f := range []string{b.File, b.Inherited} {
		if err := read(f, byID, taken); err != nil {
			return "", err
		}
	}
	for _, id := range ids {
		if a, ok := byID[id]; ok && !slices.Contains(reserved, a) {
			return a, nil
		}
	}
	for n := 0; ; n++ {
		a := prefix + letters(n)
		if taken[a] {
			continue
		}
		old, err := os.ReadFile(b.File)
		if errors.Is(err, fs.ErrNotExist) {
			old, err = []byte("# alias WWID, one line per disk; names stay as long as their line does\n"), os.MkdirAll(filepath.Dir(b.File), 0o755)
		}
		if err == nil {
			if len(old) > 0 && old[len(old)-1] != '\n' {
				old = append(old, '\n')
			}
			err = sys.ReplaceFile(b.File, fmt.Appendf(old, "%s %s\n", a, ids[0]), 0o644)
		}
		if err != nil {
			return "", fmt.Errorf("bindings %s: %w", b.File, err)
		}
		return a, nil
	}
}

// letters counts a, b, ..., z, aa, ab, ...
func letters(n int) string {
	s := ""
	for n++; n > 0; n = (n - 1) / 26 {
		s = string(rune('a'+(n-1)%26)) + s
	}
	return s
}
