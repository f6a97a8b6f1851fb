package initiator

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/mpathd/mpathd/scsi"
)

// Doer runs control commands; *Session is one. What functions ask through it they
// ask again, a few times, when it meets a unit attention or a busy unit. Their
// errors are Do's, or a *StatusError if the unit refused.
type Doer interface {
	Do(ctx context.Context, c *Command) error
}

// LUInfo is what a logical unit says of itself; Identify fills it.
type LUInfo struct {
	LUN                                  [8]byte           // raw, SAM-5 4.7
	Vendor, Product, Revision, Serial    string            // INQUIRY and page 80, blanks trimmed
	WWID                                 string            // as scsi_id prints it; empty: the unit has no ID
	Synonyms                             []string          // other spellings of it, see scsi.WWID
	Designators                          []scsi.Designator // page 83
	NumberedDefault                      bool              // see scsi.WWID
	Blocks                               uint64            // logical blocks
	BlockSize, PhysicalBlock             int               // bytes
	ReadOnly, WriteCache, DPOFUA         bool              // MODE SENSE: WP, WCE, DPOFUA; no answer counts as WCE
	Rotational, Unmap, WriteSame, Zeroes bool              // LBPU; WRITE SAME worth trying; LBPRZ
	MaxTransfer, OptTransfer             uint32            // blocks, 0 unlimited
	MaxUnmap                             uint32            // blocks, 0 unlimited
	MaxWriteSame                         uint64            // blocks, 0 unlimited
	TransferGranularity                  uint32            // blocks; transfers that are no multiple are slow
	UnmapGranularity, UnmapAlignment     uint32            // blocks; UNMAP of less than a granule does nothing
	UnmapSame                            bool              // LBPWS: WRITE SAME may deallocate
	Use16                                bool              // 16-byte READ and WRITE
	TPGS                                 uint8             // scsi.TPGSImplicit, scsi.TPGSExplicit
	// Standby says that the unit is in an asymmetric access state, through this
	// port, in which it does not tell its capacity: Blocks may be 0.
	Standby bool
}

// Size is the capacity in bytes.
func (l *LUInfo) Size() int64 { return int64(l.Blocks) * int64(l.BlockSize) }

// StatusError is a command that the logical unit refused; the session is well.
type StatusError struct {
	Op     string     // the command's name in the standard
	Status uint8      // SAM-5 5.3.1, not GOOD
	Sense  scsi.Sense // with CHECK CONDITION
}

func (e *StatusError) Error() string {
	if e.Status == scsi.StatusCheckCondition {
		return e.Op + ": " + e.Sense.String()
	}
	return e.Op + ": " + scsi.StatusText(e.Status)
}

// refusedByLU tells a target's refusal, which an optional command may meet,
// from a transport failure.
func refusedByLU(err error) bool {
	var e *StatusError
	return errors.As(err, &e)
}

// TestUnitReady asks whether the unit is ready (SPC-4 6.47): nil, or a *StatusError
// with the sense that says what it lacks, or what Doer says.
func TestUnitReady(ctx context.Context, d Doer, lun [8]byte) error {
	_, err := run(ctx, d, "TEST UNIT READY", lun, scsi.TestUnitReady(), 0)
	return err
}

// StartUnit starts a unit that says it needs START UNIT (SBC-3 5.25); it returns
// when the unit is ready, or with a *StatusError when it refuses. That may take as
// long as a disk needs to spin up: ctx bounds it.
func StartUnit(ctx context.Context, d Doer, lun [8]byte) error {
	_, err := run(ctx, d, "START STOP UNIT", lun, scsi.StartUnit(), 0)
	return err
}

// ReportLUNs lists the target's raw LUNs (SPC-4 6.33) in its order, each once and at
// most scsi.FlatLUNs of them. It asks LUN 0, which need not have a unit.
func ReportLUNs(ctx context.Context, d Doer) ([][8]byte, error) {
	const usual, most = 8 + 8*256, 8 + 8*scsi.FlatLUNs
	for alloc := uint64(usual); ; {
		b, err := run(ctx, d, "REPORT LUNS", [8]byte{}, scsi.ReportLUNs(uint32(alloc)), int(alloc))
		if err != nil {
			return nil, err
		}
		luns, size, err := scsi.ParseReportLUNs(b)
		if err != nil || size <= alloc || alloc == most {
			return luns, err
		}
		alloc = min(size, most)
	}
}

