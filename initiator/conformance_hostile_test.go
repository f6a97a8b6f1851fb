package initiator_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/scsi"
)

// Lengths that lie, opcodes of others, streams in pieces, numbers that are not
// due, floods: the rest of HM.
var hostileCases = map[string]conformanceCase{
	"HM01": {"announces huge data segments or additional headers on every opcode, in login too", "drops at the header: it neither waits for them nor makes room", func(t *testing.T) {
		for op := range uint8(64) {
			for name, announce := range lyingHeaders {
				t.Run(fmt.Sprintf("%02x %s", op, name), func(t *testing.T) {
					t.Parallel()
					hugePDU(t, op, announce)
				})
			}
		}
		for name, announce := range lyingHeaders {
			began := time.Now()
			refuses(t, "protocol error", func(_ int, r *raw) {
				if h, _, ok := r.read(); ok {
					var a pdu.Header
					a[0] = uint8(pdu.OpLoginResp)
					a.SetITT(h.ITT())
					announce(&a)
					r.Write(a[:])
					r.drain()
				}
			})
			require.Less(t, time.Since(began), 1500*time.Millisecond, "login, %s: it waited for the rest", name)
		}
	}},
	"HM02": {"sends opcodes that no target sends", "drops", func(t *testing.T) {
		targets := map[pdu.Opcode]bool{pdu.OpNopIn: true, pdu.OpSCSIResponse: true, pdu.OpTaskMgmtResp: true, pdu.OpTextResp: true, pdu.OpDataIn: true, pdu.OpLogoutResp: true,
			pdu.OpR2T: true, pdu.OpAsync: true, pdu.OpReject: true}
		for op := range pdu.Opcode(64) {
			if targets[op] {
				continue
			}
			for _, immediate := range []uint8{0, pdu.Immediate} {
				t.Run(fmt.Sprintf("%02x %02x", op, immediate), func(t *testing.T) {
					t.Parallel()
					readDrops("unexpected opcode", func(r *raw, itt uint32) {
						var h pdu.Header
						h[0] = uint8(op) | immediate
						h.SetITT(itt)
						r.send(h, nil, false)
					})(t)
				})
			}
		}
		t.Run("an answer to a command that is not sent yet", func(t *testing.T) {
			second := make(chan struct{})
			s := watches(t, narrow, func(r *raw) {
				r.narrow()
				r.login("InitialR2T", "No", "ImmediateData", "No", "FirstBurstLength", "262144", "MaxBurstLength", "1048576", "MaxRecvDataSegmentLength", "65536")
				<-second
				r.expCmdSN = 1
				r.dataIn(0x00010001, pdu.Final|pdu.StatusBit, 0, 0, pattern) // the tag can be guessed
				time.Sleep(200 * time.Millisecond)
			})
			write(t, s.Session, 1<<20) // fills the socket
			time.Sleep(50 * time.Millisecond)
			w := read8(t, s.Session)
			close(second)
			require.ErrorContains(t, ends(t, s), "before it was sent")
			require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
			require.Equal(t, make([]byte, 4096), w.c.Data)
		})
		t.Run("an answer to nothing", readDrops("protocol error", func(r *raw, itt uint32) {
			var h pdu.Header
			h[0], h[1] = uint8(pdu.OpTextResp), pdu.Final
			h.SetITT(itt)
			r.send(h, nil, true)
		}))
	}},
	"HM03": {"sends byte by byte, or splits each PDU at every byte, with and without digests", "works as ever", inPieces},
	"HM06": {"has an ExpCmdSN beyond the commands that were sent", "drops", func(t *testing.T) {
		for _, ahead := range []uint32{1, 2, 1 << 16, 1<<31 - 2} {
			t.Run(fmt.Sprint(ahead), readDrops(fmt.Sprintf("ExpCmdSN %d where the next command will be 1", 1+ahead), func(r *raw, itt uint32) {
				r.expCmdSN += ahead
				r.dataIn(itt, pdu.Final|pdu.StatusBit, 0, 0, pattern)
			}))
		}
		// In every PDU that carries one.
		for name, say := range map[string]func(r *raw, itt uint32){
			"NOP-In": func(r *raw, _ uint32) { r.nopIn(pdu.NoTag) },
			"R2T":    func(r *raw, itt uint32) { r.r2t(itt, 1, 0, 0, 512) },
			"Async":  func(r *raw, _ uint32) { r.async(255) },
		} {
			t.Run(name, writeDrops("ExpCmdSN", func(r *raw, itt uint32) { r.expCmdSN++; say(r, itt) }))
		}
		t.Run("data without status", readDrops("ExpCmdSN", func(r *raw, itt uint32) { r.expCmdSN++; r.dataIn(itt, 0, 0, 0, pattern[:512]) }))
	}},
	"HM10": {"floods with pings, window updates, events, empty Data-In, tiny R2Ts or rejects, and reads the answers or not", "drops at limits of queue and rate; what waits to be sent stays bounded", floods},
}

