package kernel

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/scsi"
)

// prepare fills rq with a command without data.
func prepare(rq *sys.SGRequest, cdb scsi.CDB, o Options) {
	rq.CDB, rq.CDBLen = cdb, length(cdb[0])
	rq.Direction, rq.Data = sys.SGNone, nil
	rq.TimeoutMS = uint32(o.CommandTimeout / time.Millisecond)
	rq.Status, rq.SenseLen, rq.Host, rq.Driver, rq.Residual = 0, 0, 0, 0, 0
}

// length of a CDB by its group code (SPC-4 4.2.5.1).
func length(op uint8) int {
	switch op >> 5 {
	case 0:
		return 6
	case 1, 2:
		return 10
	case 5:
		return 12
	}
	return 16
}

// The kernel's codes for how a command ended (linux/include/scsi/scsi_status.h).
const (
	hostBusBusy   = 0x02
	hostTimeout   = 0x03
	hostReset     = 0x08
	hostSoftError = 0x0b
	hostRetry     = 0x0c
	hostRequeue   = 0x0d
)

var hostTexts = map[uint16]string{0x01: "no connection", 0x02: "bus busy", 0x03: "timed out", 0x04: "bad target", 0x05: "aborted", 0x07: "internal error",
	0x0e: "transport disrupted", 0x0f: "transport failed", 0x14: "transport marginal"}

// read takes the outcome of an SG_IO command. With an errno the kernel did not
// send it.
func read(rq *sys.SGRequest, err error, device string) (o outcome) {
	r := &o.res
	switch {
	case errors.Is(err, syscall.ENOMEM), errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.EBUSY):
		r.Err = initiator.ErrAborted
		return o
	case errors.Is(err, syscall.EPERM): // the kernel's filter of commands: CAP_SYS_RAWIO is missing
		o.res = sense(scsi.KeyIllegalRequest, 0x20, 0)
		return o
	case err != nil:
		o.lost = fmt.Errorf("%s: %w", device, err)
		return o
	}
	r.Status = rq.Status & 0x7e
	r.SenseLen = uint8(copy(r.Sense[:], rq.Sense[:min(max(rq.SenseLen, 0), len(rq.Sense))]))
	r.Residual = uint32(max(rq.Residual, 0))
	if rq.Direction == sys.SGIn {
		r.Received = uint32(max(len(rq.Data)-int(r.Residual), 0))
	}
	if r.Status != 0 || rq.Host == 0 {
		return o
	}
	switch rq.Host {
	case hostBusBusy, hostSoftError, hostRetry, hostRequeue, hostReset: // not executed, or ended by a reset
		r.Err = initiator.ErrAborted
		return o
	}
	text := hostTexts[rq.Host]
	if text == "" {
		text = "failed"
	}
	o.lost = fmt.Errorf("%s: the kernel's path %s (host status %#02x)", device, text, rq.Host)
	return o
}

// sense is CHECK CONDITION with fixed format sense data (SPC-4 4.5.3).
func sense(key, asc, ascq uint8) (r initiator.Result) {
	r.Status = scsi.StatusCheckCondition
	r.Sense[0], r.Sense[2], r.Sense[7], r.Sense[12], r.Sense[13] = 0x70, key, 10, asc, ascq
	r.SenseLen = 18
	return r
}

// attention is CHECK CONDITION with the sense data of an earlier command.
func attention(b []byte) (r initiator.Result) {
	r.Status = scsi.StatusCheckCondition
	r.SenseLen = uint8(copy(r.Sense[:], b))
	return r
}
