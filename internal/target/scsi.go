package target

import (
	"encoding/binary"
	"fmt"
)

// Operation codes (SPC-4, SBC-3).
const (
	opTestUnitReady  = 0x00
	opRequestSense   = 0x03
	opInquiry        = 0x12
	opModeSense6     = 0x1a
	opReadCapacity10 = 0x25
	opRead10         = 0x28
	opWrite10        = 0x2a
	opSyncCache10    = 0x35
	opUnmap          = 0x42
	opModeSense10    = 0x5a
	opRead16         = 0x88
	opWrite16        = 0x8a
	opSyncCache16    = 0x91
	opWriteSame16    = 0x93
	opCompareWrite   = 0x89
	opServiceIn16    = 0x9e
	opReportLUNs     = 0xa0
	opMaintenanceIn  = 0xa3
	opMaintenanceOut = 0xa4
)

// maxWriteSame and maxUnmap bound one command, in bytes and descriptors.
const (
	maxWriteSame      = 64 << 20
	maxUnmapBytes     = 1 << 30
	maxUnmapDescr     = 256
	saReadCapacity16  = 0x10
	saGetLBAStatus    = 0x12
	pageCaching       = 0x08
	pageControl       = 0x0a
	pageAll           = 0x3f
	inquiryLen        = 74
	noDevice          = 0x7f // peripheral qualifier 3: no LU can be here
	versionSPC4       = 6
	additionalLenAt   = 4
	physicalBlockSize = 4096
)

// execute runs every command but READ and WRITE. The answer is valid until
// the next one and already cut to the allocation length.
func (c *conn) execute(r *request, param []byte) ([]byte, Sense) {
	cdb, lu := &r.cdb, r.lu
	be16, be32 := binary.BigEndian.Uint16, binary.BigEndian.Uint32
	switch cdb[0] {
	case opTestUnitReady:
		return nil, noSense
	case opRequestSense:
		b := c.scratch[:18]
		clear(b)
		b[0], b[7] = 0x70, 10
		return cut(b, uint32(cdb[4])), noSense
	case opInquiry:
		b, s := c.inquiry(lu, cdb)
		return cut(b, uint32(be16(cdb[3:]))), s
	case opReportLUNs:
		return cut(c.reportLUNs(), be32(cdb[6:])), noSense
	case opReadCapacity10:
		b := c.scratch[:8]
		binary.BigEndian.PutUint32(b, uint32(min(lu.size.Load()>>lu.shift-1, 0xffffffff)))
		binary.BigEndian.PutUint32(b[4:], uint32(lu.blockSize))
		return b, noSense
	case opServiceIn16:
		switch cdb[1] & 0x1f {
		case saReadCapacity16:
		case saGetLBAStatus:
			return c.lbaStatus(lu, cdb)
		default:
			return nil, errOpcode
		}
		b := c.scratch[:32]
		clear(b)
		binary.BigEndian.PutUint64(b, lu.size.Load()>>lu.shift-1)
		binary.BigEndian.PutUint32(b[8:], uint32(lu.blockSize))
		b[13] = lu.physicalExponent()
		b[14] = 0xc0 // LBPME, LBPRZ
		return cut(b, be32(cdb[10:])), noSense
	case opModeSense6:
		return c.modeSense(r, false), c.modePage(cdb[2])
	case opModeSense10:
		return c.modeSense(r, true), c.modePage(cdb[2])
	case opSyncCache10, opSyncCache16:
		c.tally.Flushes++
		lba, n := uint64(be32(cdb[2:])), uint64(be16(cdb[7:]))
		if cdb[0] == opSyncCache16 {
			lba, n = binary.BigEndian.Uint64(cdb[2:]), uint64(be32(cdb[10:]))
		}
		if total := lu.size.Load() >> lu.shift; lba > total || n > total-lba {
			return nil, errRange
		}
		return nil, noSense
	case opMaintenanceIn:
		return c.reportGroups(lu, cdb)
	case opMaintenanceOut:
		return nil, c.setGroups(lu, cdb, param)
	case opPersistentIn:
		return c.persistentIn(lu, cdb)
	case opPersistentOut:
		return nil, c.persistentOut(lu, cdb, param)
	case opUnmap:
		return nil, unmap(lu, param, r.n)
	case opWriteSame16:
		return nil, writeSame(lu, cdb, param)
	case opCompareWrite:
		return nil, compareAndWrite(lu, cdb, param)
	}
	return nil, errOpcode
}

func cut(b []byte, alloc uint32) []byte { return b[:min(uint32(len(b)), alloc)] }

// physicalExponent is log2 of the logical blocks in a physical one.
func (l *LU) physicalExponent() byte {
	e := byte(0)
	for l.blockSize<<e < physicalBlockSize {
		e++
	}
	return e
}

