package simulate

import (
	"encoding/binary"
	"slices"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/scsi"
)

// task is a SCSI command.
type task struct {
	tc      *tconn
	h       pdu.Header
	data    []byte
	want    int // bytes of data it needs
	asked   int
	unasked bool // unsolicited data follows
	r2t     uint32
	queued  bool
	inWork  bool
	ended   bool
	aborted bool // answers TASK ABORTED, or nothing if mute
	mute    bool
}

func (t *task) ready() bool { return !t.unasked && len(t.data) >= t.want }

// command takes a SCSI command with its immediate data.
func (tc *tconn) command(h pdu.Header, data []byte) {
	t := &task{tc: tc, h: h, data: data, unasked: !h.IsFinal()}
	if h.Flags()&pdu.CmdWrite != 0 {
		t.want = int(h.EDTL())
		tc.s.w.net.used = tc.c.link
	}
	tc.tasks = append(tc.tasks, t)
	s := tc.s
	if s.serial {
		t.queued = true
		s.queue = append(s.queue, t)
	}
	if s.dataTimeout > 0 && !s.serial && !t.ready() {
		s.w.after(s.dataTimeout, func() {
			if !t.ended && !t.ready() {
				tc.kill()
			}
		})
	}
	s.advance(t)
}

// advance asks for data, or puts the command to work.
func (s *server) advance(t *task) {
	if t.unasked || t.ended {
		return
	}
	if !t.ready() {
		if t.tc.dead {
			return
		}
		var a pdu.Header
		a[0], a[1] = uint8(pdu.OpR2T), pdu.Final
		a.SetLUN(t.h.LUN())
		a.SetITT(t.h.ITT())
		a.SetTTT(1 + t.r2t)
		a.SetDataSN(t.r2t)
		a.SetBufferOffset(uint32(len(t.data)))
		a.SetDesiredLen(uint32(min(t.want-len(t.data), s.w.set.Burst)))
		t.r2t++
		t.tc.send(&a, nil, false)
		return
	}
	if t.aborted { // while it waited for data: not executed
		s.end(t)
		return
	}
	if t.queued && s.queue[0] != t || t.inWork {
		return
	}
	t.inWork = true
	s.work = append(s.work, t)
	s.w.after(s.takes(t), func() { s.finish(t) })
}

// takes is how long the backend works on a command.
func (s *server) takes(t *task) time.Duration {
	switch t.h.CDB()[0] {
	case 0x00, 0x12, 0x9e, 0x1a:
		return 10 * time.Microsecond
	}
	if s.stalled && s.r.IntN(3) > 0 {
		return time.Duration(s.r.Int64N(int64(5 * time.Second)))
	}
	return time.Duration(30+s.r.IntN(1500)) * time.Microsecond
}

// commit is for arrays that write each burst when it is complete.
func (s *server) commit(t *task) {
	if op := t.h.CDB()[0]; op != scsi.OpWrite16 || !s.w.set.CommitsBursts || t.aborted || t.queued && s.queue[0] != t {
		return
	}
	if lba := int(binary.BigEndian.Uint64(t.h.CDB()[2:])); lba+len(t.data)/blockSize <= len(s.w.disk.dirty) {
		s.w.disk.write(s, lba, t.data[:len(t.data)/blockSize*blockSize], false)
	}
}

// finish executes a command and answers it.
func (s *server) finish(t *task) {
	if t.ended { // the machine went down meanwhile
		return
	}
	data, sn := s.execute(t)
	s.end(t)
	switch {
	case t.mute:
	case t.aborted:
		t.tc.respond(&t.h, scsi.StatusTaskAborted, noSense, 0)
	case sn == busy:
		t.tc.respond(&t.h, scsi.StatusBusy, noSense, 0)
	case sn != noSense:
		t.tc.respond(&t.h, scsi.StatusCheckCondition, sn, 0)
	case t.h.Flags()&pdu.CmdRead != 0:
		t.tc.dataIn(&t.h, data)
	default:
		t.tc.respond(&t.h, scsi.StatusGood, noSense, t.want)
	}
}

