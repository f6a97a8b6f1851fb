package initiator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mpathd/mpathd/scsi"
)

// Doer runs control commands; *Session is one.
type Doer interface {
	Do(ctx context.Context, c *Command) error
}

// LUInfo is what a logical unit says of itself.
type LUInfo struct {
	LUN                                  [8]byte
	Vendor, Product, Revision, Serial    string
	WWID                                 string
	Synonyms                             []string
	Designators                          []scsi.Designator
	NumberedDefault                      bool // see scsi.WWID
	Blocks                               uint64
	BlockSize, PhysicalBlock             int // bytes
	ReadOnly, WriteCache, DPOFUA         bool
	Rotational, Unmap, WriteSame, Zeroes bool   // LBPU; WRITE SAME worth trying; LBPRZ
	MaxTransfer, OptTransfer             uint32 // blocks, 0 unlimited
	MaxUnmap                             uint32 // blocks, 0 unlimited
	MaxWriteSame                         uint64 // blocks, 0 unlimited
	Use16                                bool   // 16-byte READ and WRITE
	TPGS                                 uint8  // scsi.TPGSImplicit, scsi.TPGSExplicit
	// Standby says that the unit is in an asymmetric access state, through this
	// port, in which it does not tell its capacity: Blocks may be 0.
	Standby bool
}

// Size is the capacity in bytes.
func (l *LUInfo) Size() int64 { return int64(l.Blocks) * int64(l.BlockSize) }

// StatusError is a command that the logical unit refused.
type StatusError struct {
	Op     string
	Status uint8
	Sense  scsi.Sense
}

func (e *StatusError) Error() string {
	if e.Status == scsi.StatusCheckCondition {
		return e.Op + ": " + e.Sense.String()
	}
	return e.Op + ": " + scsi.StatusText(e.Status)
}

const attentions = 8 // unit attentions and busy answers that a control command rides out

