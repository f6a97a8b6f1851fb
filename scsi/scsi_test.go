package scsi

import (
	"encoding/hex"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

func vpd83(t *testing.T, designators ...string) []byte {
	t.Helper()
	var body []byte
	for _, d := range designators {
		b, err := hex.DecodeString(d)
		require.NoError(t, err)
		body = append(body, b...)
	}
	return append([]byte{0, 0x83, byte(len(body) >> 8), byte(len(body))}, body...)
}

func TestWWIDIsWhatScsiIDPrints(t *testing.T) {
	ascii := func(s string) string { return hex.EncodeToString([]byte(s)) }
	for _, c := range []struct {
		name, want, synonym string
		numbered            bool
		designators         []string
	}{
		{"NAA 6", "3600140541f67c5d5e05470fb14394815", "", false, []string{"01030010600140541f67c5d5e05470fb14394815"}},
		{"NAA 5", "35005076800000001", "", false, []string{"010300085005076800000001"}},
		{"NAA 3 alone is a local number", "33123456789abcdef", "", true, []string{"010300083123456789abcdef"}},
		{"EUI-64", "2abcdef0123456789", "", false, []string{"01020008abcdef0123456789"}},
		{"T10 ASCII", "1FreeBSD_iSCSI_Disk_000c29a1b2c3000", "", false, []string{"02010023" + ascii("FreeBSD iSCSI Disk      000c29a1b2c")}},
		{"IET binary T10", "1494554000000000031343934353534303366313630633030", "", false, []string{"010100184945540000000000" + ascii("149455403f160c00")}},
		{"tgt's numbered default", "33000000100000001", "1IET_00010001", true, []string{"01010010" + ascii("IET     00010001"), "010300083000000100000001"}},
		{"NAA wins over T10", "3600140541f67c5d5e05470fb14394815", "1LIO-ORG_disk", false, []string{"0201000d" + ascii("LIO-ORG disk "), "01030010600140541f67c5d5e05470fb14394815"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			page := vpd83(t, c.designators...)
			if c.name == "T10 ASCII" {
				c.want = "1FreeBSD_iSCSI_Disk_000c29a1b2c"
			}
			ds, err := ParseVPD83(page)
			require.NoError(t, err)
			got, synonyms, numbered := WWID(InquiryData{}, ds, "")
			require.Equal(t, c.want, got)
			require.Equal(t, c.numbered, numbered)
			if c.synonym != "" {
				require.True(t, slices.Contains(synonyms, c.synonym), "%v", synonyms)
			}
		})
	}
}

func TestHostileLengthsAreBounded(t *testing.T) {
	_, err := ParseVPD83([]byte{0, 0x83, 0xff, 0xff, 1, 3, 0, 200, 1})
	require.Error(t, err)
	_, err = ParseReadCapacity16(append(make([]byte, 8), 0, 0, 2, 1))
	require.ErrorContains(t, err, "power of two")
	_, err = ParseReadCapacity16([]byte{255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 2, 0})
	require.ErrorContains(t, err, "beyond any disk")
	luns, size, err := ParseReportLUNs([]byte{255, 255, 255, 255, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0})
	require.NoError(t, err)
	require.Len(t, luns, 1, "each once")
	require.EqualValues(t, 1<<32+7, size)
}

func TestSense(t *testing.T) {
	s := ParseSense([]byte{0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x25, 0})
	require.Equal(t, "ILLEGAL REQUEST, logical unit not supported (5/25/00)", s.String())
	s = ParseSense([]byte{0x73, 6, 0x29, 7})
	require.True(t, s.Deferred)
	require.False(t, ParseSense([]byte{0x70}).Valid)
}

func TestLUN(t *testing.T) {
	for _, c := range []struct {
		text, also string
		raw        [8]byte
	}{
		{"0", "0x0000000000000000", [8]byte{}},
		{"1", "0x0001000000000000", [8]byte{0, 1}},
		{"255", "0x00ff000000000000", [8]byte{0, 255}},
		{"256", "0x4100000000000000", [8]byte{0x41}},
		{"16383", "0x7FFF000000000000", [8]byte{0x7f, 0xff}},
		{"0x4001000000000000", "0x4001000000000000", [8]byte{0x40, 1}}, // flat, of a small number
		{"0x0100000000000000", "0x0100000000000000", [8]byte{1}},       // peripheral, bus 1
		{"0x0001000200000000", "0x0001000200000000", [8]byte{0, 1, 0, 2}},
		{"0xd2000001abcdef01", "0xD2000001ABCDEF01", [8]byte{0xd2, 0, 0, 1, 0xab, 0xcd, 0xef, 1}}, // extended
		{"0x0000000000000005", "0x0000000000000005", [8]byte{7: 5}},
		{"0xffffffffffffffff", "0xffffffffffffffff", [8]byte{255, 255, 255, 255, 255, 255, 255, 255}},
	} {
		require.Equal(t, c.text, LUNText(c.raw))
		for _, s := range []string{c.text, c.also} {
			l, err := ParseLUN(s)
			require.NoError(t, err)
			require.Equal(t, c.raw, l, s)
		}
	}
	for _, n := range []uint64{0, 1, 255, 256, 16383, 0x4001 << 48} {
		require.Equal(t, n, LUNNumber(LUNFromNumber(n)))
	}
	for _, bad := range []string{"", "-1", "+1", "01", " 1", "1 ", "1_0", "16384", "65536", "18446744073709551616", "0x", "0x1", "0X4001000000000000", "0x400100000000000", "0x40010000000000000",
		"0x-001000000000000", "0x+001000000000000", "0x4001_00000000000", "0x400100000000000g", "x4001000000000000", "4001000000000000", "0b1", "0o1", "1e3", "\u0661", "1/2", "1\x00"} {
		l, err := ParseLUN(bad)
		require.ErrorContains(t, err, "is no LUN", "%q: %x", bad, l)
	}
}
