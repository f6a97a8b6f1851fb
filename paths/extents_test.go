package paths

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
)

// slowMap is a session through which GET LBA STATUS is never answered.
type slowMap struct {
	Session
	now, most atomic.Int32
}

func (s *slowMap) Do(ctx context.Context, c *initiator.Command) error {
	if c.CDB[0] != 0x9e || c.CDB[1] != 0x12 {
		return s.Session.Do(ctx, c)
	}
	s.most.Store(max(s.most.Load(), s.now.Add(1)))
	defer s.now.Add(-1)
	<-ctx.Done()
	return ctx.Err()
}

// Questions where data is leave the path's window to I/O and checkers, however
// many clients ask them, and all of them end in time.
func TestQuestionsForExtentsAreFewAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, _, _ := newGroup(t, Config{}, 1, 8)
		defer closeGroup(g)
		synctest.Wait()
		l := *g.lu()
		l.Unmap = true
		g.info.Store(&l)
		p := (*g.everyPath.Load())[0]
		s := &slowMap{Session: p.current.Load().Session}
		p.current.Store(&sessionBox{s})
		began := time.Now()
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() {
				require.Equal(t, []block.Extent{{Len: 1 << 20}}, g.Extents(context.Background(), 0, 1<<20, 100))
			})
		}
		wg.Wait()
		require.LessOrEqual(t, time.Since(began), extentsTime)
		require.EqualValues(t, extentsAtOnce, s.most.Load())
		p.current.Store(&sessionBox{s.Session})
	})
}