var lyingHeaders = map[string]func(h *pdu.Header){
	"data":                    func(h *pdu.Header) { h.SetDataLen(1<<24 - 1) },
	"additional header":       func(h *pdu.Header) { h[4] = 255 },
	"both":                    func(h *pdu.Header) { h[4] = 255; h.SetDataLen(1<<24 - 1) },
	"data of one byte more":   func(h *pdu.Header) { h.SetDataLen(256<<10 + 1) },
	"a short extra header":    func(h *pdu.Header) { h[4] = 1 },
	"more than a small PDU's": func(h *pdu.Header) { h.SetDataLen(64<<10 + 1) },
}

// hugePDU sends nothing but a header with a lie about what follows.
func hugePDU(t *testing.T, op uint8, announce func(h *pdu.Header)) {
	s := logsIn(t, func(r *raw) {
		if r.login() {
			if cmd, _, ok := r.command(); ok {
				var h pdu.Header
				h[0] = op
				h.SetITT(cmd.ITT())
				h.SetTTT(pdu.NoTag)
				h.SetStatSN(r.statSN)
				announce(&h)
				r.Write(h[:])
				r.drain()
			}
		}
	})
	w := read8(t, s)
	dropped(t, s, "protocol error") // silence would end it too
	require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
}

// What is announced is not allocated. Not in parallel: it looks at the memory of
// the process.
func TestAnnouncedLengthsAllocateNothing(t *testing.T) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	n := 0
	for op := range uint8(64) {
		for _, announce := range lyingHeaders {
			hugePDU(t, op, announce)
			n++
		}
	}
	runtime.ReadMemStats(&after)
	each := (after.TotalAlloc - before.TotalAlloc) / uint64(n)
	t.Logf("%d bytes for each of %d sessions", each, n)
	require.Less(t, each, uint64(256<<10), "a session that reads a header allocates for what it announces")
}

func (r *raw) nopIn(ttt uint32) {
	var h pdu.Header
	h[0], h[1] = uint8(pdu.OpNopIn), pdu.Final
	h.SetITT(pdu.NoTag)
	h.SetTTT(ttt)
	h.SetStatSN(r.statSN)
	r.send(h, nil, false)
}

// pieces hands what is written on in pieces: of one byte, or in two at a
// certain byte.
type pieces struct {
	net.Conn
	at int // 0: byte by byte
}

func (p *pieces) Write(b []byte) (int, error) {
	for n := 0; n < len(b); {
		k := 1
		switch {
		case p.at > 0 && n == 0:
			k = min(p.at, len(b))
		case p.at > 0:
			k = len(b) - n
		}
		if _, err := p.Conn.Write(b[n : n+k]); err != nil {
			return n, err
		}
		n += k
	}
	return len(b), nil
}

