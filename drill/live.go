package drill

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/paths"
)

// Stack is a running daemon.
type Stack interface {
	Maps() (*daemon.Maps, error)
	FailPath(name string) error
	ReinstatePath(name string) error
}

// Step is what the failover of one path did to reads of the map.
type Step struct {
	Path      string `json:"path"`
	Reads     int64  `json:"reads"`
	Errors    int64  `json:"errors"`
	Cause     string `json:"cause,omitempty"` // of the first error
	LongestUS int64  `json:"longest_us"`      // of all reads
	BackMS    int64  `json:"back_ms"`         // until the path was up again, -1: it was not
	Serves    bool   `json:"serves"`          // whether it served again at the end
}

// Live rehearses a failover on a map in use: it takes the named paths, or those
// that serve, out of service one after the other for a while, and reads random
// blocks from disk meanwhile. It writes nothing. A path is back in service when
// Live returns, also when ctx ended it. It refuses where no other path is left.
func Live(ctx context.Context, s Stack, disk io.ReaderAt, size int64, mapName string, names []string, hold time.Duration) (steps []Step, err error) {
	m, err := Map(s, mapName)
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		for _, p := range pathsOf(m) {
			if p.Serving {
				names = append(names, p.Name)
			}
		}
	}
	for _, name := range names {
		if err := drillable(s, mapName, name); err != nil {
			return steps, err
		}
		r := startReads(disk, size)
		step, err := failOver(ctx, s, mapName, name, hold)
		r.stop(&step)
		if err != nil {
			return steps, err
		}
		steps = append(steps, step)
	}
	return steps, nil
}

// Map is the map of that alias or WWID as the daemon tells of it now.
func Map(s Stack, name string) (*paths.MapStatus, error) {
	all, err := s.Maps()
	if err != nil {
		return nil, err
	}
	for i := range all.Maps {
		if m := &all.Maps[i]; m.Alias == name || m.WWID == name {
			return m, nil
		}
	}
	return nil, fmt.Errorf("drill: no map %q: `mpathd show maps` lists them", name)
}

func pathsOf(m *paths.MapStatus) (out []paths.PathStatus) {
	for _, g := range m.Groups {
		out = append(out, g.Paths...)
	}
	return out
}

// drillable tells why a path cannot be failed without stopping the map.
func drillable(s Stack, mapName, name string) error {
	m, err := Map(s, mapName)
	if err != nil {
		return err
	}
	all := pathsOf(m)
	i := slices.IndexFunc(all, func(p paths.PathStatus) bool { return p.Name == name })
	switch {
	case i < 0:
		return fmt.Errorf("drill: map %s has no path %q: `mpathd show paths` lists them", mapName, name)
	case all[i].State != "up":
		return fmt.Errorf("drill: path %s is %s, not up: nothing to rehearse", name, all[i].State)
	case m.Paths.Usable < 2:
		return fmt.Errorf("drill: path %s is the last usable one of map %s: without it its I/O would stop", name, mapName)
	}
	return nil
}

const backTime = 30 * time.Second // for a path to come up again

// failOver takes one path out and lets it in again.
func failOver(ctx context.Context, s Stack, mapName, name string, hold time.Duration) (step Step, err error) {
	step = Step{Path: name, BackMS: -1}
	pause(ctx, hold/4)
	if ctx.Err() != nil {
		return step, ctx.Err()
	}
	if err := s.FailPath(name); err != nil {
		return step, err
	}
	pause(ctx, hold)
	if err := s.ReinstatePath(name); err != nil {
		return step, fmt.Errorf("drill: path %s is out of service and could not be reinstated: %w", name, err)
	}
	began := time.Now()
	for time.Since(began) < backTime && ctx.Err() == nil {
		m, err := Map(s, mapName)
		if err != nil {
			return step, err
		}
		if i := slices.IndexFunc(pathsOf(m), func(p paths.PathStatus) bool { return p.Name == name && p.State == "up" }); i >= 0 {
			step.BackMS = time.Since(began).Milliseconds()
			break
		}
		pause(ctx, 10*time.Millisecond)
	}
	pause(ctx, hold/4)
	m, err := Map(s, mapName)
	if err != nil {
		return step, err
	}
	step.Serves = slices.ContainsFunc(pathsOf(m), func(p paths.PathStatus) bool { return p.Name == name && p.Serving })
	if ctx.Err() != nil {
		return step, fmt.Errorf("drill: interrupted, path %s was let in again: %w", name, ctx.Err())
	}
	return step, nil
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

const (
	liveReaders = 4
	livePace    = 5 * time.Millisecond // of each, so that a live map hardly notices
)

// timedReads are reads of random blocks until they are stopped.
type timedReads struct {
	done chan struct{}
	wg   sync.WaitGroup

	mu      sync.Mutex
	n, errs int64
	cause   string // of the first error
	longest time.Duration
}

func startReads(disk io.ReaderAt, size int64) *timedReads {
	r := &timedReads{done: make(chan struct{})}
	for range liveReaders {
		r.wg.Go(func() {
			buf := make([]byte, min(blockSize, size))
			pace := time.NewTicker(livePace)
			defer pace.Stop()
			for {
				select {
				case <-r.done:
					return
				case <-pace.C:
				}
				began := time.Now()
				_, err := disk.ReadAt(buf, rand.Int64N(max(size/blockSize, 1))*blockSize)
				r.note(time.Since(began), err)
			}
		})
	}
	return r
}

func (r *timedReads) note(took time.Duration, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.n++
	r.longest = max(r.longest, took)
	if err == nil {
		return
	}
	if r.errs++; r.errs == 1 {
		r.cause = err.Error()
	}
}

// stop waits for the reads under way and fills in what they took.
func (r *timedReads) stop(s *Step) {
	close(r.done)
	r.wg.Wait()
	s.Reads, s.Errors, s.LongestUS, s.Cause = r.n, r.errs, r.longest.Microseconds(), r.cause
}
