package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"github.com/ncw/directio"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/scsi"
)

// device is what a session drives. All calls may hang, and all but close may
// run beside each other.
type device interface {
	sg(r *sys.SGRequest) error
	readAt(b []byte, off int64) (int, error)
	writeAt(b []byte, off int64, durable bool) (int, error)
	reset() error // LOGICAL UNIT RESET
	rescan()      // makes the kernel ask for the capacity anew
	close()
}

// Phases of a worker. Session.mu guards them.
type phase uint8

const (
	waiting   phase = iota
	loading         // copies the command's data: it comes back soon
	inKernel        // may hang; uses only the worker's memory
	abandoned       // as inKernel, but the command was handed back
	finishing       // fills in the command: it comes back soon
)

// worker is a goroutine that takes one command at a time through the kernel.
type worker struct {
	s     *Session
	phase phase
	job   job
	plug  block.Plug

	// The worker's alone, also while the kernel works on it.
	buf []byte // aligned for O_DIRECT, grows to the largest command
	rq  sys.SGRequest
	out outcome
}

// outcome is what became of a command: an answer of the unit, or lost.
type outcome struct {
	res  initiator.Result
	lost error // the path failed
}

// room makes the worker's buffer n bytes.
func (w *worker) room(n int) []byte {
	if cap(w.buf) < n {
		size := directio.BlockSize
		for size < n {
			size *= 2
		}
		w.buf = directio.AlignedBlock(size)
	}
	return w.buf[:n]
}

func (w *worker) routine() {
	s := w.s
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		for s.n == 0 && !s.dead {
			s.idle++
			s.work.Wait()
			s.idle--
		}
		if s.dead {
			return
		}
		w.job = s.take()
		w.phase = loading
		s.mu.Unlock()
		c := w.job.c
		cdb, dir := c.CDB, c.Dir
		data := w.room(len(c.Data))
		if dir == initiator.DataOut {
			copy(data, c.Data)
		}
		s.mu.Lock()
		if s.dead {
			w.giveBack(initiator.NotSent)
			return
		}
		if len(s.unitAttn) > 0 && isData(cdb[0]) {
			w.out = outcome{res: attention(s.unitAttn)}
			s.unitAttn = nil
			w.phase = finishing
		} else {
			w.phase = inKernel
			s.calls++
			s.mu.Unlock()
			w.execute(cdb, dir, data)
			s.mu.Lock()
			s.calls--
			if w.phase == abandoned {
				s.release()
				return
			}
			w.phase = finishing
		}
		s.mu.Unlock()
		if w.out.lost != nil {
			s.fail(w.out.lost)
			s.mu.Lock()
			w.giveBack(initiator.Sent)
			return
		}
		s.life.Add(1)
		s.notice(&w.out.res)
		if dir == initiator.DataIn {
			copy(c.Data[:min(int(w.out.res.Received), len(c.Data))], data)
		}
		c.Result = w.out.res
		if c.Result.Err == nil && c.Result.Status == scsi.StatusGood && c.Result.Residual > 0 && !c.ShortOK {
			c.Result.Err = initiator.ErrShort
		}
		s.mu.Lock()
		s.inFlight--
		room := s.refused
		s.refused = false
		s.mu.Unlock()
		c.Owner.Done(c, &w.plug)
		if room && s.o.OnRoom != nil {
			s.o.OnRoom(&w.plug)
		}
		w.plug.Flush()
		s.mu.Lock()
		w.job, w.phase = job{}, waiting
		s.calm.Broadcast()
	}
}

// giveBack leaves the command of a dead session to routineEnd. Caller holds mu.
func (w *worker) giveBack(d initiator.Delivery) {
	w.job.delivery = d
	w.s.returned = append(w.s.returned, w.job)
	w.job, w.phase = job{}, waiting
	w.s.calm.Broadcast()
	w.s.release()
}

// isData tells the commands that go through O_DIRECT.
func isData(op uint8) bool {
	return op == scsi.OpRead10 || op == scsi.OpRead16 || op == scsi.OpWrite10 || op == scsi.OpWrite16
}

