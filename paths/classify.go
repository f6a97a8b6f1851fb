package paths

import (
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// Verb is what to do with a command that came back.
type Verb uint8

const (
	Done           Verb = iota // the command did its work
	RetryElsewhere             // try another path first; this one stays
	RetryHere                  // try again on the same path
	FailPath                   // the path is at fault: fail it, retry elsewhere
	FailUp                     // no path can help: report Err
	Unsupported                // the unit does not know this command: fall back, else report Err
)

// Action is a verdict on a result.
type Action struct {
	Verb Verb
	// Err is what the request ends with: at once for FailUp, after Limit such
	// verdicts, or when the map's patience ends (see Group.patience).
	Err   error
	Limit int32         // 0: the request may be retried for as long as the map lets it
	Pause time.Duration // before the retry
	Full  bool          // the target has more commands than it can take: see depth
	Ask   uint32        // what the path's own goroutine should look into
	// Doubt: the unit may have changed; it is verified before the next I/O.
	Doubt bool
	// Foreign: the unit, or its LUN, may have become another one: nothing
	// counts until it is identified.
	Foreign bool
	// Deferred: a write that was acknowledged before has failed; the next flush
	// must say so.
	Deferred bool
}

// Pauses before a retry.
const (
	pauseBusy   = 100 * time.Millisecond // a flush that meets BUSY, transitions
	pauseMaking = time.Second            // a unit that is becoming ready
)

// classify is the one table that decides what a result means, after the
// kernel's (drivers/scsi/scsi_error.c, scsi_dh_alua.c, block/blk-core.c
// blk_path_error): target errors go up, transport errors move to another path.
// docs/failover.md has it in words.
func classify(r *initiator.Result) Action {
	switch r.Err {
	case nil:
	case initiator.ErrSessionLost:
		return Action{Verb: RetryElsewhere} // the session's end has failed the path already
	case initiator.ErrAborted:
		return Action{Verb: RetryHere, Pause: pauseBusy}
	case initiator.ErrTimeout: // the target aborted it: slow, not dead
		return Action{Verb: RetryElsewhere}
	default: // target failure, short transfer, overflow
		return Action{Verb: FailPath}
	}
	switch r.Status {
	case scsi.StatusGood, scsi.StatusConditionMet:
		return Action{Verb: Done}
	case scsi.StatusBusy, scsi.StatusTaskSetFull:
		return Action{Verb: RetryHere, Pause: pauseBusy, Err: block.ErrIO, Full: true}
	case scsi.StatusACAActive:
		return Action{Verb: RetryHere, Pause: pauseBusy, Err: block.ErrIO, Ask: askClearACA}
	case scsi.StatusTaskAborted:
		return Action{Verb: RetryHere, Err: block.ErrIO, Limit: retriesHere}
	case scsi.StatusReservationConflict:
		return Action{Verb: FailUp, Err: block.ErrReservation}
	case scsi.StatusCheckCondition:
		return classifySense(scsi.ParseSense(r.SenseData()))
	}
	return Action{Verb: FailPath}
}

const retriesHere = 5 // of one request, for what another try may mend

func classifySense(s scsi.Sense) Action {
	if !s.Valid {
		return Action{Verb: RetryElsewhere, Pause: pauseBusy, Err: block.ErrIO, Limit: retriesHere}
	}
	if s.Deferred { // belongs to an earlier command; this one was not executed
		return Action{Verb: RetryHere, Err: block.ErrIO, Limit: retriesHere, Deferred: true}
	}
	switch s.Key {
	case scsi.KeyNoSense, scsi.KeyRecovered:
		return Action{Verb: Done}
	case scsi.KeyNotReady:
		return notReady(s)
	case scsi.KeyMedium:
		if s.ASC == 0x11 || s.ASC == 0x13 || s.ASC == 0x14 {
			return Action{Verb: FailUp, Err: block.ErrMedium}
		}
		return Action{Verb: RetryHere, Err: block.ErrMedium, Limit: retriesHere}
	case scsi.KeyHardware: // may be the controller's: another one gets a try
		return Action{Verb: RetryElsewhere, Err: block.ErrTarget, Limit: 1}
	case scsi.KeyIllegalRequest:
		switch s.ASC {
		case 0x20, 0x24:
			return Action{Verb: Unsupported, Err: block.ErrTarget}
		case 0x21:
			return Action{Verb: FailUp, Err: block.ErrOutOfRange, Ask: askVerify} // did the unit shrink?
		case 0x25: // the unit is gone on this path
			return Action{Verb: FailPath, Ask: askRescan}
		}
		return Action{Verb: FailUp, Err: block.ErrTarget}
	case scsi.KeyUnitAttention:
		return unitAttention(s)
	case scsi.KeyDataProtect:
		if s.ASC == 0x27 && s.ASCQ == 0x07 {
			return Action{Verb: FailUp, Err: block.ErrNoSpace}
		}
		return Action{Verb: FailUp, Err: block.ErrReadOnly, Ask: askVerify}
	case scsi.KeyAborted:
		switch {
		case s.ASC == 0x10: // protection information
			return Action{Verb: FailUp, Err: block.ErrIntegrity}
		case s.ASC == 0x2e && s.ASCQ >= 1 && s.ASCQ <= 3: // command duration limit
			return Action{Verb: FailUp, Err: block.ErrTimeLimit}
		case s.ASC == 0x47 || s.ASC == 0x4b: // the way there corrupts data
			return Action{Verb: RetryElsewhere, Err: block.ErrIO, Limit: retriesHere}
		}
		return Action{Verb: RetryHere, Err: block.ErrIO, Limit: retriesHere}
	case scsi.KeyCompleted:
		if s.ASC == 0x55 && s.ASCQ == 0x0a {
			return Action{Verb: FailUp, Err: block.ErrTimeLimit}
		}
	}
	return Action{Verb: FailUp, Err: block.ErrTarget} // blank check, copy aborted, overflow, miscompare
}

// notReady is sense key 2 (SPC-4 annex D, ASC 04).
func notReady(s scsi.Sense) Action {
	if s.ASC == 0x3a { // no medium
		return Action{Verb: FailUp, Err: block.ErrIO}
	}
	if s.ASC != 0x04 {
		return Action{Verb: RetryElsewhere, Pause: pauseMaking, Err: block.ErrIO}
	}
	switch s.ASCQ {
	case 0x01, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x11, 0x14, 0x1a, 0x1b, 0x1d: // becoming ready, busy with itself
		return Action{Verb: RetryHere, Pause: pauseMaking, Err: block.ErrIO}
	case 0x02: // needs START UNIT
		return Action{Verb: RetryElsewhere, Pause: pauseMaking, Err: block.ErrIO, Limit: retriesHere, Ask: askStart}
	case 0x0a: // asymmetric access state transition
		return Action{Verb: RetryElsewhere, Pause: pauseBusy, Err: block.ErrIO, Ask: askRank}
	case 0x0b: // standby: out of use until the unit says otherwise
		return Action{Verb: RetryElsewhere, Pause: pauseBusy, Err: block.ErrIO, Ask: askRank, Doubt: true}
	case 0x03, 0x0c, 0x12: // manual intervention, unavailable, offline
		return Action{Verb: FailPath}
	}
	return Action{Verb: RetryElsewhere, Pause: pauseMaking, Err: block.ErrIO}
}

// unitAttention is sense key 6: nothing was executed, something changed.
func unitAttention(s scsi.Sense) Action {
	a := Action{Verb: RetryHere, Err: block.ErrIO}
	switch s.ASC {
	case 0x04:
		if s.ASCQ == 0x0a {
			return Action{Verb: RetryElsewhere, Pause: pauseBusy, Err: block.ErrIO, Ask: askRank}
		}
	case 0x29: // reset, power on, nexus loss; the session resolves older commands
		a.Doubt, a.Ask = true, askRank
	case 0x2a:
		switch s.ASCQ {
		case 0x01: // mode parameters: the cache may have become volatile
			a.Doubt = true
		case 0x03, 0x04, 0x05: // reservations preempted or released, registrations preempted
			a.Ask = askReserve
		case 0x06, 0x07:
			a.Ask = askRank
		case 0x09: // capacity
			a.Doubt = true
		}
	case 0x38:
		if s.ASCQ == 0x07 {
			a.Ask = askThin
		}
	case 0x3f:
		switch s.ASCQ {
		case 0x03: // inquiry data
			a.Foreign = true
		case 0x0e: // reported LUNs
			a.Foreign, a.Ask = true, askRescan
		}
	}
	return a
}
