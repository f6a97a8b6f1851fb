package initiator_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/scsi"
)

// FuzzSession is a target that says anything while commands are in flight.
//
// The input is one byte of mode and then records: a byte of repairs, a header,
// and as much data as the header announces. The repairs make a record pass the
// checks that random bytes never pass: see fix. Whatever is said, each command
// ends exactly once, nothing outside a command's data is written or sent,
// nothing touches a command after its end, and the session leaves no goroutine
// and no pile of memory behind.
func FuzzSession(f *testing.F) {
	for _, mode := range []byte{0, modePipe, modeDigests, modeR2T, modeR2T | modeDigests, modeReset, modeClose, modeReset | modeLUReset} {
		for _, seed := range sessionSeeds() {
			f.Add(append([]byte{mode}, seed...))
		}
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) == 0 || len(in) > 1<<20 {
			return
		}
		fuzzSession(t, in[0], in[1:])
	})
}

// Modes of a run.
const (
	modePipe    byte = 1 << iota // net.Pipe instead of a socket pair
	modeDigests                  // CRC32C on both
	modeR2T                      // InitialR2T=Yes, ImmediateData=No
	modeLUReset                  // a LOGICAL UNIT RESET is in flight as well
	modePing                     // and a ping
	modeReset                    // the initiator aborts the session in the middle
	modeClose                    // the initiator logs out in the middle
	modeAgain                    // commands that end are submitted again, a few times
)

// Repairs of a record.
const (
	fixStatSN  byte = 1 << iota // the StatSN that is due
	fixITT                      // the tag of the command that bits 6 and 7 name
	fixWindow                   // ExpCmdSN and MaxCmdSN as a sane target has them
	fixDigests                  // right digests
	fixLength                   // no additional header, at most 8 KiB of data
	fixBurst                    // an offset and a length that are due
)

func sessionSeeds() (seeds [][]byte) {
	rec := func(fix byte, change func(h *pdu.Header), data ...byte) []byte {
		var h pdu.Header
		h[1] = pdu.Final
		h.SetITT(pdu.NoTag)
		h.SetTTT(pdu.NoTag)
		change(&h)
		h.SetDataLen(len(data))
		return append(append([]byte{fix}, h[:]...), append(data, make([]byte, pdu.Pad(len(data)))...)...)
	}
	const all = fixStatSN | fixITT | fixWindow | fixDigests
	read := func(slot byte, n int, flags uint8) []byte {
		return rec(all|fixBurst|slot<<6, func(h *pdu.Header) { h[0], h[1] = uint8(pdu.OpDataIn), flags }, make([]byte, n)...)
	}
	response := func(slot byte, status uint8, data ...byte) []byte {
		return rec(all|slot<<6, func(h *pdu.Header) { h[0], h[3] = uint8(pdu.OpSCSIResponse), status }, data...)
	}
	r2t := func(slot byte) []byte {
		return rec(all|fixBurst|slot<<6, func(h *pdu.Header) { h[0] = uint8(pdu.OpR2T); h.SetTTT(5); h.SetDesiredLen(4096) })
	}
	sense := append([]byte{0, 18, 0x70, 0, 6, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x29}, make([]byte, 5)...)
	good, last := response(0, scsi.StatusGood), pdu.Final|pdu.StatusBit
	seeds = append(seeds,
		nil,
		good,
		read(0, 512, last),
		append(read(1, 2048, pdu.Final), append(read(1, 2048, 0), response(1, 0)...)...),
		append(read(1, 4096, pdu.Final), read(0, 512, last)...),
		append(append(r2t(3), r2t(3)...), response(3, scsi.StatusGood)...),
		append(response(2, scsi.StatusCheckCondition, sense...), response(1, scsi.StatusBusy)...),
		append(good, good...),
		append(r2t(3), response(3, scsi.StatusGood)...), // before all its data has left
	)
	special := func(op pdu.Opcode, change func(h *pdu.Header), data ...byte) {
		seeds = append(seeds, append(rec(fixStatSN|fixWindow|fixDigests, func(h *pdu.Header) { h[0] = uint8(op); change(h) }, data...), good...))
	}
	special(pdu.OpNopIn, func(h *pdu.Header) {})
	special(pdu.OpNopIn, func(h *pdu.Header) { h.SetTTT(7) }, []byte("ping")...)
	special(pdu.OpNopIn, func(h *pdu.Header) { h.SetITT(0x80000001) })
	special(pdu.OpTaskMgmtResp, func(h *pdu.Header) { h.SetITT(0xa0000001) })
	special(pdu.OpTaskMgmtResp, func(h *pdu.Header) { h.SetITT(0xa0000001); h[2] = pdu.TMFRejected })
	special(pdu.OpLogoutResp, func(h *pdu.Header) { h.SetITT(0xc0000000) })
	for _, e := range []uint8{pdu.AsyncSCSI, pdu.AsyncLogoutRequest, pdu.AsyncDropConnection, pdu.AsyncDropSession, pdu.AsyncRenegotiate, 255} {
		special(pdu.OpAsync, func(h *pdu.Header) { h[36] = e; h.SetU16(42, 1); h.SetU16(44, 1) }, sense...)
	}
	for _, reason := range []uint8{pdu.RejectDataDigest, pdu.RejectProtocol, pdu.RejectNotSupported, pdu.RejectTooManyImm, pdu.RejectTaskInProgress, pdu.RejectInvalidField, pdu.RejectResources} {
		var bad pdu.Header
		bad[0] = uint8(pdu.OpSCSICommand)
		bad.SetITT(0x00010000)
		special(pdu.OpReject, func(h *pdu.Header) { h[2] = reason }, bad[:]...)
	}
	special(pdu.OpTextResp, func(h *pdu.Header) {}, []byte("A=b\x00")...)
	special(pdu.OpLoginResp, func(h *pdu.Header) {})
	special(pdu.OpDataIn, func(h *pdu.Header) { h[5], h[4] = 0xff, 0xff })
	return seeds
}

