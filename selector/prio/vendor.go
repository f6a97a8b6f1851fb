package prio

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// What arrays from before asymmetric access tell of a path. The values are those
// of multipath-tools.

// emc ranks the paths of a CLARiiON or VNX (page C0): the state of the unit, and
// 2 for the processor that owns it by configuration.
type emc struct{}

func (emc) Name() string { return "emc" }

func (emc) Prio(ctx context.Context, p Path) (int, error) {
	b, err := initiator.VPDPage(ctx, p.Doer, p.LUN, 0xc0)
	if err != nil {
		return 0, err
	}
	c, err := scsi.ParseClariionPath(b)
	switch {
	case err != nil:
		return 0, err
	case !c.Configured:
		return 0, errors.New("the array is not configured for failover: initiator type 3, failover mode 1 or 4 and arraycommpath 1 are wanted")
	case c.Busy:
		return 0, errors.New("an operation on the unit is under way")
	case c.Default:
		return int(c.State) + 2, nil
	}
	return int(c.State), nil
}

// rdac ranks the paths of an RDAC array (page C9): 8 if any controller takes
// I/O, 4 for a preferred path, 2 to the owner, 1 for a secondary path.
type rdac struct{}

func (rdac) Name() string { return "rdac" }

func (rdac) Prio(ctx context.Context, p Path) (int, error) {
	b, err := initiator.VPDPage(ctx, p.Doer, p.LUN, 0xc9)
	if err != nil {
		return 0, err
	}
	v, err := scsi.ParseVolumeAccess(b)
	if err != nil {
		return 0, err
	}
	n := 0
	for _, x := range []struct {
		is    bool
		worth int
	}{{v.Sharing, 8}, {v.Preferred, 4}, {v.Owner, 2}, {v.Secondary, 1}} {
		if x.is {
			n += x.worth
		}
	}
	return n, nil
}

// hds spreads the units of Hitachi's modular arrays over both controllers: odd
// units prefer the odd one, even units the even one. Their numbers are in the
// vendor's part of the INQUIRY data.
type hds struct{}

func (hds) Name() string { return "hds" }

func (hds) Prio(ctx context.Context, p Path) (int, error) {
	b, err := initiator.InquiryData(ctx, p.Doer, p.LUN)
	if err != nil {
		return 0, err
	}
	const unit, controller = 47, 49 // the last hex digit of the unit's number; a digit
	if len(b) <= controller {
		return 0, fmt.Errorf("INQUIRY data of %d bytes names no controller: is this a Hitachi modular array?", len(b))
	}
	u, c := strings.IndexByte("0123456789ABCDEF", b[unit]), strings.IndexByte("0123456789", b[controller])
	if u < 0 || c < 0 {
		return 0, fmt.Errorf("INQUIRY data names unit %q and controller %q, which are no digits: is this a Hitachi modular array?", b[unit], b[controller])
	}
	if u%2 == c%2 {
		return 1, nil
	}
	return 0, nil
}

// hpSW ranks the paths of HP's old arrays by TEST UNIT READY: 4 to the active
// controller, 2 to the passive one (02/04/02).
type hpSW struct{}

func (hpSW) Name() string { return "hp_sw" }

func (hpSW) Prio(ctx context.Context, p Path) (int, error) {
	err := initiator.TestUnitReady(ctx, p.Doer, p.LUN)
	var se *initiator.StatusError
	switch {
	case err == nil:
		return 4, nil
	case !errors.As(err, &se) || se.Status != scsi.StatusCheckCondition:
		return 0, err
	case se.Sense.Key == scsi.KeyRecovered:
		return 4, nil
	case se.Sense.Key == scsi.KeyNotReady && se.Sense.ASC == 0x04 && se.Sense.ASCQ == 0x02:
		return 2, nil
	}
	return 0, err
}
