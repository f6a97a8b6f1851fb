package checker

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// page asks for a vital product data page; unknown tells that the unit has no
// such page, so that another question must decide.
func page(ctx context.Context, lu LU, code uint8) (b []byte, unknown bool, err error) {
	b, err = initiator.VPDPage(ctx, lu.Doer, lu.LUN, code)
	var se *initiator.StatusError
	unknown = errors.As(err, &se) && se.Status == scsi.StatusCheckCondition && se.Sense.Key == scsi.KeyIllegalRequest && se.Sense.ASC != 0x25
	return b, unknown, err
}

// rdac asks an RDAC array which controller owns the unit (page C9). It changes
// nothing at the array.
type rdac struct{}

func (rdac) Name() string { return "rdac" }

func (rdac) Check(ctx context.Context, lu LU) Verdict {
	b, unknown, err := page(ctx, lu, 0xc9)
	if unknown {
		return TUR.Check(ctx, lu)
	}
	if err != nil {
		return verdict(ctx, err)
	}
	v, err := scsi.ParseVolumeAccess(b)
	switch {
	case err != nil:
		return Verdict{Down, err}
	case !v.Connected:
		return Verdict{Down, errors.New("the unit is not connected")}
	case v.Reported && v.State == scsi.Unavailable:
		return Verdict{Down, fmt.Errorf("the controller is unavailable: %s", scsi.RDACReason(v.Reason))}
	case v.Reported && v.State == scsi.Transitioning && v.Other != scsi.Transitioning:
		return Verdict{Down, errors.New("the controller is starting")}
	case v.Owner || v.Sharing:
		return Verdict{State: Up}
	}
	return Verdict{Ghost, errors.New("the other controller owns the unit")}
}

// clariion asks a CLARiiON or VNX for the state of the unit and the path (page
// C0). One checker serves all paths of a unit: it finds paths that lead to
// different ones, and knows on the passive paths too that a snapshot is
// inactive, which only the active one tells.
type clariion struct {
	wwn      atomic.Pointer[[16]byte]
	inactive atomic.Bool
}

func (*clariion) Name() string { return "emc_clariion" }

func (c *clariion) Check(ctx context.Context, lu LU) Verdict {
	b, unknown, err := page(ctx, lu, 0xc0)
	if unknown {
		return TUR.Check(ctx, lu)
	}
	if err != nil {
		return verdict(ctx, err)
	}
	p, err := scsi.ParseClariionPath(b)
	switch {
	case err != nil:
		return Verdict{Down, err}
	case !p.Configured:
		return Verdict{Down, errors.New("the array is not configured for failover: initiator type 3, failover mode 1 or 4 and arraycommpath 1 are wanted")}
	case p.Busy:
		return Verdict{Shaky, errors.New("an operation on the unit is under way")}
	case p.State == 0:
		return Verdict{Down, errors.New("the unit is unbound")}
	}
	if !c.wwn.CompareAndSwap(nil, &p.WWN) && *c.wwn.Load() != p.WWN {
		return Verdict{Down, fmt.Errorf("the unit behind the path is %x now, it was %x", p.WWN, *c.wwn.Load())}
	}
	if p.State != 2 {
		if c.inactive.Load() {
			return Verdict{Down, errInactive}
		}
		return Verdict{Ghost, errors.New("the other storage processor owns the unit")}
	}
	if lu.BlockSize <= 0 {
		return Verdict{State: Up}
	}
	err = initiator.ReadBlocks(ctx, lu.Doer, lu.LUN, 0, max(1, 4096/lu.BlockSize), lu.BlockSize, lu.Use16)
	var se *initiator.StatusError
	if errors.As(err, &se) && se.Sense.Key == scsi.KeyIllegalRequest && se.Sense.ASC == 0x25 && se.Sense.ASCQ == 0x01 {
		c.inactive.Store(true)
		return Verdict{Down, errInactive}
	}
	if err == nil {
		c.inactive.Store(false)
	}
	return verdict(ctx, err)
}

var errInactive = errors.New("the unit is an inactive snapshot")

// hpSW asks old HP arrays: a unit that tells its serial number and is not ready
// is behind its passive controller.
type hpSW struct{}

func (hpSW) Name() string { return "hp_sw" }

func (hpSW) Check(ctx context.Context, lu LU) Verdict {
	if _, _, err := page(ctx, lu, 0x80); err != nil {
		return verdict(ctx, err)
	}
	err := initiator.TestUnitReady(ctx, lu.Doer, lu.LUN)
	var se *initiator.StatusError
	if errors.As(err, &se) && se.Status == scsi.StatusCheckCondition {
		return Verdict{Ghost, err}
	}
	return verdict(ctx, err)
}
