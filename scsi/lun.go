package scsi

import (
	"fmt"
	"strconv"
	"strings"
)

// FlatLUNs is where flat space addressing ends (SAM-5 4.7.5): numbers from 0.
const FlatLUNs = 16384

// LUNFromNumber encodes a LUN below 256 as peripheral device, below FlatLUNs as
// flat space addressing (SAM-5 4.7). Larger numbers are taken as the raw eight
// bytes.
func LUNFromNumber(n uint64) (l [8]byte) {
	switch {
	case n < 256:
		l[1] = uint8(n)
	case n < FlatLUNs:
		l[0], l[1] = 0x40|uint8(n>>8), uint8(n)
	default:
		be.PutUint64(l[:], n)
	}
	return l
}

// LUNNumber is the number of a raw LUN that LUNFromNumber would encode like
// this, and the raw eight bytes of any other.
func LUNNumber(l [8]byte) uint64 {
	if n := uint64(l[0]&0x3f)<<8 | uint64(l[1]); LUNFromNumber(n) == l {
		return n
	}
	return be.Uint64(l[:])
}

// LUNText is how users write a LUN: its number, if LUNFromNumber would encode
// that number like this, else the raw eight bytes as 0x and 16 digits. Some
// targets use flat space addressing for small numbers too, and what they
// reported is what they must be told.
func LUNText(l [8]byte) string {
	if n := LUNNumber(l); n < FlatLUNs && LUNFromNumber(n) == l {
		return strconv.FormatUint(n, 10)
	}
	return fmt.Sprintf("0x%016x", be.Uint64(l[:]))
}

// ParseLUN reads what LUNText writes.
func ParseLUN(s string) (l [8]byte, err error) {
	bad := fmt.Errorf("%.20q is no LUN: want 0 to %d, or 0x and the 16 hex digits of its eight bytes", s, FlatLUNs-1)
	if digits, raw := strings.CutPrefix(s, "0x"); raw {
		n, err := strconv.ParseUint(digits, 16, 64)
		if err != nil || len(digits) != 16 {
			return l, bad
		}
		be.PutUint64(l[:], n)
		return l, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n >= FlatLUNs || strconv.FormatUint(n, 10) != s {
		return l, bad
	}
	return LUNFromNumber(n), nil
}
