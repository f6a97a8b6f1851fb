package daemon

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/compat"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/paths"
)

// steady writes to an export of d until the test ends and tells the longest write.
func steady(t *testing.T, d *Daemon, export string) (longest func() time.Duration) {
	var worst, since atomic.Int64 // since: when the write under way began
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for off := int64(0); ; off = (off + 4096) % (4 << 20) {
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond):
			}
			began := time.Now()
			since.Store(began.UnixNano())
			write(t, d, export, off)
			since.Store(0)
			worst.Store(max(worst.Load(), int64(time.Since(began))))
		}
	}()
	t.Cleanup(func() { close(stop); <-done })
	return func() time.Duration {
		w := worst.Swap(0)
		if at := since.Load(); at != 0 {
			w = max(w, time.Now().UnixNano()-at)
		}
		return time.Duration(w)
	}
}

// answers asks for everything that is shown, for a while, and tells the longest
// answer.
func answers(d *Daemon, during time.Duration) (worst time.Duration) {
	for end := time.Now().Add(during); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		for _, cmd := range []string{"show topology", "show paths", "show maps json"} {
			began := time.Now()
			compat.Run(legacy{d}, cmd)
			worst = max(worst, time.Since(began))
		}
	}
	return worst
}

// prompt is far less than what anybody waits for a hung part: 5 s for a login,
// 10 s and more for a unit.
const prompt = 2 * time.Second

func TestAHungUnitDelaysNoOtherMapAndNoShow(t *testing.T) {
	srv, _, urls := shelf(t, "a", "b")
	d, _ := begin(t, Options{URLs: urls, RescanInterval: 200 * time.Millisecond, Policy: paths.Config{PollingInterval: 100 * time.Millisecond}})
	awaitMaps(t, d, map[string]int{"a": 2, "b": 2})
	longest := steady(t, d, target.WWID("a"))
	time.Sleep(100 * time.Millisecond)
	srv.OnCommand(func(c *target.Cmd) target.Action {
		return target.Action{Silent: c.LUN[1] == 1}
	})
	stuck := make(chan struct{})
	go func() { defer close(stuck); write(t, d, target.WWID("b"), 0) }()
	longest()
	assert.Less(t, answers(d, 3*time.Second), prompt)
	assert.Less(t, longest(), prompt)
	select {
	case <-stuck:
		t.Error("the unit did not hang")
	default:
	}
	srv.OnCommand(nil)
	srv.DropAll() // its sessions end, and the write goes again
	<-stuck
}

func TestAHungPortalDelaysNoOtherMapAndNoShow(t *testing.T) {
	_, _, healthy := shelf(t, "a")
	sick, _, urls := shelf(t, "b")
	d, _ := begin(t, Options{URLs: append(healthy, urls...), RescanInterval: 200 * time.Millisecond, Policy: paths.Config{PollingInterval: 100 * time.Millisecond}})
	awaitMaps(t, d, map[string]int{"a": 2, "b": 2})
	longest := steady(t, d, target.WWID("a"))
	time.Sleep(100 * time.Millisecond)
	longest()
	sick.Hang()
	assert.Less(t, answers(d, 3*time.Second), prompt)
	assert.Less(t, longest(), prompt)
	require.Equal(t, map[string]int{"a": 2, "b": 0}, has(d), "the portals did not hang")
	sick.Resume()
	awaitMaps(t, d, map[string]int{"a": 2, "b": 2})
}