// inPieces uses a pipe: what is written in one piece is read in one.
func inPieces(t *testing.T) {
	for name, digests := range map[string]bool{"plain": false, "digests": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			near, far := net.Pipe()
			defer far.Close()
			p := &pieces{Conn: far}
			on := [2]bool{digests, digests}
			crc32c := map[bool]string{true: "CRC32C", false: "None"}[digests]
			const splits = pdu.HeaderLen + 4 + 512 + 4
			failed := make(chan string, 1)
			go func() {
				r := &raw{Conn: p, statSN: 100, window: 32}
				if !r.login("HeaderDigest", crc32c, "DataDigest", crc32c, "InitialR2T", "Yes", "ImmediateData", "No", "MaxRecvDataSegmentLength", "512") {
					failed <- "login"
					return
				}
				for n := 0; ; n++ {
					h, _, ok := r.readDigested(on)
					if !ok {
						failed <- ""
						return
					}
					switch h.Opcode() {
					case pdu.OpNopOut:
						if h.ITT() != pdu.NoTag {
							r.sendDigested(on, pdu.OpNopIn, h.ITT(), pdu.Final, nil)
						}
						continue
					case pdu.OpLogoutReq:
						r.sendDigested(on, pdu.OpLogoutResp, h.ITT(), pdu.Final, nil)
						continue
					}
					switch h.CDB()[0] {
					case 0x88: // READ (16)
						r.sendDigested(on, pdu.OpDataIn, h.ITT(), pdu.Final|pdu.StatusBit, pattern[:h.EDTL()])
					case 0x8a: // WRITE (16)
						r.r2tDigested(on, h.ITT(), 0, h.EDTL())
						d, data, ok := r.readDigested(on)
						if !ok || d.Opcode() != pdu.OpDataOut || len(data) != int(h.EDTL()) {
							failed <- "write"
							return
						}
						r.sendDigested(on, pdu.OpSCSIResponse, h.ITT(), pdu.Final, nil)
					default:
						r.checkDigested(on, h.ITT(), fixedSense(6, 0x28, 0))
					}
					p.at = n % (splits + 1)
				}
			}()
			s, err := initiator.Open(t.Context(), initiator.Config{Address: "pipe", TargetName: iqn, InitiatorName: "iqn.2026-11.example:i", HeaderDigest: digestPolicy(digests), DataDigest: digestPolicy(digests),
				FailoverTime: 5 * time.Second, LoginTimeout: 5 * time.Second, Dial: func(context.Context, string, string) (net.Conn, error) { return near, nil }})
			require.NoError(t, err)
			defer func() { s.Abort(io.EOF); <-s.Done() }()
			for i := range 3 * (splits + 1) {
				c := &initiator.Command{Data: make([]byte, 512)}
				switch i % 3 {
				case 0:
					c.Dir = initiator.DataIn
					scsi.Read(&c.CDB, 0, 1, true)
				case 1:
					c.Dir = initiator.DataOut
					scsi.Write(&c.CDB, 0, 1, false, true)
				default:
					c.Data = nil
				}
				require.NoError(t, s.Do(t.Context(), c), "command %d", i)
				switch i % 3 {
				case 0:
					require.Equal(t, pattern[:512], c.Data)
				case 2:
					require.EqualValues(t, 2, c.Result.Status)
					require.Equal(t, fixedSense(6, 0x28, 0), c.Result.SenseData())
				}
			}
			require.NoError(t, s.Close(t.Context()))
			require.Empty(t, <-failed)
		})
	}
}

func (r *raw) r2tDigested(on [2]bool, itt uint32, off, n uint32) {
	var h pdu.Header
	h[0], h[1] = uint8(pdu.OpR2T), pdu.Final
	h.SetITT(itt)
	h.SetTTT(5)
	h.SetStatSN(r.statSN)
	h.SetExpCmdSN(r.expCmdSN)
	h.SetMaxCmdSN(r.expCmdSN + r.window - 1)
	h.SetBufferOffset(off)
	h.SetDesiredLen(n)
	r.Write(digested(on, h, nil))
}

func (r *raw) checkDigested(on [2]bool, itt uint32, sense []byte) {
	var h pdu.Header
	h[0], h[1] = uint8(pdu.OpSCSIResponse), pdu.Final
	h.SetITT(itt)
	h.SetStatus(2)
	h.SetStatSN(r.statSN)
	r.statSN++
	h.SetExpCmdSN(r.expCmdSN)
	h.SetMaxCmdSN(r.expCmdSN + r.window - 1)
	r.Write(digested(on, h, append([]byte{0, byte(len(sense))}, sense...)))
}

// digested is a PDU with its padding, all of 0xff, and the digests that are on.
func digested(on [2]bool, h pdu.Header, data []byte) []byte {
	h.SetDataLen(len(data))
	out := append([]byte(nil), h[:]...)
	if on[0] {
		out = binary.LittleEndian.AppendUint32(out, crc(h[:]))
	}
	whole := append([]byte(nil), data...)
	for range pdu.Pad(len(data)) {
		whole = append(whole, 0xff)
	}
	out = append(out, whole...)
	if on[1] && len(data) > 0 {
		out = binary.LittleEndian.AppendUint32(out, crc(whole))
	}
	return out
}

