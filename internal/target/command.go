package target

import (
	"encoding/binary"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// SAM status codes used here.
const (
	statusGood           = 0x00
	statusCheckCondition = 0x02
)

// maxTransfer is the longest READ or WRITE, as VPD page B0 states it, bytes.
const maxTransfer = 16 << 20

var (
	noSense         = Sense{}
	errNoLUN        = Sense{0x05, 0x25, 0x00}
	errOpcode       = Sense{0x05, 0x20, 0x00}
	errField        = Sense{0x05, 0x24, 0x00}
	errRange        = Sense{0x05, 0x21, 0x00}
	errParamList    = Sense{0x05, 0x26, 0x00}
	errParamLength  = Sense{0x05, 0x1a, 0x00}
	errWriteProtect = Sense{0x07, 0x27, 0x00}
	errMiscompare   = Sense{0x0e, 0x1d, 0x00}
)

// request is what is kept of a SCSI Command PDU.
type request struct {
	itt, edtl, cmdSN uint32
	flags            uint8
	lun              [8]byte
	cdb              [16]byte
	lu               *LU
	// off and n are the byte range of a READ or WRITE; n is the parameter
	// list length for other commands with data out.
	off, n uint64
	sense  Sense // why it fails, known before its data came
	block  bool  // READ or WRITE
}

func (r *request) isWrite() bool { return r.flags&pdu.CmdWrite != 0 && r.edtl > 0 }

func (r *request) wantsData() bool { return r.flags&pdu.CmdRead != 0 && r.edtl > 0 }

// scsiCommand takes one SCSI Command PDU with its immediate data.
func (c *conn) scsiCommand(h *pdu.Header, data []byte) bool {
	r := &c.req
	*r = request{
		itt: h.ITT(), edtl: h.EDTL(), cmdSN: h.CmdSN(), flags: h.Flags(),
		lun: h.LUN(), cdb: *h.CDB(),
	}
	if len(data) > 0 && (!r.isWrite() || !c.params.immediate || len(data) > int(r.edtl) || len(data) > c.params.firstBurst) {
		return c.fail("unexpected immediate data", h)
	}
	if c.params.initialR2T && !h.IsFinal() && r.isWrite() {
		return c.fail("unsolicited data announced although InitialR2T=Yes", h)
	}
	c.tally.Commands++
	c.count++
	c.decode(r)
	var act Action
	scripted := false
	if hook := c.srv.hook.Load(); hook != nil {
		c.cmd = Cmd{
			Portal: c.p, Target: c.target.Name, Initiator: c.nexus.initiator, LUN: r.lun, CDB: r.cdb,
			Length: r.edtl, Write: r.isWrite(), CmdSN: r.cmdSN, Count: c.count - 1,
		}
		act = (*hook)(&c.cmd)
		scripted = act.Status != 0 || act.Response != 0 || act.Silent || act.Delay != 0 || act.Orphan ||
			act.ShortBy != 0 || act.Inject != nil || act.Reset || act.Data != nil
	}
	if act.Reject != 0 {
		c.rejectPDU(h, act.Reject)
		return true
	}
	if r.isWrite() && (len(data) < int(r.edtl) || scripted) {
		return c.begin(r, data, h.IsFinal(), scripted, &act)
	}
	if scripted {
		return c.script(r, nil, &act)
	}
	if r.block && r.isWrite() && r.sense == noSense {
		c.tally.Writes++
		c.tally.WrittenBytes += r.n
		r.store(data)
	}
	c.finish(r, data, 0)
	return true
}

// lookup finds the LU of a raw LUN, peripheral or flat (SAM-5 4.7.5).
func (c *conn) lookup(l *[8]byte) (*LU, int) {
	if c.target == nil { // a discovery session
		return nil, -1
	}
	n := int(l[1])
	switch l[0] >> 6 {
	case 0:
		if l[0] != 0 {
			return nil, -1
		}
	case 1:
		n |= int(l[0]&0x3f) << 8
	default:
		return nil, -1
	}
	if [6]byte(l[2:]) != [6]byte{} || n >= len(c.target.units()) {
		return nil, -1
	}
	return c.target.units()[n], n
}

// decode finds the LU and checks a READ or WRITE against it.
func (c *conn) decode(r *request) {
	var n int
	r.lu, n = c.lookup(&r.lun)
	op := r.cdb[0]
	if r.lu == nil {
		if op != opInquiry && op != opReportLUNs && op != opRequestSense {
			r.sense = errNoLUN
		}
		return
	}
	if len(c.ua) > 0 && op != opInquiry && op != opReportLUNs && op != opRequestSense {
		for i, a := range c.ua {
			if a.lun == n {
				c.ua = append(c.ua[:i], c.ua[i+1:]...)
				r.sense = Sense{0x06, a.asc, a.ascq}
				return
			}
		}
	}
	if s := r.lu.access.Load().refusal(c.nexus.group, op); s != noSense {
		r.sense = s
		return
	}
	if changes(op) && r.lu.fenced(c.nexus) {
		r.sense = errConflict
		return
	}
	var lba, blocks uint64
	write := false
	switch op {
	case opWrite10:
		write = true
		fallthrough
	case opRead10:
		lba, blocks = uint64(binary.BigEndian.Uint32(r.cdb[2:])), uint64(binary.BigEndian.Uint16(r.cdb[7:]))
	case opWrite16:
		write = true
		fallthrough
	case opRead16:
		lba, blocks = binary.BigEndian.Uint64(r.cdb[2:]), uint64(binary.BigEndian.Uint32(r.cdb[10:]))
	case opMaintenanceOut:
		r.n = uint64(binary.BigEndian.Uint32(r.cdb[6:]))
		return
	case opPersistentOut:
		r.n = uint64(binary.BigEndian.Uint32(r.cdb[5:]))
		return
	case opUnmap:
		r.n = uint64(binary.BigEndian.Uint16(r.cdb[7:]))
		return
	case opCompareWrite:
		r.n = 2 * uint64(r.cdb[13]) << r.lu.shift
		return
	case opWriteSame16:
		if r.cdb[1]&1 == 0 { // not NDOB
			r.n = uint64(r.lu.blockSize)
		}
		return
	default:
		return
	}
	total := r.lu.size.Load() >> r.lu.shift
	switch {
	case lba > total || blocks > total-lba:
		r.sense = errRange
	case blocks<<r.lu.shift > maxTransfer, r.cdb[1]>>5 != 0, // too long, or protection wanted
		blocks > 0 && write && r.flags&pdu.CmdWrite == 0:
		r.sense = errField
	case write && r.lu.readOnly.Load():
		r.sense = errWriteProtect
	default:
		r.block = true
		r.off, r.n = lba<<r.lu.shift, blocks<<r.lu.shift
	}
}

// finish executes what is not done yet and answers. data is the parameter
// list of commands other than WRITE, whose data is on the disk already.
func (c *conn) finish(r *request, data []byte, shortBy int) {
	switch {
	case r.sense == errConflict:
		c.respond(r, statusReservationConflict, noSense, 0)
	case r.sense != noSense:
		c.respond(r, statusCheckCondition, r.sense, 0)
	case !r.block:
		answer, sense := c.execute(r, data)
		if sense == errConflict {
			c.respond(r, statusReservationConflict, noSense, 0)
		} else if sense != noSense {
			c.respond(r, statusCheckCondition, sense, 0)
		} else if len(answer) > 0 && r.wantsData() {
			c.dataIn(r, nil, answer, uint64(len(answer)), shortBy)
		} else {
			c.respond(r, statusGood, noSense, r.n+uint64(len(answer)))
		}
	case r.isWrite() || r.n == 0 || !r.wantsData():
		c.respond(r, statusGood, noSense, r.n)
	default:
		c.tally.Reads++
		c.tally.ReadBytes += r.n
		c.dataIn(r, r.lu, nil, r.n, shortBy)
	}
}

// residual sets the O or U bit and the count for a command that moves n bytes.
func residual(h *pdu.Header, edtl uint32, n uint64) {
	switch {
	case n < uint64(edtl):
		h[1] |= pdu.Underflow
		h.SetResidual(edtl - uint32(n))
	case n > uint64(edtl):
		h[1] |= pdu.Overflow
		h.SetResidual(uint32(min(n-uint64(edtl), 1<<32-1)))
	}
}

// respond sends a SCSI Response; n is how many bytes the command would move.
func (c *conn) respond(r *request, status uint8, s Sense, n uint64) {
	var sense []byte
	if status == statusCheckCondition {
		b := [18]byte{0: 0x70, 2: s.Key, 7: 10, 12: s.ASC, 13: s.ASCQ}
		sense = b[:]
	}
	c.respondSense(r, status, sense, n)
}

// respondSense is respond with the sense data as it goes out.
func (c *conn) respondSense(r *request, status uint8, sense []byte, n uint64) {
	a := c.response(r, status, n)
	if len(sense) > 0 {
		var b [2 + 252]byte
		b[1] = uint8(copy(b[2:], sense))
		a.SetDataLen(2 + int(b[1]))
		c.payload(b[:2+b[1]])
	}
}

// response begins a SCSI Response, which is whole without sense.
func (c *conn) response(r *request, status uint8, n uint64) *pdu.Header {
	a := c.header(pdu.OpSCSIResponse)
	a.SetITT(r.itt)
	a.SetStatus(status)
	residual(a, r.edtl, n)
	c.status(a)
	return a
}

// dataIn sends the data of a read, from the disk or from src, in Data-In PDUs
// with the status in the last one (RFC 7143 11.7). A PDU never crosses the
// end of a burst, and its length but the last is a multiple of four.
func (c *conn) dataIn(r *request, lu *LU, src []byte, n uint64, shortBy int) {
	send := int(min(n, uint64(r.edtl)))
	var extra []byte // bytes beyond what was asked for, by script
	if shortBy > 0 {
		send = max(send-shortBy, 0)
	} else if shortBy < 0 {
		extra = zeros[:min(-shortBy, c.params.peerSegment)&^3]
	}
	burst := 0
	segment := c.params.peerSegment &^ 3
	sn := uint32(0)
	for at := 0; ; {
		m := min(send-at, segment, c.params.maxBurst-burst)
		if m < send-at {
			m &^= 3
		}
		last := at+m == send && len(extra) == 0
		a := c.header(pdu.OpDataIn)
		burst += m
		flags := uint8(0)
		if last || burst+4 > c.params.maxBurst {
			flags, burst = pdu.Final, 0
		}
		a.SetFlags(flags)
		a.SetITT(r.itt)
		a.SetTTT(pdu.NoTag)
		a.SetDataLen(m)
		a.SetDataSN(sn)
		a.SetBufferOffset(uint32(at))
		a.SetStatSN(0)
		if last {
			a[1] |= pdu.StatusBit
			residual(a, r.edtl, n)
			c.status(a)
		}
		if lu != nil {
			c.diskPayload(lu, r.off+uint64(at), m)
		} else {
			c.payload(src[at : at+m])
		}
		at += m
		sn++
		if last {
			return
		}
		if at == send { // the scripted excess goes into a PDU of its own
			lu, src, extra, send = nil, append(make([]byte, at), extra...), nil, at+len(extra)
		}
	}
}

// diskPayload appends n bytes of the disk: copied if few or if they need a
// digest, which nobody's write may make wrong, else gathered from where they
// are. Reading while another session writes the same blocks may then send
// either, as a disk may.
func (c *conn) diskPayload(lu *LU, off uint64, n int) {
	var sum uint32
	for left := n; left > 0; {
		var b []byte
		if n <= copyLimit || c.digests.data {
			b = c.room(min(left, copyLimit))
			lu.read(b, off)
			sum = c.digests.sum(sum, b)
		} else {
			b = lu.view(off, left)
			c.gather(b)
		}
		off, left = off+uint64(len(b)), left-len(b)
	}
	c.endPayload(n, sum)
}
