package initiator

import (
	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/sys"
)

// item is one PDU on its way out: its header, and data that stays where it is.
type item struct {
	hdr         pdu.Header
	data        []byte
	hcrc, dcrc  [pdu.DigestLen]byte // digests, if negotiated
	summed      bool
	slot        int32  // the task it belongs to, -1 for none
	sent        int32  // bytes of header, data and pad that the kernel took
	unsolicited uint32 // of a command: bytes of its data that go without R2T, those in this PDU included
}

func (s *Session) size(it *item) int {
	n := pdu.HeaderLen + len(it.data) + pdu.Pad(len(it.data))
	if s.params.HeaderDigest {
		n += pdu.DigestLen
	}
	if s.params.DataDigest && len(it.data) > 0 {
		n += pdu.DigestLen
	}
	return n
}

// sum computes the digests (RFC 7143 13.1): CRC32C over the header, and over
// data and padding.
func (s *Session) sum(it *item) {
	it.summed = true
	if s.params.HeaderDigest {
		pdu.PutDigest(it.hcrc[:], pdu.CRC32C(0, it.hdr[:]))
	}
	if s.params.DataDigest {
		pdu.PutDigest(it.dcrc[:], pdu.CRC32C(pdu.CRC32C(0, it.data), zeroPad[:pdu.Pad(len(it.data))]))
	}
}

// wire is the session's private part of a Command.
type wire struct{}

// Tags of our own immediate PDUs; tasks use generation<<16 | slot with bit 31 clear.
const (
	pingITT   uint32 = 0x80000000
	logoutITT uint32 = 0xc0000000
)

var zeroPad [4]byte

// Submit takes c if the session serves and its window and queue have room. It
// lists the command, with as much immediate and unsolicited data as was
// negotiated (RFC 7143 4.2.5.2), and adds the session to p; the caller flushes p.
func (s *Session) Submit(c *Command, p *block.Plug) bool {
	c.Result = Result{}
	s.mu.Lock()
	if s.closed || State(s.state.Load()) >= Leaving || len(s.free) == 0 || pdu.SerialLess(s.maxCmdSN.Load(), s.cmdSN) {
		s.refused = true
		s.mu.Unlock()
		return false
	}
	idx := s.free[len(s.free)-1]
	s.free = s.free[:len(s.free)-1]
	sl := &s.slots[idx]
	gen := (sl.gen + 1) & 0x7fff
	*sl = slot{cmd: c, gen: gen, cmdSN: s.cmdSN, due: s.ticks.Load() + s.hangTicks}
	itt := uint32(gen)<<16 | uint32(idx)

	length := len(c.Data)
	var flags uint8 = pdu.AttrSimple
	imm, unsolicited := 0, 0
	switch {
	case length == 0:
	case c.Dir == DataIn:
		flags |= pdu.CmdRead
	case c.Dir == DataOut:
		flags |= pdu.CmdWrite
		if s.params.ImmediateData {
			imm = min(length, s.params.FirstBurst, s.params.TargetMaxData)
		}
		if !s.params.InitialR2T {
			unsolicited = min(length, s.params.FirstBurst)
		}
	}
	if unsolicited <= imm {
		flags |= pdu.Final
	}
	it := s.list(c.Data[:imm], int32(idx))
	it.hdr[0], it.hdr[1] = uint8(pdu.OpSCSICommand), flags
	it.hdr.SetLUN(c.LUN)
	it.hdr.SetITT(itt)
	if flags&(pdu.CmdRead|pdu.CmdWrite) != 0 {
		it.hdr.SetEDTL(uint32(length))
	}
	it.hdr.SetCmdSN(s.cmdSN)
	*it.hdr.CDB() = c.CDB
	it.unsolicited = uint32(unsolicited)
	s.cmdSN++
	s.watchClosely()
	if c.Dir == DataOut {
		sl.off = uint32(max(imm, unsolicited))
	}
	s.mu.Unlock()
	p.Add(s)
	return true
}

