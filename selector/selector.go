// Package selector decides which path of a group takes the next I/O, as the
// path selectors of dm-multipath do (drivers/md/dm-ps-*.c). Picking is pure:
// no lock, no clock, no allocation.
package selector

import (
	"fmt"
	"strings"
	"sync/atomic"
)

// Load is what a path carries; the path updates it, selectors read it.
type Load struct {
	InFlight atomic.Int64 // commands
	Bytes    atomic.Int64 // data of those commands
}

// Selector picks an index into loads (at least one) for an I/O of size bytes.
// Pick is called from many goroutines at once.
type Selector interface {
	Name() string
	Pick(loads []*Load, size int) int
}

// New makes a selector from its multipath.conf spelling: a name, and an
// argument count that is ignored.
func New(spec string) (Selector, error) {
	name, _, _ := strings.Cut(strings.TrimSpace(spec), " ")
	switch name {
	case "failover":
		return failover{}, nil
	case "round-robin":
		return &roundRobin{}, nil
	case "queue-length":
		return queueLength{}, nil
	case "service-time", "":
		return serviceTime{}, nil
	}
	return nil, fmt.Errorf("path_selector %q: want failover, round-robin, queue-length or service-time", spec)
}

type failover struct{}

func (failover) Name() string          { return "failover 0" }
func (failover) Pick([]*Load, int) int { return 0 }

type roundRobin struct{ n atomic.Uint64 }

func (*roundRobin) Name() string { return "round-robin 0" }
func (r *roundRobin) Pick(loads []*Load, _ int) int {
	return int(r.n.Add(1) % uint64(len(loads)))
}

type queueLength struct{}

func (queueLength) Name() string { return "queue-length 0" }
func (queueLength) Pick(loads []*Load, _ int) int {
	best := 0
	for i, l := range loads {
		if l.InFlight.Load() < loads[best].InFlight.Load() {
			best = i
		}
	}
	return best
}

// serviceTime is the least data in flight, the new I/O included; that is the
// same for every path, so only what is there decides.
type serviceTime struct{}

func (serviceTime) Name() string { return "service-time 0" }
func (serviceTime) Pick(loads []*Load, _ int) int {
	best := 0
	for i, l := range loads {
		a, b := l.Bytes.Load(), loads[best].Bytes.Load()
		if a < b || a == b && l.InFlight.Load() < loads[best].InFlight.Load() {
			best = i
		}
	}
	return best
}
