package initiator_test

import (
	"encoding/binary"
	"io"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// readDigested is read with header and data digests, each if on; ok is false
// too if one is wrong.
func (r *raw) readDigested(on [2]bool) (h pdu.Header, data []byte, ok bool) {
	sum := func(over []byte) bool {
		var b [4]byte
		_, err := io.ReadFull(r, b[:])
		return err == nil && binary.LittleEndian.Uint32(b[:]) == crc(over)
	}
	if _, err := io.ReadFull(r, h[:]); err != nil || on[0] && !sum(h[:]) {
		return h, nil, false
	}
	data = make([]byte, h.DataLen()+pdu.Pad(h.DataLen()))
	if _, err := io.ReadFull(r, data); err != nil || on[1] && len(data) > 0 && !sum(data) {
		return h, nil, false
	}
	if !h.IsImmediate() && h.Opcode() == pdu.OpSCSICommand {
		r.expCmdSN = h.CmdSN() + 1
	}
	return h, data[:h.DataLen()], true
}

// sendDigested sends a PDU with status and the digests that are on.
func (r *raw) sendDigested(on [2]bool, op pdu.Opcode, itt uint32, flags uint8, data []byte) {
	var h pdu.Header
	h[0], h[1] = uint8(op), flags
	h.SetITT(itt)
	h.SetStatSN(r.statSN)
	r.statSN++
	h.SetExpCmdSN(r.expCmdSN)
	h.SetMaxCmdSN(r.expCmdSN + r.window - 1)
	h.SetDataLen(len(data))
	out := append([]byte(nil), h[:]...)
	if on[0] {
		out = binary.LittleEndian.AppendUint32(out, crc(h[:]))
	}
	out = append(out, data...)
	if on[1] && len(data) > 0 {
		out = binary.LittleEndian.AppendUint32(out, crc(data))
	}
	r.Write(out)
}
