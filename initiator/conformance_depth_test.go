package initiator_test

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/paths"
)

const statusFull, statusBusy = 0x28, 0x08

// A target that has no room for commands.
var depthCases = map[string]conformanceCase{
	"FF12": {"answers TASK SET FULL to more than 8 commands at once, or BUSY to all for a while or for good", "halves the commands in flight on that path once per round trip, pauses, tries again until they are done, and goes back up; a path that stays busy for 3 s gets none while another serves; no I/O fails", func(t *testing.T) {
		t.Run("full above 8", fullAboveEight)
		t.Run("busy for a second", busyForASecond)
		t.Run("busy for good", busyForGood)
	}},
}

// hammer keeps n writes in flight until stop; each must succeed.
func hammer(t *testing.T, m *mapped, n int) (done *atomic.Int64, stop func()) {
	done = &atomic.Int64{}
	quit := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			for {
				select {
				case <-quit:
					return
				default:
				}
				_, c := begin(m.g, block.Write, int64(i)*4096, 4096, 0)
				if r := <-c; r.Err != nil {
					t.Errorf("write: %v", r.Err)
					return
				}
				done.Add(1)
			}
		})
	}
	return done, sync.OnceFunc(func() { close(quit); wg.Wait() })
}

func fullAboveEight(t *testing.T) {
	const room, takes = 8, 2 * time.Millisecond
	m := newMapped(t, 1, options{paths: paths.Config{NoPathRetry: paths.Fail}})
	var mu sync.Mutex
	var ends []time.Time // of the commands under way
	var limited atomic.Bool
	var refused, most atomic.Int64
	limited.Store(true)
	m.hook(func(*target.Cmd) target.Action {
		if !limited.Load() {
			return target.Action{}
		}
		mu.Lock()
		defer mu.Unlock()
		now := time.Now()
		under := ends[:0]
		for _, e := range ends {
			if e.After(now) {
				under = append(under, e)
			}
		}
		if ends = under; len(ends) >= room {
			refused.Add(1)
			return target.Action{Status: statusFull}
		}
		ends = append(ends, now.Add(takes))
		most.Store(max(most.Load(), int64(len(ends))))
		return target.Action{Delay: takes}
	})
	done, stop := hammer(t, m, 64)
	defer stop()
	m.await("goes on", func() bool { return done.Load() > 1000 })
	depth := m.path(0).QueueDepth
	require.Less(t, depth, 2*room+2)
	t.Logf("%d writes, %d refused, depth %d", done.Load(), refused.Load(), depth)
	require.Less(t, refused.Load(), done.Load()/2, "it does not learn")
	require.EqualValues(t, room, most.Load())
	limited.Store(false)
	m.await("back to the queue depth", func() bool { return m.path(0).QueueDepth == 128 })
	stop()
	require.Equal(t, 1, m.g.Snapshot().Paths.Usable)
	require.True(t, m.log.has("it gets fewer commands at once"))
}

func busyForASecond(t *testing.T) {
	m := newMapped(t, 1, options{paths: paths.Config{NoPathRetry: paths.Fail}})
	done, stop := hammer(t, m, 64)
	defer stop()
	m.await("runs", func() bool { return done.Load() > 1000 })
	var asked atomic.Int64
	m.hook(func(*target.Cmd) target.Action {
		asked.Add(1)
		return target.Action{Status: statusBusy}
	})
	time.Sleep(time.Second)
	m.hook(nil)
	before := done.Load()
	require.Less(t, asked.Load(), int64(64+32+16+8+8), "of 64 requests: each halving asks with half as many")
	require.Less(t, m.path(0).QueueDepth, 16)
	m.await("goes on", func() bool { return done.Load() > before+10000 })
	m.await("back to the queue depth", func() bool { return m.path(0).QueueDepth == 128 })
}

func busyForGood(t *testing.T) {
	m := newMapped(t, 2, options{paths: paths.Config{NoPathRetry: paths.Fail}})
	var asked atomic.Int64
	m.hook(func(c *target.Cmd) target.Action {
		if c.Portal == m.portals[0] {
			asked.Add(1)
			return target.Action{Status: statusBusy}
		}
		return target.Action{}
	})
	began := time.Now()
	done, stop := hammer(t, m, 16)
	defer stop()
	m.await("moved", func() bool { return done.Load() > 100 })
	took := time.Since(began)
	require.Greater(t, took, 2900*time.Millisecond, "kept to the path")
	require.Less(t, took, 4500*time.Millisecond)
	require.Equal(t, "delayed", m.path(0).State)
	require.Equal(t, 2, m.g.Snapshot().Paths.Usable, "it is not failed")
	require.Less(t, asked.Load(), int64(64))
	m.hook(nil)
	m.await("serves again", func() bool { return m.path(0).State == "up" && m.path(0).Serving && m.path(0).QueueDepth > 1 })
	stop()
	require.NoError(t, m.io(block.Write, 0, 4096))
}
