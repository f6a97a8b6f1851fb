package initiator

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/scsi"
)

const (
	maxSmallPDU = 16 << 10 // a data segment of any PDU but Data-In, bytes

	// With this many commands in flight the reader lets the peers on its CPU
	// run before it reads: more answers then arrive per wake-up, which on a
	// busy host halves the CPU of an I/O. An idle CPU makes it free.
	yieldDepth = 4
)

// protocolError is a breach of RFC 7143 by the target: the connection is
// dropped, nothing it said afterwards is believed.
type protocolError string

func (e protocolError) Error() string        { return "protocol error by the target: " + string(e) }
func (e protocolError) Is(target error) bool { return target == ErrProtocol }

// ErrProtocol is what every breach of RFC 7143 by a target is, to errors.Is.
var ErrProtocol = errors.New("protocol error by the target")

func breach(format string, a ...any) error { return protocolError(fmt.Sprintf(format, a...)) }

// receiver is the state of the one goroutine that reads the connection.
type receiver struct {
	s  *Session
	in interface {
		ReadAhead(b, ahead []byte) (int, error)
	} // of s.conn; see sys.Reader
	readAhead
	plug block.Plug
	hdr  pdu.Header

	// See idle.
	idleSince time.Time
	idleSeen  int

	rejects    int    // since rejectTick
	rejectTick uint32 // of the watchdog
}

func (s *Session) routineReceive() {
	defer s.alive.Done()
	rc := receiver{s: s, in: plainReader{s.conn}, readAhead: newReadAhead(), idleSince: time.Now()}
	if raw, err := sys.RawConn(s.conn); err == nil {
		rc.in = sys.NewReader(raw)
	}
	defer rc.shrink()
	for {
		if err := rc.next(); err != nil {
			rc.plug.Flush()
			if errors.Is(err, io.EOF) {
				s.awaitSender()
				err = errTargetClosed
			}
			s.fail(s.ending(err))
			return
		}
	}
}

