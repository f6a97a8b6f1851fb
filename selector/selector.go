// Package selector decides which path of a group takes the next I/O, as the
// path selectors of dm-multipath do (drivers/md/dm-ps-*.c). Picking is pure:
// no lock, no allocation.
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
	// Repeat is how many I/Os in a row round-robin gives this path: rr_min_io
	// times its priority with rr_weight priorities. 0 counts as 1.
	Repeat atomic.Int64

	service atomic.Int64 // historical service time, ns
	last    atomic.Int64 // monotonic ns of the last observation
}

// Selector picks an index into loads (at least one) for an I/O of size bytes.
// Pick is called from many goroutines at once; loads is the caller's and not kept.
type Selector interface {
	Name() string // with the number of arguments and those, as `show topology` prints it
	Pick(loads []*Load, size int) int
}

// An Observer is a Selector that learns from every I/O that succeeds: it took
// ns and ended at the monotonic time now, in ns.
type Observer interface {
	Observe(l *Load, ns, now int64)
}

// New makes a selector from its multipath.conf spelling: a name, the number of
// arguments, and the arguments; empty is service-time. now is the monotonic clock, in
// ns, for the one that measures. The error says which names or arguments there are.
func New(spec string, now func() int64) (Selector, error) {
	words := strings.Fields(spec)
	name := ""
	if len(words) > 0 {
		name = words[0]
	}
	switch name {
	case "failover":
		return failover{}, nil
	case "round-robin":
		return &roundRobin{}, nil
	case "queue-length":
		return queueLength{}, nil
	case "service-time", "":
		return serviceTime{}, nil
	case "historical-service-time":
		var args []string
		if len(words) > 2 {
			args = words[2:]
		}
		return newHistorical(args, now)
	}
	return nil, fmt.Errorf("path_selector %q: want failover, round-robin, queue-length, service-time or historical-service-time", spec)
}

type failover struct{}

func (failover) Name() string          { return "failover 0" }
func (failover) Pick([]*Load, int) int { return 0 }

// roundRobin takes the paths in turn, each for its Repeat.
type roundRobin struct{ n atomic.Uint64 }

func (*roundRobin) Name() string { return "round-robin 0" }
func (r *roundRobin) Pick(loads []*Load, _ int) int {
	var total uint64
	for _, l := range loads {
		total += uint64(max(l.Repeat.Load(), 1))
	}
	at := r.n.Add(1) % total
	for i, l := range loads {
		n := uint64(max(l.Repeat.Load(), 1))
		if at < n {
			return i
		}
		at -= n
	}
	return 0 // a Repeat grew meanwhile
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
