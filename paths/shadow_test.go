package paths

import (
	"bytes"
	"context"
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// shadowed is a map whose path A died with a write of blocks 1 and 2 under way,
// which was acknowledged on B since.
func shadowed(t *testing.T, c Config) (*Group, []*door, *disk, *done) {
	c.Protection, c.NoPathRetry = Shadow, Queue
	g, doors, d := newGroup(t, c, 2, 8)
	synctest.Wait()
	dn := newDone()
	w := &block.Request{Op: block.Write, Off: fakeBlock, Len: 2 * fakeBlock, Data: bytes.Repeat([]byte{1}, 2*fakeBlock), Owner: dn}
	submit(g, w)
	doors[0].set(true)
	doors[0].session().Abort(errDoor)
	synctest.Wait()
	doors[1].session().end(0, "good")
	require.NoError(t, w.Err)
	require.Len(t, g.ledger.of("A"), 1)
	return g, doors, d, dn
}

func endAll(f *fake) {
	for len(f.pending()) > 0 {
		f.end(0, "good")
		synctest.Wait()
	}
}

func TestShadowNeverShowsALateWriteAndMendsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, d, dn := shadowed(t, Config{})
		defer closeGroup(g)
		b := doors[1].session()
		over := writeOf(dn, 2, 2)
		submit(g, over)
		require.Len(t, b.pending(), 1, "the overwrite waits although there is memory for it")
		endAll(b)
		require.Equal(t, 1, dn.count(over))
		require.True(t, doors[0].haunt(0))
		require.EqualValues(t, 1, d.data[2*fakeBlock], "the late write did not revert the disk: this test proves nothing")

		read := &block.Request{Op: block.Read, Len: 4 * fakeBlock, Data: make([]byte, 4*fakeBlock), Owner: dn}
		submit(g, read)
		endAll(b)
		require.Equal(t, 1, dn.count(read))
		require.Equal(t, []byte{0, 1, 2, 0}, []byte{read.Data[0], read.Data[fakeBlock], read.Data[2*fakeBlock], read.Data[3*fakeBlock]})
		st := g.Snapshot().Safety
		require.EqualValues(t, fakeBlock, st.ShadowBytes)

		doors[0].set(false) // A comes back: its login is the fence
		time.Sleep(5 * time.Second)
		require.Empty(t, g.ledger.of("A"))
		for range 5 {
			endAll(b)
			endAll(doors[0].session())
			time.Sleep(time.Second)
		}
		require.EqualValues(t, 2, d.data[2*fakeBlock], "not written again after the fence")
		require.EqualValues(t, 1, d.data[fakeBlock])
		st = g.Snapshot().Safety
		require.Zero(t, st.ShadowBytes)
		require.EqualValues(t, 1, st.Repairs)
		require.Zero(t, g.ledger.open.Load(), "mutations go on asking")
	})
}

func TestShadowHoldsWhatDoesNotFitAndTrims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, d, dn := shadowed(t, Config{ShadowLimit: fakeBlock})
		defer closeGroup(g)
		b := doors[1].session()
		first, second := writeOf(dn, 1, 2), writeOf(dn, 2, 2)
		submit(g, first)
		endAll(b)
		submit(g, second)
		endAll(b)
		require.Equal(t, 1, dn.count(first))
		require.Zero(t, dn.count(second), "memory beyond the limit")
		again := writeOf(dn, 1, 3) // needs no more memory
		submit(g, again)
		endAll(b)
		require.Equal(t, 1, dn.count(again))
		require.NoError(t, g.DeclareFenced("A"))
		for range 5 {
			endAll(b)
			time.Sleep(time.Second)
		}
		require.Equal(t, 1, dn.count(second))
		require.EqualValues(t, 3, d.data[fakeBlock])
		require.EqualValues(t, 2, d.data[2*fakeBlock])
	})
}

// Two writes of one block at once would leave it open which of them the disk
// has in the end, and which the memory.
func TestShadowSendsOverlappingWritesOneAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, d, dn := shadowed(t, Config{})
		defer closeGroup(g)
		b := doors[1].session()
		submit(g, writeOf(dn, 2, 2), writeOf(dn, 2, 3))
		require.Len(t, b.pending(), 1)
		b.end(0, "good")
		require.Len(t, b.pending(), 1, "the second was forgotten")
		b.end(0, "good")
		require.EqualValues(t, 3, d.data[2*fakeBlock])
		require.Len(t, dn.in, 3)
	})
}

