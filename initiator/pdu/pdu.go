// Package pdu is the wire format of iSCSI (RFC 7143 clause 11): the 48-byte
// basic header segment with its fields, opcodes and codes, and login text. It
// is pure functions over bytes, for both ends of a connection.
package pdu

import "encoding/binary"

// HeaderLen is the length of the basic header segment in bytes.
const HeaderLen = 48

// NoTag is the reserved task tag (ITT or TTT) that means "none".
const NoTag uint32 = 0xffffffff

// Opcode is the low six bits of byte 0 (RFC 7143 11.2.1.2).
type Opcode uint8

// Initiator opcodes.
const (
	OpNopOut       Opcode = 0x00
	OpSCSICommand  Opcode = 0x01
	OpTaskMgmtReq  Opcode = 0x02
	OpLoginReq     Opcode = 0x03
	OpTextReq      Opcode = 0x04
	OpDataOut      Opcode = 0x05
	OpLogoutReq    Opcode = 0x06
	OpSNACK        Opcode = 0x10
	OpNopIn        Opcode = 0x20
	OpSCSIResponse Opcode = 0x21
	OpTaskMgmtResp Opcode = 0x22
	OpLoginResp    Opcode = 0x23
	OpTextResp     Opcode = 0x24
	OpDataIn       Opcode = 0x25
	OpLogoutResp   Opcode = 0x26
	OpR2T          Opcode = 0x31
	OpAsync        Opcode = 0x32
	OpReject       Opcode = 0x3f
)

// Bits of bytes 0 and 1.
const (
	Immediate  uint8 = 0x40 // byte 0, I
	Final      uint8 = 0x80 // byte 1, F (or T in login)
	Continue   uint8 = 0x40 // byte 1, C of login and text
	CmdRead    uint8 = 0x40 // byte 1, R of a SCSI Command
	CmdWrite   uint8 = 0x20 // byte 1, W of a SCSI Command
	AttrSimple uint8 = 0x01 // byte 1, ATTR of a SCSI Command
	DataAck    uint8 = 0x40 // byte 1, A of Data-In
	Overflow   uint8 = 0x04 // byte 1, O of Data-In and SCSI Response
	Underflow  uint8 = 0x02 // byte 1, U of Data-In and SCSI Response
	StatusBit  uint8 = 0x01 // byte 1, S of Data-In
)

// Login stages (RFC 7143 11.12.3).
const (
	StageSecurity    uint8 = 0
	StageOperational uint8 = 1
	StageFullFeature uint8 = 3
)

// Task management functions (RFC 7143 11.5.1) and responses (11.6.1).
const (
	TMFAbortTask    uint8 = 1
	TMFAbortTaskSet uint8 = 2
	TMFClearACA     uint8 = 3
	TMFClearTaskSet uint8 = 4
	TMFLUReset      uint8 = 5

	TMFComplete     uint8 = 0
	TMFNoTask       uint8 = 1
	TMFNoLUN        uint8 = 2
	TMFAllegiant    uint8 = 3
	TMFNotSupported uint8 = 5
	TMFNotAllowed   uint8 = 6
	TMFRejected     uint8 = 255
)

// Asynchronous events (RFC 7143 11.9.1).
const (
	AsyncSCSI           uint8 = 0
	AsyncLogoutRequest  uint8 = 1
	AsyncDropConnection uint8 = 2
	AsyncDropSession    uint8 = 3
	AsyncRenegotiate    uint8 = 4
	AsyncTasksEnd       uint8 = 5 // all tasks of a LUN are being terminated
)

// Reject reasons (RFC 7143 11.17.1).
const (
	RejectDataDigest     uint8 = 0x02
	RejectSNACK          uint8 = 0x03
	RejectProtocol       uint8 = 0x04
	RejectNotSupported   uint8 = 0x05
	RejectTooManyImm     uint8 = 0x06
	RejectTaskInProgress uint8 = 0x07
	RejectInvalidDataAck uint8 = 0x08
	RejectInvalidField   uint8 = 0x09
	RejectResources      uint8 = 0x0a
	RejectWaitLogout     uint8 = 0x0c
)

// Header is a basic header segment (RFC 7143 11.2.1). Multi-byte fields are
// big-endian. Its methods read and set the fields of 11.3 to 11.19 by their names
// there; each is meaningful only in the PDUs that have the field, named behind it
// where that is not obvious. Lengths are bytes, LUNs raw (SAM-5 4.7).
type Header [HeaderLen]byte

