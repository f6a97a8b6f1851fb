package scsi

import (
	"errors"
	"fmt"
	"strings"
)

// InquiryData is standard INQUIRY data (SPC-4 6.6.2).
type InquiryData struct {
	Qualifier, Type           uint8  // peripheral; 0 and 0 are a disk that is there
	Version                   uint8  // of SPC: 6 is SPC-4
	TPGS                      uint8  // asymmetric access: TPGSImplicit, TPGSExplicit or both
	Vendor, Product, Revision string // blanks trimmed at the right
	rawVendor, rawProduct     string
}

// ParseInquiry reads standard INQUIRY data.
func ParseInquiry(b []byte) (InquiryData, error) {
	if len(b) < 36 {
		return InquiryData{}, fmt.Errorf("inquiry data: %d bytes, need 36", len(b))
	}
	return InquiryData{
		Qualifier: b[0] >> 5, Type: b[0] & 0x1f, Version: b[2], TPGS: b[5] >> 4 & 3,
		Vendor: text(b[8:16]), Product: text(b[16:32]), Revision: text(b[32:36]),
		rawVendor: string(b[8:16]), rawProduct: string(b[16:32]),
	}, nil
}

// text keeps printable ASCII and trims blanks and NULs at the right.
func text(b []byte) string {
	s := strings.Map(func(r rune) rune {
		if r < 0x20 || r > 0x7e {
			return ' '
		}
		return r
	}, string(b))
	return strings.TrimRight(s, " ")
}

// page checks the header of a vital product data page and returns its payload.
func page(b []byte, code uint8) ([]byte, error) {
	if len(b) < 4 {
		return nil, fmt.Errorf("VPD page %02x: %d bytes, need 4", code, len(b))
	}
	if b[1] != code {
		return nil, fmt.Errorf("VPD page %02x: the target answered with page %02x", code, b[1])
	}
	n := int(be.Uint16(b[2:]))
	if n > len(b)-4 {
		n = len(b) - 4
	}
	return b[4 : 4+n], nil
}

// ParseVPDPages reads page 00: the codes of the pages that exist.
func ParseVPDPages(b []byte) ([]uint8, error) { return page(b, 0x00) }

// ParseVPD80 reads page 80, the unit serial number, blanks trimmed.
func ParseVPD80(b []byte) (string, error) {
	p, err := page(b, 0x80)
	return strings.TrimSpace(text(p)), err
}

// BlockLimits is VPD page B0 (SBC-3 6.6.4), in logical blocks; 0 is unlimited or unknown.
type BlockLimits struct {
	OptimalGranularity        uint16 // transfers that are no multiple are slow
	MaxTransfer, OptTransfer  uint32 // of one READ or WRITE
	MaxUnmapLBAs, MaxUnmapCnt uint32 // of one UNMAP; Cnt counts descriptors
	UnmapGranularity          uint32 // less than that is not unmapped
	UnmapAlignment            uint32 // of the first granule; 0 if the unit does not tell
	MaxWriteSame              uint64 // of one WRITE SAME
	NonZeroSame               bool   // WSNZ: WRITE SAME of "0 blocks, all there are" is refused
}

// ParseBlockLimits reads page B0; short pages leave the later fields 0.
func ParseBlockLimits(b []byte) (l BlockLimits, err error) {
	p, err := page(b, 0xb0)
	if err != nil {
		return l, err
	}
	var full [60]byte
	copy(full[:], p)
	l.OptimalGranularity = be.Uint16(full[2:])
	l.MaxTransfer, l.OptTransfer = be.Uint32(full[4:]), be.Uint32(full[8:])
	l.MaxUnmapLBAs, l.MaxUnmapCnt = be.Uint32(full[16:]), be.Uint32(full[20:])
	l.UnmapGranularity = be.Uint32(full[24:])
	if a := be.Uint32(full[28:]); a>>31 != 0 {
		l.UnmapAlignment = a &^ (1 << 31)
	}
	l.NonZeroSame = full[0]&1 != 0
	l.MaxWriteSame = be.Uint64(full[32:])
	return l, nil
}

// ParseRotational reads page B1 (SBC-3 6.6.3): false only if the medium says
// that it does not rotate.
func ParseRotational(b []byte) (bool, error) {
	p, err := page(b, 0xb1)
	if err != nil || len(p) < 2 {
		return true, err
	}
	return be.Uint16(p) != 1, nil
}

// Provisioning is VPD page B2 (SBC-3 6.6.5): LBPU, UNMAP works; LBPWS, WRITE SAME (16)
// with its UNMAP bit does.
type Provisioning struct{ Unmap, WriteSame bool }

