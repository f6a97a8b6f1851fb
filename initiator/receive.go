package initiator

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/scsi"
)

// Sizes of what is received besides Data-In, which goes to its destination.
const (
	readBuffer  = 128 << 10
	maxSmallPDU = 16 << 10 // a data segment of any other PDU, bytes

	// With this many commands in flight the reader lets the peers on its CPU
	// run before it reads: more answers then arrive per wake-up, which on a
	// busy host halves the CPU of an I/O. An idle CPU makes it free.
	yieldDepth = 4
)

// protocolError is a breach of RFC 7143 by the target: the connection is
// dropped, nothing it said afterwards is believed.
type protocolError string

func (e protocolError) Error() string { return "protocol error by the target: " + string(e) }

func breach(format string, a ...any) error { return protocolError(fmt.Sprintf(format, a...)) }

// receiver is the state of the one goroutine that reads the connection.
type receiver struct {
	s    *Session
	buf  []byte
	r, w int // unread bytes are buf[r:w]
	plug block.Plug
	hdr  pdu.Header
}

func (s *Session) routineReceive() {
	defer s.alive.Done()
	rc := receiver{s: s, buf: make([]byte, readBuffer)}
	for {
		if err := rc.next(); err != nil {
			rc.plug.Flush()
			if errors.Is(err, io.EOF) {
				err = errors.New("connection closed by the target")
			}
			s.fail(err)
			return
		}
	}
}

