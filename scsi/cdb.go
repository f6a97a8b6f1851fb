// Package scsi is the wire format of SCSI commands and their answers (SPC-4,
// SBC-3): pure functions over bytes. Nothing a target says sizes an allocation
// or indexes memory unchecked.
package scsi

import "encoding/binary"

// CDB is a command descriptor block of up to 16 bytes, zero-filled.
type CDB = [16]byte

// Status codes (SAM-5 5.3.1).
const (
	StatusGood                uint8 = 0x00
	StatusCheckCondition      uint8 = 0x02
	StatusConditionMet        uint8 = 0x04
	StatusBusy                uint8 = 0x08
	StatusReservationConflict uint8 = 0x18
	StatusTaskSetFull         uint8 = 0x28
	StatusACAActive           uint8 = 0x30
	StatusTaskAborted         uint8 = 0x40
)

// Operation codes.
const (
	OpTestUnitReady   uint8 = 0x00
	OpRequestSense    uint8 = 0x03
	OpInquiry         uint8 = 0x12
	OpModeSense6      uint8 = 0x1a
	OpStartStop       uint8 = 0x1b
	OpReadCapacity10  uint8 = 0x25
	OpRead10          uint8 = 0x28
	OpWrite10         uint8 = 0x2a
	OpSyncCache10     uint8 = 0x35
	OpUnmap           uint8 = 0x42
	OpModeSense10     uint8 = 0x5a
	OpRead16          uint8 = 0x88
	OpCompareAndWrite uint8 = 0x89
	OpWrite16         uint8 = 0x8a
	OpSyncCache16     uint8 = 0x91
	OpWriteSame16     uint8 = 0x93
	OpServiceIn16     uint8 = 0x9e
	OpReportLUNs      uint8 = 0xa0
)

var be = binary.BigEndian

// TestUnitReady builds TEST UNIT READY (SPC-4 6.47).
func TestUnitReady() CDB { return CDB{} }

// StartUnit builds START STOP UNIT with START (SBC-3 5.25).
func StartUnit() (c CDB) {
	c[0], c[4] = OpStartStop, 0x01
	return c
}

// Inquiry builds INQUIRY (SPC-4 6.6); page is used with evpd only.
func Inquiry(evpd bool, page uint8, alloc uint16) (c CDB) {
	c[0] = OpInquiry
	if evpd {
		c[1], c[2] = 1, page
	}
	be.PutUint16(c[3:], alloc)
	return c
}

// ReportLUNs builds REPORT LUNS, SELECT REPORT 0 (SPC-4 6.33).
func ReportLUNs(alloc uint32) (c CDB) {
	c[0] = OpReportLUNs
	be.PutUint32(c[6:], alloc)
	return c
}

// ReadCapacity16 builds READ CAPACITY (16) (SBC-3 5.16).
func ReadCapacity16(alloc uint32) (c CDB) {
	c[0], c[1] = OpServiceIn16, 0x10
	be.PutUint32(c[10:], alloc)
	return c
}

// ReadCapacity10 builds READ CAPACITY (10) (SBC-3 5.15).
func ReadCapacity10() (c CDB) {
	c[0] = OpReadCapacity10
	return c
}

// ModeSense6 builds MODE SENSE (6) without block descriptors (SPC-4 6.13).
func ModeSense6(page, alloc uint8) (c CDB) {
	c[0], c[1], c[2], c[4] = OpModeSense6, 0x08, page, alloc
	return c
}

// Read fills cdb with READ (16) or READ (10) (SBC-3 5.11, 5.13); blocks counts
// logical blocks. The 10-byte form needs lba < 2^32 and blocks < 2^16.
func Read(cdb *CDB, lba uint64, blocks uint32, use16 bool) {
	transfer(cdb, OpRead10, OpRead16, 0, lba, blocks, use16)
}

// Write fills cdb with WRITE (16) or WRITE (10) (SBC-3 5.33, 5.35).
func Write(cdb *CDB, lba uint64, blocks uint32, fua, use16 bool) {
	var f uint8
	if fua {
		f = 0x08
	}
	transfer(cdb, OpWrite10, OpWrite16, f, lba, blocks, use16)
}

// SyncCache fills cdb with SYNCHRONIZE CACHE, IMMED 0 (SBC-3 5.26, 5.27);
// lba 0 and blocks 0 mean the whole unit.
func SyncCache(cdb *CDB, lba uint64, blocks uint32, use16 bool) {
	transfer(cdb, OpSyncCache10, OpSyncCache16, 0, lba, blocks, use16)
}

func transfer(cdb *CDB, op10, op16, flags uint8, lba uint64, blocks uint32, use16 bool) {
	*cdb = CDB{}
	if use16 {
		cdb[0], cdb[1] = op16, flags
		be.PutUint64(cdb[2:], lba)
		be.PutUint32(cdb[10:], blocks)
		return
	}
	cdb[0], cdb[1] = op10, flags
	be.PutUint32(cdb[2:], uint32(lba))
	be.PutUint16(cdb[7:], uint16(blocks))
}

// UnmapListLen is the parameter list of UNMAP with one descriptor, in bytes.
const UnmapListLen = 24

// Unmap fills cdb and list (UnmapListLen bytes) with UNMAP of one extent (SBC-3 5.28).
func Unmap(cdb *CDB, list []byte, lba uint64, blocks uint32) {
	*cdb = CDB{0: OpUnmap}
	be.PutUint16(cdb[7:], UnmapListLen)
	clear(list[:UnmapListLen])
	be.PutUint16(list[0:], UnmapListLen-2)
	be.PutUint16(list[2:], 16)
	be.PutUint64(list[8:], lba)
	be.PutUint32(list[16:], blocks)
}

// CompareAndWrite builds COMPARE AND WRITE (SBC-3 5.2) of one block. Its data are
// the block to compare with and the block to write.
func CompareAndWrite(lba uint64) (c CDB) {
	c[0], c[13] = OpCompareAndWrite, 1
	be.PutUint64(c[2:], lba)
	return c
}

// WriteSame16 fills cdb with WRITE SAME (16) of one block of data (SBC-3 5.44).
func WriteSame16(cdb *CDB, lba uint64, blocks uint32, unmap bool) {
	transfer(cdb, 0, OpWriteSame16, 0, lba, blocks, true)
	if unmap {
		cdb[1] = 0x08
	}
}