// awaitSender lets a sender say why the connection was aborted: the kernel tells
// an error such as ETIMEDOUT to one system call only, the others find the end of
// the stream. A sender that waits is woken by an abort.
func (s *Session) awaitSender() {
	raw, err := sys.RawConn(s.conn)
	if err != nil {
		return
	}
	if in, ok := sys.NewTCPInfoReader(raw).Read(); !ok || !in.Closed {
		return
	}
	s.mu.Lock()
	for s.sending {
		s.idle.Wait()
	}
	s.mu.Unlock()
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

// next handles one PDU.
func (rc *receiver) next() error {
	if err := rc.need(pdu.HeaderLen); err != nil {
		return err
	}
	copy(rc.hdr[:], rc.buf[rc.r:])
	rc.r += pdu.HeaderLen
	h := &rc.hdr
	if err := rc.extra(h); err != nil {
		return err
	}
	if most := rc.s.cfg.Offer.MaxData; h.DataLen() > most {
		return breach("%d bytes of data in one PDU, %d allowed", h.DataLen(), most)
	}
	if h.Opcode() == pdu.OpDataIn {
		return rc.dataIn(h)
	}
	n := h.DataLen()
	if n > maxSmallPDU && !(h.Opcode() == pdu.OpTextResp && n <= maxTextPDU) {
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
		if err := rc.compare(pdu.CRC32C(0, whole), "data"); err != nil {
			return err
		}
	}
	return rc.dispatch(h, data)
}

// extra checks the header digest, which covers the additional header segments
// too. Targets have no use for those (RFC 7143 11.2.2: extended CDB, length of
// a bidirectional read).
func (rc *receiver) extra(h *pdu.Header) error {
	n := h.AHSLen()
	if rc.s.params.HeaderDigest {
		if err := rc.need(n + pdu.DigestLen); err != nil {
			return err
		}
		sum := pdu.CRC32C(pdu.CRC32C(0, h[:]), rc.buf[rc.r:rc.r+n])
		rc.r += n
		if err := rc.compare(sum, "header"); err != nil {
			return err
		}
	}
	if n > 0 {
		return breach("opcode %#02x with %d bytes of additional header", h.Opcode(), n)
	}
	return nil
}

// dataDigest is how many bytes of digest follow a data segment of n bytes.
func (rc *receiver) dataDigest(n int) int {
	if n > 0 && rc.s.params.DataDigest {
		return pdu.DigestLen
	}
	return 0
}

// sum continues the digest of a data segment, if it has one, over b.
func (rc *receiver) sum(sum uint32, b []byte) uint32 {
	if rc.s.params.DataDigest {
		return pdu.CRC32C(sum, b)
	}
	return 0
}

// compare takes a digest off the buffer. At ErrorRecoveryLevel 0 a wrong one
// ends the connection (RFC 7143 7.8): its commands are retried.
func (rc *receiver) compare(sum uint32, what string) error {
	got := pdu.TakeDigest(rc.buf[rc.r:])
	rc.r += pdu.DigestLen
	if got != sum {
		return fmt.Errorf("%s digest error: the network or the target corrupts data", what)
	}
	return nil
}

func (rc *receiver) dispatch(h *pdu.Header, data []byte) error {
	switch h.Opcode() {
	case pdu.OpSCSIResponse:
		if err := rc.status(h); err != nil {
			return err
		}
		return rc.response(h, data)
	case pdu.OpR2T:
		if err := rc.window(h); err != nil {
			return err
		}
		return rc.r2t(h)
	case pdu.OpNopIn:
		return rc.nopIn(h, data)
	case pdu.OpLogoutResp:
		return rc.logoutResponse(h)
	case pdu.OpAsync:
		return rc.async(h, data)
	case pdu.OpReject:
		return rc.reject(h, data)
	case pdu.OpTaskMgmtResp:
		return rc.taskMgmt(h)
	case pdu.OpTextResp:
		return rc.textResponse(h, data)
	}
	return breach("unexpected opcode %#02x", h.Opcode())
}

// window takes ExpCmdSN and MaxCmdSN, which only move forward (RFC 7143 4.2.2.1).
// A pair that contradicts itself is ignored; one that knows commands which were
// not sent is not.
func (rc *receiver) window(h *pdu.Header) error {
	s := rc.s
	exp, maxSN := h.ExpCmdSN(), h.MaxCmdSN()
	if pdu.SerialLess(maxSN, exp-1) {
		return nil
	}
	if pdu.SerialLess(s.expCmdSN.Load(), exp) {
		if next := s.wireSN.Load(); pdu.SerialLess(next, exp) {
			// istgt counts the immediate requests of a discovery, which has no
			// commands whose order could suffer.
			if s.cfg.Lenient || s.cfg.TargetName == "" {
				return nil
			}
			return breach("ExpCmdSN %d where the next command will be %d", exp, next)
		}
		s.expCmdSN.Store(exp)
	}
	if pdu.SerialLess(s.maxCmdSN.Load(), maxSN) {
		s.maxCmdSN.Store(maxSN)
	}
	return nil
}

// status checks the StatSN of a PDU that carries one; at ErrorRecoveryLevel 0
// a gap means lost status and ends the connection.
func (rc *receiver) status(h *pdu.Header) error {
	if want := rc.s.expStatSN.Load(); h.StatSN() != want {
		if !rc.s.cfg.Lenient {
			return breach("StatSN %d where %d was due: `lenient` takes such a target", h.StatSN(), want)
		}
		if pdu.SerialLess(h.StatSN(), want) {
			return rc.window(h)
		}
	}
	rc.s.expStatSN.Store(h.StatSN() + 1)
	return rc.window(h)
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
	ok, early := sl.cmd != nil && !sl.finished && sl.gen == uint16(itt>>16), sl.unsent
	s.mu.Unlock()
	switch {
	case !ok:
		return 0, nil, breach("unknown task tag %#08x", itt)
	case early:
		return 0, nil, breach("answer to task tag %#08x before it was sent", itt)
	}
	return uint16(idx), sl, nil
}

// finish ends a task; its buffers go back once the sender is done with them.
func (rc *receiver) finish(idx uint16, sl *slot) {
	s := rc.s
	s.mu.Lock()
	c := sl.cmd
	if !sl.unsent { // else its CmdSN must go out: no hole
		s.forget(idx)
	}
	if sl.listed() {
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
	sum, err := rc.readInto(c.Data[off : int(off)+n])
	if err != nil {
		return err
	}
	pad, digest := pdu.Pad(n), rc.dataDigest(n)
	if err := rc.need(pad + digest); err != nil {
		return err
	}
	sum = rc.sum(sum, rc.buf[rc.r:rc.r+pad])
	rc.r += pad
	if digest > 0 {
		if err := rc.compare(sum, "data"); err != nil {
			return err
		}
	}
	sl.off += uint32(n)
	sl.dataSN++
	if h.Flags()&pdu.StatusBit == 0 {
		if n == 0 {
			if err := rc.idle(); err != nil {
				return err
			}
		}
		return rc.window(h)
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
	if h.Status() == scsi.StatusCheckCondition {
		rc.attention(c.LUN, sl.cmdSN, scsi.ParseSense(c.Result.SenseData()))
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
	if c.Result.Status == scsi.StatusGood && !c.ShortOK {
		missing := rc.missing(sl)
		switch {
		case sl.starved:
			c.Result.Err = ErrAborted
		case c.Dir == DataOut && missing > int(c.Result.Residual):
			return breach("GOOD status for a write of %d bytes of which it did not take %d", len(c.Data), missing)
		case c.Result.Residual > 0 || missing > 0:
			c.Result.Err = ErrShort
		case f == pdu.Overflow && h.Residual() > 0:
			c.Result.Err = ErrOverflow
		}
	}
	rc.finish(idx, sl)
	return nil
}

// missing is how many bytes of the command's data have not arrived, or were
// not asked for or surely not sent.
func (rc *receiver) missing(sl *slot) int {
	n := len(sl.cmd.Data) - int(sl.off)
	if sl.cmd.Dir != DataOut {
		return n
	}
	s := rc.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if sl.bursting {
		n += int(s.burst.end - s.burst.at)
	}
	for at := sl.first; at != 0; at = s.sequences[at-1].next {
		n += int(s.sequences[at-1].end - s.sequences[at-1].at)
	}
	return n
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
	if n < tinyR2T && int(off+n) < len(c.Data) {
		if err := rc.idle(); err != nil {
			return err
		}
	}
	sl.r2tSN++
	sl.off += n
	s.mu.Lock()
	if sl.r2ts >= s.params.MaxR2T {
		s.mu.Unlock()
		return breach("more than the %d R2Ts of a command that were agreed on", s.params.MaxR2T)
	}
	if sl.aborting || s.closed {
		sl.starved = true
	} else {
		s.answer(idx, sequence{lun: h.LUN(), itt: h.ITT(), ttt: h.TTT(), at: off, end: off + n})
	}
	s.mu.Unlock()
	rc.plug.Add(s)
	return nil
}

// nopIn answers a target's ping and takes the answer to ours (RFC 7143 11.19).
func (rc *receiver) nopIn(h *pdu.Header, data []byte) error {
	s := rc.s
	if itt := h.ITT(); itt != pdu.NoTag {
		if err := rc.status(h); err != nil {
			return err
		}
		s.mu.Lock()
		ok := itt == s.ping
		if ok {
			s.ping, s.repings = 0, 0
			if s.ackedSN == h.StatSN() { // else each ping would be followed by another one
				s.ackedSN++
			}
		}
		s.mu.Unlock()
		switch {
		case !ok:
			return breach("answer to a ping that was not sent, tag %#08x", itt)
		case len(data) > 0:
			return breach("%d bytes in the answer to an empty ping", len(data))
		}
		return nil
	}
	if err := rc.window(h); err != nil {
		return err
	}
	if err := rc.idle(); err != nil {
		return err
	}
	if h.TTT() == pdu.NoTag {
		return nil // only a window update
	}
	s.mu.Lock()
	if s.urgent.len() >= maxAnswers { // of one burst, perhaps, that nobody tried to answer yet
		s.mu.Unlock()
		rc.plug.Flush()
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	if s.urgent.len() >= maxAnswers {
		return breach("%d pings whose answers it does not take", maxAnswers)
	}
	it := s.urgent.push()
	it.hdr[0], it.hdr[1] = uint8(pdu.OpNopOut)|pdu.Immediate, pdu.Final
	it.hdr.SetLUN(h.LUN())
	it.hdr.SetITT(pdu.NoTag)
	it.hdr.SetTTT(h.TTT())
	rc.plug.Add(s)
	return nil
}

// Limits of what a target may say without moving anything forward.
const (
	maxAnswers = 8192   // to its pings, waiting for it to take them; below 1 MiB
	maxIdle    = 50_000 // PDUs in a second; a chatty target sends a few
	tinyR2T    = 512    // bytes; only the last R2T of a command has a reason to ask for less
)

// idle counts a PDU that moves nothing forward, and ends a flood of them.
func (rc *receiver) idle() error {
	if rc.idleSeen++; rc.idleSeen > maxIdle {
		if passed := time.Since(rc.idleSince); passed < time.Second {
			return breach("a flood of PDUs that move nothing: %d in %v", rc.idleSeen, passed)
		}
		rc.idleSince, rc.idleSeen = time.Now(), 1
	}
	return nil
}
