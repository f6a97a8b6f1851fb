package paths

import (
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// One round trip in which many commands are refused counts once; one command
// more per round trip comes back.
func TestDepthIsHalvedOncePerRoundTrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &Group{log: slog.New(slog.DiscardHandler)}
		g.policy.Store(&policy{Config: Config{QueueDepth: 64}})
		g.info.Store(&initiator.LUInfo{})
		g.table.Store(&table{})
		p := newPath(g, PathConfig{}, 0)
		p.current.Store(&sessionBox{})
		took := func(flush bool) (n int, all []*attempt) {
			for {
				a, _ := p.take(flush)
				if a == nil {
					return len(all), all
				}
				a.start = now()
				all = append(all, a)
			}
		}
		n, all := took(false)
		require.Equal(t, 64, n)
		time.Sleep(time.Millisecond)
		for _, a := range all {
			p.full(a.start, scsi.StatusTaskSetFull)
			p.give(a, false)
		}
		require.Equal(t, 32, p.queueDepth())
		for want := 32; want < 64; want++ {
			n, all = took(false)
			require.Equal(t, want, n)
			for _, a := range all {
				p.give(a, true)
			}
		}
		// BUSY: none at all for 50 ms, then 100, but flushes.
		for _, pause := range []time.Duration{50, 100, 200, 400, 500, 500} {
			n, all = took(false)
			require.NotZero(t, n)
			time.Sleep(time.Millisecond)
			for _, a := range all {
				p.full(a.start, scsi.StatusBusy)
				p.give(a, false)
			}
			time.Sleep(pause*time.Millisecond - 1)
			n, _ = took(false)
			require.Zero(t, n)
			a, _ := p.take(true)
			require.NotNil(t, a)
			p.give(a, false)
			time.Sleep(2)
			synctest.Wait()
		}
		require.Equal(t, 1, p.queueDepth())
		p.refill()
		require.Equal(t, 64, p.queueDepth())
	})
}