// fill reads once. Everything plugged goes out first: this may wait.
func (rc *receiver) fill(into []byte) (int, error) {
	if rc.flush() >= yieldDepth {
		sys.Yield()
	}
	n, err := rc.s.conn.Read(into)
	if n > 0 {
		rc.s.rx.Add(1)
		return n, nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return 0, err
}

// flush tells the owner of new room and sends what completions brought. It
// reports how many commands are in flight.
func (rc *receiver) flush() int {
	s := rc.s
	s.mu.Lock()
	room := s.refused && len(s.free) > 0 && !pdu.SerialLess(s.maxCmdSN.Load(), s.cmdSN)
	if room {
		s.refused = false
	}
	inFlight := len(s.slots) - len(s.free)
	s.mu.Unlock()
	if room && s.cfg.OnRoom != nil {
		s.cfg.OnRoom(&rc.plug)
	}
	rc.plug.Flush()
	return inFlight
}

// need makes n bytes available in buf[r:]; n is at most the buffer.
func (rc *receiver) need(n int) error {
	if rc.w-rc.r >= n {
		return nil
	}
	if rc.r > 0 && len(rc.buf)-rc.r < max(n, 8<<10) {
		copy(rc.buf, rc.buf[rc.r:rc.w])
		rc.w -= rc.r
		rc.r = 0
	}
	if rc.r == rc.w {
		rc.r, rc.w = 0, 0
	}
	for rc.w-rc.r < n {
		k, err := rc.fill(rc.buf[rc.w:])
		if err != nil {
			return err
		}
		rc.w += k
	}
	return nil
}

// readInto fills dst: what is buffered first, the rest straight from the socket.
func (rc *receiver) readInto(dst []byte) error {
	n := copy(dst, rc.buf[rc.r:rc.w])
	rc.r += n
	for n < len(dst) {
		if len(dst)-n < 4<<10 { // a short rest: read ahead with it
			if err := rc.need(len(dst) - n); err != nil {
				return err
			}
			rc.r += copy(dst[n:], rc.buf[rc.r:rc.w])
			return nil
		}
		k, err := rc.fill(dst[n:])
		if err != nil {
			return err
		}
		n += k
	}
	return nil
}

func (rc *receiver) skip(n int) error {
	for n > 0 {
		k := min(n, 4<<10)
		if err := rc.need(k); err != nil {
			return err
		}
		rc.r += k
		n -= k
	}
	return nil
}

// next handles one PDU.
func (rc *receiver) next() error {
	if err := rc.need(pdu.HeaderLen); err != nil {
		return err
	}
	copy(rc.hdr[:], rc.buf[rc.r:])
	rc.r += pdu.HeaderLen
	h := &rc.hdr
	if h.DataLen() > offeredMaxData {
		return breach("%d bytes of data in one PDU, %d allowed", h.DataLen(), offeredMaxData)
	}
	if err := rc.extra(h); err != nil {
		return err
	}
	if h.Opcode() == pdu.OpDataIn {
		return rc.dataIn(h)
	}
	n := h.DataLen()
	if n > maxSmallPDU {
		return breach("opcode %#02x with %d bytes of data", h.Opcode(), n)
	}
	padded := n + pdu.Pad(n)
	if err := rc.need(padded + rc.dataDigest(n)); err != nil {
		return err
	}
	data := rc.buf[rc.r : rc.r+n]
	whole := rc.buf[rc.r : rc.r+padded]
	rc.r += padded
	if rc.dataDigest(n) > 0 {
		if err := rc.compare(crc32.Checksum(whole, castagnoli), "data"); err != nil {
			return err
		}
	}
	return rc.dispatch(h, data)
}

// extra passes the additional header segments and checks the header digest,
// which covers them.
func (rc *receiver) extra(h *pdu.Header) error {
	if !rc.s.params.HeaderDigest {
		return rc.skip(h.AHSLen())
	}
	n := h.AHSLen()
	if err := rc.need(n + digestLen); err != nil {
		return err
	}
	sum := crc32.Update(crc32.Checksum(h[:], castagnoli), castagnoli, rc.buf[rc.r:rc.r+n])
	rc.r += n
	return rc.compare(sum, "header")
}

// dataDigest is how many bytes of digest follow a data segment of n bytes.
func (rc *receiver) dataDigest(n int) int {
	if n > 0 && rc.s.params.DataDigest {
		return digestLen
	}
	return 0
}

// compare takes a digest off the buffer. At ErrorRecoveryLevel 0 a wrong one
// ends the connection (RFC 7143 7.7, 7.8): its commands are retried.
func (rc *receiver) compare(sum uint32, what string) error {
	got := binary.LittleEndian.Uint32(rc.buf[rc.r:])
	rc.r += digestLen
	if got != sum {
		return fmt.Errorf("%s digest error: the network or the target corrupts data", what)
	}
	return nil
}

func (rc *receiver) dispatch(h *pdu.Header, data []byte) error {
	s := rc.s
	switch h.Opcode() {
	case pdu.OpSCSIResponse:
		if err := rc.status(h); err != nil {
			return err
		}
		return rc.response(h, data)
	case pdu.OpR2T:
		rc.window(h)
		return rc.r2t(h)
	case pdu.OpNopIn:
		return rc.nopIn(h)
	case pdu.OpLogoutResp:
		s.fail(errClosed)
		return errClosed
	case pdu.OpAsync:
		if err := rc.status(h); err != nil {
			return err
		}
		switch h[36] {
		case pdu.AsyncLogoutRequest, pdu.AsyncRenegotiate:
			return errors.New("the target asked us to log out")
		case pdu.AsyncDropConnection, pdu.AsyncDropSession:
			return errors.New("the target announced that it drops the session")
		}
		return nil
	case pdu.OpReject:
		if err := rc.status(h); err != nil {
			return err
		}
		return breach("it rejected a PDU, reason %#02x", h.Response())
	case pdu.OpTaskMgmtResp:
		return rc.taskMgmt(h)
	}
	return breach("unexpected opcode %#02x", h.Opcode())
}

// window takes ExpCmdSN and MaxCmdSN, which only move forward (RFC 7143 4.2.2.1).
func (rc *receiver) window(h *pdu.Header) {
	s := rc.s
	exp, maxSN := h.ExpCmdSN(), h.MaxCmdSN()
	if pdu.SerialLess(maxSN, exp-1) {
		return
	}
	if pdu.SerialLess(s.expCmdSN.Load(), exp) {
		s.expCmdSN.Store(exp)
	}
	if pdu.SerialLess(s.maxCmdSN.Load(), maxSN) {
		s.maxCmdSN.Store(maxSN)
	}
}

// status checks the StatSN of a PDU that carries one; at ErrorRecoveryLevel 0
// a gap means lost status and ends the connection.
func (rc *receiver) status(h *pdu.Header) error {
	if want := rc.s.expStatSN.Load(); h.StatSN() != want {
		return breach("StatSN %d where %d was due", h.StatSN(), want)
	}
	rc.s.expStatSN.Store(h.StatSN() + 1)
	rc.window(h)
	return nil
}

// task finds the slot of an ITT. The slot stays valid: only the reader ends it.
func (rc *receiver) task(itt uint32) (uint16, *slot, error) {
	s := rc.s
	idx := itt & 0xffff
	if itt&0x80000000 != 0 || int(idx) >= len(s.slots) {
		return 0, nil, breach("unknown task tag %#08x", itt)
	}
	s.mu.Lock()
	sl := &s.slots[idx]
	ok := sl.cmd != nil && !sl.finished && sl.gen == uint16(itt>>16)
	s.mu.Unlock()
	if !ok {
		return 0, nil, breach("unknown task tag %#08x", itt)
	}
	return uint16(idx), sl, nil
}

// finish ends a task; its buffers go back once the sender is done with them.
func (rc *receiver) finish(idx uint16, sl *slot) {
	s := rc.s
	s.mu.Lock()
	c := sl.cmd
	if sl.listed > 0 {
		sl.finished = true
		s.mu.Unlock()
		return
	}
	s.release(idx)
	s.mu.Unlock()
	c.Owner.Done(c, &rc.plug)
}

// dataIn takes READ data straight into the command's buffer (RFC 7143 11.7).
func (rc *receiver) dataIn(h *pdu.Header) error {
	idx, sl, err := rc.task(h.ITT())
	if err != nil {
		return err
	}
	c := sl.cmd
	n, off := h.DataLen(), h.BufferOffset()
	switch {
	case c.Dir != DataIn:
		return breach("Data-In for a command that reads nothing")
	case h.DataSN() != sl.dataSN:
		return breach("DataSN %d where %d was due", h.DataSN(), sl.dataSN)
	case off != sl.off || uint64(off)+uint64(n) > uint64(len(c.Data)):
		return breach("Data-In of %d bytes at %d in a command of %d", n, off, len(c.Data))
	case h.Flags()&pdu.StatusBit != 0 && !h.IsFinal():
		return breach("Data-In with status that is not final")
	}
	if err := rc.readInto(c.Data[off : int(off)+n]); err != nil {
		return err
	}
	if rc.dataDigest(n) == 0 {
		if err := rc.skip(pdu.Pad(n)); err != nil {
			return err
		}
	} else {
		pad := pdu.Pad(n)
		if err := rc.need(pad + digestLen); err != nil {
			return err
		}
		sum := crc32.Update(crc32.Checksum(c.Data[off:int(off)+n], castagnoli), castagnoli, rc.buf[rc.r:rc.r+pad])
		rc.r += pad
		if err := rc.compare(sum, "data"); err != nil {
			return err
		}
	}
	sl.off += uint32(n)
	sl.dataSN++
	if h.Flags()&pdu.StatusBit == 0 {
		rc.window(h)
		return nil
	}
	if err := rc.status(h); err != nil {
		return err
	}
	switch h.Status() {
	case scsi.StatusGood, scsi.StatusConditionMet:
	default:
		return breach("Data-In with %s", scsi.StatusText(h.Status()))
	}
	c.Result.Status = h.Status()
	return rc.residual(h, idx, sl)
}

// response is the SCSI Response (RFC 7143 11.4).
func (rc *receiver) response(h *pdu.Header, data []byte) error {
	idx, sl, err := rc.task(h.ITT())
	if err != nil {
		return err
	}
	c := sl.cmd
	if h.Response() != 0 {
		c.Result.Err = ErrTargetFailure
		rc.finish(idx, sl)
		return nil
	}
	c.Result.Status = h.Status()
	if len(data) >= 2 {
		n := int(data[0])<<8 | int(data[1])
		if n > len(data)-2 {
			return breach("%d bytes of sense in %d of data", n, len(data))
		}
		c.Result.SenseLen = uint8(copy(c.Result.Sense[:], data[2:2+n]))
	}
	return rc.residual(h, idx, sl)
}

// residual checks that a command moved what it should have, and ends it.
func (rc *receiver) residual(h *pdu.Header, idx uint16, sl *slot) error {
	c := sl.cmd
	f := h.Flags() & (pdu.Overflow | pdu.Underflow)
	if f == pdu.Overflow|pdu.Underflow {
		return breach("residual overflow and underflow at once")
	}
	if f == pdu.Underflow {
		c.Result.Residual = h.Residual()
	}
	if c.Dir == DataIn {
		c.Result.Received = sl.off
	}
	if c.Result.Status == scsi.StatusGood {
		short := f == pdu.Underflow && h.Residual() > 0 || c.Dir == DataIn && int(sl.off) != len(c.Data)
		if short && !c.ShortOK {
			c.Result.Err = ErrShort
		}
	}
	rc.finish(idx, sl)
	return nil
}

// r2t answers Ready To Transfer with the data it asks for (RFC 7143 11.8).
func (rc *receiver) r2t(h *pdu.Header) error {
	idx, sl, err := rc.task(h.ITT())
	if err != nil {
		return err
	}
	s, c := rc.s, sl.cmd
	off, n := h.BufferOffset(), h.DesiredLen()
	switch {
	case c.Dir != DataOut:
		return breach("R2T for a command that writes nothing")
	case h.TTT() == pdu.NoTag:
		return breach("R2T without a transfer tag")
	case h.DataSN() != sl.r2tSN:
		return breach("R2TSN %d where %d was due", h.DataSN(), sl.r2tSN)
	case n == 0 || uint64(n) > uint64(s.params.MaxBurst) || off != sl.off || uint64(off)+uint64(n) > uint64(len(c.Data)):
		return breach("R2T for %d bytes at %d in a command of %d", n, off, len(c.Data))
	}
	sl.r2tSN++
	sl.off += n
	s.mu.Lock()
	s.listDataOut(int32(idx), h.ITT(), h.TTT(), h.LUN(), int(off), int(off+n))
	s.mu.Unlock()
	rc.plug.Add(s)
	return nil
}

// nopIn answers a target's ping and takes the answer to ours (RFC 7143 11.19).
func (rc *receiver) nopIn(h *pdu.Header) error {
	s := rc.s
	rc.window(h)
	if itt := h.ITT(); itt != pdu.NoTag {
		if err := rc.status(h); err != nil {
			return err
		}
		s.mu.Lock()
		ok := itt == s.ping
		if ok {
			s.ping = 0
		}
		s.mu.Unlock()
		if !ok {
			return breach("answer to a ping that was not sent, tag %#08x", itt)
		}
		return nil
	}
	if h.TTT() == pdu.NoTag {
		return nil // only a window update
	}
	s.mu.Lock()
	if len(s.pend) > 16*len(s.slots) {
		s.mu.Unlock()
		return breach("flood of pings")
	}
	it := s.list(nil, -1)
	it.hdr[0], it.hdr[1] = uint8(pdu.OpNopOut)|pdu.Immediate, pdu.Final
	it.hdr.SetLUN(h.LUN())
	it.hdr.SetITT(pdu.NoTag)
	it.hdr.SetTTT(h.TTT())
	it.hdr.SetCmdSN(s.cmdSN)
	it.hdr.SetExpStatSN(s.expStatSN.Load())
	s.mu.Unlock()
	rc.plug.Add(s)
	return nil
}
