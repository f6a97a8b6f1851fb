package initiator_test

import (
	"context"
	"hash/crc32"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/scsi"
)

// patience is for what must happen, however busy the machine is.
const patience = 2 * time.Minute

// raw is the target's end of a connection in the hands of a script.
type raw struct {
	net.Conn
	statSN, expCmdSN, window uint32
	first                    pdu.Header // the first request, and its keys
	firstKeys                []pdu.Key
	offered                  []pdu.Key // operational keys of the initiator
}

// read takes one PDU; ok is false when the initiator is gone.
func (r *raw) read() (h pdu.Header, data []byte, ok bool) {
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return h, nil, false
	}
	data = make([]byte, h.DataLen()+pdu.Pad(h.DataLen()))
	if _, err := io.ReadFull(r, data); err != nil {
		return h, nil, false
	}
	if !h.IsImmediate() && h.Opcode() == pdu.OpSCSICommand {
		r.expCmdSN = h.CmdSN() + 1
	}
	return h, data[:h.DataLen()], true
}

// send sends a PDU with the next StatSN if it carries status.
func (r *raw) send(h pdu.Header, data []byte, status bool) {
	h.SetDataLen(len(data))
	if status {
		h.SetStatSN(r.statSN)
		r.statSN++
	}
	h.SetExpCmdSN(r.expCmdSN)
	h.SetMaxCmdSN(r.expCmdSN + r.window - 1)
	r.Write(append(append(append([]byte(nil), h[:]...), data...), make([]byte, pdu.Pad(len(data)))...))
}

func (r *raw) loginResponse(rq pdu.Header, flags uint8, keys []byte, change func(h *pdu.Header)) {
	var h pdu.Header
	h[0], h[1] = uint8(pdu.OpLoginResp), flags
	h.SetISID(rq.ISID())
	h.SetITT(rq.ITT())
	if flags&pdu.Final != 0 && flags&3 == pdu.StageFullFeature {
		h.SetTSIH(7)
	}
	if change != nil {
		change(&h)
	}
	r.send(h, keys, true)
}

func keys(kv ...string) (b []byte) {
	for i := 0; i < len(kv); i += 2 {
		b = pdu.AppendKey(b, kv[i], kv[i+1])
	}
	return b
}

const (
	toOperational = pdu.Final | pdu.StageSecurity<<2 | pdu.StageOperational
	toFullFeature = pdu.Final | pdu.StageOperational<<2 | pdu.StageFullFeature
)

// login answers both stages in peace; answers are the operational ones.
func (r *raw) login(answers ...string) bool {
	h, data, ok := r.read()
	if !ok {
		return false
	}
	r.first = h
	r.firstKeys, _ = pdu.ParseKeys(data)
	r.loginResponse(h, toOperational, keys("AuthMethod", "None", "TargetPortalGroupTag", "1"), nil)
	if h, data, ok = r.read(); !ok {
		return false
	}
	r.offered, _ = pdu.ParseKeys(data)
	if len(answers) == 0 {
		answers = []string{"HeaderDigest", "None", "DataDigest", "None", "InitialR2T", "No", "ImmediateData", "Yes", "MaxRecvDataSegmentLength", "262144",
			"MaxBurstLength", "262144", "FirstBurstLength", "65536", "MaxOutstandingR2T", "1"}
	}
	r.loginResponse(h, toFullFeature, keys(answers...), nil)
	return true
}

// command waits for the next SCSI command and lets everything else pass;
// pings are answered.
func (r *raw) command() (pdu.Header, []byte, bool) {
	for {
		h, data, ok := r.read()
		if !ok {
			return h, nil, false
		}
		switch h.Opcode() {
		case pdu.OpSCSICommand:
			return h, data, true
		case pdu.OpNopOut:
			if h.ITT() != pdu.NoTag {
				r.pong(h)
			}
		}
	}
}

func (r *raw) pong(rq pdu.Header) {
	var h pdu.Header
	h[0], h[1] = uint8(pdu.OpNopIn), pdu.Final
	h.SetITT(rq.ITT())
	h.SetTTT(pdu.NoTag)
	r.send(h, nil, true)
}

