package initiator

import (
	"errors"

	"github.com/mpathd/mpathd/block"
)

// Direction is which way a command's data flows.
type Direction uint8

const (
	// NoData: the command moves no data.
	NoData Direction = iota
	// DataIn: target to initiator, into Command.Data.
	DataIn
	// DataOut: initiator to target, out of Command.Data.
	DataOut
)

// Delivery tells how much of a mutating command may have reached the target
// when its session died, by what the kernel accepted from writev.
type Delivery uint8

const (
	// NotSent: no byte of the command was handed to the kernel.
	NotSent Delivery = iota
	// PartlySent: some of the header, or not all data, was handed over.
	PartlySent
	// Sent: header and all data were handed to the kernel: ambiguous.
	Sent
)

// MaxSense is how many bytes of sense data a Result keeps.
const MaxSense = 96

// Result is the outcome of a command. Err tells a transport outcome; with
// Err nil, Status and Sense hold what the target said (SAM-5 5.3.1).
type Result struct {
	Err      error          // nil, or ErrSessionLost, ErrTargetFailure, ErrShort, ErrOverflow, ErrTimeout, ErrAborted
	Status   uint8          // SAM status, valid with Err == nil
	SenseLen uint8          // how many bytes of Sense are there
	Sense    [MaxSense]byte // as received, see scsi.ParseSense
	Residual uint32         // bytes not transferred (underflow)
	Received uint32         // bytes of Data-In that arrived
	Delivery Delivery       // with ErrSessionLost
}

// SenseData is the sense bytes received, empty if there were none.
func (r *Result) SenseData() []byte { return r.Sense[:r.SenseLen] }

// Errors of commands and sessions.
var (
	// ErrSessionLost: the session ended before the command did.
	ErrSessionLost = errors.New("session lost")
	// ErrTargetFailure: SCSI Response with response != 0 (RFC 7143 11.4.3).
	ErrTargetFailure = errors.New("target failure")
	// ErrShort: GOOD status, but fewer bytes moved than a full-length command asked for.
	ErrShort = errors.New("short transfer")
	// ErrOverflow: GOOD status, but the target had more data than the command's
	// buffer: it understood another length.
	ErrOverflow = errors.New("the target had more data to transfer than was asked for")
	// ErrTimeout: no answer in time although the session lives.
	ErrTimeout = errors.New("command timed out")
	// ErrAborted: the command was rejected or aborted and may be issued again.
	ErrAborted = errors.New("command aborted")
)

// Doner takes finished commands back: Done is called once for each that Submit
// took, on any goroutine, after the session has let go of c and c.Data. It never
// blocks, allocates or logs, and may submit again with p.
type Doner interface {
	Done(c *Command, p *block.Plug)
}

// Command is one SCSI command on a session. The submitter owns the struct and
// Data before Submit and after Done; in between the session does.
type Command struct {
	LUN  [8]byte  // raw, as REPORT LUNS gave it (SAM-5 4.7)
	CDB  [16]byte // package scsi fills it
	Dir  Direction
	Data []byte // its length is the Expected Data Transfer Length
	// ShortOK accepts a residual underflow as success (INQUIRY, MODE SENSE).
	ShortOK bool
	Owner   Doner
	Tag     uint64 // the owner's own
	Result  Result

	wire wire // private: ITT and offsets
}
