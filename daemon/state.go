package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/mpathd/mpathd/internal/sys"
)

// riskFile remembers which paths may have writes under way, so that the run
// after a crash ends their sessions before it writes anything. It changes when
// a path begins or ceases to serve, never for an I/O; a clean stop leaves it
// empty.
type riskFile struct {
	path string
	mu   sync.Mutex
	data riskData
}

type riskData struct {
	Version int                            `json:"version"`
	Maps    map[string]map[string]riskPath `json:"maps"` // WWID, path name
}

type riskPath struct {
	URL     string   `json:"url"` // without secrets
	Portals []string `json:"portals,omitempty"`
}

// openRiskFile reads what the run before left. A file that cannot be read is
// an error: guessing that nothing is at risk could cost data.
func openRiskFile(path string) (*riskFile, error) {
	r := &riskFile{path: path, data: riskData{Version: 1, Maps: map[string]map[string]riskPath{}}}
	if path == "" {
		return r, nil
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &r.data)
	}
	if err == nil && r.data.Version != 1 {
		err = fmt.Errorf("version %d", r.data.Version)
	}
	if err != nil {
		return nil, fmt.Errorf("state file %s: %w: if no earlier run can have writes under way, remove it", path, err)
	}
	if r.data.Maps == nil {
		r.data.Maps = map[string]map[string]riskPath{}
	}
	return r, nil
}

// of are the paths of a map that are at risk.
func (r *riskFile) of(wwid string) map[string]riskPath {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[string]riskPath{}
	for k, v := range r.data.Maps[wwid] {
		out[k] = v
	}
	return out
}

// set changes one path and makes the file durable.
func (r *riskFile) set(wwid, name string, risk bool, p riskPath) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.data.Maps[wwid]
	if _, have := m[name]; !risk && !have {
		return nil
	}
	if risk {
		if m == nil {
			m = map[string]riskPath{}
			r.data.Maps[wwid] = m
		}
		m[name] = p
	} else if delete(m, name); len(m) == 0 {
		delete(r.data.Maps, wwid)
	}
	if r.path == "" {
		return nil
	}
	b, err := json.MarshalIndent(&r.data, "", " ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(r.path), 0o700); err != nil {
		return err
	}
	return sys.ReplaceFile(r.path, append(b, '\n'), 0o600)
}