// sessionFuzz is one run: the commands, and the target's end.
type sessionFuzz struct {
	t           *testing.T
	s           *initiator.Session
	raw         *raw
	digests     bool
	unsolicited uint32       // bytes of a write that come without R2T
	again       atomic.Int32 // submissions left
	late        atomic.Bool  // nothing may be submitted any more

	mu   sync.Mutex
	cmds []*fuzzed
	tags [4]uint32 // of the first commands as the target saw them
	next [4]uint32 // offset due
	sn   [4]uint32 // DataSN or R2TSN due
}

// fuzzed is a command with guards around its data.
type fuzzed struct {
	initiator.Command
	f     *sessionFuzz
	room  []byte // guard, data, guard
	ended int
	taken bool
	at    initiator.Result // when it ended
}

const (
	guard    = 64
	guarded  = 0xa5
	gone     = 0xee // what the data is filled with when the command has ended
	sentByte = 0x5a // what writes carry
)

func (f *sessionFuzz) submit(dir initiator.Direction, n int) {
	c := &fuzzed{f: f, room: bytes.Repeat([]byte{guarded}, n+2*guard)}
	c.Dir, c.Owner, c.Data = dir, c, c.room[guard:guard+n:guard+n]
	if dir == initiator.DataOut {
		for i := range c.Data {
			c.Data[i] = sentByte
		}
		scsi.Write(&c.CDB, 8, uint32(n/512), false, true)
	} else {
		scsi.Read(&c.CDB, 8, uint32(n/512), true)
	}
	f.mu.Lock()
	f.cmds = append(f.cmds, c)
	f.mu.Unlock()
	var p block.Plug
	if f.s.Submit(&c.Command, &p) {
		c.taken = true
	}
	p.Flush()
}

// Done checks what came back and spoils the data for whoever still looks at it.
func (c *fuzzed) Done(cmd *initiator.Command, p *block.Plug) {
	f := c.f
	f.mu.Lock()
	c.ended++
	twice := c.ended > 1
	f.mu.Unlock()
	if twice {
		f.t.Error("a command ended twice")
	}
	c.check()
	if c.Dir == initiator.DataOut && !filled(c.Data, sentByte) {
		f.t.Error("data of a write was changed")
	}
	if int(cmd.Result.Received) > len(c.Data) || int(cmd.Result.SenseLen) > len(cmd.Result.Sense) {
		f.t.Errorf("result %+v of %d bytes", cmd.Result, len(c.Data))
	}
	for i := range c.Data {
		c.Data[i] = gone
	}
	c.at = cmd.Result
	if f.again.Add(-1) >= 0 && !f.late.Load() {
		go f.submit(c.Dir, len(c.Data))
	}
}

func (c *fuzzed) check() {
	if !filled(c.room[:guard], guarded) || !filled(c.room[len(c.room)-guard:], guarded) {
		c.f.t.Error("a byte outside of the command's data was written")
	}
}

