package scsi

import "fmt"

// Provisioning status (SBC-3 table 66).
const (
	Mapped      uint8 = 0
	Deallocated uint8 = 1
	Anchored    uint8 = 2
)

// LBARun is a run of blocks of one provisioning status; it begins where the run
// before it ends.
type LBARun struct {
	Blocks uint64 // logical blocks, at least one
	Status uint8  // Mapped, Deallocated or Anchored
}

// GetLBAStatus builds GET LBA STATUS (SBC-3 5.4) from block lba on, for an answer of at
// most alloc bytes: 8, and 16 for each run.
func GetLBAStatus(lba uint64, alloc uint32) (c CDB) {
	c[0], c[1] = OpServiceIn16, 0x12
	be.PutUint64(c[2:], lba)
	be.PutUint32(c[10:], alloc)
	return c
}

// ParseLBAStatus reads GET LBA STATUS data that was asked for from lba on. The
// runs must follow each other without a gap.
func ParseLBAStatus(b []byte, lba uint64) (runs []LBARun, err error) {
	if len(b) < 8 {
		return nil, fmt.Errorf("LBA status: %d bytes, need 8", len(b))
	}
	for p := b[8:]; len(p) >= 16; p = p[16:] {
		at, n := be.Uint64(p), uint64(be.Uint32(p[8:]))
		if at > lba || len(runs) > 0 && at != lba {
			return runs, fmt.Errorf("LBA status: a run at %d where %d was due", at, lba)
		}
		if n <= lba-at { // the first may begin before what was asked
			break
		}
		if n -= lba - at; lba+n < lba {
			return runs, fmt.Errorf("LBA status: a run of %d blocks at %d ends beyond any disk", n, lba)
		}
		runs = append(runs, LBARun{n, p[12] & 0x0f})
		lba += n
	}
	return runs, nil
}