func (h *Header) Opcode() Opcode                     { return Opcode(h[0] & 0x3f) }
func (h *Header) IsImmediate() bool                  { return h[0]&Immediate != 0 }
func (h *Header) SetOpcode(o Opcode)                 { h[0] = h[0]&Immediate | uint8(o) }
func (h *Header) SetImmediate()                      { h[0] |= Immediate }
func (h *Header) Flags() uint8                       { return h[1] }
func (h *Header) SetFlags(f uint8)                   { h[1] = f }
func (h *Header) IsFinal() bool                      { return h[1]&Final != 0 }
func (h *Header) AHSLen() int                        { return int(h[4]) * 4 } // bytes
func (h *Header) DataLen() int                       { return int(h[5])<<16 | int(h[6])<<8 | int(h[7]) }
func (h *Header) SetDataLen(n int)                   { h[5], h[6], h[7] = uint8(n>>16), uint8(n>>8), uint8(n) }
func (h *Header) LUN() (l [8]byte)                   { copy(l[:], h[8:16]); return }
func (h *Header) SetLUN(l [8]byte)                   { copy(h[8:16], l[:]) }
func (h *Header) ITT() uint32                        { return h.U32(16) }
func (h *Header) SetITT(v uint32)                    { h.SetU32(16, v) }
func (h *Header) TTT() uint32                        { return h.U32(20) }
func (h *Header) SetTTT(v uint32)                    { h.SetU32(20, v) }
func (h *Header) CmdSN() uint32                      { return h.U32(24) } // requests
func (h *Header) SetCmdSN(v uint32)                  { h.SetU32(24, v) }
func (h *Header) ExpStatSN() uint32                  { return h.U32(28) } // requests
func (h *Header) SetExpStatSN(v uint32)              { h.SetU32(28, v) }
func (h *Header) StatSN() uint32                     { return h.U32(24) } // responses
func (h *Header) SetStatSN(v uint32)                 { h.SetU32(24, v) }
func (h *Header) ExpCmdSN() uint32                   { return h.U32(28) } // responses
func (h *Header) SetExpCmdSN(v uint32)               { h.SetU32(28, v) }
func (h *Header) MaxCmdSN() uint32                   { return h.U32(32) } // responses
func (h *Header) SetMaxCmdSN(v uint32)               { h.SetU32(32, v) }
func (h *Header) EDTL() uint32                       { return h.U32(20) } // SCSI Command
func (h *Header) SetEDTL(v uint32)                   { h.SetU32(20, v) }
func (h *Header) CDB() *[16]byte                     { return (*[16]byte)(h[32:48]) } // SCSI Command
func (h *Header) DataSN() uint32                     { return h.U32(36) }             // Data-In/Out; R2TSN; ExpDataSN
func (h *Header) SetDataSN(v uint32)                 { h.SetU32(36, v) }
func (h *Header) BufferOffset() uint32               { return h.U32(40) } // Data-In/Out, R2T
func (h *Header) SetBufferOffset(v uint32)           { h.SetU32(40, v) }
func (h *Header) DesiredLen() uint32                 { return h.U32(44) } // R2T
func (h *Header) SetDesiredLen(v uint32)             { h.SetU32(44, v) }
func (h *Header) Residual() uint32                   { return h.U32(44) } // Data-In with S, SCSI Response
func (h *Header) SetResidual(v uint32)               { h.SetU32(44, v) }
func (h *Header) Response() uint8                    { return h[2] } // SCSI, task management, logout responses; Reject reason
func (h *Header) SetResponse(v uint8)                { h[2] = v }
func (h *Header) Status() uint8                      { return h[3] } // SAM status
func (h *Header) SetStatus(v uint8)                  { h[3] = v }
func (h *Header) ISID() (i [6]byte)                  { copy(i[:], h[8:14]); return } // login
func (h *Header) SetISID(i [6]byte)                  { copy(h[8:14], i[:]) }
func (h *Header) TSIH() uint16                       { return binary.BigEndian.Uint16(h[14:]) }
func (h *Header) SetTSIH(v uint16)                   { binary.BigEndian.PutUint16(h[14:], v) }
func (h *Header) Event() uint8                       { return h[36] } // Async Message
func (h *Header) EventParams() (p1, p2, p3 uint16)   { return h.U16(38), h.U16(40), h.U16(42) }
func (h *Header) Time2Wait() uint16                  { return h.U16(40) } // Logout Response, seconds
func (h *Header) LoginStatus() (class, detail uint8) { return h[36], h[37] }
func (h *Header) SetLoginStatus(class, detail uint8) { h[36], h[37] = class, detail }
func (h *Header) CSG() uint8                         { return h[1] >> 2 & 3 } // login
func (h *Header) NSG() uint8                         { return h[1] & 3 }      // login

// U16 and U32 read, SetU16 and SetU32 write the big-endian field at byte off.
func (h *Header) U16(off int) uint16       { return binary.BigEndian.Uint16(h[off:]) }
func (h *Header) SetU16(off int, v uint16) { binary.BigEndian.PutUint16(h[off:], v) }
func (h *Header) U32(off int) uint32       { return binary.BigEndian.Uint32(h[off:]) }
func (h *Header) SetU32(off int, v uint32) { binary.BigEndian.PutUint32(h[off:], v) }

// Pad is how many bytes follow a data segment of n bytes to reach a multiple of four.
func Pad(n int) int { return -n & 3 }

// SerialLess tells whether a precedes b in serial arithmetic (RFC 1982).
func SerialLess(a, b uint32) bool { return int32(a-b) < 0 }
