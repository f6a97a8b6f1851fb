package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/paths"
)

// riskFile remembers which paths may have writes under way, so that the run
// after a crash ends their sessions before it writes anything. It changes when
// a path begins or ceases to serve, never for an I/O; a clean stop leaves no
// path in it.
type riskFile struct {
	path string
	mu   sync.Mutex
	data riskData

	before map[string]map[string]paths.Tested // what the run before left; never changes

	// Many paths come up at once: one write serves all that wait for it.
	next    *riskWrite // includes every change so far; nil: there was none since the last began
	writing sync.Mutex // held during a write
	changes uint64     // so far
	durable uint64     // of those, the ones in the file
}

// riskWrite is a write of the file that begins when the one before has ended.
type riskWrite struct {
	done chan struct{}
	err  error
}

type riskData struct {
	Version int                            `json:"version"`
	Maps    map[string]map[string]riskPath `json:"maps"`              // WWID, path name
	Targets map[string]paths.Trust         `json:"targets,omitempty"` // what the self-test found, by target name
	Lost    map[string]bool                `json:"lost,omitempty"`    // WWIDs: acknowledged writes are lost, and no flush has failed for it yet
	Left    *left                          `json:"left,omitempty"`    // by a run that stopped by itself, for the one that goes on
}

// left is what a run knew of its paths when it stopped. One that starts soon
// after goes on where it was, instead of testing the paths anew while I/O waits.
type left struct {
	At     time.Time                          `json:"at"`
	Tested map[string]map[string]paths.Tested `json:"tested"` // WWID, path name
}

// leftFor is how long what a run left holds: as long as an upgrade takes.
const leftFor = time.Minute

type riskPath struct {
	URL     string   `json:"url"` // without secrets
	Portals []string `json:"portals,omitempty"`
}

// stateTime is how long the run before may take to end.
const stateTime = 5 * time.Second

// lockState keeps a second daemon from a state file: it would write over what this
// one has noted there. Where the lock cannot be made the file cannot either.
func lockState(path string) (*sys.Lock, error) {
	if path == "" {
		return nil, nil
	}
	os.MkdirAll(filepath.Dir(path), 0o700)
	l, err := sys.LockFile(path+".lock", stateTime)
	var held *sys.HeldError
	if errors.As(err, &held) {
		return nil, fmt.Errorf("state file %s: process %s has it: give this run a file of its own with --state", path, held.PID)
	}
	return l, nil
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
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("state file %s: %w: run mpathd as its owner, usually root, or give this run a file of its own with --state", path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("state file %s: %w: if no earlier run can have writes under way, remove it", path, err)
	}
	if r.data.Maps == nil {
		r.data.Maps = map[string]map[string]riskPath{}
	}
	if l := r.data.Left; l != nil { // good once
		if age := time.Since(l.At); age >= 0 && age < leftFor {
			r.before = l.Tested
		}
		r.data.Left = nil
	}
	return r, nil
}

// leave remembers what the self-tests of a run that stops found, by WWID and path
// name. The next write of the file, or flush, makes it durable.
func (r *riskFile) leave(tested map[string]map[string]paths.Tested) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.data.Left = &left{time.Now(), tested}
	r.changes++
}

// flush writes what is not written yet.
func (r *riskFile) flush() error {
	r.mu.Lock()
	return r.save()
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

// set changes one path; the file is durable when it returns.
func (r *riskFile) set(wwid, name string, risk bool, p riskPath) error {
	r.mu.Lock()
	m := r.data.Maps[wwid]
	if have, ok := m[name]; risk == ok && (!risk || have.URL == p.URL && slices.Equal(have.Portals, p.Portals)) {
		return r.save()
	}
	r.changes++
	if risk {
		if m == nil {
			m = map[string]riskPath{}
			r.data.Maps[wwid] = m
		}
		m[name] = p
	} else if delete(m, name); len(m) == 0 {
		delete(r.data.Maps, wwid)
	}
	return r.save()
}

// lost tells whether the next flush of a map must fail.
func (r *riskFile) lost(wwid string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.data.Lost[wwid]
}

// setLost remembers it.
func (r *riskFile) setLost(wwid string, lost bool) error {
	r.mu.Lock()
	if r.data.Lost[wwid] == lost {
		return r.save()
	}
	r.changes++
	if r.data.Lost == nil {
		r.data.Lost = map[string]bool{}
	}
	if r.data.Lost[wwid] = lost; !lost {
		delete(r.data.Lost, wwid)
	}
	return r.save()
}

// classes are the classes of targets.
func (r *riskFile) classes() map[string]paths.Trust {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.data.Targets)
}

// setClass remembers what a target is.
func (r *riskFile) setClass(target string, c paths.Trust) error {
	r.mu.Lock()
	if r.data.Targets[target] == c {
		return r.save()
	}
	r.changes++
	if r.data.Targets == nil {
		r.data.Targets = map[string]paths.Trust{}
	}
	r.data.Targets[target] = c
	return r.save()
}

// save waits until the file says what the data says. Caller holds mu, which it
// gives up.
func (r *riskFile) save() error {
	if r.path == "" || r.durable == r.changes {
		r.mu.Unlock()
		return nil
	}
	w := r.next
	if w != nil {
		r.mu.Unlock()
		<-w.done
		return w.err
	}
	w = &riskWrite{done: make(chan struct{})}
	r.next = w
	r.mu.Unlock()
	r.writing.Lock()
	defer r.writing.Unlock()
	r.mu.Lock()
	r.next = nil // later changes are for the next one
	covers := r.changes
	b, err := json.MarshalIndent(&r.data, "", " ")
	r.mu.Unlock()
	if err == nil {
		err = os.MkdirAll(filepath.Dir(r.path), 0o700)
	}
	if err == nil {
		err = sys.ReplaceFile(r.path, append(b, '\n'), 0o600)
	}
	if err == nil {
		r.mu.Lock()
		r.durable = covers
		r.mu.Unlock()
	}
	w.err = err
	close(w.done)
	return err
}
