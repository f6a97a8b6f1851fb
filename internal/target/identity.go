package target

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
)

// Identity is what a logical unit says it is.
type Identity struct {
	Vendor   string // 8 characters of INQUIRY
	Product  string // 16 characters
	Revision string // 4 characters
	Serial   string // VPD page 80
	// Designators are the LU-associated designation descriptors of VPD page
	// 83 (SPC-4 7.8.6), ready for the wire.
	Designators []byte
	// NoPortDesignators leaves out the descriptors of port and target that
	// follow, as old targets do.
	NoPortDesignators bool
	// NoVPD83 makes the page an illegal request.
	NoVPD83 bool
}

// Designator types (SPC-4 table 493).
const (
	typeT10   = 1
	typeNAA   = 3
	typePort  = 4
	typeGroup = 5
	typeName  = 8
)

// Designator appends one descriptor to b: association 0 is the LU, 1 the
// port, 2 the target; codeSet 1 is binary, 2 ASCII, 3 UTF-8.
func Designator(b []byte, association, kind, codeSet uint8, id []byte) []byte {
	h := []byte{codeSet, association<<4 | kind, 0, byte(len(id))}
	if association != 0 {
		h[0] |= 5 << 4 // iSCSI
		h[1] |= 0x80   // PIV
	}
	return append(append(b, h...), id...)
}

// NAA6 is the 16-byte NAA IEEE Registered Extended name derived from a
// serial: equal serials have equal names.
func NAA6(serial string) [16]byte {
	sum := sha256.Sum256([]byte("mpathd target " + serial))
	var n [16]byte
	copy(n[:], sum[:])
	// 6, then a locally administered OUI so that no vendor's is claimed.
	n[0], n[1], n[2], n[3] = 0x60, 0x26, 0xd7, n[3]&0x0f
	return n
}

// WWID is the SCSI ID of a DefaultIdentity with this serial, as scsi_id and
// multipathd print it.
func WWID(serial string) string { return fmt.Sprintf("3%x", NAA6(serial)) }

// DefaultIdentity names an LU by an NAA-6 derived from its serial.
func DefaultIdentity(serial string) Identity {
	naa := NAA6(serial)
	d := Designator(nil, 0, typeNAA, 1, naa[:])
	d = Designator(d, 0, typeT10, 2, []byte("MPATHD  "+serial))
	return Identity{Vendor: "MPATHD", Product: "RAM DISK", Revision: "1", Serial: serial, Designators: d}
}

// IETIdentity mimics iSCSI Enterprise Target: one binary T10 designator of
// "IET" in eight bytes and a 16-byte ID.
func IETIdentity(id [16]byte) Identity {
	t10 := append([]byte("IET\x00\x00\x00\x00\x00"), id[:]...)
	return Identity{
		Vendor: "IET", Product: "VIRTUAL-DISK", Revision: "0", Serial: fmt.Sprintf("%x", id[:8]),
		Designators: Designator(nil, 0, typeT10, 1, t10), NoPortDesignators: true,
	}
}

// TGTIdentity mimics tgtd's defaults, which number the LU and say nothing of
// the disk: unrelated servers have equal ones.
func TGTIdentity(target, lun uint16) Identity {
	serial := fmt.Sprintf("%04x%04x", target, lun)
	var naa [8]byte
	binary.BigEndian.PutUint64(naa[:], 3<<60|uint64(target)<<32|uint64(lun))
	d := Designator(nil, 0, typeT10, 2, []byte("IET     "+serial))
	d = Designator(d, 0, typeNAA, 1, naa[:])
	return Identity{
		Vendor: "IET", Product: "VIRTUAL-DISK", Revision: "0001", Serial: "beaf" + serial[3:],
		Designators: d, NoPortDesignators: true,
	}
}

// SetIdentity replaces what the LU says it is, at once and for all sessions.
func (l *LU) SetIdentity(id Identity) {
	id.Designators = append([]byte(nil), id.Designators...)
	l.identity.Store(&id)
}

// Identity is the current identity.
func (l *LU) Identity() Identity { return *l.identity.Load() }