// end takes a task out of everything.
func (s *server) end(t *task) {
	if t.ended {
		return
	}
	t.ended = true
	same := func(o *task) bool { return o == t }
	t.tc.tasks = slices.DeleteFunc(t.tc.tasks, same)
	s.work = slices.DeleteFunc(s.work, same)
	s.queue = slices.DeleteFunc(s.queue, same)
	s.settle()
	if len(s.queue) > 0 && s.queue[0].ready() {
		s.advance(s.queue[0])
	}
}

var (
	busy    = sense{255}
	powerOn = sense{6, 0x29, 1}
)

// execute has the effect of a command.
func (s *server) execute(t *task) ([]byte, sense) {
	cdb, d, tc := t.h.CDB(), s.w.disk, t.tc
	be := binary.BigEndian
	if cdb[0] == 0x12 {
		return d.answer(s, cdb)
	}
	if s.w.set.TellsPower && s.told[tc.isid] < s.cuts && !tc.dead && !t.aborted { // what a nexus loss ended reports nothing
		s.told[tc.isid] = s.cuts
		return nil, powerOn
	}
	if len(tc.ua) > 0 && !t.aborted { // an aborted one reports nothing: the next command does
		ua := tc.ua[0]
		tc.ua = tc.ua[1:]
		return nil, ua
	}
	lba, n := int(be.Uint64(cdb[2:])), int(be.Uint32(cdb[10:]))
	if cdb[0] == scsi.OpUnmap && len(t.data) >= 24 {
		lba, n = int(be.Uint64(t.data[8:])), int(be.Uint32(t.data[16:]))
	}
	switch cdb[0] {
	case scsi.OpRead16, scsi.OpWrite16, scsi.OpUnmap, scsi.OpWriteSame16:
		if lba < 0 || n < 0 || lba+n > len(d.dirty) {
			return nil, badRange
		}
		if s.w.set.Busy > 0 && s.r.IntN(s.w.set.Busy) == 0 {
			return nil, busy
		}
	default:
		return d.answer(s, cdb)
	}
	switch cdb[0] {
	case scsi.OpRead16:
		return slices.Clone(d.view[lba*blockSize : (lba+n)*blockSize]), noSense
	case scsi.OpWrite16:
		d.write(s, lba, t.data, cdb[1]&8 != 0)
	default:
		d.write(s, lba, make([]byte, n*blockSize), false)
	}
	return nil, noSense
}

func (tc *tconn) respond(rq *pdu.Header, status uint8, sn sense, moved int) {
	var a pdu.Header
	a[0], a[1] = uint8(pdu.OpSCSIResponse), pdu.Final
	a.SetITT(rq.ITT())
	a.SetStatus(status)
	if short := int(rq.EDTL()) - moved; rq.Flags()&(pdu.CmdRead|pdu.CmdWrite) != 0 && short > 0 {
		a[1] |= pdu.Underflow
		a.SetResidual(uint32(short))
	}
	if sn == powerOn {
		tc.c.tells = true
		tc.s.w.guest.tells(1)
		defer func() { tc.c.tells = false }()
	}
	var data []byte
	if status == scsi.StatusCheckCondition {
		data = []byte{1: 18, 2: 0x70, 4: sn[0], 9: 10, 14: sn[1], 15: sn[2], 19: 0}
	}
	tc.send(&a, data, true)
}

func (tc *tconn) dataIn(rq *pdu.Header, data []byte) {
	data = data[:min(len(data), int(rq.EDTL()))]
	var a pdu.Header
	a[0], a[1] = uint8(pdu.OpDataIn), pdu.Final|pdu.StatusBit
	a.SetITT(rq.ITT())
	a.SetTTT(pdu.NoTag)
	if short := int(rq.EDTL()) - len(data); short > 0 {
		a[1] |= pdu.Underflow
		a.SetResidual(uint32(short))
	}
	tc.send(&a, data, true)
}
