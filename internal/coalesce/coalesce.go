// Package coalesce makes timers of many sessions and maps end together, so that
// an idle process wakes up a few times in a second and not once for each of
// them. It is the idea of the kernel's timer slack (prctl(2), PR_SET_TIMERSLACK).
package coalesce

import "time"

const (
	share = 16                     // the slack is this part of a delay,
	most  = 250 * time.Millisecond // and no more
)

// Delay is d, or up to a sixteenth of it and 250 ms more: delays that begin at
// different times then end at common instants. Those of long delays are among
// those of short ones.
func Delay(d time.Duration) time.Duration {
	grid := most
	for grid > d/share {
		grid /= 5
	}
	if grid <= 0 {
		return d
	}
	return d + missing(time.Now().Add(d), grid)
}

// Period is the time until the next multiple of d, for work that is done at
// each of them.
func Period(d time.Duration) time.Duration {
	if left := missing(time.Now(), d); left > 0 {
		return left
	}
	return d
}

// missing is the time from t to the next multiple of grid; 0 at one.
func missing(t time.Time, grid time.Duration) time.Duration {
	if over := time.Duration(t.UnixNano()) % grid; over > 0 {
		return grid - over
	}
	return 0
}
