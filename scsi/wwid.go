package scsi

import (
	"encoding/hex"
	"fmt"
	"strings"
)

// Designator is one entry of VPD page 83 (SPC-4 7.8.6).
type Designator struct {
	Association uint8  // 0 logical unit, 1 target port, 2 target device
	Type        uint8  // 0 vendor, 1 T10, 2 EUI-64, 3 NAA, 8 SCSI name, ...
	CodeSet     uint8  // 1 binary, 2 ASCII, 3 UTF-8
	ID          []byte // of the page that was parsed, not a copy
}

// Designator types (SPC-4 7.8.6.1).
const (
	TypeVendor   uint8 = 0
	TypeT10      uint8 = 1
	TypeEUI64    uint8 = 2
	TypeNAA      uint8 = 3
	TypeSCSIName uint8 = 8
)

// ParseVPD83 reads the designators of page 83. A designator that reaches past
// the page ends the walk with an error and what was read before it.
func ParseVPD83(b []byte) ([]Designator, error) {
	p, err := page(b, 0x83)
	if err != nil {
		return nil, err
	}
	var ds []Designator
	for len(p) >= 4 {
		n := int(p[3])
		if n > len(p)-4 {
			return ds, fmt.Errorf("VPD page 83: a designator of %d bytes reaches past the page", n)
		}
		ds = append(ds, Designator{Association: p[1] >> 4 & 3, Type: p[1] & 0x0f, CodeSet: p[0] & 0x0f, ID: p[4 : 4+n]})
		p = p[4+n:]
	}
	return ds, nil
}

// rank orders designators as systemd's scsi_id does: NAA 6, NAA 5, other NAA,
// EUI-64, T10 vendor, vendor specific. Higher is better, 0 is unusable. SCSI
// names come last: scsi_id knows none, other tools do.
func rank(d Designator) int {
	if d.Association != 0 || len(d.ID) == 0 {
		return 0
	}
	switch d.Type {
	case TypeNAA:
		switch d.ID[0] >> 4 {
		case 6:
			if len(d.ID) == 16 {
				return 9
			}
		case 5:
			if len(d.ID) == 8 {
				return 8
			}
		default:
			if len(d.ID) == 8 {
				return 7
			}
		}
		return 0
	case TypeEUI64:
		if n := len(d.ID); n == 8 || n == 12 || n == 16 {
			return 6
		}
	case TypeT10:
		if len(d.ID) >= 8 {
			return 5
		}
	case TypeVendor:
		return 4
	case TypeSCSIName:
		return 3
	}
	return 0
}

// WWID is the SCSI ID of a logical unit as scsi_id prints it, the other
// spellings that multipath tools use for the same unit, and whether the ID is
// only a number that the target software assigns by default, which unrelated
// servers share. An empty WWID means that the unit has no usable ID.
func WWID(inq InquiryData, ds []Designator, serial string) (wwid string, synonyms []string, numberedDefault bool) {
	best, bestRank := -1, 0
	for i, d := range ds {
		if r := rank(d); r > bestRank {
			best, bestRank = i, r
		}
	}
	add := func(s string) {
		if s == "" || s == wwid {
			return
		}
		for _, have := range synonyms {
			if have == s {
				return
			}
		}
		synonyms = append(synonyms, s)
	}
	if best < 0 {
		if serial == "" {
			return "", nil, false
		}
		return "S" + blanks(inq.Vendor+"_"+inq.Product+"_"+serial), nil, false
	}
	wwid = spell(inq, ds[best], true)
	numberedDefault = true
	for _, d := range ds {
		if rank(d) == 0 {
			continue
		}
		add(spell(inq, d, true))
		add(spell(inq, d, false))
		numberedDefault = numberedDefault && isNumbered(d)
	}
	return wwid, synonyms, numberedDefault
}