func (c *conn) reportLUNs() []byte {
	b := c.scratch[:8]
	clear(b)
	for i, l := range c.target.units() {
		if l != nil {
			first := byte(0) // peripheral device addressing
			if i > 255 {
				first = 0x40 | byte(i>>8) // flat space
			}
			b = append(b, first, byte(i), 0, 0, 0, 0, 0, 0)
		}
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-8))
	return b
}

func pad(b []byte, s string) {
	for i := copy(b, s); i < len(b); i++ {
		b[i] = ' '
	}
}

// inquiry is standard data or a vital product data page (SPC-4 6.6, 7.8).
func (c *conn) inquiry(lu *LU, cdb *[16]byte) ([]byte, Sense) {
	b := c.scratch[:inquiryLen]
	clear(b)
	if cdb[1]&1 == 0 {
		if cdb[2] != 0 {
			return nil, errField
		}
		b[2], b[3], b[additionalLenAt], b[7] = versionSPC4, 0x12, inquiryLen-5, 0x02 // HISUP, CMDQUE
		id := &Identity{}
		if lu == nil {
			b[0] = noDevice
		} else {
			id = lu.identity.Load()
			if a := lu.access.Load(); a != nil {
				b[5] = 0x10 // TPGS implicit
				if a.explicit {
					b[5] = 0x30
				}
			}
		}
		pad(b[8:16], id.Vendor)
		pad(b[16:32], id.Product)
		pad(b[32:36], id.Revision)
		for i, v := range []uint16{0x00a0, 0x0960, 0x0460, 0x04c0} { // SAM-5, iSCSI, SPC-4, SBC-3
			binary.BigEndian.PutUint16(b[58+2*i:], v)
		}
		return b, noSense
	}
	if lu == nil {
		return nil, errNoLUN
	}
	id := lu.identity.Load()
	b = b[:4]
	b[1] = cdb[2]
	put := func(n int) []byte { b = c.scratch[:4+n]; clear(b[4:]); return b }
	switch cdb[2] {
	case 0x00:
		if b = append(b, 0x00, 0x80); !id.NoVPD83 {
			b = append(b, 0x83)
		}
		b = append(b, 0xb0, 0xb1, 0xb2)
	case 0x80:
		b = append(b, id.Serial...)
	case 0x83:
		if id.NoVPD83 {
			return nil, errField
		}
		b = append(b, id.Designators...)
		if !id.NoPortDesignators {
			b = c.portDesignators(b)
		}
	case 0xb0:
		b = put(60)
		binary.BigEndian.PutUint16(b[6:], uint16(physicalBlockSize/lu.blockSize))
		binary.BigEndian.PutUint32(b[8:], uint32(maxTransfer>>lu.shift))
		binary.BigEndian.PutUint32(b[12:], uint32(c.srv.cfg.MaxBurst>>lu.shift))
		binary.BigEndian.PutUint32(b[20:], uint32(maxUnmapBytes>>lu.shift))
		binary.BigEndian.PutUint32(b[24:], maxUnmapDescr)
		binary.BigEndian.PutUint32(b[28:], uint32(physicalBlockSize/lu.blockSize))
		binary.BigEndian.PutUint64(b[36:], maxWriteSame>>lu.shift)
	case 0xb1:
		b = put(60)
		b[5] = 1 // not rotating
	case 0xb2:
		b = put(4)
		b[5], b[6] = 0x80|0x40|0x04, 2 // LBPU, LBPWS, LBPRZ; thin provisioned
	default:
		return nil, errField
	}
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)-4))
	return b, noSense
}

// portDesignators appends what page 83 says of this port and target.
func (c *conn) portDesignators(b []byte) []byte {
	b = Designator(b, 1, typePort, 1, binary.BigEndian.AppendUint32(nil, uint32(c.p.index)))
	b = Designator(b, 1, typeGroup, 1, binary.BigEndian.AppendUint32(nil, uint32(c.nexus.group)))
	name := func(s string) []byte { // NUL terminated, padded to four
		n := append([]byte(s), 0)
		return append(n, make([]byte, -len(n)&3)...)
	}
	b = Designator(b, 1, typeName, 3, name(fmt.Sprintf("%s,t,0x%04x", c.target.Name, c.nexus.group)))
	return Designator(b, 2, typeName, 3, name(c.target.Name))
}

// modePage refuses pages that do not exist.
func (c *conn) modePage(b2 byte) Sense {
	switch b2 & 0x3f {
	case pageCaching, pageControl, pageAll:
		if b2>>6 == 3 { // saved values
			return Sense{0x05, 0x39, 0x00}
		}
		return noSense
	}
	return errField
}