func filled(b []byte, with byte) bool { return bytes.Count(b, []byte{with}) == len(b) }

func fuzzSession(t *testing.T, mode byte, in []byte) {
	before := runtime.NumGoroutine()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	allocated := mem.TotalAlloc

	near, far := connected(t, mode&modePipe != 0)
	f := &sessionFuzz{t: t, raw: &raw{Conn: far, statSN: 100, window: 32}, digests: mode&modeDigests != 0}
	if mode&modeR2T == 0 {
		f.unsolicited = 4096
	}
	if mode&modeAgain != 0 {
		f.again.Store(8)
	}
	yes, digest := map[bool]string{true: "Yes", false: "No"}, map[bool]string{true: "CRC32C", false: "None"}[f.digests]
	logged := make(chan bool, 1)
	go func() {
		logged <- f.raw.login("HeaderDigest", digest, "DataDigest", digest, "InitialR2T", yes[mode&modeR2T != 0], "ImmediateData", yes[mode&modeR2T == 0],
			"MaxRecvDataSegmentLength", "2048", "MaxBurstLength", "8192", "FirstBurstLength", "4096", "MaxOutstandingR2T", "2")
	}()
	cfg := initiator.Config{Address: "fuzz", TargetName: iqn, InitiatorName: "iqn.2026-11.example:i", HeaderDigest: digestPolicy(f.digests), DataDigest: digestPolicy(f.digests),
		FailoverTime: 2 * time.Second, QueueDepth: 8, Dial: func(context.Context, string, string) (net.Conn, error) { return near, nil }}
	s, err := initiator.Open(t.Context(), cfg)
	if err != nil || !<-logged {
		t.Fatal("login:", err)
	}
	f.s = s
	read := make(chan struct{})
	ready := make(chan struct{})
	go func() { defer close(read); f.listen(ready) }()
	f.submit(initiator.DataIn, 512)
	f.submit(initiator.DataIn, 8192)
	f.submit(initiator.DataIn, 64<<10)
	f.submit(initiator.DataOut, 32<<10)
	if mode&modePing != 0 {
		s.Ping()
	}
	var reset sync.WaitGroup
	if mode&modeLUReset != 0 {
		reset.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			s.LUReset(ctx, [8]byte{})
		})
	}
	<-ready // the target knows the tags
	if mode&(modeReset|modeClose) != 0 {
		half := len(in) / 2
		f.say(in[:half])
		reset.Go(func() { f.say(in[half:]) })
		if mode&modeReset != 0 {
			s.Abort(io.ErrClosedPipe)
		} else {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Millisecond)
			s.Close(ctx)
			cancel()
		}
	} else {
		f.say(in)
		if u, ok := far.(*net.UnixConn); ok {
			u.CloseWrite()
		} else {
			far.Close()
		}
	}
	select {
	case <-s.Done():
	case <-time.After(20 * time.Second):
		panic("the session does not end")
	}
	f.late.Store(true)
	far.Close()
	<-read
	reset.Wait()
	for wait := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(50 * time.Microsecond) {
		if time.Now().After(wait) {
			b := make([]byte, 1<<16)
			t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, b[:runtime.Stack(b, true)])
		}
	}
	for _, c := range f.cmds {
		if c.taken != (c.ended == 1) || c.ended > 1 {
			t.Fatalf("a command of %d, taken %v, ended %d times", len(f.cmds), c.taken, c.ended)
		}
		c.check()
		if c.taken && (!filled(c.Data, gone) || c.Result != c.at) {
			t.Fatal("a command was touched after it had ended")
		}
	}
	runtime.ReadMemStats(&mem)
	if got, most := mem.TotalAlloc-allocated, uint64(4<<20+256*len(in)); got > most {
		t.Fatalf("%d bytes allocated for %d of input", got, len(in))
	}
}