func floods(t *testing.T) {
	header := func(op pdu.Opcode, change func(h *pdu.Header)) pdu.Header {
		var h pdu.Header
		h[0], h[1] = uint8(op), pdu.Final
		h.SetITT(pdu.NoTag)
		h.SetTTT(pdu.NoTag)
		if change != nil {
			change(&h)
		}
		return h
	}
	nothing := func(*pdu.Header, uint32) {}
	event := func(e uint8) pdu.Header { return header(pdu.OpAsync, func(h *pdu.Header) { h[36] = e }) }
	for name, c := range map[string]struct {
		h      pdu.Header
		status bool
		nth    func(h *pdu.Header, n uint32) // what changes from one to the next
		why    string
	}{
		"pings":                   {header(pdu.OpNopIn, func(h *pdu.Header) { h.SetTTT(1) }), false, func(h *pdu.Header, n uint32) { h.SetTTT(n) }, ""},
		"window updates":          {header(pdu.OpNopIn, nil), false, nothing, "flood"},
		"events of the vendor":    {event(255), true, nothing, "flood"},
		"events of nothing":       {event(pdu.AsyncSCSI), true, nothing, "flood"},
		"ended tasks":             {event(pdu.AsyncTasksEnd), true, nothing, ""},
		"events of other cables":  {header(pdu.OpAsync, func(h *pdu.Header) { h[36] = pdu.AsyncDropConnection; h.SetU16(38, 9) }), true, nothing, "flood"},
		"Data-In without data":    {header(pdu.OpDataIn, func(h *pdu.Header) { h[1] = 0; h.SetITT(0x00010000) }), false, func(h *pdu.Header, n uint32) { h.SetDataSN(n) }, "flood"},
		"rejects of nothing":      {header(pdu.OpReject, func(h *pdu.Header) { h.SetResponse(pdu.RejectTooManyImm) }), true, nothing, ""},
		"R2Ts of a byte":          {header(pdu.OpR2T, func(h *pdu.Header) { h.SetITT(0x00010001); h.SetDesiredLen(1) }), false, func(h *pdu.Header, n uint32) { h.SetTTT(n); h.SetDataSN(n); h.SetBufferOffset(n) }, ""},
		"answers to an old abort": {header(pdu.OpTaskMgmtResp, func(h *pdu.Header) { h.SetITT(0xa0000001) }), true, nothing, ""},
	} {
		for _, reads := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, reads %v", name, reads), func(t *testing.T) {
				t.Parallel()
				listed, sent := 0, uint32(0)
				done := make(chan struct{})
				began := time.Now()
				s := watches(t, func(c *initiator.Config) { narrow(c) }, func(r *raw) {
					defer close(done)
					r.login("InitialR2T", "Yes", "ImmediateData", "No", "MaxOutstandingR2T", "8")
					r.command()
					r.command()
					if reads {
						go io.Copy(io.Discard, r.Conn)
					}
					h := c.h
					for n := uint32(0); ; {
						var out []byte
						for range 2000 {
							c.nth(&h, n)
							h.SetStatSN(r.statSN)
							if c.status {
								r.statSN++
							}
							h.SetExpCmdSN(r.expCmdSN)
							h.SetMaxCmdSN(r.expCmdSN + 31)
							out = append(out, h[:]...)
							n++
						}
						if sent = n; time.Since(began) > 5*time.Second {
							return
						}
						if _, err := r.Write(out); err != nil {
							return
						}
					}
				})
				read8(t, s.Session)
				write(t, s.Session, 1<<20)
				for alive := true; alive; {
					select {
					case <-done:
						alive = false
					case <-time.After(time.Millisecond):
						listed = max(listed, s.Listed())
					}
				}
				err, took := ends(t, s), time.Since(began)
				if float64(sent) > 100_000*took.Seconds() || took < 5*time.Second { // else the machine is too slow for a flood
					require.ErrorIs(t, err, initiator.ErrProtocol)
					require.ErrorContains(t, err, c.why)
				}
				require.Less(t, listed, initiator.MaxAnswers+300, "what waits to be sent piles up")
			})
		}
	}
}
