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
	"syscall"
	"time"

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
	if a, _, err := b.find(ids, reserved); a != "" || err != nil {
		return a, err
	}
	unlock, err := b.lock()
	if err != nil {
		return "", fmt.Errorf("bindings %s: %w", b.File, err)
	}
	defer unlock()
	a, taken, err := b.find(ids, reserved) // another process may have been first
	if a != "" || err != nil {
		return a, err
	}
	for n := 0; ; n++ {
		a := prefix + letters(n)
		if taken[a] {
			continue
		}
		old, err := os.ReadFile(b.File)
		if errors.Is(err, fs.ErrNotExist) {
			old, err = []byte("# alias WWID, one line per disk; names stay as long as their line does\n"), nil
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

// find is the name that a unit has, or "" with the names that are taken.
func (b *Bindings) find(ids, reserved []string) (string, map[string]bool, error) {
	byID, taken := map[string]string{}, map[string]bool{}
	for _, r := range reserved {
		taken[r] = true
	}
	for _, f := range []string{b.File, b.Inherited} {
		if err := read(f, byID, taken); err != nil {
			return "", nil, err
		}
	}
	for _, id := range ids {
		if a, ok := byID[id]; ok && !slices.Contains(reserved, a) {
			return a, nil, nil
		}
	}
	return "", taken, nil
}

const bindingsWait = 5 * time.Second

// lock keeps other processes from allocating names. The lock is the kernel's:
// it ends with its holder.
func (b *Bindings) lock() (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(b.File), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(b.File+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(bindingsWait); ; time.Sleep(10 * time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) || time.Now().After(end) {
			f.Close()
			return nil, fmt.Errorf("locked by another process: %w", err)
		}
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
