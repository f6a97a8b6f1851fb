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

// One row per line of the table of what a result means.
func TestClassify(t *testing.T) {
	const busy, making = pauseBusy, pauseMaking
	up := func(err error) Action { return Action{Verb: FailUp, Err: err} }
	making1 := Action{Verb: RetryHere, Pause: making, Err: block.ErrIO}
	for _, c := range []struct {
		name string
		r    initiator.Result
		want Action
	}{
		{"good", initiator.Result{}, Action{}},
		{"condition met", initiator.Result{Status: scsi.StatusConditionMet}, Action{}},
		{"no sense", check(0, 0, 0), Action{}},
		{"recovered error", check(1, 0x17, 0), Action{}},
		{"session lost", initiator.Result{Err: initiator.ErrSessionLost}, Action{Verb: RetryElsewhere}},
		{"aborted", initiator.Result{Err: initiator.ErrAborted}, Action{Verb: RetryHere, Pause: busy}},
		{"timeout", initiator.Result{Err: initiator.ErrTimeout}, Action{Verb: RetryElsewhere}},
		{"target failure", initiator.Result{Err: initiator.ErrTargetFailure}, Action{Verb: FailPath}},
		{"short transfer", initiator.Result{Err: initiator.ErrShort}, Action{Verb: FailPath}},
		{"overflow", initiator.Result{Err: initiator.ErrOverflow}, Action{Verb: FailPath}},
		{"unknown status", initiator.Result{Status: 0x22}, Action{Verb: FailPath}},
		{"busy", initiator.Result{Status: scsi.StatusBusy}, Action{Verb: RetryHere, Pause: busy, Err: block.ErrIO, Full: true}},
		{"task set full", initiator.Result{Status: scsi.StatusTaskSetFull}, Action{Verb: RetryHere, Pause: busy, Err: block.ErrIO, Full: true}},
		{"reservation conflict goes up", initiator.Result{Status: scsi.StatusReservationConflict}, up(block.ErrReservation)},
		{"ACA active", initiator.Result{Status: scsi.StatusACAActive}, Action{Verb: RetryHere, Pause: busy, Err: block.ErrIO, Ask: askClearACA}},
		{"task aborted", initiator.Result{Status: scsi.StatusTaskAborted}, Action{Verb: RetryHere, Err: block.ErrIO, Limit: 5}},
		{"check condition without sense", initiator.Result{Status: scsi.StatusCheckCondition}, Action{Verb: RetryElsewhere, Pause: busy, Err: block.ErrIO, Limit: 5}},
		{"not ready, cause unknown", check(2, 4, 0), Action{Verb: RetryElsewhere, Pause: making, Err: block.ErrIO}},
		{"becoming ready", check(2, 4, 1), making1},
		{"needs START UNIT", check(2, 4, 2), Action{Verb: RetryElsewhere, Pause: making, Err: block.ErrIO, Limit: 5, Ask: askStart}},
		{"manual intervention", check(2, 4, 3), Action{Verb: FailPath}},
		{"format in progress", check(2, 4, 4), making1},
		{"rebuild in progress", check(2, 4, 5), making1},
		{"recalculation in progress", check(2, 4, 6), making1},
		{"operation in progress", check(2, 4, 7), making1},
		{"long write in progress", check(2, 4, 8), making1},
		{"self-test in progress", check(2, 4, 9), making1},
		{"notify (enable spinup) required", check(2, 4, 0x11), making1},
		{"space allocation in progress", check(2, 4, 0x14), making1},
		{"start in progress", check(2, 4, 0x1a), making1},
		{"sanitize in progress", check(2, 4, 0x1b), making1},
		{"configuration in progress", check(2, 4, 0x1d), making1},
		{"transition", check(2, 4, 0x0a), Action{Verb: RetryElsewhere, Pause: busy, Err: block.ErrIO, Ask: askRank}},
		{"standby", check(2, 4, 0x0b), Action{Verb: RetryElsewhere, Pause: busy, Err: block.ErrIO, Ask: askRank, Doubt: true}},
		{"unavailable", check(2, 4, 0x0c), Action{Verb: FailPath}},
		{"offline", check(2, 4, 0x12), Action{Verb: FailPath}},
		{"no medium", check(2, 0x3a, 0), up(block.ErrIO)},
		{"other not ready", check(2, 0x30, 0), Action{Verb: RetryElsewhere, Pause: making, Err: block.ErrIO}},
		{"unrecovered read error goes up", check(3, 0x11, 0), up(block.ErrMedium)},
		{"address mark not found for data goes up", check(3, 0x13, 0), up(block.ErrMedium)},
		{"record not found goes up", check(3, 0x14, 0), up(block.ErrMedium)},
		{"other medium error", check(3, 0x0c, 0), Action{Verb: RetryHere, Err: block.ErrMedium, Limit: 5}},
		{"hardware error gets one try elsewhere", check(4, 0x44, 0), Action{Verb: RetryElsewhere, Err: block.ErrTarget, Limit: 1}},
		{"unknown command", check(5, 0x20, 0), Action{Verb: Unsupported, Err: block.ErrTarget}},
		{"invalid field in the CDB", check(5, 0x24, 0), Action{Verb: Unsupported, Err: block.ErrTarget}},
		{"LBA out of range", check(5, 0x21, 0), Action{Verb: FailUp, Err: block.ErrOutOfRange, Ask: askVerify}},
		{"unit gone on this path", check(5, 0x25, 0), Action{Verb: FailPath, Ask: askRescan}},
		{"invalid field in the parameter list", check(5, 0x26, 0), up(block.ErrTarget)},
		{"power on or reset", check(6, 0x29, 0), Action{Verb: RetryHere, Err: block.ErrIO, Ask: askRank, Doubt: true}},
		{"nexus loss", check(6, 0x29, 7), Action{Verb: RetryHere, Err: block.ErrIO, Ask: askRank, Doubt: true}},
		{"mode parameters changed", check(6, 0x2a, 1), Action{Verb: RetryHere, Err: block.ErrIO, Doubt: true}},
		{"reservations preempted", check(6, 0x2a, 3), Action{Verb: RetryHere, Err: block.ErrIO, Ask: askReserve}},
		{"registrations preempted", check(6, 0x2a, 5), Action{Verb: RetryHere, Err: block.ErrIO, Ask: askReserve}},
		{"access state changed", check(6, 0x2a, 6), Action{Verb: RetryHere, Err: block.ErrIO, Ask: askRank}},
		{"implicit transition failed", check(6, 0x2a, 7), Action{Verb: RetryHere, Err: block.ErrIO, Ask: askRank}},
		{"capacity changed", check(6, 0x2a, 9), Action{Verb: RetryHere, Err: block.ErrIO, Doubt: true}},
		{"transition as an attention", check(6, 4, 0x0a), Action{Verb: RetryElsewhere, Pause: busy, Err: block.ErrIO, Ask: askRank}},
		{"commands cleared by another initiator", check(6, 0x2f, 0), Action{Verb: RetryHere, Err: block.ErrIO}},
		{"thin provisioning soft threshold", check(6, 0x38, 7), Action{Verb: RetryHere, Err: block.ErrIO, Ask: askThin}},
		{"inquiry data changed", check(6, 0x3f, 3), Action{Verb: RetryHere, Err: block.ErrIO, Foreign: true}},
		{"reported LUNs changed", check(6, 0x3f, 0x0e), Action{Verb: RetryHere, Err: block.ErrIO, Foreign: true, Ask: askRescan}},
		{"other attention", check(6, 0x28, 0), Action{Verb: RetryHere, Err: block.ErrIO}},
		{"thin pool full", check(7, 0x27, 7), up(block.ErrNoSpace)},
		{"write protected", check(7, 0x27, 0), Action{Verb: FailUp, Err: block.ErrReadOnly, Ask: askVerify}},
		{"blank check", check(8, 0, 0), up(block.ErrTarget)},
		{"copy aborted", check(0xa, 0, 0), up(block.ErrTarget)},
		{"protection information", check(0xb, 0x10, 1), up(block.ErrIntegrity)},
		{"command duration limit", check(0xb, 0x2e, 1), up(block.ErrTimeLimit)},
		{"digest or parity error", check(0xb, 0x47, 3), Action{Verb: RetryElsewhere, Err: block.ErrIO, Limit: 5}},
		{"data phase error", check(0xb, 0x4b, 0), Action{Verb: RetryElsewhere, Err: block.ErrIO, Limit: 5}},
		{"internal target failure", check(0xb, 0x44, 0), Action{Verb: RetryHere, Err: block.ErrIO, Limit: 5}},
		{"aborted command", check(0xb, 0, 0), Action{Verb: RetryHere, Err: block.ErrIO, Limit: 5}},
		{"volume overflow", check(0xd, 0, 0), up(block.ErrTarget)},
		{"miscompare", check(0xe, 0x1d, 0), up(block.ErrTarget)},
		{"duration limit as completed", check(0xf, 0x55, 0x0a), up(block.ErrTimeLimit)},
	} {
		require.Equal(t, c.want, classify(&c.r), c.name)
		if s := c.r.SenseData(); len(s) > 0 { // the same in the other formats (SPC-4 4.5)
			d := initiator.Result{Status: scsi.StatusCheckCondition, SenseLen: 8}
			copy(d.Sense[:], []byte{0x72, s[2], s[12], s[13]})
			require.Equal(t, c.want, classify(&d), c.name+", as descriptors")
			deferred := c.r
			deferred.Sense[0] = 0x71
			d.Sense[0] = 0x73
			for _, r := range []*initiator.Result{&deferred, &d} {
				require.Equal(t, Action{Verb: RetryHere, Err: block.ErrIO, Limit: 5, Deferred: true}, classify(r), c.name+", deferred")
			}
		}
	}
	short := initiator.Result{Status: scsi.StatusCheckCondition, SenseLen: 4} // only the key fits
	short.Sense[0], short.Sense[2] = 0x70, 3
	require.Equal(t, block.ErrMedium, classify(&short).Err)
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
