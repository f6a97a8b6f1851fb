package paths

import (
	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// Verb is what to do with a command that came back.
type Verb uint8

const (
	Done           Verb = iota // the command did its work
	RetryElsewhere             // try another path first; this one stays
	RetryHere                  // try again, after a pause unless Now
	FailPath                   // the path is at fault: fail it, retry elsewhere
	FailUp                     // no path can help: report Err
	Unsupported                // the unit does not know this command: fall back
)

// Action is a verdict on a result. Pause asks for a delay before the retry;
// Bounded counts the retry against the request.
type Action struct {
	Verb    Verb
	Err     error
	Pause   bool
	Bounded bool
	Verify  bool // the unit may have become another one: prove it before the next I/O
	Rank    bool // the priority of the path may have changed
}

// classify is the one table that decides what a result means, after the
// kernel's (drivers/scsi/scsi_error.c, block/blk-core.c blk_path_error): target
// errors go up, transport errors move to another path.
func classify(r *initiator.Result) Action {
	switch r.Err {
	case nil:
	case initiator.ErrSessionLost:
		return Action{Verb: RetryElsewhere} // the session's end has failed the path already
	case initiator.ErrAborted:
		return Action{Verb: RetryHere, Pause: true}
	case initiator.ErrTimeout: // the target aborted it: slow, not dead
		return Action{Verb: RetryElsewhere}
	default: // target failure, short transfer
		return Action{Verb: FailPath}
	}
	switch r.Status {
	case scsi.StatusGood, scsi.StatusConditionMet:
		return Action{Verb: Done}
	case scsi.StatusBusy, scsi.StatusTaskSetFull, scsi.StatusACAActive:
		return Action{Verb: RetryHere, Pause: true}
	case scsi.StatusTaskAborted:
		return Action{Verb: RetryHere}
	case scsi.StatusReservationConflict:
		return Action{Verb: FailUp, Err: block.ErrReservation}
	case scsi.StatusCheckCondition:
		return classifySense(scsi.ParseSense(r.SenseData()))
	}
	return Action{Verb: FailPath}
}

func classifySense(s scsi.Sense) Action {
	if !s.Valid {
		return Action{Verb: RetryElsewhere, Pause: true, Bounded: true, Err: block.ErrIO}
	}
	if s.Deferred { // belongs to an earlier command; this one was not executed
		return Action{Verb: RetryHere, Bounded: true, Err: block.ErrIO}
	}
	switch s.Key {
	case scsi.KeyNoSense, scsi.KeyRecovered:
		return Action{Verb: Done}
	case scsi.KeyNotReady:
		switch {
		case s.ASC == 0x3a:
			return Action{Verb: FailUp, Err: block.ErrIO}
		case s.ASC == 4 && (s.ASCQ == 0x03 || s.ASCQ == 0x0b || s.ASCQ == 0x0c || s.ASCQ == 0x12):
			return Action{Verb: FailPath}
		}
		return Action{Verb: RetryElsewhere, Pause: true}
	case scsi.KeyMedium:
		if s.ASC == 0x11 || s.ASC == 0x13 || s.ASC == 0x14 {
			return Action{Verb: FailUp, Err: block.ErrMedium}
		}
		return Action{Verb: RetryHere, Bounded: true, Err: block.ErrMedium}
	case scsi.KeyHardware:
		return Action{Verb: RetryElsewhere, Bounded: true, Err: block.ErrIO}
	case scsi.KeyIllegalRequest:
		switch s.ASC {
		case 0x20, 0x24, 0x26:
			return Action{Verb: Unsupported, Err: block.ErrIO}
		case 0x21:
			return Action{Verb: FailUp, Err: block.ErrOutOfRange}
		case 0x25: // the unit is gone on this path
			return Action{Verb: FailPath}
		}
		return Action{Verb: FailUp, Err: block.ErrIO}
	case scsi.KeyUnitAttention:
		// Power on and resets, changed parameters and capacity, changed
		// inquiry data and LUN inventory (SPC-4 annex D).
		return Action{Verb: RetryHere, Rank: s.ASC == 0x2a && (s.ASCQ == 0x06 || s.ASCQ == 0x07), Verify: s.ASC == 0x29 || s.ASC == 0x2a && s.ASCQ == 0x09 || s.ASC == 0x3f && (s.ASCQ == 0x03 || s.ASCQ == 0x0e)}
	case scsi.KeyDataProtect:
		if s.ASC == 0x27 && s.ASCQ == 0x07 {
			return Action{Verb: FailUp, Err: block.ErrNoSpace}
		}
		return Action{Verb: FailUp, Err: block.ErrReadOnly}
	case scsi.KeyAborted:
		if s.ASC == 0x10 {
			return Action{Verb: FailUp, Err: block.ErrIO}
		}
		return Action{Verb: RetryElsewhere, Bounded: true, Err: block.ErrIO}
	}
	return Action{Verb: FailUp, Err: block.ErrIO}
}
