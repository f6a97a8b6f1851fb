package selector

import (
	"container/heap"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func loads(n int) []*Load {
	out := make([]*Load, n)
	for i := range out {
		out[i] = &Load{}
	}
	return out
}

func TestNewRefusesWhatItDoesNotKnow(t *testing.T) {
	for _, bad := range []string{"fastest", "historical-service-time 1 5000", "historical-service-time 1 x"} {
		_, err := New(bad, nil)
		require.Error(t, err, bad)
	}
	for _, good := range []string{"", "service-time 0", "round-robin 0", "queue-length 0", "failover", "historical-service-time 2 900 3"} {
		_, err := New(good, func() int64 { return 0 })
		require.NoError(t, err, good)
	}
}

func TestRoundRobinGivesEachPathItsRepeat(t *testing.T) {
	s, _ := New("round-robin 0", nil)
	l := loads(3)
	l[1].Repeat.Store(2)
	l[2].Repeat.Store(5)
	var got [3]int
	for range 800 {
		got[s.Pick(l, 4096)]++
	}
	require.Equal(t, [3]int{100, 200, 500}, got)
}

// end is one I/O that ends on a path.
type end struct{ at, began int64 }
type ends struct {
	e []struct {
		end
		path, size int
	}
}

func (h ends) Len() int           { return len(h.e) }
func (h ends) Less(i, j int) bool { return h.e[i].at < h.e[j].at }
func (h ends) Swap(i, j int)      { h.e[i], h.e[j] = h.e[j], h.e[i] }
func (h *ends) Push(x any) {
	h.e = append(h.e, x.(struct {
		end
		path, size int
	}))
}
func (h *ends) Pop() any { x := h.e[len(h.e)-1]; h.e = h.e[:len(h.e)-1]; return x }

// share simulates a closed loop of depth I/Os over paths that serve one I/O at
// a time at their own speed (ns per I/O, ns per byte), and counts who did what.
func share(t *testing.T, spec string, fixed []int64, perByte []float64, depth, n int, size func(i int) int) (done []int, elapsed int64) {
	var clock int64
	s, err := New(spec, func() int64 { return clock })
	require.NoError(t, err)
	l := loads(len(fixed))
	free := make([]int64, len(fixed))
	done = make([]int, len(fixed))
	q := &ends{}
	issued := 0
	start := func() {
		sz := size(issued)
		issued++
		p := s.Pick(l, sz)
		l[p].InFlight.Add(1)
		l[p].Bytes.Add(int64(sz))
		free[p] = max(free[p], clock) + fixed[p] + int64(perByte[p]*float64(sz))
		heap.Push(q, struct {
			end
			path, size int
		}{end{free[p], clock}, p, sz})
	}
	for range depth {
		start()
	}
	for range n {
		e := heap.Pop(q).(struct {
			end
			path, size int
		})
		clock = e.at
		l[e.path].InFlight.Add(-1)
		l[e.path].Bytes.Add(-int64(e.size))
		if o, ok := s.(Observer); ok {
			o.Observe(l[e.path], e.at-e.began, clock)
		}
		done[e.path]++
		start()
	}
	return done, clock
}

// Two paths, one four times as slow: what each selector makes of it.
func TestSharesOverUnequalPaths(t *testing.T) {
	fixed, perByte := []int64{100e3, 400e3}, []float64{0, 0}
	same := func(int) int { return 4096 }
	rr, rrTime := share(t, "round-robin 0", fixed, perByte, 16, 20000, same)
	ql, qlTime := share(t, "queue-length 0", fixed, perByte, 16, 20000, same)
	st, stTime := share(t, "service-time 0", fixed, perByte, 16, 20000, same)
	hst, hstTime := share(t, "historical-service-time 0", fixed, perByte, 16, 20000, same)
	t.Logf("I/Os on the fast and the slow path, time: round-robin %v %d ms, queue-length %v %d ms, service-time %v %d ms, historical %v %d ms",
		rr, rrTime/1e6, ql, qlTime/1e6, st, stTime/1e6, hst, hstTime/1e6)
	require.InDelta(t, 0.5, float64(rr[0])/20000, 0.02, "round-robin shares evenly, whatever it costs")
	for name, got := range map[string][]int{"queue-length": ql, "service-time": st, "historical-service-time": hst} {
		require.InDelta(t, 0.8, float64(got[0])/20000, 0.15, "%s shares by speed", name)
	}
	for name, took := range map[string]int64{"queue-length": qlTime, "service-time": stTime, "historical-service-time": hstTime} {
		require.Less(t, took, rrTime*6/10, "%s is faster than taking turns", name)
	}
}

// Large and small I/Os mixed: bytes in flight tell more than their number.
func TestServiceTimeSeesSizes(t *testing.T) {
	fixed, perByte := []int64{20e3, 20e3}, []float64{1, 4}
	mixed := func(i int) int {
		if i%4 == 0 {
			return 1 << 20
		}
		return 4096
	}
	_, ql := share(t, "queue-length 0", fixed, perByte, 8, 8000, mixed)
	_, st := share(t, "service-time 0", fixed, perByte, 8, 8000, mixed)
	t.Logf("queue-length %d ms, service-time %d ms", ql/1e6, st/1e6)
	require.Less(t, st, ql*11/10)
}

// A path that was slow long ago gets a chance again.
func TestHistoricalForgets(t *testing.T) {
	var clock int64
	s, _ := New("historical-service-time 0", func() int64 { return clock })
	l := loads(2)
	o := s.(Observer)
	for range 100 {
		clock += 1e6
		o.Observe(l[0], 100e3, clock)
		o.Observe(l[1], 50e6, clock)
	}
	require.Equal(t, 0, s.Pick(l, 4096))
	for range 30 { // only the fast one is used for a while
		clock += 100e6
		o.Observe(l[0], 100e3, clock)
	}
	require.Equal(t, 1, s.Pick(l, 4096), "a stale path is probed")
	l[1].InFlight.Add(1)
	require.Equal(t, 0, s.Pick(l, 4096), "with one I/O at a time")
	o.Observe(l[1], 50e3, clock)
	l[1].InFlight.Add(-1)
	require.Equal(t, 1, s.Pick(l, 4096), "and judged by what it does now")
}

func TestPickIsAlwaysInRangeAndAllocatesNothing(t *testing.T) {
	for _, spec := range []string{"failover", "round-robin 0", "queue-length 0", "service-time 0", "historical-service-time 0"} {
		s, err := New(spec, func() int64 { return 5e9 })
		require.NoError(t, err)
		rapid.Check(t, func(t *rapid.T) {
			l := loads(rapid.IntRange(1, 8).Draw(t, "paths"))
			for _, x := range l {
				x.InFlight.Store(rapid.Int64Range(0, 1000).Draw(t, "in flight"))
				x.Bytes.Store(rapid.Int64Range(0, 1<<40).Draw(t, "bytes"))
				x.Repeat.Store(rapid.Int64Range(-1, 100).Draw(t, "repeat"))
				x.service.Store(rapid.Int64Range(0, 1<<40).Draw(t, "service"))
				x.last.Store(rapid.Int64Range(0, 5e9).Draw(t, "last"))
			}
			if i := s.Pick(l, 4096); i < 0 || i >= len(l) {
				t.Fatalf("%s picked %d of %d", spec, i, len(l))
			}
		})
		l := loads(4)
		require.Zero(t, testing.AllocsPerRun(100, func() { s.Pick(l, 4096) }), spec)
	}
}