// modeSense is the header and the caching and control pages (SPC-4 7.5,
// SBC-3 6.4), without block descriptors.
func (c *conn) modeSense(r *request, ten bool) []byte {
	b := c.scratch[:4]
	if ten {
		b = c.scratch[:8]
	}
	clear(b)
	device := byte(0x10) // DPOFUA
	if r.lu.readOnly.Load() {
		device |= 0x80
	}
	page, changeable := r.cdb[2]&0x3f, r.cdb[2]>>6 == 1
	if page == pageCaching || page == pageAll {
		p := [20]byte{pageCaching, 18}
		if !r.lu.noCache.Load() && !changeable {
			p[2] = 0x04 // WCE
		}
		b = append(b, p[:]...)
	}
	if page == pageControl || page == pageAll {
		b = append(b, pageControl, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	}
	if ten {
		binary.BigEndian.PutUint16(b, uint16(len(b)-2))
		b[3] = device
		return cut(b, uint32(binary.BigEndian.Uint16(r.cdb[7:])))
	}
	b[0], b[2] = byte(len(b)-1), device
	return cut(b, uint32(r.cdb[4]))
}

// lbaStatus is GET LBA STATUS (SBC-3 5.4) with one descriptor: whether the
// memory from this block on exists, up to where that changes.
func (c *conn) lbaStatus(lu *LU, cdb *[16]byte) ([]byte, Sense) {
	lba := binary.BigEndian.Uint64(cdb[2:])
	if lba >= lu.size.Load()>>lu.shift {
		return nil, errRange
	}
	i := lba << lu.shift >> chunkShift
	none := lu.chunks[i].Load() == nil
	for i++; i < uint64(len(lu.chunks)) && (lu.chunks[i].Load() == nil) == none; i++ {
	}
	b := c.scratch[:24]
	clear(b)
	b[3] = 20
	binary.BigEndian.PutUint64(b[8:], lba)
	end := min(i<<chunkShift, lu.size.Load()) >> lu.shift
	binary.BigEndian.PutUint32(b[16:], uint32(min(end-lba, 1<<31)))
	if none {
		b[20] = 1 // deallocated
	}
	return cut(b, binary.BigEndian.Uint32(cdb[10:])), noSense
}

// unmap zeroes the ranges of an UNMAP parameter list (SBC-3 5.28).
func unmap(lu *LU, p []byte, want uint64) Sense {
	if lu.readOnly.Load() {
		return errWriteProtect
	}
	if want == 0 {
		return noSense
	}
	if uint64(len(p)) < want || len(p) < 8 {
		return errParamLength
	}
	n := int(binary.BigEndian.Uint16(p[2:]))
	if n > len(p)-8 {
		return errParamLength
	}
	if n/16 > maxUnmapDescr {
		return errParamList
	}
	for d := p[8:][:n]; len(d) >= 16; d = d[16:] {
		lba, blocks := binary.BigEndian.Uint64(d), uint64(binary.BigEndian.Uint32(d[8:]))
		if total := lu.size.Load() >> lu.shift; lba > total || blocks > total-lba {
			return errRange
		}
		if blocks<<lu.shift > maxUnmapBytes {
			return errParamList
		}
		lu.zero(lba<<lu.shift, blocks<<lu.shift)
	}
	return noSense
}

// writeSame is WRITE SAME(16), with and without UNMAP and NDOB (SBC-3 5.44).
func writeSame(lu *LU, cdb *[16]byte, p []byte) Sense {
	lba, blocks := binary.BigEndian.Uint64(cdb[2:]), uint64(binary.BigEndian.Uint32(cdb[10:]))
	total := lu.size.Load() >> lu.shift
	switch {
	case lba > total || blocks > total-lba:
		return errRange
	case lu.readOnly.Load():
		return errWriteProtect
	}
	if blocks == 0 {
		blocks = total - lba
	}
	if blocks<<lu.shift > maxWriteSame || cdb[1]&0xf0 != 0 { // ANCHOR, protection
		return errField
	}
	off, n := lba<<lu.shift, blocks<<lu.shift
	if cdb[1]&1 != 0 { // NDOB: zeroes
		lu.zero(off, n)
		return noSense
	}
	if len(p) < lu.blockSize {
		return errParamLength
	}
	p = p[:lu.blockSize]
	if [4096]byte(zeros[:4096]) == padded(p) {
		lu.zero(off, n)
		return noSense
	}
	for end := off + n; off < end; off += uint64(len(p)) {
		lu.write(p, off)
	}
	return noSense
}

// padded copies one block into a comparable array.
func padded(p []byte) (a [4096]byte) {
	copy(a[:], p)
	return a
}
