// Package checker asks a path whether it is usable, as multipath-tools'
// checkers of the same names do.
package checker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// State of a path by its checker, with the words and meanings of multipath-tools
// (libmultipath/checkers.h).
type State string

const (
	Up      State = "up"      // it takes I/O
	Down    State = "down"    // it answers with an error, or not at all
	Ghost   State = "ghost"   // usable after a failover of the array
	Pending State = "pending" // in transition: ask again soon
	Timeout State = "timeout" // no answer before the context ended
	Shaky   State = "shaky"   // busy with itself: not now
	// Disconnected: the target says that there is no such unit.
	Disconnected State = "disconnected"
)

// Verdict is the outcome of one check.
type Verdict struct {
	State State
	Err   error // why not up; nil with Up
}

// LU is the unit under check, through one path.
type LU struct {
	Doer      initiator.Doer // the session to ask through
	LUN       [8]byte        // raw
	BlockSize int            // bytes; 0: unknown, then nothing can be read
	Use16     bool           // READ (16), else READ (10)
}

// Checker is one way to check. Check asks and waits for the answer, until ctx ends; it
// changes nothing at the unit. One Checker serves all paths of a map at once.
type Checker interface {
	Name() string // as in path_checker
	Check(ctx context.Context, lu LU) Verdict
}

// New returns the checker of a path_checker setting, tur for an empty one. The error
// lists the names.
func New(name string) (Checker, error) {
	switch name {
	case "tur", "":
		return tur{}, nil
	case "readsector0":
		return reader{"readsector0", 1}, nil
	case "directio":
		return reader{"directio", 4096}, nil
	case "none":
		return none{}, nil
	case "rdac":
		return rdac{}, nil
	case "emc_clariion":
		return &clariion{}, nil
	case "hp_sw":
		return hpSW{}, nil
	}
	return nil, fmt.Errorf("path_checker %q: want %s", name, strings.Join(Names, ", "))
}

// Names are the checkers that New knows.
var Names = []string{"tur", "readsector0", "directio", "none", "rdac", "emc_clariion", "hp_sw"}

// TUR asks with TEST UNIT READY, without touching the medium. A reservation conflict
// counts as up: reads may go through, and the guest is told of the rest.
var TUR Checker = tur{}

type none struct{}

func (none) Name() string                      { return "none" }
func (none) Check(context.Context, LU) Verdict { return Verdict{State: Up} }

type tur struct{}

func (tur) Name() string { return "tur" }
func (tur) Check(ctx context.Context, lu LU) Verdict {
	return verdict(ctx, initiator.TestUnitReady(ctx, lu.Doer, lu.LUN))
}

// reader reads from the start of the unit: one block, or up to size bytes.
type reader struct {
	name string
	size int
}

func (r reader) Name() string { return r.name }
func (r reader) Check(ctx context.Context, lu LU) Verdict {
	if lu.BlockSize <= 0 {
		return Verdict{Down, errors.New("block size unknown")}
	}
	blocks := max(1, r.size/lu.BlockSize)
	return verdict(ctx, initiator.ReadBlocks(ctx, lu.Doer, lu.LUN, 0, blocks, lu.BlockSize, lu.Use16))
}

func verdict(ctx context.Context, err error) Verdict {
	if err == nil {
		return Verdict{State: Up}
	}
	var se *initiator.StatusError
	if errors.As(err, &se) {
		switch s := se.Sense; {
		case se.Status == scsi.StatusReservationConflict:
			return Verdict{State: Up}
		case s.Key == scsi.KeyNotReady && s.ASC == 4 && s.ASCQ == 0x0b:
			return Verdict{Ghost, err}
		case s.Key == scsi.KeyNotReady && s.ASC == 4 && s.ASCQ == 0x0a:
			return Verdict{Pending, err}
		case s.Key == scsi.KeyIllegalRequest && s.ASC == 0x25 && s.ASCQ == 0:
			return Verdict{Disconnected, err}
		}
	} else if ctx.Err() != nil {
		return Verdict{Timeout, err}
	}
	return Verdict{Down, err}
}

// Interval is the time between checks: it starts at Min and doubles to Max
// while checks are good and nothing changes.
type Interval struct {
	Min, Max time.Duration // polling_interval, max_polling_interval
	cur      time.Duration
}

// Next is the wait after a check; steady tells that it was good and unchanged.
func (i *Interval) Next(steady bool) time.Duration {
	if !steady || i.cur == 0 {
		i.cur = i.Min
	} else {
		i.cur = min(2*i.cur, i.Max)
	}
	return i.cur
}
