package paths

import (
	"context"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

const (
	extentsTime   = 5 * time.Second // after which everything counts as data
	extentsAtOnce = 4               // questions to the unit
)

// Extents tells where the unit holds data (block.Mapper), by GET LBA STATUS on
// a serving path. A unit that does not know, and a path that does not answer,
// make everything data: that is always true. Few ask at a time: clients may have
// thousands of questions, which would fill the path's window and keep I/O and the
// checker out.
func (g *Group) Extents(ctx context.Context, off, n int64, limit int) []block.Extent {
	all := []block.Extent{{Len: n}}
	l := g.lu()
	t := g.table.Load()
	if !l.Unmap || g.noStatus.Load() || len(t.paths) == 0 || limit < 1 {
		return all
	}
	ctx, cancel := context.WithTimeout(ctx, extentsTime)
	defer cancel()
	select {
	case g.mapping <- struct{}{}:
		defer func() { <-g.mapping }()
	case <-ctx.Done():
		return all
	}
	box := t.paths[0].current.Load()
	if box == nil {
		return all
	}
	bs := int64(l.BlockSize)
	runs, err := initiator.LBAStatus(ctx, box.Session, t.paths[0].LUN, uint64(off/bs), limit)
	if err != nil {
		if initiator.Refused(err) {
			g.noStatus.Store(true)
		}
		return all
	}
	if g.ledger.shadow.used.Load() > 0 { // the unit alone does not know what is true
		return all
	}
	var out []block.Extent
	for _, r := range runs {
		size := int64(min(r.Blocks, uint64(n/bs))) * bs
		e := block.Extent{Len: size, Hole: r.Status == scsi.Deallocated, Zero: r.Status != scsi.Mapped && l.Zeroes}
		if k := len(out); k > 0 && out[k-1].Hole == e.Hole && out[k-1].Zero == e.Zero {
			out[k-1].Len += size
		} else if len(out) == limit {
			break
		} else {
			out = append(out, e)
		}
		if n -= size; n == 0 {
			break
		}
	}
	if len(out) == 0 {
		return all
	}
	return out
}

// ServingPath is the number of the path that serves, counted from 1 in the
// order of the configuration; 0 while there is none.
func (g *Group) ServingPath() uint32 {
	t := g.table.Load()
	if len(t.paths) == 0 {
		return 0
	}
	for i, p := range *g.everyPath.Load() {
		if p == t.paths[0] {
			return uint32(i + 1)
		}
	}
	return 0
}
