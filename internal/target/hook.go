package target

import "time"

// Cmd is a SCSI command as the hook sees it. It is valid during the call only.
type Cmd struct {
	Portal    *Portal
	Target    string
	Initiator string
	LUN       [8]byte
	CDB       [16]byte
	Length    uint32 // expected data transfer length, bytes
	Write     bool   // data goes to the target
	CmdSN     uint32
	Count     uint64 // commands this connection received before this one
}

// Op is the operation code, the first byte of the CDB.
func (c *Cmd) Op() byte { return c.CDB[0] }

// Sense is a sense key with its additional code and qualifier (SPC-4 4.5).
type Sense struct{ Key, ASC, ASCQ uint8 }

// Action is what a hook makes of a command. The zero Action executes and
// answers it as usual.
type Action struct {
	// Status other than 0 answers with this SAM status and does not execute;
	// 2 (CHECK CONDITION) comes with Sense.
	Status uint8
	Sense  Sense
	// SenseData, if not nil, are the sense bytes in place of Sense: any format,
	// cut short, or empty for none.
	SenseData []byte
	// Data, if not nil, is what a command with data in answers instead of its
	// own, cut to what the initiator expects.
	Data []byte
	// Response other than 0 is a SCSI Response with this iSCSI response code
	// (1: target failure) and no status; the command is not executed.
	Response uint8
	// Reject other than 0 rejects the PDU for this reason (RFC 7143 11.17.1); only
	// for commands without data to the target.
	Reject uint8
	// Silent never answers. The command is not executed unless Orphan is set.
	Silent bool
	// Delay executes and answers this much later, behind whatever comes in
	// between. The command dies with its connection.
	Delay time.Duration
	// Orphan executes the command after Delay even though its connection is
	// gone by then: a ghost write. Session reinstatement, LOGICAL UNIT RESET
	// and Kill still prevent it, as on a real target.
	Orphan bool
	// ShortBy sends that many bytes fewer of a read's data than the status
	// and residual admit; a negative value sends bytes beyond the request.
	ShortBy int
	// Inject is sent as it is before the answer.
	Inject []byte
	// Reset resets the connection instead of any answer.
	Reset bool
}

// Task is a task management request as its hook sees it (RFC 7143 11.5.1).
type Task struct {
	Portal   *Portal
	Function uint8
	LUN      [8]byte
}

// TaskAction is what a hook makes of a task management request. The zero value
// executes and answers it as usual.
type TaskAction struct {
	// Lie answers "function complete" and does nothing.
	Lie      bool
	Response uint8 // other than 0: answers with this response and does nothing
	Silent   bool  // does nothing and never answers
}