// The protection is switched off while blocks are kept in memory: they go to the
// disk at once, and what is written to them later is neither hidden nor undone.
func TestWhatWasKeptInMemoryUndoesNoWriteAfterTheProtectionIsSwitchedOff(t *testing.T) {
	for _, to := range []string{Off, Hold, Strict} {
		synctest.Test(t, func(t *testing.T) {
			g, doors, d, dn := shadowed(t, Config{})
			defer closeGroup(g)
			b := doors[1].session()
			over := writeOf(dn, 2, 2)
			submit(g, over)
			endAll(b)
			require.Equal(t, 1, dn.count(over))
			c := g.Config()
			c.Protection = to
			require.NoError(t, g.Reconfigure(c))
			last := writeOf(dn, 2, 3)
			submit(g, last)
			for range 10 {
				rest(100 * time.Millisecond)
				endAll(b)
			}
			require.Equal(t, to == Off, dn.count(last) == 1, to)
			doors[0].set(false)
			for range 50 {
				rest(100 * time.Millisecond)
				all(doors)
			}
			require.Equal(t, 1, dn.count(last))
			read := readOf(dn, 2)
			submit(g, read)
			all(doors)
			require.Equal(t, 1, dn.count(read))
			require.EqualValues(t, 3, read.Data[0], "a read sees what was overwritten")
			require.EqualValues(t, 3, d.data[2*fakeBlock], "an acknowledged write was undone")
			require.Zero(t, g.ledger.shadow.used.Load())
		})
	}
}

// One block that the unit does not take any more keeps no write of the others waiting.
func TestBlockThatCannotBeWrittenAgainLocksNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, d := newGroup(t, Config{Protection: Shadow, NoPathRetry: Queue}, 2, 8)
		defer closeGroup(g)
		synctest.Wait()
		dn := newDone()
		submit(g, writeOf(dn, 2, 1), writeOf(dn, 60, 1))
		doors[0].set(true)
		doors[0].session().Abort(errDoor)
		synctest.Wait()
		b := doors[1].session()
		endAll(b)
		submit(g, writeOf(dn, 2, 2), writeOf(dn, 60, 2))
		endAll(b)
		require.Len(t, dn.in, 4)
		require.EqualValues(t, 2, g.ledger.shadow.used.Load())
		bad := true
		end := func() {
			for _, door := range doors {
				for f := door.session(); f != nil && len(f.pending()) > 0; {
					if c := f.pending()[0]; bad && c.CDB[0] == 0x8a && c.CDB[9] == 60 {
						f.end(0, "medium")
					} else {
						f.end(0, "good")
					}
					synctest.Wait()
				}
			}
		}
		doors[0].set(false) // the fence
		for range 50 {
			rest(100 * time.Millisecond)
			end()
		}
		require.Empty(t, g.ledger.of("A"))
		last := writeOf(dn, 2, 3)
		submit(g, last)
		for range 50 {
			rest(100 * time.Millisecond)
			end()
		}
		require.Equal(t, 1, dn.count(last), "it waits for a block that has nothing to do with it")
		require.EqualValues(t, 3, d.data[2*fakeBlock])
		require.EqualValues(t, 1, g.ledger.shadow.used.Load())
		bad = false
		for range 50 {
			rest(100 * time.Millisecond)
			end()
		}
		require.Zero(t, g.ledger.shadow.used.Load())
		require.EqualValues(t, 2, d.data[60*fakeBlock])
	})
}

// trimmed is a session whose unit says that it holds nothing at all.
type trimmed struct{ *fake }

func (h trimmed) Do(ctx context.Context, c *initiator.Command) error {
	if c.CDB[0] != 0x9e || c.CDB[1]&0x1f != 0x12 { // GET LBA STATUS
		return h.fake.Do(ctx, c)
	}
	b := make([]byte, 24)
	binary.BigEndian.PutUint32(b, 20)
	binary.BigEndian.PutUint64(b[8:], binary.BigEndian.Uint64(c.CDB[2:]))
	binary.BigEndian.PutUint32(b[16:], fakeBlocks)
	b[20] = scsi.Deallocated
	c.Result = initiator.Result{Received: uint32(copy(c.Data, b))}
	return nil
}

// A late trim makes holes of blocks that reads still show from memory: who copies the
// disk by its extents must not skip them.
func TestBlocksKeptInMemoryAreNoHoles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, _, dn := shadowed(t, Config{})
		defer closeGroup(g)
		l := *g.lu()
		l.Unmap, l.Zeroes = true, true
		g.info.Store(&l)
		b := doors[1].session()
		g.paths[1].current.Store(&sessionBox{trimmed{b}})
		const size = fakeBlocks * fakeBlock
		hole := []block.Extent{{Len: size, Hole: true, Zero: true}}
		require.Equal(t, hole, g.Extents(t.Context(), 0, size, 10))
		submit(g, writeOf(dn, 2, 2))
		endAll(b)
		require.EqualValues(t, 1, g.ledger.shadow.used.Load())
		require.Equal(t, []block.Extent{{Len: size}}, g.Extents(t.Context(), 0, size, 10))
	})
}