func (r *raw) dataIn(itt uint32, flags uint8, sn, off uint32, data []byte) {
	var h pdu.Header
	h[0], h[1] = uint8(pdu.OpDataIn), flags
	h.SetITT(itt)
	h.SetTTT(pdu.NoTag)
	h.SetDataSN(sn)
	h.SetBufferOffset(off)
	r.send(h, data, flags&pdu.StatusBit != 0)
}

func (r *raw) good(itt uint32, change func(h *pdu.Header)) {
	var h pdu.Header
	h[0], h[1] = uint8(pdu.OpSCSIResponse), pdu.Final
	h.SetITT(itt)
	if change != nil {
		change(&h)
	}
	r.send(h, nil, true)
}

func (r *raw) r2t(itt, ttt, sn, off, n uint32) {
	var h pdu.Header
	h[0], h[1] = uint8(pdu.OpR2T), pdu.Final
	h.SetITT(itt)
	h.SetTTT(ttt)
	h.SetStatSN(r.statSN)
	h.SetDataSN(sn)
	h.SetBufferOffset(off)
	h.SetDesiredLen(n)
	r.send(h, nil, false)
}

// drain reads until the initiator leaves.
func (r *raw) drain() {
	for {
		if _, _, ok := r.read(); !ok {
			return
		}
	}
}

// scripted runs a script for each connection and returns where to connect.
func scripted(t *testing.T, script func(n int, r *raw)) initiator.Config {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	return scriptedOn(t, ln, script)
}

func scriptedOn(t *testing.T, ln net.Listener, script func(n int, r *raw)) initiator.Config {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n := 0; ; n++ {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(patience))
			r := &raw{Conn: c, statSN: 100, expCmdSN: 0, window: 32}
			script(n, r)
			c.Close()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
	return initiator.Config{Address: ln.Addr().String(), TargetName: iqn, InitiatorName: "iqn.2026-11.example:i", ISID: [6]byte{0x80, 1, 2, 3, 4, 5},
		FailoverTime: time.Second, LoginTimeout: 2 * time.Second}
}

// logsIn opens a session on a script; it is ended with the test.
func logsIn(t *testing.T, script func(r *raw)) *initiator.Session {
	t.Helper()
	s, err := initiator.Open(context.Background(), scripted(t, func(_ int, r *raw) { script(r) }))
	require.NoError(t, err)
	t.Cleanup(func() { s.Abort(io.EOF); <-s.Done() })
	return s
}

// read8 submits a READ of 4096 bytes.
func read8(t *testing.T, s *initiator.Session) *waited { return readOf(t, s, [8]byte{}) }

func readOf(t *testing.T, s *initiator.Session, lun [8]byte) *waited {
	w := &waited{done: make(chan struct{})}
	w.c = &initiator.Command{LUN: lun, Dir: initiator.DataIn, Data: make([]byte, 4096), Owner: w}
	scsi.Read(&w.c.CDB, 0, 8, true)
	var p block.Plug
	require.True(t, s.Submit(w.c, &p))
	p.Flush()
	return w
}

func write(t *testing.T, s *initiator.Session, n int) *waited {
	w := &waited{done: make(chan struct{})}
	w.c = &initiator.Command{Dir: initiator.DataOut, Data: make([]byte, n), Owner: w}
	for i := range w.c.Data {
		w.c.Data[i] = byte(i>>8 + i)
	}
	scsi.Write(&w.c.CDB, 0, uint32(n/512), false, true)
	var p block.Plug
	require.True(t, s.Submit(w.c, &p))
	p.Flush()
	return w
}

type waited struct {
	c    *initiator.Command
	done chan struct{}
}

func (w *waited) Done(*initiator.Command, *block.Plug) { close(w.done) }

func (w *waited) result(t *testing.T) *initiator.Result {
	t.Helper()
	select {
	case <-w.done:
	case <-time.After(patience):
		t.Fatal("the command did not end")
	}
	return &w.c.Result
}

// dropped requires that the session ended because of what the target did.
func dropped(t *testing.T, s *initiator.Session, why string) {
	t.Helper()
	select {
	case <-s.Done():
	case <-time.After(patience):
		t.Fatal("the session lives on")
	}
	require.ErrorContains(t, s.Err(), why)
}

func readFull(r io.Reader, b []byte) (int, error) { return io.ReadFull(r, b) }

func crc(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }
