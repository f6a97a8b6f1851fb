package initiator

import (
	"encoding/binary"
	"hash/crc32"
	"net"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/sys"
)

// item is one PDU on its way out: its header, and data that stays where it is.
type item struct {
	hdr        pdu.Header
	data       []byte
	hcrc, dcrc [4]byte // digests, if negotiated
	summed     bool
	slot       int32 // the task it belongs to, -1 for none
	sent       int32 // bytes of header, data and pad that the kernel took
}

func (s *Session) size(it *item) int {
	n := pdu.HeaderLen + len(it.data) + pdu.Pad(len(it.data))
	if s.params.HeaderDigest {
		n += digestLen
	}
	if s.params.DataDigest && len(it.data) > 0 {
		n += digestLen
	}
	return n
}

// sum computes the digests (RFC 7143 13.1): CRC32C over the header, and over
// data and padding.
func (s *Session) sum(it *item) {
	it.summed = true
	if s.params.HeaderDigest {
		binary.LittleEndian.PutUint32(it.hcrc[:], crc32.Checksum(it.hdr[:], castagnoli))
	}
	if s.params.DataDigest {
		c := crc32.Checksum(it.data, castagnoli)
		binary.LittleEndian.PutUint32(it.dcrc[:], crc32.Update(c, castagnoli, zeroPad[:pdu.Pad(len(it.data))]))
	}
}

const digestLen = 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// wire is the session's private part of a Command.
type wire struct{}

// Tags of our own immediate PDUs; tasks use generation<<16 | slot with bit 31 clear.
const (
	pingITT   uint32 = 0x80000000
	logoutITT uint32 = 0xc0000000
)

var zeroPad [4]byte

// vecWriter hands buffers to the connection; see sys.VecWriter.
type vecWriter interface {
	Write(bufs [][]byte, park bool) (int, error)
}

// parkedWriter serves connections without a file descriptor: only the parked
// writer goroutine may wait.
type parkedWriter struct{ c net.Conn }

func (w parkedWriter) Write(bufs [][]byte, park bool) (int, error) {
	if !park {
		return 0, sys.ErrWouldBlock
	}
	for _, b := range bufs {
		if len(b) > 0 {
			return w.c.Write(b)
		}
	}
	return 0, nil
}

// list appends an empty item. Caller holds mu and fills the item at once.
func (s *Session) list(data []byte, slot int32) *item {
	n := len(s.pend)
	if n < cap(s.pend) {
		s.pend = s.pend[:n+1]
		s.pend[n] = item{data: data, slot: slot}
	} else {
		s.pend = append(s.pend, item{data: data, slot: slot})
	}
	it := &s.pend[n]
	it.hdr.SetDataLen(len(data))
	if slot >= 0 {
		sl := &s.slots[slot]
		sl.listed++
		sl.sent = false
	}
	return it
}

// Submit takes c if the session serves and its window and queue have room. It
// lists the command, with as much immediate and unsolicited data as was
// negotiated (RFC 7143 4.2.5.2), and adds the session to p; the caller flushes p.
func (s *Session) Submit(c *Command, p *block.Plug) bool {
	c.Result = Result{}
	s.mu.Lock()
	if s.closed || State(s.state.Load()) == Dead || len(s.free) == 0 || pdu.SerialLess(s.maxCmdSN.Load(), s.cmdSN) {
		s.refused = true
		s.mu.Unlock()
		return false
	}
	idx := s.free[len(s.free)-1]
	s.free = s.free[:len(s.free)-1]
	sl := &s.slots[idx]
	gen := (sl.gen + 1) & 0x7fff
	*sl = slot{cmd: c, gen: gen, cmdSN: s.cmdSN, tick: s.ticks.Load()}
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
	it.hdr.SetExpStatSN(s.expStatSN.Load())
	*it.hdr.CDB() = c.CDB
	s.cmdSN++
	if imm < unsolicited {
		s.listDataOut(int32(idx), itt, pdu.NoTag, c.LUN, imm, unsolicited)
	}
	if c.Dir == DataOut {
		sl.off = uint32(max(imm, unsolicited))
	}
	s.mu.Unlock()
	p.Add(s)
	return true
}

// listDataOut lists bytes [from,to) of a command's data as one sequence.
func (s *Session) listDataOut(idx int32, itt, ttt uint32, lun [8]byte, from, to int) {
	data := s.slots[idx].cmd.Data
	for sn := uint32(0); from < to; sn++ {
		n := min(to-from, s.params.TargetMaxData)
		it := s.list(data[from:from+n], idx)
		it.hdr[0] = uint8(pdu.OpDataOut)
		if from+n == to {
			it.hdr[1] = pdu.Final
		}
		if ttt != pdu.NoTag {
			it.hdr.SetLUN(lun)
		}
		it.hdr.SetITT(itt)
		it.hdr.SetTTT(ttt)
		it.hdr.SetExpStatSN(s.expStatSN.Load())
		it.hdr.SetDataSN(sn)
		it.hdr.SetBufferOffset(uint32(from))
		from += n
	}
}

// Kick sends what is listed without waiting. One sender works at a time:
// whoever finds it busy leaves its items to it. A full socket is left to the
// parked writer goroutine.
func (s *Session) Kick() {
	if s.claim() && !s.send(false) {
		s.mu.Lock()
		s.takeOver <- struct{}{} // buffered, and only the one sender sends: never waits
		s.idle.Broadcast()
		s.mu.Unlock()
	}
}

// claim makes the caller the sender, if there is something to send.
func (s *Session) claim() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sending || len(s.pend) == 0 || State(s.state.Load()) == Dead {
		return false
	}
	s.sending = true
	s.swap()
	return true
}

func (s *Session) swap() {
	s.cur, s.pend = s.pend, s.cur[:0]
	s.curAt = 0
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
	for i := s.curAt; i < len(s.cur) && len(iov)+5 <= sys.MaxIovecs; i++ {
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
	var p *block.Plug // made only when needed: it would escape
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
				sl.listed--
				sl.sent = sl.listed == 0
				if sl.finished && sl.listed == 0 {
					c := sl.cmd
					s.release(uint16(it.slot))
					s.mu.Unlock()
					if p == nil {
						p = new(block.Plug)
					}
					c.Owner.Done(c, p)
					s.mu.Lock()
				}
			}
		}
		if whole {
			it.data = nil
			s.curAt++
		}
	}
	more := true
	if failed || State(s.state.Load()) == Dead {
		more = false
	} else if s.curAt == len(s.cur) {
		more = len(s.pend) > 0
		if more {
			s.swap()
		}
	}
	if !more {
		s.sending = false
		s.idle.Broadcast()
	}
	s.mu.Unlock()
	if p != nil {
		p.Flush()
	}
	return more
}

// release frees a task. Caller holds mu.
func (s *Session) release(idx uint16) {
	s.slots[idx].cmd = nil
	s.slots[idx].finished = false
	s.free = append(s.free, idx)
}

// routineSend is the parked writer: it takes over when the socket is full.
func (s *Session) routineSend() {
	defer s.alive.Done()
	for {
		select {
		case <-s.takeOver:
			s.send(true)
		case <-s.dying:
			return
		}
	}
}
