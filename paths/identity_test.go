package paths

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// answer ends all commands of the session in one go, as a reader does with what
// one read of the socket brought: command i with sense senses[i], nil is GOOD.
func (f *fake) answer(senses ...[]byte) {
	f.mu.Lock()
	all := f.out[:len(senses):len(senses)]
	f.out = f.out[len(senses):]
	f.mu.Unlock()
	var p block.Plug
	for i, c := range all {
		if senses[i] == nil {
			f.execute(c)
		} else {
			c.Result.Status = scsi.StatusCheckCondition
			c.Result.SenseLen = uint8(copy(c.Result.Sense[:], senses[i]))
		}
		c.Owner.Done(c, &p)
	}
	p.Flush()
}

func readOf(dn *done, blk int) *block.Request {
	return &block.Request{Op: block.Read, Off: int64(blk * fakeBlock), Len: fakeBlock, Data: make([]byte, fakeBlock), Owner: dn}
}

// The unit says that it became another one while commands are in flight: what
// comes back behind that is another disk's word, and nothing more goes there.
func TestUnitThatBecomesAnotherDiskUnderLoadIsNotBelieved(t *testing.T) {
	for _, attention := range [][]byte{sense(6, 0x3f, 0x03), sense(6, 0x3f, 0x0e)} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, right := newGroup(t, Config{NoPathRetry: Queue}, 2, 8)
			defer closeGroup(g)
			synctest.Wait()
			right.data[2*fakeBlock] = 7
			dn := newDone()
			first, write, read := writeOf(dn, 0, 1), writeOf(dn, 1, 1), readOf(dn, 2)
			flush := &block.Request{Op: block.Flush, Owner: dn}
			submit(g, first, write, read, flush)
			a, b := doors[0].session(), doors[1].session()
			require.Len(t, a.pending(), 4)
			wrong := &disk{id: 2}
			doors[0].mu.Lock()
			doors[0].d = wrong
			doors[0].mu.Unlock()
			a.d = wrong
			a.answer(attention, nil, nil, nil) // it even says GOOD
			synctest.Wait()
			require.Empty(t, dn.in, "the answer of another disk was believed")
			more := writeOf(dn, 3, 1)
			submit(g, more)
			time.Sleep(time.Minute)
			for len(b.pending()) > 0 {
				b.end(0, "good")
				synctest.Wait()
			}
			for _, r := range []*block.Request{first, write, read, flush, more} {
				require.Equal(t, 1, dn.count(r))
				require.NoError(t, r.Err)
			}
			require.EqualValues(t, 7, read.Data[0])
			for _, blk := range []int{0, 1, 3} {
				require.EqualValues(t, 1, right.data[blk*fakeBlock])
			}
			require.Zero(t, wrong.data[0], "a byte reached the other disk")
			require.Zero(t, wrong.data[3*fakeBlock], "a byte reached the other disk")
			require.Contains(t, g.Snapshot().Groups[0].Paths[0].LastError, "identity changed")
		})
	}
}

// The same attention from a unit that stayed what it was costs a login.
func TestUnitThatOnlySaysItChangedServesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue}, 1, 8)
		defer closeGroup(g)
		synctest.Wait()
		dn := newDone()
		r := writeOf(dn, 0, 1)
		submit(g, r)
		doors[0].session().answer(sense(6, 0x3f, 0x03))
		time.Sleep(5 * time.Second)
		doors[0].session().end(0, "good")
		require.NoError(t, r.Err)
		require.Equal(t, 1, dn.count(r))
	})
}

// A login that leads to another disk ends nothing of what the old session may
// still write.
func TestAnotherDiskIsNoFence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, right := newGroup(t, Config{NoPathRetry: Queue}, 2, 8)
		defer closeGroup(g)
		synctest.Wait()
		dn := newDone()
		w := writeOf(dn, 0, 1)
		submit(g, w)
		doors[0].mu.Lock()
		doors[0].d = &disk{id: 2}
		doors[0].mu.Unlock()
		doors[0].session().Abort(errDoor)
		synctest.Wait()
		b := doors[1].session()
		b.end(0, "good")
		over := writeOf(dn, 0, 2)
		submit(g, over)
		time.Sleep(time.Minute)
		require.Zero(t, dn.count(over))
		require.Len(t, g.ledger.of("A"), 1, "another disk's login counted as the fence")
		require.NoError(t, g.DeclareFenced("A"))
		b.end(0, "good")
		require.NoError(t, over.Err)
		require.EqualValues(t, 2, right.data[0])
	})
}

