package scsi

import (
	"encoding/hex"
	"fmt"
	"time"
)

// Operation codes of asymmetric logical unit access (SPC-4 5.15).
const (
	OpMaintenanceIn  uint8 = 0xa3
	OpMaintenanceOut uint8 = 0xa4
	targetPortGroups uint8 = 0x0a // service action of both
)

// Asymmetric access states (SPC-4 table 305).
const (
	ActiveOptimized    uint8 = 0x0
	ActiveNonOptimized uint8 = 0x1
	Standby            uint8 = 0x2
	Unavailable        uint8 = 0x3
	LBADependent       uint8 = 0x4
	Offline            uint8 = 0xe
	Transitioning      uint8 = 0xf
)

// TPGS of INQUIRY: which asymmetric access a unit supports (SPC-4 table 144).
const (
	TPGSImplicit uint8 = 1 // the target moves the states
	TPGSExplicit uint8 = 2 // SET TARGET PORT GROUPS may
)

// AccessStateText names an asymmetric access state.
func AccessStateText(s uint8) string {
	switch s {
	case ActiveOptimized:
		return "active/optimized"
	case ActiveNonOptimized:
		return "active/non-optimized"
	case Standby:
		return "standby"
	case Unavailable:
		return "unavailable"
	case LBADependent:
		return "LBA-dependent"
	case Offline:
		return "offline"
	case Transitioning:
		return "transitioning"
	}
	return fmt.Sprintf("access state %#x", s)
}

// PortGroup is one descriptor of REPORT TARGET PORT GROUPS.
type PortGroup struct {
	ID        uint16 // target port group, as in page 83
	State     uint8  // ActiveOptimized and so on
	Preferred bool   // PREF
	Supported uint8  // bits of the states that exist, as on the wire
	Ports     []uint16
}

// ReportTargetPortGroups builds REPORT TARGET PORT GROUPS (SPC-4 6.37), with
// the extended header if wanted: it tells how long a transition may take.
func ReportTargetPortGroups(alloc uint32, extended bool) (c CDB) {
	c[0], c[1] = OpMaintenanceIn, targetPortGroups
	if extended {
		c[1] |= 1 << 5
	}
	be.PutUint32(c[6:], alloc)
	return c
}

// SetTargetPortGroups builds SET TARGET PORT GROUPS (SPC-4 6.45) that wants one
// group in a state, and its parameter list.
func SetTargetPortGroups(group uint16, state uint8) (c CDB, list []byte) {
	c[0], c[1] = OpMaintenanceOut, targetPortGroups
	list = make([]byte, 8)
	list[4] = state
	be.PutUint16(list[6:], group)
	be.PutUint32(c[6:], uint32(len(list)))
	return c, list
}

// ParsePortGroups reads REPORT TARGET PORT GROUPS data with either header, and
// the implicit transition time, 0 if the target does not tell. Descriptors cut
// off at the end are left out.
func ParsePortGroups(b []byte) (groups []PortGroup, transition time.Duration, err error) {
	if len(b) < 4 {
		return nil, 0, fmt.Errorf("target port groups: %d bytes, need 4", len(b))
	}
	p := b[4:]
	p = p[:min(uint64(len(p)), uint64(be.Uint32(b)))]
	// A target that knows no extended header ignores the format of the CDB;
	// bits 4 to 6 of the first descriptor byte are 0 there, except for PREF.
	if len(p) >= 4 && p[0]&0x70 == 0x10 {
		transition = time.Duration(p[1]) * time.Second
		p = p[4:]
	}
	for len(p) >= 8 {
		g := PortGroup{ID: be.Uint16(p[2:]), State: p[0] & 0x0f, Preferred: p[0]&0x80 != 0, Supported: p[1]}
		n := int(p[7])
		p = p[8:]
		for ; n > 0 && len(p) >= 4; n-- {
			g.Ports = append(g.Ports, be.Uint16(p[2:]))
			p = p[4:]
		}
		groups = append(groups, g)
	}
	return groups, transition, nil
}

// TargetPort are the relative target port and the target port group through
// which page 83 was read (SPC-4 7.8.6.7, 7.8.6.8); ok is false without a group.
func TargetPort(ds []Designator) (port, group uint16, ok bool) {
	for _, d := range ds {
		if d.Association != 1 || len(d.ID) < 4 {
			continue
		}
		switch d.Type {
		case 4:
			port = be.Uint16(d.ID[2:])
		case 5:
			group, ok = be.Uint16(d.ID[2:]), true
		}
	}
	return port, group, ok
}

// TargetDevice names the device that a unit belongs to, the same through all its
// ports (SPC-4 7.8.6, association 2): its SCSI name, else its NAA in hex, else
// empty.
func TargetDevice(ds []Designator) (name string) {
	for _, d := range ds {
		switch {
		case d.Association != 2:
		case d.Type == TypeSCSIName:
			return text(d.ID)
		case d.Type == TypeNAA:
			name = "naa." + hex.EncodeToString(d.ID)
		}
	}
	return name
}
