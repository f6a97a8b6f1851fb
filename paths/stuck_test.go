package paths

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
)

// A path that the operator fails while it logs in must not come up; once
// reinstated it serves what waits.
func TestPathFailedWhileItLogsInServesOnceReinstated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue}, 1, 8)
		defer closeGroup(g)
		synctest.Wait()
		p := (*g.everyPath.Load())[0]
		open := p.Open
		p.Open = func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error) {
			g.FailPath("A")
			return open(ctx, onState, onRoom)
		}
		doors[0].session().Abort(errDoor)
		time.Sleep(time.Second)
		require.Nil(t, doors[0].session(), "a path that was failed came up")
		p.Open = open
		dn := newDone()
		r := writeOf(dn, 0, 1)
		submit(g, r)
		require.NoError(t, g.ReinstatePath("A"))
		time.Sleep(time.Second)
		require.Len(t, doors[0].session().pending(), 1, "the request waits although the path is back")
		doors[0].session().end(0, "good")
		require.Equal(t, 1, dn.count(r))
	})
}

// crowded ends a command of another session just before it refuses one.
type crowded struct {
	*fake
	other func() *fake
}

func (c *crowded) Submit(*initiator.Command, *block.Plug) bool {
	if o := c.other(); o != nil && len(o.pending()) > 0 {
		o.end(0, "good")
	}
	return false
}

// Room that appears on one path while another refuses the only waiting request
// must not be missed.
func TestRoomThatAppearsDuringARefusalIsUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue, Policy: "multibus", Selector: "round-robin 0", QueueDepth: 1}, 2, 8)
		defer closeGroup(g)
		synctest.Wait()
		dn := newDone()
		first, second := writeOf(dn, 0, 1), writeOf(dn, 1, 1)
		b := (*g.everyPath.Load())[1]
		refuse := false
		b.current.Store(&sessionBox{&crowded{doors[1].session(), func() *fake {
			if refuse {
				return doors[0].session()
			}
			return nil
		}}})
		submit(g, first)
		a := doors[0].session()
		require.Len(t, a.pending(), 1)
		var plug block.Plug
		second.Route = block.Route{Start: now()}
		g.enqueue(second)
		refuse = true
		g.drain(&plug)
		require.Equal(t, 1, dn.count(first))
		require.Len(t, a.pending(), 1, "the request waits although there is room")
		a.end(0, "good")
		require.Equal(t, 1, dn.count(second))
		require.Zero(t, g.waiting.Load())
	})
}
