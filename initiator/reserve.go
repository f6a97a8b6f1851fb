package initiator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/mpathd/mpathd/scsi"
)

// reserveAlloc is room for the keys of over a hundred nexuses; more are an error.
const reserveAlloc = 1024

// Reservations tells the registered keys and the holder (SPC-4 6.15).
func Reservations(ctx context.Context, d Doer, lun [8]byte) (keys []uint64, holder *scsi.Reservation, err error) {
	in := func(action uint8) *question {
		return &question{op: "PERSISTENT RESERVE IN", cdb: scsi.PersistentIn(action, reserveAlloc), alloc: reserveAlloc}
	}
	registered, reserved := in(scsi.InReadKeys), in(scsi.InReadReservation)
	if err := ask(ctx, d, lun, registered, reserved); err != nil {
		return nil, nil, err
	}
	if err := cmp.Or(registered.err, reserved.err); err != nil {
		return nil, nil, err
	}
	if keys, err = scsi.ParseKeys(registered.data); err != nil {
		return nil, nil, err
	}
	holder, err = scsi.ParseReservation(reserved.data)
	return keys, holder, err
}

// WriteRefused tells whether the unit refuses writes of this nexus for a
// reservation, and changes nothing: COMPARE AND WRITE (SBC-3 5.2) of block 0 with
// the bytes that are there writes the same bytes, or nothing if they are others by
// then. A unit that does not know it gets a WRITE of no blocks (SBC-3 5.33), which
// LIO answers before it looks at the reservation.
func WriteRefused(ctx context.Context, d Doer, lun [8]byte, blockSize int, use16 bool) (bool, error) {
	var read, write scsi.CDB
	scsi.Read(&read, 0, 1, use16)
	was, err := run(ctx, d, "READ", lun, read, blockSize)
	if err == nil && len(was) != blockSize {
		err = fmt.Errorf("READ of a block of %d bytes: %d came", blockSize, len(was))
	}
	if err != nil {
		return false, err
	}
	_, err = one(ctx, d, lun, &question{op: "COMPARE AND WRITE", cdb: scsi.CompareAndWrite(0), out: slices.Concat(was, was)})
	var refused *StatusError
	if errors.As(err, &refused) && refused.Sense.Key == scsi.KeyIllegalRequest {
		scsi.Write(&write, 0, 0, false, use16)
		_, err = run(ctx, d, "WRITE of no blocks", lun, write, 0)
	}
	switch {
	case !errors.As(err, &refused):
		return false, err
	case refused.Status == scsi.StatusReservationConflict:
		return true, nil
	case refused.Sense.Key == scsi.KeyMiscompare:
		return false, nil
	}
	return false, err
}

// Reserve sends PERSISTENT RESERVE OUT with an action of package scsi (SPC-4
// 6.16). Unit attentions are taken; a *StatusError is the unit's refusal,
// RESERVATION CONFLICT among them.
func Reserve(ctx context.Context, d Doer, lun [8]byte, action uint8, key, actionKey uint64) error {
	cdb, list := scsi.PersistentOut(action, scsi.WriteExclusiveAll, key, actionKey)
	_, err := one(ctx, d, lun, &question{op: "PERSISTENT RESERVE OUT", cdb: cdb, out: list})
	return err
}
