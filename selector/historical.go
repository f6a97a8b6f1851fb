package selector

import (
	"fmt"
	"strconv"
)

// historical weighs what a path took for its past I/Os with what waits on it
// (drivers/md/dm-ps-historical-service-time.c): the least (1 + in flight) times
// the moving average of its service time.
type historical struct {
	base int64 // of 1024: weight of the past over one bucket of time
	now  func() int64
}

const (
	bucket      = 16e6 // ns; a sample after a longer silence weighs more
	staleAfter  = 1e9  // ns without an observation: what is known may be wrong
	baseDefault = 972
)

func newHistorical(args []string, now func() int64) (Selector, error) {
	h := &historical{baseDefault, now}
	for i, a := range args {
		n, err := strconv.ParseInt(a, 10, 32)
		if err != nil || i == 0 && (n < 1 || n > 1023) || i > 1 {
			return nil, fmt.Errorf("historical-service-time: argument %q: want base_weight (1 to 1023) and threshold_multiplier", a)
		}
		if i == 0 {
			h.base = n
		}
	}
	return h, nil
}

func (*historical) Name() string { return "historical-service-time 0" }

// Observe moves the average of l; the longer l was silent, the less of the
// past remains. Races between observations lose one of them, which is fine.
func (h *historical) Observe(l *Load, ns, now int64) {
	old, silent := l.service.Load(), now-l.last.Load()
	keep := h.base
	for n := min(silent/bucket, 255); n > 0 && keep > 0; n-- {
		keep = keep * h.base / 1024
	}
	if old == 0 {
		keep = 0
	}
	l.service.Store((old*keep + ns*(1024-keep)) / 1024)
	l.last.Store(now)
}

func (h *historical) Pick(loads []*Load, _ int) int {
	now := h.now()
	best, least := 0, int64(-1)
	for i, l := range loads {
		waiting := l.InFlight.Load()
		if waiting == 0 && now-l.last.Load() > staleAfter {
			return i // one I/O to learn what it takes today
		}
		if cost := (1 + waiting) * max(l.service.Load(), 1); least < 0 || cost < least {
			best, least = i, cost
		}
	}
	return best
}
