package initiator

import (
	"sync/atomic"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// outgoing is what waits to be sent. The sender takes it in batches, so that
// what is urgent waits for one batch at most, and in turns, so that neither
// commands nor the data of one large write starve the rest. Guarded by
// Session.mu but for wireSN.
type outgoing struct {
	// urgent: pings and answers to pings. They go ahead of everything.
	urgent lane
	// commands, in CmdSN order, and requests that must keep their place among
	// them (RFC 7143 4.2.2.1: a task management request acts on what was sent
	// before it).
	commands lane
	// burst is the rest of the unsolicited data of the command that left last.
	// It goes before the next command, since unsolicited data keeps the order
	// of the commands (RFC 7143 4.2.5.2).
	burst sequence
	// Data that R2Ts asked for, as sequences, not as PDUs: 1 MiB in segments of
	// 512 bytes takes one entry. Indices are one more than they are, 0 is none.
	sequences           []sequence
	unused              int32 // list of free entries
	readyFirst, readyTo int32 // ring of the slots that have data to send, by turns
	turn                int   // bytes that commands may still send before it is data's turn
	leftForGood         bool  // the logout request is out: nothing may follow

	wireSN  atomic.Uint32 // CmdSN of the first command that is not on its way: stored by the sender
	ackedSN uint32        // the last ExpStatSN that went out
}

// Sizes of a batch, which is one writev. What one writev holds cannot be
// overtaken.
const (
	batchBytes  = 256 << 10
	batchItems  = 128 // of five buffers each: sys.MaxIovecs is not exceeded
	commandTurn = 64 << 10
)

// sequence is a run of Data-Out PDUs that are not made yet: bytes [at,end) of
// the data of the task itt (RFC 7143 11.7).
type sequence struct {
	lun      [8]byte
	itt, ttt uint32
	sn       uint32
	at, end  uint32
	next     int32 // of the same task, or free
}

// lane is a queue of items.
type lane struct {
	items []item
	at    int
}

func (l *lane) len() int { return len(l.items) - l.at }

// push appends an item of zeroes, valid until the next push.
func (l *lane) push() *item {
	if n := len(l.items); n == cap(l.items) && l.at > n/2 {
		k := copy(l.items, l.items[l.at:])
		clear(l.items[k:])
		l.items, l.at = l.items[:k], 0
	}
	l.items = append(l.items, item{slot: -1})
	return &l.items[len(l.items)-1]
}

// pop moves the oldest item to the end of batch.
func (l *lane) pop(batch []item) []item {
	it := &l.items[l.at]
	batch = append(batch, *it)
	it.data = nil
	if l.at++; l.at == len(l.items) {
		l.items, l.at = l.items[:0], 0
	}
	return batch
}

// list appends an item to the commands. Caller holds mu and fills the item at
// once; the sender stamps what every PDU carries: see stamp.
func (s *Session) list(data []byte, slot int32) *item {
	it := s.commands.push()
	it.data, it.slot = data, slot
	it.hdr.SetDataLen(len(data))
	if slot >= 0 {
		s.slots[slot].unsent = true
	}
	return it
}

// answer lists data that an R2T asked for. Caller holds mu.
func (s *Session) answer(idx uint16, q sequence) {
	at := s.unused
	if at == 0 {
		s.sequences = append(s.sequences, sequence{})
		at = int32(len(s.sequences))
	} else {
		s.unused = s.sequences[at-1].next
	}
	q.next = 0
	s.sequences[at-1] = q
	sl := &s.slots[idx]
	if sl.first == 0 {
		sl.first = at
	} else {
		s.sequences[sl.last-1].next = at
	}
	sl.last = at
	sl.r2ts++
	if !sl.bursting { // else its unsolicited data comes first: offsets only grow
		s.makeReady(int32(idx))
	}
}

// makeReady appends a task that has sequences to the ring.
func (s *Session) makeReady(idx int32) {
	sl := &s.slots[idx]
	if sl.isReady || sl.first == 0 {
		return
	}
	sl.isReady, sl.nextReady = true, 0
	if s.readyFirst == 0 {
		s.readyFirst = idx + 1
	} else {
		s.slots[s.readyTo-1].nextReady = idx + 1
	}
	s.readyTo = idx + 1
}

// dropSequence frees the first sequence of a task.
func (s *Session) dropSequence(sl *slot) {
	at := sl.first
	q := &s.sequences[at-1]
	sl.first = q.next
	q.next, s.unused = s.unused, at
	sl.r2ts--
}

// forget drops the data of a task that is not on its way yet. Caller holds mu.
func (s *Session) forget(idx uint16) {
	sl := &s.slots[idx]
	for sl.first != 0 {
		s.dropSequence(sl)
	}
	if sl.bursting {
		sl.bursting = false
		s.burst = sequence{}
	}
	if !sl.isReady {
		return
	}
	sl.isReady = false
	before := int32(0)
	for at := s.readyFirst; at != int32(idx)+1; at = s.slots[at-1].nextReady {
		before = at
	}
	if before == 0 {
		s.readyFirst = sl.nextReady
	} else {
		s.slots[before-1].nextReady = sl.nextReady
	}
	if s.readyTo == int32(idx)+1 {
		s.readyTo = before
	}
}

// fill makes the next batch, in cur, and reports whether there is one. Caller
// holds mu and is, or becomes, the sender.
func (s *Session) fill() bool {
	s.cur, s.curAt = s.cur[:0], 0
	for room := batchBytes; room > 0 && len(s.cur) < batchItems && !s.leftForGood; {
		commands := s.commands.len() > 0 || s.burst.at < s.burst.end
		switch {
		case s.urgent.len() > 0:
			s.cur = s.urgent.pop(s.cur)
		case commands && (s.turn > 0 || s.readyFirst == 0):
			s.fillCommand()
			s.turn -= s.size(&s.cur[len(s.cur)-1])
		case s.readyFirst != 0:
			s.fillData()
			s.turn = commandTurn
		default:
			return len(s.cur) > 0
		}
		it := &s.cur[len(s.cur)-1]
		s.stamp(it)
		room -= s.size(it)
	}
	return len(s.cur) > 0
}

// stamp writes the sequence numbers of the moment (RFC 7143 4.2.2).
func (s *Session) stamp(it *item) {
	sn := s.expStatSN.Load()
	it.hdr.SetExpStatSN(sn)
	s.ackedSN = sn
	switch {
	case it.hdr.Opcode() == pdu.OpDataOut: // has no CmdSN
	case it.hdr.IsImmediate():
		it.hdr.SetCmdSN(s.wireSN.Load()) // consumes none
		s.leftForGood = it.hdr.Opcode() == pdu.OpLogoutReq
	default:
		s.wireSN.Store(it.hdr.CmdSN() + 1)
	}
}

// fillCommand appends the next PDU of the command lane to cur.
func (s *Session) fillCommand() {
	if s.burst.at < s.burst.end {
		idx := int32(s.burst.itt & 0xffff)
		s.fillDataOut(&s.burst, idx)
		if s.burst.at == s.burst.end {
			s.slots[idx].bursting = false
			s.makeReady(idx)
		}
		return
	}
	s.cur = s.commands.pop(s.cur)
	it := &s.cur[len(s.cur)-1]
	if it.slot < 0 {
		return
	}
	sl := &s.slots[it.slot]
	sl.unsent = false
	sl.leaving++
	if n := uint32(len(it.data)); n < it.unsolicited {
		sl.bursting = true
		s.burst = sequence{itt: it.hdr.ITT(), ttt: pdu.NoTag, at: n, end: it.unsolicited}
	}
}

// fillData appends a PDU of the task whose turn it is to cur.
func (s *Session) fillData() {
	idx := s.readyFirst - 1
	sl := &s.slots[idx]
	s.readyFirst, sl.isReady = sl.nextReady, false
	q := &s.sequences[sl.first-1]
	s.fillDataOut(q, idx)
	if q.at == q.end {
		s.dropSequence(sl)
	}
	s.makeReady(idx)
}

// fillDataOut appends the next PDU of a sequence to cur.
func (s *Session) fillDataOut(q *sequence, idx int32) {
	n := min(q.end-q.at, uint32(s.params.TargetMaxData))
	sl := &s.slots[idx]
	s.cur = append(s.cur, item{data: sl.cmd.Data[q.at : q.at+n], slot: idx})
	sl.leaving++
	h := &s.cur[len(s.cur)-1].hdr
	h[0] = uint8(pdu.OpDataOut)
	q.at += n
	if q.at == q.end {
		h[1] = pdu.Final
	}
	h.SetDataLen(int(n))
	h.SetLUN(q.lun)
	h.SetITT(q.itt)
	h.SetTTT(q.ttt)
	h.SetDataSN(q.sn)
	h.SetBufferOffset(q.at - n)
	q.sn++
}