// ParseProvisioning reads page B2: LBPU and LBPWS.
func ParseProvisioning(b []byte) (Provisioning, error) {
	p, err := page(b, 0xb2)
	if err != nil || len(p) < 2 {
		return Provisioning{}, err
	}
	return Provisioning{Unmap: p[1]&0x80 != 0, WriteSame: p[1]&0x40 != 0}, nil
}

// Capacity is what READ CAPACITY says (SBC-3 5.15, 5.16).
type Capacity struct {
	Blocks        uint64 // logical blocks: the last LBA and one
	BlockSize     int    // bytes, a power of two from 512 to 65536
	PhysicalBlock int    // bytes
	Thin, Zeroes  bool   // LBPME, LBPRZ
}

// ParseReadCapacity16 reads READ CAPACITY (16) data (SBC-3 5.16.2).
func ParseReadCapacity16(b []byte) (Capacity, error) {
	if len(b) < 12 {
		return Capacity{}, fmt.Errorf("capacity: %d bytes, need 12", len(b))
	}
	last, size := be.Uint64(b), be.Uint32(b[8:])
	var flags, exp uint8
	if len(b) >= 15 {
		exp, flags = b[13]&0x0f, b[14]
	}
	return capacity(last, size, exp, flags)
}

// ParseReadCapacity10 reads READ CAPACITY (10) data (SBC-3 5.15.2). A last LBA
// of 2^32-1 means that the 16-byte form is needed.
func ParseReadCapacity10(b []byte) (Capacity, error) {
	if len(b) < 8 {
		return Capacity{}, fmt.Errorf("capacity: %d bytes, need 8", len(b))
	}
	if be.Uint32(b) == 1<<32-1 {
		return Capacity{}, errors.New("capacity: too large for READ CAPACITY (10), and the unit does not know the 16-byte form")
	}
	return capacity(uint64(be.Uint32(b)), be.Uint32(b[4:]), 0, 0)
}

func capacity(last uint64, size uint32, exp, flags uint8) (Capacity, error) {
	if size < 512 || size > 65536 || size&(size-1) != 0 {
		return Capacity{}, fmt.Errorf("capacity: block size %d is not a power of two from 512 to 65536", size)
	}
	if last >= (1<<62)/uint64(size) {
		return Capacity{}, fmt.Errorf("capacity: last block %d is beyond any disk", last)
	}
	phys := int(size) << exp
	if exp > 8 {
		phys = int(size)
	}
	return Capacity{Blocks: last + 1, BlockSize: int(size), PhysicalBlock: phys, Thin: flags&0x80 != 0, Zeroes: flags&0x40 != 0}, nil
}

// Caching is the caching mode page (SBC-3 6.5.5) with the device-specific parameter
// before it (6.5.1): WCE, WP and DPOFUA.
type Caching struct{ WriteProtected, DPOFUA, WriteCache bool }

// ParseModeCaching reads MODE SENSE (6) data that asked for page 08 or 3F (SBC-3 6.5.5).
func ParseModeCaching(b []byte) (c Caching, err error) {
	if len(b) < 4 {
		return c, fmt.Errorf("mode data: %d bytes, need 4", len(b))
	}
	c.WriteProtected, c.DPOFUA = b[2]&0x80 != 0, b[2]&0x10 != 0
	for p := b[min(4+int(b[3]), len(b)):]; len(p) >= 3; {
		if p[0]&0x3f == 0x08 {
			c.WriteCache = p[2]&0x04 != 0
		}
		n := 2 + int(p[1])
		if p[0]&0x40 != 0 && len(p) >= 4 {
			n = 4 + int(be.Uint16(p[2:]))
		}
		p = p[min(n, len(p)):]
	}
	return c, nil
}

// ParseReportLUNs reads REPORT LUNS data into raw LUNs, each once. size is how
// many bytes the whole answer has, of which b may be the beginning.
func ParseReportLUNs(b []byte) (luns [][8]byte, size uint64, err error) {
	if len(b) < 8 {
		return nil, 0, fmt.Errorf("LUN list: %d bytes, need 8", len(b))
	}
	size = 8 + uint64(be.Uint32(b))
	n := int(min(size, uint64(len(b)))-8) / 8
	seen := make(map[[8]byte]bool, n)
	for i := range n {
		if l := [8]byte(b[8+8*i:]); !seen[l] {
			seen[l] = true
			luns = append(luns, l)
		}
	}
	return luns, size, nil
}
