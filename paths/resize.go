package paths

import (
	"errors"
	"fmt"

	"github.com/mpathd/mpathd/initiator"
)

// Resize modes (Config.AutoResize): what a change of capacity does by itself.
const (
	GrowOnly    = "grow_only"   // it grows; a smaller unit takes its paths out: the default
	Never       = "never"       // only Resize changes the size
	GrowAndCut  = "grow_shrink" // it follows both ways; what is beyond the new end is lost
	errShrunk   = "%w: the unit has %d blocks, the map %d: if that was meant, run `mpathd resize MAP --force`"
	errNoLive   = "map %s: no path is up to ask for the new size: `mpathd show paths` says why"
	errStandby  = "map %s: the unit is in standby through all paths that are up, and does not tell its size"
	errSameSize = "map %s has %d blocks, and so have all its paths: %w"
)

// ErrSameSize is the error of a Resize that changes nothing.
var ErrSameSize = errors.New("nothing to do")

var errShrank = errors.New("it shrank")

// fits compares what a login found with the map, which may be smaller than the
// unit: a unit that grew serves with its old size until all paths see the new.
func (p *Path) fits(info *initiator.LUInfo) error {
	have := p.g.lu()
	seen := *info
	if seen.Blocks > have.Blocks {
		seen.Blocks = have.Blocks
	}
	if seen.Blocks < have.Blocks && !(seen.Standby && seen.Blocks == 0) && seen.WWID == have.WWID && seen.BlockSize == have.BlockSize {
		if p.g.cfg().AutoResize != GrowAndCut {
			return fmt.Errorf(errShrunk, errShrank, seen.Blocks, have.Blocks)
		}
		seen.Blocks = have.Blocks
	}
	return SameLU(have, &seen, p.Target, p.Target, true)
}

// Resize takes over the capacity that all paths agree on, the least that one
// reports; with force also a smaller one than the map's, whose end is then lost. The
// paths are asked anew, CheckTimeout each. The error wraps ErrSameSize if there is
// nothing to do, and says otherwise what is missing.
func (g *Group) Resize(force bool) error {
	least := g.agreed(true)
	have := g.lu()
	switch {
	case have.Blocks == 0:
		return fmt.Errorf(errStandby, g.cfg().Alias)
	case least == 0:
		return fmt.Errorf(errNoLive, g.cfg().Alias)
	case least == have.Blocks:
		return fmt.Errorf(errSameSize, g.cfg().Alias, have.Blocks, ErrSameSize)
	case least < have.Blocks && !force:
		return fmt.Errorf("map %s: "+errShrunk, g.cfg().Alias, errShrank, least, have.Blocks)
	}
	return g.setBlocks(least)
}

// agreed is the least capacity that a path reports, in blocks, be it live or out
// because its unit shrank; fresh asks the live ones first.
func (g *Group) agreed(fresh bool) (least uint64) {
	for _, p := range *g.everyPath.Load() {
		g.mu.Lock()
		s, live := p.session, p.up
		n, shrunk := p.blocks, p.shrunk
		g.mu.Unlock()
		if !shrunk && (!live || s == nil) {
			continue
		}
		if fresh && !shrunk {
			ctx, cancel := g.within(g.cfg().CheckTimeout)
			info, err := initiator.Identify(ctx, s, p.LUN)
			cancel()
			g.mu.Lock()
			n, shrunk = p.blocks, p.shrunk // the path may have found out meanwhile
			g.mu.Unlock()
			if !shrunk && (err != nil || info.WWID != g.lu().WWID || info.BlockSize != g.lu().BlockSize) {
				continue
			}
			if !shrunk {
				n = info.Blocks
				g.mu.Lock()
				p.blocks = n
				g.mu.Unlock()
			}
		}
		if n > 0 && (least == 0 || n < least) {
			least = n
		}
	}
	return least
}

// regrow follows the unit after a path saw another capacity, if the
// configuration lets it.
func (g *Group) regrow() {
	least, have := g.agreed(false), g.lu().Blocks
	mode := g.cfg().AutoResize
	if least == 0 || least == have || mode == Never || least < have && mode != GrowAndCut {
		return
	}
	if err := g.setBlocks(least); err != nil {
		g.log.Error("not resized", "cause", err)
	}
}

func (g *Group) setBlocks(n uint64) error {
	g.resizing.Lock()
	defer g.resizing.Unlock()
	old := g.lu()
	l := *old
	l.Blocks = n
	if !l.Use16 && n > 1<<32 {
		return errors.New("the unit grew beyond what its 10-byte commands reach")
	}
	g.info.Store(&l)
	g.admitShrunk()
	g.log.Info("map resized", "from_bytes", old.Size(), "to_bytes", l.Size())
	if f := g.cfg().OnResize; f != nil {
		return f(l.Size())
	}
	return nil
}

// admitShrunk lets the paths log in again that were out because their unit is
// smaller than the map was.
func (g *Group) admitShrunk() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.paths {
		if p.shrunk && p.blocks >= g.lu().Blocks {
			p.shrunk, p.wrongLU = false, false
			select {
			case p.wake <- struct{}{}:
			default:
			}
		}
	}
}

// sees is the capacity last seen through this path, in blocks; the most there
// can be if the path is not up.
func (p *Path) sees() uint64 {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	if !p.up {
		return 1<<64 - 1
	}
	return p.blocks
}