func inquiry() *question {
	return &question{op: "INQUIRY", cdb: scsi.Inquiry(false, 0, 255), alloc: 255}
}

func vpd(page uint8) *question {
	return &question{op: fmt.Sprintf("INQUIRY page %02x", page), cdb: scsi.Inquiry(true, page, 1024), alloc: 1024}
}

// VPDPage is a vital product data page as the unit gives it, header included, up to
// 1024 bytes, which are the caller's (SPC-4 6.6, 7.8). A unit that does not have the
// page answers with a *StatusError, or with another page: the parsers of package
// scsi look at its code.
func VPDPage(ctx context.Context, d Doer, lun [8]byte, page uint8) ([]byte, error) {
	return one(ctx, d, lun, vpd(page))
}

// UnitIDs are the WWID of a unit and its other spellings, in one round trip. TEST
// UNIT READY goes with the questions and takes unit attentions; the unit has to
// answer it, but need not be ready.
func UnitIDs(ctx context.Context, d Doer, lun [8]byte) ([]string, error) {
	l, who := &LUInfo{LUN: lun}, askWho()
	if err := ask(ctx, d, lun, append(readiness(), who.all()...)...); err != nil {
		return nil, err
	}
	if _, err := l.identity(who); err != nil {
		return nil, err
	}
	return append([]string{l.WWID}, l.Synonyms...), nil
}

// who are the questions about a unit's identity. The pages 80 and 83 are asked
// for before page 00 has said that they exist: a unit without them refuses.
type who struct{ standard, pages, serial, designators *question }

// readiness asks twice: the first one takes the unit attention that most units
// have for a new session, and the second one, which counts, costs no round trip more.
func readiness() []*question {
	ask := func(once bool) *question {
		return &question{op: "TEST UNIT READY", cdb: scsi.TestUnitReady(), once: once}
	}
	return []*question{ask(true), ask(false)}
}

func askWho() who { return who{inquiry(), vpd(0x00), vpd(0x80), vpd(0x83)} }

func (w who) all() []*question { return []*question{w.standard, w.pages, w.serial, w.designators} }

// identity takes the answers to who, and tells which pages there are.
func (l *LUInfo) identity(w who) (pages []uint8, err error) {
	inq, err := l.disk(w.standard)
	if err != nil {
		return nil, err
	}
	l.Vendor, l.Product, l.Revision, l.TPGS = inq.Vendor, inq.Product, inq.Revision, inq.TPGS
	if w.pages.err != nil {
		return nil, nil
	}
	if pages, err = scsi.ParseVPDPages(w.pages.data); err != nil {
		return nil, err
	}
	if slices.Contains(pages, 0x80) && w.serial.err == nil {
		if l.Serial, err = scsi.ParseVPD80(w.serial.data); err != nil {
			return nil, err
		}
	}
	if slices.Contains(pages, 0x83) && w.designators.err == nil {
		if l.Designators, err = scsi.ParseVPD83(w.designators.data); err != nil {
			return nil, err
		}
	}
	l.WWID, l.Synonyms, l.NumberedDefault = scsi.WWID(inq, l.Designators, l.Serial)
	return pages, nil
}

// disk makes sure that the unit is one.
func (l *LUInfo) disk(q *question) (inq scsi.InquiryData, err error) {
	if q.err != nil {
		return inq, q.err
	}
	if inq, err = scsi.ParseInquiry(q.data); err != nil {
		return inq, err
	}
	switch {
	case inq.Qualifier != 0:
		err = fmt.Errorf("LUN %s does not exist at this target", scsi.LUNText(l.LUN))
	case inq.Type != 0:
		err = fmt.Errorf("LUN %s is no disk (device type %#02x)", scsi.LUNText(l.LUN), inq.Type)
	}
	return inq, err
}

