package paths

import (
	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
)

// maxIO is the most that one READ or WRITE moves, in bytes: no more than the
// unit takes (VPD page B0), in multiples of what it likes.
func maxIO(l *initiator.LUInfo) int64 {
	bs := int64(l.BlockSize)
	n := int64(maxCommand)
	if l.MaxTransfer > 0 {
		n = min(n, int64(l.MaxTransfer)*bs)
	}
	if !l.Use16 {
		n = min(n, 65535*bs)
	}
	if grain := int64(l.TransferGranularity) * bs; grain > bs && grain <= n {
		n -= n % grain
	}
	return max(n&^(bs-1), bs)
}

// largest is maxIO within what the policy allows.
func (g *Group) largest(l *initiator.LUInfo) int64 {
	n := maxIO(l)
	if most := g.cfg().MaxIO; most > 0 && most < n {
		n = max(most-most%int64(l.BlockSize), int64(l.BlockSize))
	}
	return n
}

// learnUnit takes over size and block size from the first path that tells them,
// for a map that began with paths in standby alone.
func (g *Group) learnUnit(info *initiator.LUInfo) {
	g.resizing.Lock()
	if g.lu().Blocks > 0 || info.Blocks == 0 || info.WWID != g.lu().WWID {
		g.resizing.Unlock()
		return
	}
	g.info.Store(info)
	g.maxIO.Store(g.largest(info))
	g.resizing.Unlock()
	g.log.Info("the unit tells its size", "bytes", info.Size(), "block_size", info.BlockSize)
	if f := g.cfg().OnResize; f != nil {
		if err := f(info.Size()); err != nil {
			g.log.Error("map not exported", "cause", err)
		}
	}
}

// learnLimits takes over what the unit says of itself through one more path: a
// command must suit every path that may carry it. Limits only become narrower.
func (g *Group) learnLimits(info *initiator.LUInfo) {
	g.resizing.Lock()
	defer g.resizing.Unlock()
	old := g.lu()
	l := *old
	least := func(a *uint32, b uint32) { // 0 is no limit
		if b > 0 && (*a == 0 || b < *a) {
			*a = b
		}
	}
	least(&l.MaxTransfer, info.MaxTransfer)
	least(&l.OptTransfer, info.OptTransfer)
	least(&l.MaxUnmap, info.MaxUnmap)
	if n := info.MaxWriteSame; n > 0 && (l.MaxWriteSame == 0 || n < l.MaxWriteSame) {
		l.MaxWriteSame = n
	}
	l.TransferGranularity = max(l.TransferGranularity, info.TransferGranularity)
	if info.UnmapGranularity > l.UnmapGranularity {
		l.UnmapGranularity, l.UnmapAlignment = info.UnmapGranularity, info.UnmapAlignment
	}
	l.PhysicalBlock = max(l.PhysicalBlock, info.PhysicalBlock)
	l.Unmap, l.UnmapSame, l.Zeroes = l.Unmap && info.Unmap, l.UnmapSame && info.UnmapSame, l.Zeroes && (info.Zeroes || info.Standby)
	l.Rotational = l.Rotational || info.Rotational
	l.ReadOnly = l.ReadOnly || info.ReadOnly
	if l.MaxTransfer == old.MaxTransfer && l.OptTransfer == old.OptTransfer && l.MaxUnmap == old.MaxUnmap && l.MaxWriteSame == old.MaxWriteSame &&
		l.TransferGranularity == old.TransferGranularity && l.UnmapGranularity == old.UnmapGranularity && l.PhysicalBlock == old.PhysicalBlock &&
		l.Unmap == old.Unmap && l.UnmapSame == old.UnmapSame && l.Zeroes == old.Zeroes && l.Rotational == old.Rotational && l.ReadOnly == old.ReadOnly {
		return
	}
	g.info.Store(&l)
	g.maxIO.Store(g.largest(&l))
	g.log.Info("a path narrows what the map can do", "max_transfer_blocks", l.MaxTransfer, "max_unmap_blocks", l.MaxUnmap, "max_write_same_blocks", l.MaxWriteSame,
		"unmap", l.Unmap, "zeroes", l.Zeroes, "read_only", l.ReadOnly)
}

// maxTrim is the most that one UNMAP names, in bytes, where the unit names no
// limit of its own.
const maxTrim = 1 << 30

// granule is the unmap granularity and the offset of the first granule, bytes.
func granule(l *initiator.LUInfo) (grain, first int64) {
	bs := int64(l.BlockSize)
	grain = max(int64(l.UnmapGranularity), 1) * bs
	if l.MaxUnmap > 0 && int64(l.MaxUnmap)*bs < grain { // it contradicts itself
		return bs, 0
	}
	return grain, int64(l.UnmapAlignment) * bs % grain
}

// alignTrim moves a Trim on to its next whole granule (SBC-3 4.7.3.4): a unit
// ignores the rest, or worse, zeroes it slowly. False: there is no more.
func alignTrim(l *initiator.LUInfo, r *block.Request) bool {
	grain, first := granule(l)
	if over := (r.Off + r.Route.Pos - first%grain + grain) % grain; over != 0 {
		r.Route.Pos += grain - over
	}
	return r.Len-r.Route.Pos >= grain
}

// trimStep is how much of an aligned Trim goes in one UNMAP, in bytes.
func trimStep(l *initiator.LUInfo, r *block.Request) int64 {
	grain, _ := granule(l)
	n := min(r.Len-r.Route.Pos, maxTrim)
	if l.MaxUnmap > 0 {
		n = min(n, int64(l.MaxUnmap)*int64(l.BlockSize))
	}
	if n >= grain {
		n -= n % grain
	}
	return n
}
