package initiator_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
)

// What is in a digest: DG01.
var digestCases = map[string]conformanceCase{
	"DG01": {"does both digests: known vectors, padding of 1 to 3 bytes, PDUs without data", "sends and takes the digests of RFC 7143 A.4; padding is covered, no data has no data digest", digestVectors},
}

// crcVectors are data and its CRC32C as it goes over the wire (RFC 7143 A.4).
var crcVectors = map[string][]byte{
	"aa36918a": make([]byte, 32),
	"43aba862": bytes.Repeat([]byte{0xff}, 32),
	"4e79dd46": counting(0, 1),
	"5cdb3f11": counting(31, -1),
}

func counting(from, step int) []byte {
	b := make([]byte, 32)
	for i := range b {
		b[i] = byte(from + i*step)
	}
	return b
}

func digestVectors(t *testing.T) {
	on := [2]bool{true, true}
	// The header digest of a READ (10) in the same appendix checks the checker.
	read10, _ := hex.DecodeString("01c00000" + "00000000" + "0000000000000000" + "14000000" + "00000400" + "00000014" + "00000018" + "2800000000000000" + "0200000000000000")
	require.Equal(t, []byte{0x56, 0x3a, 0x96, 0xd9}, binary.LittleEndian.AppendUint32(nil, crc(read10)))

	type exchange struct {
		data []byte
		sum  []byte // wire bytes, nil: computed
	}
	var all []exchange
	for sum, data := range crcVectors {
		b, _ := hex.DecodeString(sum)
		all = append(all, exchange{data, b})
	}
	for n := range 10 { // paddings, and no data at all
		all = append(all, exchange{pattern[:n], nil})
	}
	failed := make(chan string, 1)
	c := scripted(t, func(_ int, r *raw) {
		r.login("HeaderDigest", "CRC32C", "DataDigest", "CRC32C", "InitialR2T", "Yes", "ImmediateData", "Yes", "MaxRecvDataSegmentLength", "8192")
		for i := 0; i < 2*len(all); i++ { // each is written, then read
			x := all[i/2]
			var h pdu.Header
			head := make([]byte, pdu.HeaderLen+4)
			if _, err := io.ReadFull(r, head); err != nil {
				failed <- fmt.Sprint("gone at ", i)
				return
			}
			copy(h[:], head)
			if binary.LittleEndian.Uint32(head[pdu.HeaderLen:]) != crc(h[:]) {
				failed <- fmt.Sprintf("header digest of %x", head)
				return
			}
			if h.Opcode() == pdu.OpNopOut { // a ping, without data
				r.sendDigested(on, pdu.OpNopIn, h.ITT(), pdu.Final, nil)
				i--
				continue
			}
			r.expCmdSN = h.CmdSN() + 1
			if i%2 == 0 {
				want := append(append([]byte(nil), x.data...), make([]byte, pdu.Pad(len(x.data)))...)
				switch {
				case x.sum != nil:
					want = append(want, x.sum...)
				case len(x.data) > 0:
					want = binary.LittleEndian.AppendUint32(want, crc(want))
				}
				got := make([]byte, len(want))
				if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, want) || h.DataLen() != len(x.data) {
					failed <- fmt.Sprintf("sent %x, want %x", got, want)
					return
				}
				r.sendDigested(on, pdu.OpSCSIResponse, h.ITT(), pdu.Final, nil)
				continue
			}
			if h.DataLen() != 0 {
				failed <- fmt.Sprintf("a command without data has %d bytes", h.DataLen())
				return
			}
			var a pdu.Header
			a[0], a[1] = uint8(pdu.OpDataIn), pdu.Final|pdu.StatusBit
			a.SetITT(h.ITT())
			a.SetStatSN(r.statSN)
			r.statSN++
			a.SetExpCmdSN(r.expCmdSN)
			a.SetMaxCmdSN(r.expCmdSN + r.window - 1)
			if len(x.data) == 0 {
				a[0], a[1] = uint8(pdu.OpSCSIResponse), pdu.Final
			}
			out := digested(on, a, x.data) // padded with 0xff
			if x.sum != nil {
				out = append(out[:len(out)-4], x.sum...)
			}
			r.Write(out)
		}
		failed <- ""
		io.Copy(io.Discard, r)
	})
	c.HeaderDigest, c.DataDigest = initiator.DigestRequired, initiator.DigestRequired
	s, err := initiator.Open(t.Context(), c)
	require.NoError(t, err)
	defer func() { s.Abort(io.EOF); <-s.Done() }()
	for i := 0; i < 2*len(all); i++ {
		x := all[i/2].data
		room := bytes.Repeat([]byte{0xaa}, len(x)+8)
		cmd := &initiator.Command{Dir: initiator.DataOut, Data: room[:len(x)]}
		if i%2 == 0 {
			copy(cmd.Data, x)
		} else {
			cmd.Dir = initiator.DataIn
		}
		if err := s.Do(t.Context(), cmd); err != nil {
			t.Fatalf("%x: %v: %s", x, err, <-failed)
		}
		require.True(t, bytes.Equal(x, cmd.Data))
		require.Equal(t, bytes.Repeat([]byte{0xaa}, 8), room[len(x):], "padding in the memory behind")
	}
	require.Empty(t, <-failed)
}