// extent is what a READ or WRITE asks for, in blocks.
func extent(cdb *scsi.CDB) (lba uint64, blocks uint32, use16 bool) {
	be := binary.BigEndian
	if cdb[0] == scsi.OpRead16 || cdb[0] == scsi.OpWrite16 {
		return be.Uint64(cdb[2:]), be.Uint32(cdb[10:]), true
	}
	return uint64(be.Uint32(cdb[2:])), uint32(be.Uint16(cdb[7:])), false
}

// execute runs one command and leaves its outcome in w.out. It may hang.
func (w *worker) execute(cdb scsi.CDB, dir initiator.Direction, data []byte) {
	lba, blocks, _ := extent(&cdb)
	if !isData(cdb[0]) || int64(len(data)) != int64(blocks)*w.s.bs || len(data) == 0 || lba >= 1<<62/uint64(w.s.bs) {
		w.out = w.pass(cdb, dir, data)
		return
	}
	off, done := int64(lba)*w.s.bs, 0
	var err error
	for done < len(data) && err == nil {
		var n int
		if dir == initiator.DataIn {
			n, err = w.s.dev.readAt(data[done:], off+int64(done))
		} else {
			n, err = w.s.dev.writeAt(data[done:], off+int64(done), cdb[1]&0x08 != 0)
		}
		if n == 0 && err == nil {
			err = errEnd
		}
		done += n &^ (int(w.s.bs) - 1)
	}
	switch {
	case err == nil:
		w.out = outcome{}
		if dir == initiator.DataIn {
			w.out.res.Received = uint32(len(data))
		}
	case errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.ENXIO):
		w.out = outcome{lost: fmt.Errorf("%s is gone: %w", w.s.device, err)}
	default:
		w.ask(cdb, dir, data, err)
	}
}

// errEnd is a transfer beyond the end of the device as the kernel knows it.
var errEnd = errors.New("end of the device")

// ask finds out what an errno means, which says little: the same command is
// issued again through SG_IO, which shows the unit's own status and sense. A
// write that then succeeds was lost once on the way, and the first copy may
// still arrive: only a fence can rule that out.
func (w *worker) ask(cdb scsi.CDB, dir initiator.Direction, data []byte, cause error) {
	beyond := errors.Is(cause, errEnd) || errors.Is(cause, syscall.ENOSPC)
	if beyond { // a unit that grew: nothing was sent
		w.s.dev.rescan()
	}
	lba, _, use16 := extent(&cdb)
	for at := 0; at < len(data); at += askBytes {
		part := data[at:min(at+askBytes, len(data))]
		blocks := uint32(int64(len(part)) / w.s.bs)
		var c scsi.CDB
		if dir == initiator.DataIn {
			scsi.Read(&c, lba, blocks, use16)
		} else {
			scsi.Write(&c, lba, blocks, cdb[1]&0x08 != 0, use16)
		}
		lba += uint64(blocks)
		w.out = w.pass(c, dir, part)
		r := &w.out.res
		short := r.Residual > 0 && (dir == initiator.DataIn || beyond) // the kernel lets it pass; else see below
		if w.out.lost != nil || r.Err != nil || r.Status != scsi.StatusGood || short {
			if w.out.lost != nil {
				w.out.lost = fmt.Errorf("%w (after %w)", w.out.lost, cause)
			}
			return
		}
	}
	w.out = outcome{}
	switch {
	case dir == initiator.DataIn:
		w.out.res.Received = uint32(len(data))
	case !beyond:
		w.out.lost = fmt.Errorf("%s: a write failed on the way: %w", w.s.device, cause)
	}
}

// askBytes per command are what any host adapter takes.
const askBytes = 128 << 10

// pass sends a command as it is (SG_IO).
func (w *worker) pass(cdb scsi.CDB, dir initiator.Direction, data []byte) outcome {
	prepare(&w.rq, cdb, w.s.o)
	switch {
	case len(data) == 0:
	case dir == initiator.DataIn:
		w.rq.Direction, w.rq.Data = sys.SGIn, data
	case dir == initiator.DataOut:
		w.rq.Direction, w.rq.Data = sys.SGOut, data
	}
	err := w.s.dev.sg(&w.rq)
	return read(&w.rq, err, w.s.device)
}
