package scsi

import "fmt"

// VolumeAccess is vital product data page C9 of RDAC arrays (LSI, NetApp
// E-Series and those sold under other names), the volume access control.
type VolumeAccess struct {
	Connected bool // a unit is there
	Owner     bool // this controller owns it
	Sharing   bool // any controller takes I/O
	// Preferred and Secondary say what the path is for; other arrays say neither.
	Preferred, Secondary bool
	// Reported says that the access states follow: those of this controller's
	// port group and of the other one's, as in REPORT TARGET PORT GROUPS.
	Reported     bool
	State, Other uint8
	Reason       uint8 // why this controller is unavailable
}

// RDACReason says in words why an RDAC controller is unavailable.
func RDACReason(r uint8) string {
	switch r {
	case 2:
		return "it does not respond to queries"
	case 3:
		return "it is held in reset"
	case 4, 5:
		return "its firmware is being loaded"
	case 6:
		return "it was quiesced by its administrator"
	case 7:
		return "it is in service mode"
	}
	return fmt.Sprintf("reason %d", r)
}

// ParseVolumeAccess reads page C9.
func ParseVolumeAccess(b []byte) (v VolumeAccess, err error) {
	if len(b) < 14 || b[1] != 0xc9 {
		return v, fmt.Errorf("VPD page C9 of %d bytes is too short or another page", len(b))
	}
	v = VolumeAccess{
		Connected: b[0]&0x7f == 0,
		Owner:     b[8]&0x01 != 0, Sharing: b[8]&0x20 != 0, Reported: b[8]&0x10 != 0,
		Preferred: b[9]&0x0f == 1, Secondary: b[9]&0x0f == 2,
		State: b[10] & 0x0f, Reason: b[11], Other: b[12] & 0x0f,
	}
	return v, nil
}

// ClariionPath is vital product data page C0 of CLARiiON and VNX arrays, the
// unit path report.
type ClariionPath struct {
	State uint8    // 0 unbound or LUNZ, 1 bound but owned by the other processor, 2 owned by this one
	WWN   [16]byte // of the unit
	// Default says that this is the path of the processor that owns the unit by
	// configuration.
	Default bool
	// Configured says that initiator type, failover mode (1 or 4) and the array's
	// communication path are set as failover needs them.
	Configured bool
	Busy       bool // an operation on the unit is under way
}

// ParseClariionPath reads page C0 in the revision that is known.
func ParseClariionPath(b []byte) (c ClariionPath, err error) {
	if len(b) < 49 || b[1] != 0xc0 || b[9] != 0 {
		return c, fmt.Errorf("VPD page C0 of %d bytes has an unknown format", len(b))
	}
	c.State, c.Default = b[4], b[5] == b[8]
	copy(c.WWN[:], b[10:])
	mode := b[28] & 0x07
	c.Configured = b[27] == 0x03 && (mode == 4 || mode == 6) && b[30]&0x04 != 0
	c.Busy = b[48] != 0
	return c, nil
}
