package scsi

import "fmt"

// Sense keys (SPC-4 4.5.6).
const (
	KeyNoSense        uint8 = 0x0
	KeyRecovered      uint8 = 0x1
	KeyNotReady       uint8 = 0x2
	KeyMedium         uint8 = 0x3
	KeyHardware       uint8 = 0x4
	KeyIllegalRequest uint8 = 0x5
	KeyUnitAttention  uint8 = 0x6
	KeyDataProtect    uint8 = 0x7
	KeyBlankCheck     uint8 = 0x8
	KeyCopyAborted    uint8 = 0xa
	KeyAborted        uint8 = 0xb
	KeyOverflow       uint8 = 0xd
	KeyMiscompare     uint8 = 0xe
	KeyCompleted      uint8 = 0xf
)

// Sense is parsed sense data (SPC-4 4.5), fixed or descriptor format.
type Sense struct {
	Key, ASC, ASCQ uint8
	Deferred       bool // belongs to an earlier command
	Valid          bool // false: no usable sense data was there
}

// ParseSense reads as much as b holds; short or absent sense is not an error.
func ParseSense(b []byte) (s Sense) {
	if len(b) < 3 {
		return s
	}
	switch b[0] & 0x7f {
	case 0x70, 0x71:
		s.Valid, s.Deferred, s.Key = true, b[0]&0x7f == 0x71, b[2]&0x0f
		if len(b) > 12 {
			s.ASC = b[12]
		}
		if len(b) > 13 {
			s.ASCQ = b[13]
		}
	case 0x72, 0x73:
		s.Valid, s.Deferred, s.Key, s.ASC = true, b[0]&0x7f == 0x73, b[1]&0x0f, b[2]
		if len(b) > 3 {
			s.ASCQ = b[3]
		}
	}
	return s
}

var keyNames = [16]string{"NO SENSE", "RECOVERED ERROR", "NOT READY", "MEDIUM ERROR", "HARDWARE ERROR", "ILLEGAL REQUEST",
	"UNIT ATTENTION", "DATA PROTECT", "BLANK CHECK", "VENDOR SPECIFIC", "COPY ABORTED", "ABORTED COMMAND", "RESERVED",
	"VOLUME OVERFLOW", "MISCOMPARE", "COMPLETED"}

var ascNames = map[uint16]string{
	0x0400: "not ready, cause not reportable", 0x0401: "becoming ready", 0x0402: "needs START UNIT", 0x0403: "manual intervention required",
	0x040a: "asymmetric access state transition", 0x040b: "target port in standby state", 0x040c: "target port in unavailable state",
	0x2000: "invalid command operation code", 0x2100: "LBA out of range", 0x2400: "invalid field in CDB", 0x2500: "logical unit not supported",
	0x2600: "invalid field in parameter list", 0x2700: "write protected", 0x2707: "space allocation failed", 0x2900: "power on or reset",
	0x2901: "power on", 0x2903: "bus device reset", 0x2904: "device internal reset", 0x2907: "I_T nexus loss", 0x2a01: "mode parameters changed",
	0x2a06: "asymmetric access state changed", 0x2a09: "capacity data changed", 0x2f00: "commands cleared by another initiator",
	0x3f03: "inquiry data changed", 0x3f0e: "reported LUNs data changed", 0x1100: "unrecovered read error", 0x4400: "internal target failure",
}

// String is the sense as an operator reads it.
func (s Sense) String() string {
	if !s.Valid {
		return "no sense data"
	}
	text := keyNames[s.Key&15]
	if n, ok := ascNames[uint16(s.ASC)<<8|uint16(s.ASCQ)]; ok {
		text += ", " + n
	}
	return fmt.Sprintf("%s (%x/%02x/%02x)", text, s.Key, s.ASC, s.ASCQ)
}

// StatusText names a SAM status.
func StatusText(st uint8) string {
	switch st {
	case StatusGood:
		return "GOOD"
	case StatusCheckCondition:
		return "CHECK CONDITION"
	case StatusConditionMet:
		return "CONDITION MET"
	case StatusBusy:
		return "BUSY"
	case StatusReservationConflict:
		return "RESERVATION CONFLICT"
	case StatusTaskSetFull:
		return "TASK SET FULL"
	case StatusACAActive:
		return "ACA ACTIVE"
	case StatusTaskAborted:
		return "TASK ABORTED"
	}
	return fmt.Sprintf("status %#02x", st)
}