// run issues a command, rides out unit attentions, and returns its Data-In.
func run(ctx context.Context, d Doer, op string, lun [8]byte, cdb scsi.CDB, alloc int) ([]byte, error) {
	for try := 0; ; try++ {
		c := &Command{LUN: lun, CDB: cdb, ShortOK: true}
		if alloc > 0 {
			c.Dir, c.Data = DataIn, make([]byte, alloc)
		}
		if err := d.Do(ctx, c); err != nil {
			return nil, fmt.Errorf("%s: %w", op, err)
		}
		r := &c.Result
		if r.Status == scsi.StatusGood {
			return c.Data[:min(int(r.Received), len(c.Data))], nil
		}
		e := &StatusError{op, r.Status, scsi.ParseSense(r.SenseData())}
		again := r.Status == scsi.StatusBusy || r.Status == scsi.StatusTaskSetFull || r.Status == scsi.StatusTaskAborted ||
			r.Status == scsi.StatusCheckCondition && (e.Sense.Key == scsi.KeyUnitAttention || e.Sense.Deferred)
		if !again || try == attentions {
			return nil, e
		}
		if r.Status != scsi.StatusCheckCondition {
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}
}

// refusedByLU tells a target's refusal, which an optional command may meet,
// from a transport failure.
func refusedByLU(err error) bool {
	var e *StatusError
	return errors.As(err, &e)
}

// TestUnitReady asks whether the unit is ready (SPC-4 6.47).
func TestUnitReady(ctx context.Context, d Doer, lun [8]byte) error {
	_, err := run(ctx, d, "TEST UNIT READY", lun, scsi.TestUnitReady(), 0)
	return err
}

// ReportLUNs lists the target's raw LUNs (SPC-4 6.33).
func ReportLUNs(ctx context.Context, d Doer) ([][8]byte, error) {
	b, err := run(ctx, d, "REPORT LUNS", [8]byte{}, scsi.ReportLUNs(8208), 8208)
	if err != nil {
		return nil, err
	}
	return scsi.ParseReportLUNs(b)
}

func vpd(ctx context.Context, d Doer, lun [8]byte, page uint8) ([]byte, error) {
	return run(ctx, d, fmt.Sprintf("INQUIRY page %02x", page), lun, scsi.Inquiry(true, page, 1024), 1024)
}

// Identify reads who the unit is, how large, and what it can do.
func Identify(ctx context.Context, d Doer, lun [8]byte) (*LUInfo, error) {
	l := &LUInfo{LUN: lun, Rotational: true, WriteSame: true}
	b, err := run(ctx, d, "INQUIRY", lun, scsi.Inquiry(false, 0, 255), 255)
	if err != nil {
		return nil, err
	}
	inq, err := scsi.ParseInquiry(b)
	if err != nil {
		return nil, err
	}
	if inq.Qualifier != 0 {
		return nil, fmt.Errorf("LUN %d does not exist at this target", scsi.LUNNumber(lun))
	}
	if inq.Type != 0 {
		return nil, fmt.Errorf("LUN %d is no disk (device type %#02x)", scsi.LUNNumber(lun), inq.Type)
	}
	l.Vendor, l.Product, l.Revision, l.TPGS = inq.Vendor, inq.Product, inq.Revision, inq.TPGS
	var refused *StatusError
	if err := TestUnitReady(ctx, d, lun); errors.As(err, &refused) && refused.Sense.Key == scsi.KeyNotReady && refused.Sense.ASC == 4 && refused.Sense.ASCQ == 0x0b {
		l.Standby = true
	} else if err != nil {
		return nil, err
	}
	if err := l.pages(ctx, d, inq); err != nil {
		return nil, err
	}
	if err := l.capacity(ctx, d); err != nil && !(l.Standby && refusedByLU(err)) {
		return nil, err
	}
	b, err = run(ctx, d, "MODE SENSE", lun, scsi.ModeSense6(0x08, 192), 192)
	if err == nil {
		m, err := scsi.ParseModeCaching(b)
		if err != nil {
			return nil, err
		}
		l.ReadOnly, l.DPOFUA, l.WriteCache = m.WriteProtected, m.DPOFUA, m.WriteCache
	} else if l.WriteCache = true; !refusedByLU(err) { // unknown: better flush
		return nil, err
	}
	return l, nil
}

// pages reads the vital product data that the unit lists in page 00.
func (l *LUInfo) pages(ctx context.Context, d Doer, inq scsi.InquiryData) error {
	b, err := vpd(ctx, d, l.LUN, 0x00)
	if err != nil {
		if refusedByLU(err) {
			return nil
		}
		return err
	}
	have, err := scsi.ParseVPDPages(b)
	if err != nil {
		return err
	}
	for _, code := range []uint8{0x80, 0x83, 0xb0, 0xb1, 0xb2} {
		if !slices.Contains(have, code) {
			continue
		}
		b, err := vpd(ctx, d, l.LUN, code)
		if err != nil {
			if refusedByLU(err) {
				continue
			}
			return err
		}
		switch code {
		case 0x80:
			l.Serial, err = scsi.ParseVPD80(b)
		case 0x83:
			l.Designators, err = scsi.ParseVPD83(b)
		case 0xb0:
			var bl scsi.BlockLimits
			if bl, err = scsi.ParseBlockLimits(b); err == nil {
				l.MaxTransfer, l.OptTransfer, l.MaxUnmap, l.MaxWriteSame = bl.MaxTransfer, bl.OptTransfer, bl.MaxUnmapLBAs, bl.MaxWriteSame
			}
		case 0xb1:
			l.Rotational, err = scsi.ParseRotational(b)
		case 0xb2:
			var p scsi.Provisioning
			p, err = scsi.ParseProvisioning(b)
			l.Unmap = p.Unmap
		}
		if err != nil {
			return err
		}
	}
	l.WWID, l.Synonyms, l.NumberedDefault = scsi.WWID(inq, l.Designators, l.Serial)
	return nil
}

func (l *LUInfo) capacity(ctx context.Context, d Doer) error {
	var c scsi.Capacity
	b, err := run(ctx, d, "READ CAPACITY (16)", l.LUN, scsi.ReadCapacity16(32), 32)
	switch {
	case err == nil:
		l.Use16 = true
		c, err = scsi.ParseReadCapacity16(b)
	case refusedByLU(err):
		if b, err = run(ctx, d, "READ CAPACITY (10)", l.LUN, scsi.ReadCapacity10(), 8); err == nil {
			c, err = scsi.ParseReadCapacity10(b)
		}
	}
	if err != nil {
		return err
	}
	l.Blocks, l.BlockSize, l.PhysicalBlock, l.Zeroes = c.Blocks, c.BlockSize, c.PhysicalBlock, c.Zeroes
	return nil
}

// ReadBlocks reads and forgets blocks of the unit: what checkers do.
func ReadBlocks(ctx context.Context, d Doer, lun [8]byte, lba uint64, blocks, blockSize int, use16 bool) error {
	var cdb scsi.CDB
	scsi.Read(&cdb, lba, uint32(blocks), use16)
	_, err := run(ctx, d, "READ", lun, cdb, blocks*blockSize)
	return err
}