// Identify reads who the unit is, how large, and what it can do: in two round
// trips, of which the first takes unit attentions.
func Identify(ctx context.Context, d Doer, lun [8]byte) (*LUInfo, error) {
	l, who := &LUInfo{LUN: lun, Rotational: true, WriteSame: true}, askWho()
	ready := readiness()
	size := &question{op: "READ CAPACITY (16)", cdb: scsi.ReadCapacity16(32), alloc: 32}
	mode := &question{op: "MODE SENSE", cdb: scsi.ModeSense6(0x08, 192), alloc: 192}
	if err := ask(ctx, d, lun, append(ready, append(who.all(), size, mode)...)...); err != nil {
		return nil, err
	}
	pages, err := l.identity(who)
	if err != nil {
		return nil, err
	}
	if err := ready[1].err; err != nil {
		if l.Standby = inStandby(err); !l.Standby {
			return nil, err
		}
	}
	if err := l.details(ctx, d, pages, size); err != nil {
		return nil, err
	}
	if l.WriteCache = true; mode.err != nil { // unknown: better flush
		return l, nil
	}
	m, err := scsi.ParseModeCaching(mode.data)
	if err != nil {
		return nil, err
	}
	l.ReadOnly, l.DPOFUA, l.WriteCache = m.WriteProtected, m.DPOFUA, m.WriteCache
	return l, nil
}

// inStandby tells the refusal of a unit in asymmetric access state standby.
func inStandby(err error) bool {
	var refused *StatusError
	return errors.As(err, &refused) && refused.Sense.Key == scsi.KeyNotReady && refused.Sense.ASC == 4 && refused.Sense.ASCQ == 0x0b
}

// details asks what depends on the first answers: the pages that the unit has,
// and its size once more if it does not know the 16-byte form.
func (l *LUInfo) details(ctx context.Context, d Doer, pages []uint8, size *question) error {
	var qs []*question
	var takes []func([]byte) error
	for _, page := range []struct {
		code uint8
		take func([]byte) error
	}{{0xb0, l.takeLimits}, {0xb1, l.takeRotation}, {0xb2, l.takeProvisioning}} {
		if slices.Contains(pages, page.code) {
			qs, takes = append(qs, vpd(page.code)), append(takes, page.take)
		}
	}
	parse := scsi.ParseReadCapacity16
	if l.Use16 = size.err == nil; !l.Use16 {
		size, parse = &question{op: "READ CAPACITY (10)", cdb: scsi.ReadCapacity10(), alloc: 8}, scsi.ParseReadCapacity10
		qs = append(qs, size)
	}
	if err := ask(ctx, d, l.LUN, qs...); err != nil {
		return err
	}
	for i, take := range takes {
		if qs[i].err != nil {
			continue // a page that is listed and refused is not there
		}
		if err := take(qs[i].data); err != nil {
			return err
		}
	}
	if size.err != nil {
		if l.Standby {
			return nil
		}
		return size.err
	}
	c, err := parse(size.data)
	if err != nil {
		return err
	}
	l.Blocks, l.BlockSize, l.PhysicalBlock, l.Zeroes = c.Blocks, c.BlockSize, c.PhysicalBlock, c.Zeroes
	return nil
}

func (l *LUInfo) takeLimits(b []byte) error {
	bl, err := scsi.ParseBlockLimits(b)
	if err == nil {
		l.MaxTransfer, l.OptTransfer, l.MaxUnmap, l.MaxWriteSame = bl.MaxTransfer, bl.OptTransfer, bl.MaxUnmapLBAs, bl.MaxWriteSame
		l.TransferGranularity, l.UnmapGranularity, l.UnmapAlignment = uint32(bl.OptimalGranularity), bl.UnmapGranularity, bl.UnmapAlignment
	}
	return err
}

func (l *LUInfo) takeRotation(b []byte) (err error) {
	l.Rotational, err = scsi.ParseRotational(b)
	return err
}

func (l *LUInfo) takeProvisioning(b []byte) error {
	p, err := scsi.ParseProvisioning(b)
	l.Unmap, l.UnmapSame = p.Unmap, p.WriteSame
	return err
}

// ReadBlocks reads blocks of blockSize bytes from lba on into memory of its own and
// forgets them: what checkers do. use16 chooses READ (16), else lba and blocks must fit
// READ (10) (SBC-3 5.11, 5.13). Errors as Doer says; an answer of fewer bytes with
// status GOOD is none.
func ReadBlocks(ctx context.Context, d Doer, lun [8]byte, lba uint64, blocks, blockSize int, use16 bool) error {
	var cdb scsi.CDB
	scsi.Read(&cdb, lba, uint32(blocks), use16)
	_, err := run(ctx, d, "READ", lun, cdb, blocks*blockSize)
	return err
}
