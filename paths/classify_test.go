package paths

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

func check(key, asc, ascq uint8) initiator.Result {
	r := initiator.Result{Status: scsi.StatusCheckCondition, SenseLen: 14}
	r.Sense[0], r.Sense[2], r.Sense[12], r.Sense[13] = 0x70, key, asc, ascq
	return r
}

func TestClassify(t *testing.T) {
	for _, c := range []struct {
		name string
		r    initiator.Result
		verb Verb
		err  error
	}{
		{"good", initiator.Result{}, Done, nil},
		{"recovered error", check(1, 0x17, 0), Done, nil},
		{"session lost", initiator.Result{Err: initiator.ErrSessionLost}, RetryElsewhere, nil},
		{"target failure", initiator.Result{Err: initiator.ErrTargetFailure}, FailPath, nil},
		{"short transfer", initiator.Result{Err: initiator.ErrShort}, FailPath, nil},
		{"busy", initiator.Result{Status: scsi.StatusBusy}, RetryHere, nil},
		{"task set full", initiator.Result{Status: scsi.StatusTaskSetFull}, RetryHere, nil},
		{"reservation conflict goes up", initiator.Result{Status: scsi.StatusReservationConflict}, FailUp, block.ErrReservation},
		{"task aborted", initiator.Result{Status: scsi.StatusTaskAborted}, RetryHere, nil},
		{"no sense", initiator.Result{Status: scsi.StatusCheckCondition}, RetryElsewhere, block.ErrIO},
		{"becoming ready", check(2, 4, 1), RetryElsewhere, nil},
		{"standby", check(2, 4, 0x0b), FailPath, nil},
		{"unrecovered read error goes up", check(3, 0x11, 0), FailUp, block.ErrMedium},
		{"hardware error", check(4, 0x44, 0), RetryElsewhere, block.ErrIO},
		{"unknown command", check(5, 0x20, 0), Unsupported, block.ErrIO},
		{"LBA out of range", check(5, 0x21, 0), FailUp, block.ErrOutOfRange},
		{"unit gone on this path", check(5, 0x25, 0), FailPath, nil},
		{"unit attention", check(6, 0x29, 0), RetryHere, nil},
		{"thin pool full", check(7, 0x27, 7), FailUp, block.ErrNoSpace},
		{"write protected", check(7, 0x27, 0), FailUp, block.ErrReadOnly},
		{"aborted command", check(0xb, 0x47, 0), RetryElsewhere, block.ErrIO},
		{"miscompare", check(0xe, 0x1d, 0), FailUp, block.ErrIO},
	} {
		a := classify(&c.r)
		require.Equal(t, c.verb, a.Verb, c.name)
		require.Equal(t, c.err, a.Err, c.name)
	}
}

func TestNumberedDefaultDoesNotMergeTargets(t *testing.T) {
	a := &initiator.LUInfo{WWID: "33000000100000001", NumberedDefault: true, BlockSize: 512, Blocks: 8}
	b := *a
	require.NoError(t, SameLU(a, &b, "iqn.x", "iqn.x", false))
	require.ErrorContains(t, SameLU(a, &b, "iqn.x", "iqn.y", false), "--merge")
	require.NoError(t, SameLU(a, &b, "iqn.x", "iqn.y", true))
	b.Blocks = 9
	require.ErrorContains(t, SameLU(a, &b, "iqn.x", "iqn.x", true), "9 blocks")
	b = *a
	b.BlockSize = 4096
	require.ErrorContains(t, SameLU(a, &b, "iqn.x", "iqn.x", true), "block size")
}