// Kick sends what is listed without waiting. One sender works at a time:
// whoever finds it busy leaves its items to it. A full socket is left to a
// goroutine that waits for it.
func (s *Session) Kick() {
	if s.claim() && !s.send(false) {
		go s.park()
	}
}

// claim makes the caller the sender, if there is something to send.
func (s *Session) claim() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sending || State(s.state.Load()) == Dead || !s.fill() {
		return false
	}
	s.sending = true
	return true
}

// send writes until nothing is listed. It reports false, still being the
// sender, when the socket is full and park is false.
func (s *Session) send(park bool) bool {
	for {
		s.gather()
		n, err := s.vec.Write(s.iov, park)
		clear(s.iov)
		if err == sys.ErrWouldBlock {
			return false
		}
		if err != nil {
			s.fail(err)
		}
		if !s.account(n, err != nil) {
			return true
		}
	}
}

// gather builds the vector of what is left of cur.
func (s *Session) gather() {
	iov := s.iov[:0]
	for i := s.curAt; i < len(s.cur); i++ { // at most five of each item: see batchItems
		it := &s.cur[i]
		at := int(it.sent)
		if !it.summed && (s.params.HeaderDigest || s.params.DataDigest) {
			s.sum(it)
		}
		iov, at = rest(iov, it.hdr[:], at)
		if s.params.HeaderDigest {
			iov, at = rest(iov, it.hcrc[:], at)
		}
		if len(it.data) == 0 {
			continue
		}
		iov, at = rest(iov, it.data, at)
		iov, at = rest(iov, zeroPad[:pdu.Pad(len(it.data))], at)
		if s.params.DataDigest {
			iov, _ = rest(iov, it.dcrc[:], at)
		}
	}
	s.iov = iov
}

// rest appends what is left of b when sent bytes of it and what follows are
// gone; it returns how many of those lie behind b.
func rest(iov [][]byte, b []byte, sent int) ([][]byte, int) {
	if sent >= len(b) {
		return iov, sent - len(b)
	}
	return append(iov, b[sent:]), 0
}

// account books n more bytes as sent and finishes commands that the target
// answered before their last item left. It reports whether there is more to
// send; if not, the caller is the sender no longer.
func (s *Session) account(n int, failed bool) bool {
	completed := false
	s.mu.Lock()
	for n > 0 && s.curAt < len(s.cur) {
		it := &s.cur[s.curAt]
		size := s.size(it)
		step := min(n, size-int(it.sent))
		it.sent += int32(step)
		n -= step
		whole := int(it.sent) == size
		if it.slot >= 0 {
			sl := &s.slots[it.slot]
			sl.touched = true
			if whole {
				sl.leaving--
				if sl.finished && !sl.listed() {
					c := sl.cmd
					s.release(uint16(it.slot))
					s.mu.Unlock()
					completed = true
					c.Owner.Done(c, &s.sendPlug)
					s.mu.Lock()
				}
			}
		}
		if whole {
			it.data = nil
			s.curAt++
		}
	}
	if completed {
		s.mu.Unlock()
		s.sendPlug.Flush() // still the sender: what is listed here is left to us
		s.mu.Lock()
	}
	more := true
	if failed || State(s.state.Load()) == Dead {
		more = false
	} else if s.curAt == len(s.cur) {
		more = s.fill()
	}
	if !more {
		s.sending = false
		s.idle.Broadcast()
	}
	s.mu.Unlock()
	return more
}

// release frees a task. Caller holds mu.
func (s *Session) release(idx uint16) {
	s.slots[idx].cmd = nil
	s.slots[idx].finished = false
	s.free = append(s.free, idx)
}

// routineSend is the sender while the socket is full; it ends when everything
// is sent. An idle session has none.
func (s *Session) routineSend() { s.send(true) }
