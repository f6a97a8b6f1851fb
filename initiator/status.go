package initiator

import (
	"context"
	"errors"

	"github.com/mpathd/mpathd/scsi"
)

// LBAStatus asks which blocks from lba on are mapped (SBC-3 5.4): at most limit
// runs.
func LBAStatus(ctx context.Context, d Doer, lun [8]byte, lba uint64, limit int) ([]scsi.LBARun, error) {
	alloc := 8 + 16*min(limit, 256)
	b, err := run(ctx, d, "GET LBA STATUS", lun, scsi.GetLBAStatus(lba, uint32(alloc)), alloc)
	if err != nil {
		return nil, err
	}
	return scsi.ParseLBAStatus(b, lba)
}

// Refused tells that an error is the unit's own: it does not know the command.
func Refused(err error) bool {
	var e *StatusError
	return errors.As(err, &e) && e.Sense.Key == scsi.KeyIllegalRequest
}
