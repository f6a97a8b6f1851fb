package paths

import (
	"context"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

var powerOnSense = scsi.Sense{Valid: true, Key: scsi.KeyUnitAttention, ASC: 0x29, ASCQ: 0x01}

func rest(d time.Duration) { time.Sleep(d); synctest.Wait() }

func flushOf(dn *done) *block.Request { return &block.Request{Op: block.Flush, Owner: dn} }

// all ends every command of the sessions with success.
func all(doors []*door) {
	for range 5 {
		for _, d := range doors {
			for s := d.session(); s != nil && len(s.pending()) > 0; {
				s.end(0, "good")
			}
		}
		synctest.Wait()
	}
}

// A server with a volatile cache says that it lost its power. What it had
// acknowledged is gone: a flush must not succeed as if nothing had happened,
// even if the answer to the first one gets lost.
func TestFlushFailsAfterAServerLostItsPower(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var saved []bool
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, OnLoss: func(lost bool) { saved = append(saved, lost) }}, 1, 8)
		defer closeGroup(g)
		synctest.Wait()
		p := (*g.everyPath.Load())[0]
		dn := newDone()
		flush := func() error {
			f := flushOf(dn)
			submit(g, f)
			synctest.Wait()
			all(doors)
			require.Equal(t, 1, dn.count(f))
			return f.Err
		}
		p.notice(initiator.Notice{Sense: powerOnSense})
		rest(time.Second)
		require.NoError(t, flush(), "nothing was written: nothing is lost")
		submit(g, writeOf(dn, 1, 1))
		ended(t, doors[0].session(), 0x8a)
		p.notice(initiator.Notice{Sense: powerOnSense})
		rest(time.Second)
		require.Equal(t, []bool{true}, saved, "a crash would make it forgotten")
		require.True(t, g.Snapshot().Safety.Lost)
		w := writeOf(dn, 2, 1)
		w.Flags = block.FUA
		submit(g, w)
		all(doors)
		require.NoError(t, w.Err, "this one is not lost")
		require.ErrorIs(t, flush(), block.ErrIO)
		require.ErrorIs(t, flush(), block.ErrIO, "its client may not have seen the first answer")
		rest(lossTold)
		require.NoError(t, flush())
		require.Equal(t, []bool{true, false}, saved)
	})
}

// What an earlier run knew to be lost is told by the next.
func TestLossOutlivesACrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Lost: true}, 1, 8)
		defer closeGroup(g)
		synctest.Wait()
		dn := newDone()
		f := flushOf(dn)
		submit(g, f)
		synctest.Wait()
		all(doors)
		require.ErrorIs(t, f.Err, block.ErrIO)
	})
}

// The other portal of a server that lost its power succeeds with any flush: it
// does not answer for what a path that is away had written before.
func TestPathOfAServerThatLostItsPowerDoesNotAnswerForAnother(t *testing.T) {
	for _, late := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, _ := newGroup(t, Config{NoPathRetry: Queue}, 2, 8)
			defer closeGroup(g)
			synctest.Wait()
			dn := newDone()
			submit(g, writeOf(dn, 1, 1))
			ended(t, doors[0].session(), 0x8a)
			rest(time.Second)
			if late {
				(*g.everyPath.Load())[1].notice(initiator.Notice{Sense: powerOnSense})
				rest(time.Second)
			}
			doors[0].set(true)
			doors[0].session().Abort(errDoor)
			rest(time.Second)
			f := flushOf(dn)
			submit(g, f)
			synctest.Wait()
			all(doors)
			if !late {
				require.Equal(t, 1, dn.count(f))
				require.NoError(t, f.Err)
				return
			}
			require.Zero(t, dn.count(f), "success, whatever became of the write")
			doors[0].set(false)
			time.Sleep(5 * time.Second)
			all(doors)
			require.Equal(t, 1, dn.count(f), "the path is back")
			require.NoError(t, f.Err, "it said nothing of a loss")
		})
	}
}

// What the group tells its owner it tells after a Reconfigure too: a loss that is
// not remembered is no loss after a crash.
func TestReconfigureKeepsTheCallbacks(t *testing.T) {
	lost := make(chan bool, 1)
	c := Config{Alias: "m", OnLoss: func(is bool) { lost <- is }, OnRisk: func(string, bool, []string) {}, OnResize: func(int64) error { return nil },
		OnLUNs: func(string, string) {}, OnClass: func(string, Trust) {}}
	g, err := NewGroup(c, &initiator.LUInfo{WWID: "w", Blocks: 8, BlockSize: 512})
	require.NoError(t, err)
	defer g.Close(context.Background())
	require.NoError(t, g.Reconfigure(Config{Policy: "multibus"}))
	now := reflect.ValueOf(g.Config())
	for i := range now.NumField() {
		if f := now.Type().Field(i); f.Type.Kind() == reflect.Func && f.Name != "FenceCommand" {
			require.False(t, now.Field(i).IsNil(), f.Name)
		}
	}
	g.loss.lose(1, 0)
	g.saveLoss()
	require.True(t, <-lost)
}
