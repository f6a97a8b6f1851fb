// Package block is the currency of mpathd: the request that travels from an
// NBD connection to a path and back, the device that takes it, the plug that
// batches system calls, and the error kinds they share. It does no I/O.
package block

import (
	"context"
	"errors"
)

// Op is what a Request asks for.
type Op uint8

// The operations, in the order of the NBD commands they come from.
const (
	Read Op = iota
	Write
	Flush
	Trim
	WriteZeroes
)

// String returns the operation's name as it is logged.
func (o Op) String() string {
	switch o {
	case Read:
		return "read"
	case Write:
		return "write"
	case Flush:
		return "flush"
	case Trim:
		return "trim"
	case WriteZeroes:
		return "write-zeroes"
	}
	return "unknown"
}

// Flags modify an operation.
type Flags uint8

const (
	// FUA makes a mutation durable before it completes (NBD_CMD_FLAG_FUA; the FUA
	// bit of SBC-3 5.33, or a flush behind the mutation).
	FUA Flags = 1 << iota
	// NoUnmap forbids WriteZeroes to deallocate (NBD_CMD_FLAG_NO_HOLE).
	NoUnmap
	// FastZero makes WriteZeroes fail with ErrNotSup where it would be no faster
	// than writing zeroes (NBD_CMD_FLAG_FAST_ZERO).
	FastZero
)

// Request is one I/O. It is decoded once, never copied, and waits in at most
// one place. Whoever holds the request owns Data; Submit passes the request to
// the device and Complete passes it back.
type Request struct {
	Op    Op
	Flags Flags
	// Off and Len are bytes; both are validated and multiples of the device's
	// block size. Len is 0 for Flush.
	Off, Len int64
	// Data is Len bytes for Read (filled by the device) and Write, else nil.
	Data []byte
	// Arena, if set, is where Data of a Read came from: the device may put another
	// buffer of it in Data's place, and keep the one that it was given.
	Arena *Arena
	// Owner is told when the request is done; Tag is the owner's own index.
	Owner Completer
	Tag   uint64
	// Err is the outcome: nil or one of this package's error kinds.
	Err error
	// Route is scratch space of the device while it holds the request.
	Route Route
}

// Route is the device's scratch space in a Request. No other code reads it.
type Route struct {
	Next    *Request // link in the one queue the request waits in
	Start   int64    // monotonic ns at first submission
	Parked  int64    // the same when it first had to wait for one certain path, 0: never
	PutOff  int64    // the same when the device was first told to try again later, 0: never
	Pos     int64    // bytes of Len already handed to attempts
	Losses  uint32   // sessions that the device had lost when the first command went out
	Tries   int32    // failed attempts so far
	Refused int32    // of those, the ones that count against a limit
	State   uint32   // the device's own state bits
}

// A Completer takes finished requests back. Complete never blocks, allocates
// or logs; it may be called from any goroutine, and it may submit again.
type Completer interface {
	Complete(r *Request, p *Plug)
}

// A Device serves requests. Submit never blocks and never fails: each request
// is completed exactly once, possibly before Submit returns. System calls that
// the request needs may wait in p until p.Flush. From Submit to Complete the
// device owns r and r.Data. Both methods are for many goroutines at once; what
// Geometry returns may change when the unit is resized.
type Device interface {
	Geometry() Geometry
	Submit(r *Request, p *Plug)
}

// Geometry is what a device is and what it can do.
type Geometry struct {
	Size          int64 // bytes, a multiple of BlockSize
	BlockSize     int   // logical block, bytes: the unit of Off and Len
	PhysicalBlock int   // physical block, bytes (>= BlockSize)
	OptimalIO     int   // preferred I/O size in bytes, 0 if unknown
	ReadOnly      bool  // mutations fail with ErrReadOnly
	Rotational    bool  // seeking costs time, or nobody says that it does not
	Trim          bool  // Trim does something
	FastZero      bool  // WriteZeroes is faster than writing, until it fails with ErrNotSup
	WriteCache    bool  // a volatile cache exists, so Flush matters
}

// Extent is a run of bytes of one allocation state.
type Extent struct {
	Len        int64 // bytes
	Hole, Zero bool  // not allocated; reads as zeroes
}

// A Mapper is a Device that knows where it holds data.
type Mapper interface {
	// Extents describes the bytes from off on: at least one extent, at most
	// limit, which together may reach less far than n but not beyond it. It may
	// wait for the device; when that cannot tell, everything is data.
	Extents(ctx context.Context, off, n int64, limit int) []Extent
}

// Error kinds. Hot paths compare and copy these; they never build errors. Behind
// each: what the unit said (sense key, ASC/ASCQ), and what an NBD client is told if
// that is not EIO.
var (
	ErrIO          = errors.New("input/output error")                                      // retries or patience used up
	ErrMedium      = errors.New("unrecovered medium error")                                // 3
	ErrNoSpace     = errors.New("no space left on device")                                 // 7 27/07; ENOSPC
	ErrReadOnly    = errors.New("device is write protected")                               // 7, all else; EPERM
	ErrInvalid     = errors.New("invalid request")                                         // no device would take it; EINVAL
	ErrOutOfRange  = errors.New("request beyond the end of the device")                    // 5 21; EINVAL
	ErrNotSup      = errors.New("operation not supported")                                 // FastZero; ENOTSUP
	ErrReservation = errors.New("reservation conflict")                                    // status RESERVATION CONFLICT; EPERM
	ErrTarget      = errors.New("the logical unit refuses or cannot do this")              // 4, 5 and what nobody knows
	ErrIntegrity   = errors.New("protection information does not match the data")          // B 10
	ErrTimeLimit   = errors.New("the logical unit gave the command up: its time was over") // B 2E/01 to 03, F 55/0A
	ErrNoPath      = errors.New("no usable path")                                          // no_path_retry is used up
	ErrShutdown    = errors.New("device is shutting down")                                 // ESHUTDOWN
)
