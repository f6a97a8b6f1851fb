package paths

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// risks is what Config.OnRisk was told.
type risks struct {
	mu sync.Mutex
	at map[string]bool
}

func (r *risks) set(path string, risk bool, _ []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.at == nil {
		r.at = map[string]bool{}
	}
	if r.at[path] = risk; !risk {
		delete(r.at, path)
	}
}

// now are the paths that would be Unfenced after a crash.
func (r *risks) now() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Sorted(maps.Keys(r.at))
}

// hearing hands log messages to a test, which may keep the one who logs waiting.
type hearing struct{ f func(message string) }

func (hearing) Enabled(context.Context, slog.Level) bool { return true }
func (h hearing) WithAttrs([]slog.Attr) slog.Handler     { return h }
func (h hearing) WithGroup(string) slog.Handler          { return h }
func (h hearing) Handle(_ context.Context, r slog.Record) error {
	h.f(r.Message)
	return nil
}

// Whoever ends an old session from outside says so last, when the path may take
// writes again: a crash then must not find it forgotten.
func TestPathThatServesAgainStaysAtRiskWhateverEndsItsOldSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var risks risks
		busy := slog.New(hearing{func(m string) {
			if m == "old session fenced" {
				time.Sleep(time.Second)
			}
		}})
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Logger: busy, OnRisk: risks.set}, 2, 8)
		defer closeGroup(g)
		synctest.Wait()
		ambiguous(t, g, doors, newDone())
		require.Equal(t, []string{"A", "B"}, risks.now())
		doors[0].set(false)
		require.NoError(t, g.DeclareFenced("A"))
		require.NotNil(t, g.paths[0].current.Load(), "A is not back yet: this test proves nothing")
		require.Equal(t, []string{"A", "B"}, risks.now())
		submit(g, flushOf(newDone()))
		all(doors)
		doors[0].set(true)
		doors[0].session().Abort(errDoor)
		rest(time.Second)
		require.Equal(t, []string{"B"}, risks.now())
	})
}