// spell prints one designator: as scsi_id does, or as multipathd's own parser.
func spell(inq InquiryData, d Designator, scsiID bool) string {
	switch d.Type {
	case TypeT10:
		if d.CodeSet == 1 && scsiID {
			return "1" + hex.EncodeToString(d.ID)
		}
		return "1" + blanks(clean(d.ID))
	case TypeVendor:
		id := clean(d.ID)
		if d.CodeSet == 1 {
			id = hex.EncodeToString(d.ID)
		}
		return "0" + blanks(inq.Vendor+"_"+inq.Product+"_"+id)
	case TypeSCSIName:
		name := strings.TrimRight(clean(d.ID), " ")
		if scsiID {
			return "8" + name
		}
		switch {
		case strings.HasPrefix(name, "naa."):
			return "3" + strings.ToLower(name[4:])
		case strings.HasPrefix(name, "eui."):
			return "2" + strings.ToLower(name[4:])
		}
		return "8" + strings.TrimPrefix(name, "iqn.")
	}
	return string('0'+rune(d.Type)) + hex.EncodeToString(d.ID)
}

// clean drops what follows a NUL in the tail and maps unprintables to blanks.
func clean(b []byte) string { return text([]byte(strings.TrimRight(string(b), "\x00"))) }

// blanks turns runs of blanks into one underscore and drops trailing ones.
func blanks(s string) string {
	return strings.Join(strings.Fields(s), "_")
}

// isNumbered recognises IDs that only count a target's own numbers: tgt's
// "IET     TTTTLLLL" (target and LUN in hex) and its locally assigned NAA-3.
func isNumbered(d Designator) bool {
	switch d.Type {
	case TypeNAA:
		return d.ID[0]>>4 == 3
	case TypeT10:
		s := clean(d.ID)
		if !strings.HasPrefix(s, "IET     ") || len(s) != 16 {
			return false
		}
		for _, c := range s[8:] {
			if !strings.ContainsRune("0123456789abcdefABCDEF", c) {
				return false
			}
		}
		return s[8:12] <= "00ff" && s[12:16] <= "00ff"
	}
	return false
}

// DesignatorText is a designator in words, for people and JSON.
type DesignatorText struct {
	Association string `json:"association"`
	Type        string `json:"type"`
	CodeSet     string `json:"code_set"`
	Text        string `json:"text"`
}

// Describe puts a designator in words.
func Describe(d Designator) DesignatorText {
	name := func(list []string, i uint8) string {
		if int(i) < len(list) && list[i] != "" {
			return list[i]
		}
		return fmt.Sprintf("reserved %#x", i)
	}
	t := DesignatorText{
		Association: name([]string{"logical unit", "target port", "target device"}, d.Association),
		Type: name([]string{"vendor specific", "T10 vendor", "EUI-64", "NAA", "relative target port", "target port group",
			"logical unit group", "MD5", "SCSI name", "protocol specific port", "UUID"}, d.Type),
		CodeSet: name([]string{"", "binary", "ASCII", "UTF-8"}, d.CodeSet),
	}
	if d.CodeSet == 2 || d.CodeSet == 3 {
		t.Text = clean(d.ID)
	} else {
		t.Text = hex.EncodeToString(d.ID)
	}
	return t
}

// ParseCapture reads a captured page: raw bytes, or hex digits with optional
// blanks, newlines and 0x prefixes.
func ParseCapture(b []byte) ([]byte, error) {
	s := strings.TrimSpace(string(b))
	var digits strings.Builder
	for _, f := range strings.FieldsFunc(s, func(r rune) bool { return strings.ContainsRune(" \t\r\n,:", r) }) {
		digits.WriteString(strings.TrimPrefix(strings.TrimPrefix(f, "0x"), "0X"))
	}
	if out, err := hex.DecodeString(digits.String()); err == nil && len(out) > 0 {
		return out, nil
	}
	if len(b) >= 4 && b[0] < 0x20 {
		return b, nil
	}
	return nil, fmt.Errorf("captured page: neither hex digits nor a binary page")
}
