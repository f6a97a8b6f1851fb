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

// State of a path by its checker.
type State string

const (
	Up      State = "up"
	Down    State = "down"
	Ghost   State = "ghost"   // usable after a failover of the array
	Pending State = "pending" // in transition: ask again soon
	Timeout State = "timeout"
	Shaky   State = "shaky" // busy with itself: not now
	// Disconnected: the target says that there is no such unit.
	Disconnected State = "disconnected"
)

// Verdict is the outcome of one check.
type Verdict struct {
	State State
	Err   error // why not up
}

// LU is the unit under check, through one path.
type LU struct {
	Doer      initiator.Doer
	LUN       [8]byte
	BlockSize int // bytes
	Use16     bool
}

// Checker is one way to check.
type Checker interface {
	Name() string
	Check(ctx context.Context, lu LU) Verdict
}

// New returns the checker of a path_checker setting.
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

// TUR asks without touching the medium.
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
	Min, Max time.Duration
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
