package paths

import (
	"bytes"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
)

// A target that always has something to say keeps neither the checker from its
// work nor the log busy.
func TestAChattyTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		g, _, _ := newGroup(t, Config{PollingInterval: 5 * time.Second, Logger: slog.New(slog.NewTextHandler(&log, nil))}, 1, 8)
		defer closeGroup(g)
		synctest.Wait()
		p := (*g.everyPath.Load())[0]
		checks, due := 0, p.checkDue.Load()
		for range 300 {
			rest(time.Second)
			p.notice(initiator.Notice{Event: 255})
			synctest.Wait()
			if at := p.checkDue.Load(); at != due {
				checks, due = checks+1, at
			}
		}
		require.Greater(t, checks, 10)
		require.Less(t, checks, 100, "each event postpones the next check")
		require.Less(t, bytes.Count(log.Bytes(), []byte("asynchronous event")), 10)
	})
}
