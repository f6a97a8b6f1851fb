package paths

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
)

// twoServers is a group over two target names whose caches are their own; the
// unit does not know FUA.
func twoServers(t *testing.T, c Config) (*Group, []*door) {
	g, doors, _ := newGroup(t, c, 1, 8)
	b := &door{d: doors[0].d, depth: 8}
	_, err := g.AddPath(PathConfig{Name: "B", Target: "iqn.other", Order: 1, Open: b.open}, g.Info())
	require.NoError(t, err)
	synctest.Wait()
	return g, append(doors, b)
}

func ended(t *testing.T, f *fake, op byte) {
	t.Helper()
	require.NotEmpty(t, f.pending())
	require.Equal(t, op, f.pending()[0].CDB[0])
	f.end(0, "good")
}

// A server died with acknowledged writes in its cache: a flush cannot succeed
// before it is back, and nothing else may wait for that.
func TestFlushWaitsForTheServerThatHoldsTheWritesAndNothingElseDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors := twoServers(t, Config{NoPathRetry: Queue, MultibusServers: true})
		defer closeGroup(g)
		dn := newDone()
		submit(g, writeOf(dn, 1, 1))
		ended(t, doors[0].session(), 0x8a)
		doors[0].set(true)
		doors[0].session().Abort(errDoor)
		synctest.Wait()
		flush := &block.Request{Op: block.Flush, Owner: dn}
		submit(g, flush)
		for i := range 3 {
			w := writeOf(dn, 10+i, 2)
			submit(g, w)
			ended(t, doors[1].session(), 0x8a)
			require.Equal(t, 1, dn.count(w), "a write behind a parked flush")
		}
		require.Zero(t, dn.count(flush), "flushed only the server that was left")
		doors[0].set(false)
		time.Sleep(5 * time.Second)
		synctest.Wait() // A logged in and flushed by itself, as a control command
		for _, d := range doors {
			for len(d.session().pending()) > 0 {
				ended(t, d.session(), 0x91)
			}
		}
		require.Equal(t, 1, dn.count(flush))
		require.NoError(t, flush.Err)
	})
}

func TestFlushFailsWhenItsServerDoesNotComeBackInTime(t *testing.T) {
	for _, retry := range []int{Fail, 2} {
		synctest.Test(t, func(t *testing.T) {
			g, doors := twoServers(t, Config{NoPathRetry: retry, PollingInterval: time.Second})
			defer closeGroup(g)
			dn := newDone()
			submit(g, writeOf(dn, 1, 1))
			ended(t, doors[0].session(), 0x8a)
			doors[0].set(true)
			doors[0].session().Abort(errDoor)
			synctest.Wait()
			flush := &block.Request{Op: block.Flush, Owner: dn}
			submit(g, flush)
			time.Sleep(3 * time.Second)
			synctest.Wait()
			for len(doors[1].session().pending()) > 0 {
				ended(t, doors[1].session(), 0x91)
			}
			require.Equal(t, 1, dn.count(flush))
			require.ErrorIs(t, flush.Err, block.ErrIO)
		})
	}
}