// connected are the two ends of a connection.
func connected(t *testing.T, pipe bool) (near, far net.Conn) {
	if pipe {
		return net.Pipe()
	}
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn := func(fd int) net.Conn {
		file := os.NewFile(uintptr(fd), "pair")
		defer file.Close()
		c, err := net.FileConn(file)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	return conn(fds[0]), conn(fds[1])
}

// listen takes what the initiator sends: whole PDUs, and of writes their data.
func (f *sessionFuzz) listen(ready chan struct{}) {
	defer func() {
		select {
		case <-ready:
		default:
			close(ready)
		}
	}()
	var h pdu.Header
	var sum [4]byte
	buf := make([]byte, 8<<10)
	seen := 0
	for {
		if _, err := io.ReadFull(f.raw.Conn, h[:]); err != nil {
			return
		}
		if f.digests {
			if _, err := io.ReadFull(f.raw.Conn, sum[:]); err != nil {
				return
			}
			if binary.LittleEndian.Uint32(sum[:]) != crc(h[:]) {
				f.t.Error("wrong header digest sent")
			}
		}
		n := h.DataLen()
		if n > 2048 || h.AHSLen() != 0 {
			f.t.Errorf("PDU of %d bytes sent, 2048 allowed", n)
			return
		}
		padded := n + pdu.Pad(n)
		if _, err := io.ReadFull(f.raw.Conn, buf[:padded]); err != nil {
			return
		}
		if f.digests && n > 0 {
			if _, err := io.ReadFull(f.raw.Conn, sum[:]); err != nil {
				return
			}
			if binary.LittleEndian.Uint32(sum[:]) != crc(buf[:padded]) {
				f.t.Error("wrong data digest sent")
			}
		}
		switch h.Opcode() {
		case pdu.OpSCSICommand, pdu.OpDataOut:
			for _, b := range buf[:n] {
				if b != sentByte {
					f.t.Errorf("opcode %#02x sent byte %#02x: it is not of the command's data, or the command had ended", h.Opcode(), b)
					return
				}
			}
			if h.Opcode() == pdu.OpSCSICommand && seen < len(f.tags) {
				f.mu.Lock()
				f.tags[seen] = h.ITT()
				f.raw.expCmdSN = h.CmdSN() + 1
				f.mu.Unlock()
				if seen++; seen == len(f.tags) {
					close(ready)
				}
			}
		}
	}
}

// say sends the records of in, repaired as they ask for.
func (f *sessionFuzz) say(in []byte) {
	var out []byte
	for len(in) > 0 && len(out) < 1<<20 {
		fix := in[0]
		var h pdu.Header
		n := copy(h[:], in[1:])
		in = in[1+n:]
		if n < len(h) { // a rest: as it is
			out = append(out, h[:n]...)
			break
		}
		if fix&fixLength != 0 {
			h[4] = 0
			h.SetDataLen(min(h.DataLen(), 8<<10))
		}
		length := h.AHSLen() + h.DataLen()
		length = min(length+pdu.Pad(length), len(in))
		data := in[:length]
		in = in[length:]
		which := fix >> 6
		f.mu.Lock()
		if fix&fixITT != 0 {
			h.SetITT(f.tags[which])
		}
		if fix&fixStatSN != 0 && h.Opcode() != pdu.OpR2T && (h.Opcode() != pdu.OpDataIn || h[1]&pdu.StatusBit != 0) {
			h.SetStatSN(f.raw.statSN)
			f.raw.statSN++
		}
		if fix&fixWindow != 0 {
			h.SetExpCmdSN(f.raw.expCmdSN)
			h.SetMaxCmdSN(f.raw.expCmdSN + 31)
		}
		f.mu.Unlock()
		if fix&fixBurst != 0 {
			h.SetDataSN(f.sn[which])
			f.sn[which]++
			h.SetBufferOffset(f.next[which])
			if h.Opcode() == pdu.OpR2T {
				if f.next[which] == 0 {
					f.next[which] = f.unsolicited
					h.SetBufferOffset(f.unsolicited)
				}
				f.next[which] += h.DesiredLen()
			} else {
				f.next[which] += uint32(h.DataLen())
			}
		}
		out = append(out, h[:]...)
		if f.digests && fix&fixDigests != 0 && len(data) >= h.AHSLen() {
			ahs := data[:h.AHSLen()]
			data = data[h.AHSLen():]
			out = append(out, ahs...)
			out = binary.LittleEndian.AppendUint32(out, crc(append(append([]byte(nil), h[:]...), ahs...)))
			out = append(out, data...)
			if h.DataLen() > 0 {
				out = binary.LittleEndian.AppendUint32(out, crc(data))
			}
			continue
		}
		out = append(out, data...)
	}
	f.raw.Conn.SetWriteDeadline(time.Now().Add(5 * time.Second))
	f.raw.Conn.Write(out)
}

func digestPolicy(on bool) initiator.Digest {
	if on {
		return initiator.DigestRequired
	}
	return initiator.DigestNone
}
