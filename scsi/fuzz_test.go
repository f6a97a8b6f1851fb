package scsi

import (
	"bytes"
	"encoding/hex"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// bin makes a seed of hex digits with blanks.
func bin(s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		panic(err)
	}
	return b
}

// printable says that a text of the target can do nothing to a terminal or a log.
func printable(t *testing.T, what, s string) {
	t.Helper()
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			t.Fatalf("%s has byte %#02x: %q", what, s[i], s)
		}
	}
}

// unchanged runs a parser over its own copy of b and requires that it only read.
func unchanged(t *testing.T, b []byte, f func(b []byte)) {
	t.Helper()
	c := slices.Clip(bytes.Clone(b))
	f(c)
	if !bytes.Equal(b, c) {
		t.Fatal("the parser changed its input")
	}
}

func FuzzSense(f *testing.F) {
	for _, s := range []string{
		"70 00 05 00000000 0a 00000000 25 00 00 000000", // fixed, current
		"f0 00 03 00000fff 0a 00000000 11 00 00 000000", // with INFORMATION
		"71 00 04 00000000 0a 00000000 44 00 00 000000", // deferred
		"72 06 29 07 00 00 00 00",                       // descriptor
		"72 05 21 00 00 00 00 0c 00 0a 80 00 0000000000001000",
		"73 0b 47 05 00 00 00 00", "72 0e 1d 00", "70 00 06", "72", "",
	} {
		f.Add(bin(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		unchanged(t, b, func(b []byte) {
			s := ParseSense(b)
			printable(t, "sense", s.String())
			if s.Key > 15 || !s.Valid && s != (Sense{}) {
				t.Fatalf("%+v out of %x", s, b)
			}
		})
	})
}

// FuzzVPD reads any bytes as each page that a unit is asked for, the first
// byte of the input being the peripheral type and the second the page.
func FuzzVPD(f *testing.F) {
	for _, s := range []string{
		"00 00 0007 00 80 83 b0 b1 b2 86", "00 00 0000", "00 00 ffff 00",
		"00 80 0008 2020 3132 3334 3536", "00 80 0000", "00 80 0100 41",
		"00 83 000c 01 03 00 08 5005076800000001",
		"00 83 0024 01 01 00 18 4945540000000000 31343934353534303366313630633030 0163 0004 0000 0001",
		"00 83 0018 02 01 00 14 4c494f2d4f5247 20 6469736b30303030303030303030",
		"00 83 0010 53 94 00 04 00000001 51 95 00 04 00000002",
		"00 83 0016 03 08 00 12 6e61612e3530303530373638303030303030303100",
		"00 83 0010 01 02 00 0c abcdef0123456789abcdef01", "00 83 ffff 01 03 00 c8 01", "00 83 0004 01 03 00 00",
		"00 86 003c" + strings.Repeat("00", 60),
		"00 b0 003c 00 01 0008 00000400 00000080 00000000 00001000 00000014 00000001 80000000 0000000000010000" + strings.Repeat("00", 20),
		"00 b0 0010 00 00 0001 ffffffff 00000000 00000000", "00 b0 0000",
		"00 b1 003c 0001 00 02" + strings.Repeat("00", 56), "00 b1 0001 1c",
		"00 b2 0004 00 e4 02 00", "00 b2 0001 00", "00 b2 0018 0c e7 01 00 0101 0010 600140541f67c5d5e05470fb14394815",
	} {
		f.Add(bin(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		unchanged(t, b, func(b []byte) {
			codes, err := ParseVPDPages(b)
			if err == nil && len(codes) > max(len(b)-4, 0) {
				t.Fatalf("%d page codes in %d bytes", len(codes), len(b))
			}
			serial, _ := ParseVPD80(b)
			printable(t, "serial", serial)
			if l, err := ParseBlockLimits(b); err != nil && l != (BlockLimits{}) {
				t.Fatal("limits out of a page that was refused")
			}
			if r, err := ParseRotational(b); err != nil && !r {
				t.Fatal("no disk is fast because its page is broken")
			}
			if p, err := ParseProvisioning(b); err != nil && p != (Provisioning{}) {
				t.Fatal("UNMAP out of a page that was refused")
			}
			ds, _ := ParseVPD83(b)
			designators(t, ds, serial)
			if len(b) >= 2 && b[1] != 0x83 && ds != nil {
				t.Fatal("designators out of another page")
			}
		})
	})
}

// FuzzVPD83 lets the fuzzer write designators without the header of the page.
func FuzzVPD83(f *testing.F) {
	for _, s := range []string{
		"01 03 00 08 5005076800000001", "01 03 00 10 600140541f67c5d5e05470fb14394815", "01 03 00 08 3000000100000001",
		"01 01 00 18 4945540000000000 31343934353534303366313630633030",
		"02 01 00 10 4945542020202020 3030303130303031", "02 00 00 04 61626364", "01 02 00 08 abcdef0123456789",
		"03 08 00 14 6575692e61626364656630313233343536373839", "03 08 00 08 69716e2e782e7920",
		"53 94 00 04 00000001 51 95 00 04 00000002", "01 0a 00 12 1000 00112233445566778899aabbccddeeff",
	} {
		f.Add(bin(s), "serial 1")
	}
	f.Fuzz(func(t *testing.T, body []byte, serial string) {
		if len(body) > 0xffff {
			return
		}
		ds, err := ParseVPD83(append([]byte{0, 0x83, byte(len(body) >> 8), byte(len(body))}, body...))
		n := 0
		for _, d := range ds {
			n += 4 + len(d.ID)
		}
		if n > len(body) || err == nil && len(body)-n >= 4 {
			t.Fatalf("%d of %d bytes used, error %v", n, len(body), err)
		}
		designators(t, ds, text([]byte(serial)))
		TargetPort(ds)
	})
}

// designators requires of any designators that what becomes a name is one.
func designators(t *testing.T, ds []Designator, serial string) {
	t.Helper()
	inq := InquiryData{Vendor: "IET", Product: "VIRTUAL-DISK"}
	id, synonyms, _ := WWID(inq, ds, serial)
	for _, s := range append(synonyms, id) {
		printable(t, "WWID", s)
	}
	if slices.Contains(synonyms, id) && id != "" {
		t.Fatalf("%q is a synonym of itself", id)
	}
	if again, _, _ := WWID(inq, ds, serial); again != id {
		t.Fatalf("%q, then %q", id, again)
	}
	for _, d := range ds {
		w := Describe(d)
		for _, s := range []string{w.Association, w.Type, w.CodeSet, w.Text} {
			printable(t, "description", s)
		}
	}
}

func FuzzPortGroups(f *testing.F) {
	for _, s := range []string{
		"0000000c 80 0f 0001 00 00 00 01 0000 0001",                                                 // one group, one port
		"0000001c 00 8f 0001 00 02 00 01 0000 0001 01 8f 0002 00 02 00 02 0000 0002 0000 0003",      // cut short
		"00000020 00 8f 0001 00 02 00 01 0000 0001 01 8f 0002 00 02 00 02 0000 0002 0000 0003 0000", // two groups
		"00000010 10 3c 0000 0f 8f 0001 00 00 00 01 0000 0001",                                      // extended header
		"00000000", "ffffffff 02 00 0001 00 00 00 ff 0000", "00000004 90 00 0000", "0000",
	} {
		f.Add(bin(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		unchanged(t, b, func(b []byte) {
			groups, transition, err := ParsePortGroups(b)
			n := 0
			for _, g := range groups {
				n += 8 + 4*len(g.Ports)
				if g.State > 15 {
					t.Fatalf("state %#x", g.State)
				}
				printable(t, "state", AccessStateText(g.State))
			}
			if n > len(b) || err != nil && (groups != nil || transition != 0) || transition < 0 || transition > 255*time.Second {
				t.Fatalf("%d bytes of groups in %d, %v, %v", n, len(b), transition, err)
			}
		})
	})
}

func FuzzReadCapacity(f *testing.F) {
	for _, s := range []string{
		"00000000001fffff 00000200 00 03 c000" + strings.Repeat("00", 16), // 512e, thin
		"000000000003ffff 00001000 00 00 0000" + strings.Repeat("00", 16), // 4Kn
		"0000000000000000 00000200", "ffffffffffffffff 00000200 00 00 0000", "001fffffffffffff 00000200", "0000000000000fff 00000201",
		"0000000000000fff 00010000 00 0f 0000", "001fffff 00000200", "ffffffff 00000200", "00000000 00000000", "00",
	} {
		f.Add(bin(s))
	}
	check := func(t *testing.T, c Capacity, err error) {
		if err != nil {
			if c != (Capacity{}) {
				t.Fatalf("%+v with %v", c, err)
			}
			return
		}
		if c.Blocks == 0 || c.BlockSize < 512 || c.BlockSize&(c.BlockSize-1) != 0 || c.PhysicalBlock < c.BlockSize || c.PhysicalBlock&(c.PhysicalBlock-1) != 0 {
			t.Fatalf("%+v", c)
		}
		if size := int64(c.Blocks) * int64(c.BlockSize); size <= 0 || uint64(size)/uint64(c.BlockSize) != c.Blocks {
			t.Fatalf("%+v: size %d", c, size)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		unchanged(t, b, func(b []byte) {
			c, err := ParseReadCapacity16(b)
			check(t, c, err)
			c, err = ParseReadCapacity10(b)
			check(t, c, err)
		})
	})
}

// FuzzAnswers reads any bytes as the other answers of a unit.
func FuzzAnswers(f *testing.F) {
	for _, s := range []string{
		"00 00 06 02 5b 30 00 02 4945542020202020 5649525455414c2d4449534b20202020 30303031", // INQUIRY
		"7f 00 06 02 5b 00 00 00" + strings.Repeat("20", 28), "20 00 00 00 00" + strings.Repeat("ff", 31), strings.Repeat("00", 35),
		"17 00 90 00 08 12 14 00 ffff 0000 ffff ffff 80 14 00000000 0000", // MODE SENSE, caching page
		"17 00 10 08 0000000000000200 88 0a 04 00000000000000000000", "03 00 80 00", "ff 00 00 ff 48 01 ffff 00", "00",
		"00000010 00000000 0000000000000000 0001000000000000", "ffffffff 00000000 4100000000000000 ff", "00000008 00000000 01", // REPORT LUNS
		"00000018 00000000 0000000000000000 00001000 00 000000 0000000000001000 00000800 01 000000", // GET LBA STATUS
		"00000014 00000000 ffffffffffffffff ffffffff 01 000000",
	} {
		f.Add(bin(s), uint64(0))
		f.Add(bin(s), uint64(0x800))
		f.Add(bin(s), ^uint64(0))
	}
	f.Fuzz(func(t *testing.T, b []byte, lba uint64) {
		unchanged(t, b, func(b []byte) {
			if inq, err := ParseInquiry(b); err == nil {
				for _, s := range []string{inq.Vendor, inq.Product, inq.Revision} {
					printable(t, "inquiry", s)
				}
				if inq.Qualifier > 7 || inq.Type > 31 || inq.TPGS > 3 {
					t.Fatalf("%+v", inq)
				}
			}
			if c, err := ParseModeCaching(b); err != nil && c != (Caching{}) {
				t.Fatal("caching out of what was refused")
			}
			if luns, _, err := ParseReportLUNs(b); err == nil && 8*len(luns) > len(b)-8 {
				t.Fatalf("%d LUNs in %d bytes", len(luns), len(b))
			}
			runs, err := ParseLBAStatus(b, lba)
			at := lba
			for _, r := range runs {
				if r.Blocks == 0 || at+r.Blocks < at || r.Status > 15 {
					t.Fatalf("run of %d blocks at %d, status %d", r.Blocks, at, r.Status)
				}
				at += r.Blocks
			}
			if err == nil && 16*len(runs) > len(b)-8 {
				t.Fatalf("%d runs in %d bytes", len(runs), len(b))
			}
		})
	})
}

// FuzzCapture reads any file as a captured page.
func FuzzCapture(f *testing.F) {
	for _, s := range []string{"00 83 00 0c", "0x00,0x83\n0x00:0x0c", "\x00\x83\x00\x0c\x01\x03", "", "zz"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		out, err := ParseCapture(b)
		if err == nil && (len(out) == 0 || len(out) > len(b)) {
			t.Fatalf("%d bytes out of %d", len(out), len(b))
		}
		if err != nil && !utf8.ValidString(err.Error()) {
			t.Fatal("error is no text")
		}
	})
}
