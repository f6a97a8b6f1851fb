package coalesce

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestDelaysEndTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, d := range []time.Duration{100 * time.Millisecond, time.Second, 4 * time.Second, 20 * time.Second} {
			ends := map[time.Time]bool{}
			for range 100 {
				got := Delay(d)
				if got < d || got > d+min(d/share, most) {
					t.Fatalf("%v became %v", d, got)
				}
				end := time.Now().Add(got)
				ends[end] = true
				if d >= 4*time.Second && end.UnixNano()%int64(most) != 0 {
					t.Fatalf("%v ends at %v, not with others", d, end)
				}
				time.Sleep(7 * time.Microsecond)
			}
			if len(ends) > 2 {
				t.Errorf("100 delays of %v that begin within a millisecond end at %d instants", d, len(ends))
			}
		}
	})
}

func TestShortDelaysStayAsTheyAre(t *testing.T) {
	for _, d := range []time.Duration{-1, 0, 1, 15} {
		if got := Delay(d); got != d {
			t.Errorf("%v became %v", d, got)
		}
	}
}

func TestPeriodsBeginTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(300 * time.Millisecond)
		if got := Period(time.Second); got != 700*time.Millisecond {
			t.Errorf("in the middle: %v", got)
		}
		time.Sleep(700 * time.Millisecond)
		if got := Period(time.Second); got != time.Second {
			t.Errorf("at the end: %v", got)
		}
	})
}
