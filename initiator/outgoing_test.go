package initiator

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator/pdu"
)

const testSegment = 8 << 10

// unconnected is a session whose batches are looked at instead of sent. Each of its
// tasks is a write of 1 MiB.
func unconnected(tasks int) *Session {
	s := &Session{params: Params{TargetMaxData: testSegment}, slots: make([]slot, tasks)}
	for i := range s.slots {
		s.slots[i].cmd = &Command{Dir: DataOut, Data: make([]byte, 1<<20)}
	}
	return s
}

// asks is an R2T for n bytes of a task.
func (s *Session) asks(task, n uint32) {
	s.answer(uint16(task), sequence{itt: task, ttt: 100 + task, end: n})
}

// goesOut makes batches until nothing is left and tells each PDU of theirs: c for
// a command, d for data that was asked for, u for data that was not, p for a
// ping, and the task.
func (s *Session) goesOut() (out []string) {
	for s.fill() {
		for i := range s.cur {
			h := &s.cur[i].hdr
			kind := "p"
			switch {
			case h.Opcode() == pdu.OpSCSICommand:
				kind = "c"
			case h.Opcode() == pdu.OpDataOut && h.TTT() == pdu.NoTag:
				kind = "u"
			case h.Opcode() == pdu.OpDataOut:
				kind = "d"
			}
			if kind != "p" {
				kind = fmt.Sprint(kind, h.ITT())
			}
			out = append(out, kind)
		}
	}
	return out
}

// writes lists the command of a task with n bytes of unsolicited data.
func (s *Session) writes(task int32, immediate, unsolicited int) {
	it := s.list(s.slots[task].cmd.Data[:immediate], task)
	it.hdr.SetOpcode(pdu.OpSCSICommand)
	it.hdr.SetITT(uint32(task))
	it.hdr.SetCmdSN(uint32(task))
	it.unsolicited = uint32(unsolicited)
}

func TestDataOfTasksTakesTurns(t *testing.T) {
	s := unconnected(3)
	s.asks(0, 3*testSegment)
	s.asks(1, testSegment)
	s.asks(2, 2*testSegment+1)
	require.Equal(t, []string{"d0", "d1", "d2", "d0", "d2", "d0", "d2"}, s.goesOut())
	require.Zero(t, s.slots[0].r2ts)
}

// A task that ends early leaves its place in the ring to nobody, wherever it was.
func TestTheRingGoesOnWithoutATaskThatEnds(t *testing.T) {
	for ends := range uint16(3) {
		s := unconnected(5)
		want := []string(nil)
		for task := range uint32(3) {
			s.asks(task, testSegment)
			if task != uint32(ends) {
				want = append(want, fmt.Sprint("d", task))
			}
		}
		s.forget(ends)
		s.forget(4) // which had nothing
		s.asks(3, testSegment)
		require.Equal(t, append(want, "d3"), s.goesOut(), "without task %d", ends)
		require.False(t, s.slots[ends].listed())
	}
	s := unconnected(2)
	s.asks(0, testSegment)
	s.forget(0)
	s.asks(1, testSegment)
	require.Equal(t, []string{"d1"}, s.goesOut())
}

// Neither commands nor data wait for all of the other, pings for neither.
func TestCommandsAndDataTakeTurns(t *testing.T) {
	s := unconnected(13)
	s.asks(12, 4*testSegment)
	for task := range int32(12) {
		s.writes(task, testSegment, 0) // nine of which are a turn and a bit more
	}
	s.urgent.push().hdr.SetOpcode(pdu.OpNopOut)
	require.Equal(t, []string{"p", "d12", "c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "d12", "c8", "c9", "c10", "c11", "d12", "d12"}, s.goesOut())
}

// The unsolicited data of a command goes before the next one, and before what an
// R2T asks of it, since its offsets only grow.
func TestUnsolicitedDataKeepsItsPlace(t *testing.T) {
	s := unconnected(3)
	s.writes(0, 0, 2*testSegment)
	s.writes(1, 0, 0)
	s.fillCommand()
	s.asks(0, testSegment)
	s.asks(2, testSegment)
	s.fillCommand()
	require.Equal(t, []string{"d2", "u0", "c1", "d0"}, s.goesOut())
}

// What a target has answered gets no more data.
func TestAnEndedTaskSendsNoMore(t *testing.T) {
	s := unconnected(2)
	s.writes(0, 0, 4*testSegment)
	s.fillCommand()
	s.asks(0, testSegment)
	s.writes(1, 0, 0)
	s.forget(0)
	require.Equal(t, []string{"c1"}, s.goesOut())
}

// What is listed and not made into PDUs yet has surely not been sent.
func TestWhatATargetCannotHaveTaken(t *testing.T) {
	s := unconnected(1)
	sl, rc := &s.slots[0], receiver{s: s}
	s.writes(0, 0, 4*testSegment)
	sl.off = 4 * testSegment
	s.fillCommand()
	s.fillCommand()
	require.Equal(t, 1<<20-testSegment, rc.missing(sl))
	sl.off += 2 * testSegment
	s.asks(0, 2*testSegment)
	require.Equal(t, 1<<20-testSegment, rc.missing(sl))
	s.goesOut()
	require.Equal(t, 1<<20-6*testSegment, rc.missing(sl))
}

func TestOnlyCommandsConsumeCmdSN(t *testing.T) {
	s := unconnected(2)
	s.wireSN.Store(5)
	it := s.list(nil, 0)
	it.hdr.SetOpcode(pdu.OpSCSICommand)
	it.hdr.SetCmdSN(5)
	s.asks(1, testSegment)
	s.urgent.push().hdr[0] = uint8(pdu.OpNopOut) | pdu.Immediate
	require.True(t, s.fill())
	require.Equal(t, []uint32{5, 0, 5}, []uint32{s.cur[0].hdr.CmdSN(), s.cur[1].hdr.CmdSN(), s.cur[2].hdr.CmdSN()}, "ping, data, command")
	require.EqualValues(t, 6, s.wireSN.Load())
}

// Nothing follows the Logout Request (RFC 7143 11.14).
func TestNothingFollowsALogout(t *testing.T) {
	s := unconnected(1)
	s.list(nil, -1).hdr[0] = uint8(pdu.OpLogoutReq) | pdu.Immediate
	s.writes(0, 0, 0)
	require.Len(t, s.goesOut(), 1)
	s.urgent.push()
	require.False(t, s.fill())
}

// A batch is what cannot be overtaken.
func TestABatchIsBounded(t *testing.T) {
	s := unconnected(1)
	s.asks(0, 1<<20)
	require.True(t, s.fill())
	require.Len(t, s.cur, batchBytes/(testSegment+pdu.HeaderLen)+1)
	s.params.TargetMaxData = 512
	require.True(t, s.fill())
	require.Len(t, s.cur, batchItems)
}

// A lane that is never empty does not grow.
func TestALaneKeepsItsSize(t *testing.T) {
	var l lane
	for range 3 {
		l.push()
	}
	for range 10_000 {
		l.push()
		l.pop(nil)
		require.Equal(t, 3, l.len())
	}
	require.LessOrEqual(t, cap(l.items), 16)
}