func TestServerWithACacheMakesFlushesNecessaryForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _ := newGroup(t, Config{NoPathRetry: Queue}, 1, 8)
		defer closeGroup(g)
		synctest.Wait()
		l := *g.lu() // as if the first server had no cache
		l.WriteCache = false
		g.info.Store(&l)
		g.learnCache(&initiator.LUInfo{WriteCache: true})
		dn := newDone()
		submit(g, writeOf(dn, 0, 1))
		doors[0].session().end(0, "good")
		f := &block.Request{Op: block.Flush, Owner: dn}
		submit(g, f)
		require.Zero(t, dn.count(f), "a flush that did nothing")
		ended(t, doors[0].session(), 0x91)
		require.Equal(t, 1, dn.count(f))
	})
}

// noticing is a session on which a control command may meet a unit attention.
type noticing struct {
	*fake
	notice func(initiator.Notice)
	meets  func(c *initiator.Command, notice func(initiator.Notice))
}

func (n *noticing) OnNotice(f func(initiator.Notice)) { n.notice = f }

func (n *noticing) Do(ctx context.Context, c *initiator.Command) error {
	if n.notice != nil {
		n.meets(c, n.notice)
	}
	return n.fake.Do(ctx, c)
}

// The unit becomes another disk after it was identified and before the path serves,
// or serves again: the attention that says so is met by a command of ours, and no
// byte may follow.
func TestUnitThatBecomesAnotherDiskBeforeThePathServesTakesNothing(t *testing.T) {
	for _, again := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, right := newGroup(t, Config{NoPathRetry: Queue}, 1, 8)
			defer closeGroup(g)
			synctest.Wait()
			c := g.Config()
			c.Checker = "tur"
			require.NoError(t, g.Reconfigure(c))
			wrong := &disk{id: 2}
			b := &door{d: right, depth: 8}
			var w *block.Request
			dn := newDone()
			armed, identified, became := !again, false, false
			p, err := g.AddPath(PathConfig{Name: "B", Target: "iqn.t", Order: -1, Open: func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error) {
				s, err := b.open(ctx, onState, onRoom)
				if err != nil {
					return nil, err
				}
				f := s.(*fake)
				return &noticing{fake: f, meets: func(c *initiator.Command, notice func(initiator.Notice)) {
					switch op := c.CDB[0]; {
					case !armed:
					case op == 0x1a: // the last of an identification
						identified = true
					case op == 0 && identified && !became: // the checker's
						became = true
						b.mu.Lock()
						b.d = wrong
						b.mu.Unlock()
						f.d = wrong
						notice(initiator.Notice{Sense: scsi.ParseSense(sense(6, 0x3f, 0x0e))})
					case became && w == nil: // what it is asked next
						w = writeOf(dn, 1, 9)
						submit(g, w)
						require.Empty(t, f.pending(), "a write went to the other disk")
					}
				}}, nil
			}}, g.Info())
			require.NoError(t, err)
			synctest.Wait()
			if again {
				require.Equal(t, "B", g.table.Load().paths[0].Name)
				armed = true
				p.doubt()
			}
			rest(time.Minute)
			require.NotNil(t, w)
			endAll(doors[0].session())
			require.Equal(t, 1, dn.count(w))
			require.EqualValues(t, 9, right.data[fakeBlock])
			require.Contains(t, statusOf(g, "B").LastError, "identity changed")
		})
	}
}

// A target that says so at each login is believed once its unit was asked again.
func TestUnitThatSaysAtEachLoginThatItChangedIsAskedAgain(t *testing.T) {
	for _, ends := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, _ := newGroup(t, Config{NoPathRetry: Queue}, 1, 8)
			defer closeGroup(g)
			b := &door{d: doors[0].d, depth: 8}
			_, err := g.AddPath(PathConfig{Name: "B", Target: "iqn.t", Order: -1, Open: func(ctx context.Context, onState func(initiator.State, error), onRoom func(*block.Plug)) (Session, error) {
				s, err := b.open(ctx, onState, onRoom)
				if err != nil {
					return nil, err
				}
				told := false
				return &noticing{fake: s.(*fake), meets: func(_ *initiator.Command, notice func(initiator.Notice)) {
					if !told || !ends {
						notice(initiator.Notice{Sense: scsi.ParseSense(sense(6, 0x3f, 0x0e))})
					}
					told = true
				}}, nil
			}}, g.Info())
			require.NoError(t, err)
			rest(5 * time.Second)
			require.Equal(t, ends, g.Snapshot().Paths.Usable == 2)
			require.Equal(t, ends, b.logins == 1)
		})
	}
}
