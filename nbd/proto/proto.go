// Package proto is the wire format of the NBD protocol (proto.md of
// NetworkBlockDevice/nbd): magic numbers, codes, the request header and its
// validation. It is pure functions over bytes.
package proto

import "encoding/binary"

// Handshake (proto.md, "Newstyle negotiation").
const (
	Magic       uint64 = 0x4e42444d41474943 // NBDMAGIC
	OptionMagic uint64 = 0x49484156454f5054 // IHAVEOPT
	ReplyMagic  uint64 = 0x0003e889045565a9

	FlagFixedNewstyle uint16 = 1 << 0
	FlagNoZeroes      uint16 = 1 << 1

	OptExportName      uint32 = 1
	OptAbort           uint32 = 2
	OptList            uint32 = 3
	OptStartTLS        uint32 = 5
	OptInfo            uint32 = 6
	OptGo              uint32 = 7
	OptStructuredReply uint32 = 8
	OptListMetaContext uint32 = 9
	OptSetMetaContext  uint32 = 10
	OptExtendedHeaders uint32 = 11

	RepAck         uint32 = 1
	RepServer      uint32 = 2
	RepInfo        uint32 = 3
	RepMetaContext uint32 = 4
	RepErrUnsup    uint32 = 1<<31 + 1
	RepErrPolicy   uint32 = 1<<31 + 2
	RepErrInvalid  uint32 = 1<<31 + 3
	RepErrTLSReqd  uint32 = 1<<31 + 5
	RepErrUnknown  uint32 = 1<<31 + 6
	RepErrShutdown uint32 = 1<<31 + 7
	RepErrTooBig   uint32 = 1<<31 + 9
	// RepErrExtHeaderReqd answers STRUCTURED_REPLY after EXTENDED_HEADERS.
	RepErrExtHeaderReqd uint32 = 1<<31 + 10

	InfoExport      uint16 = 0
	InfoName        uint16 = 1
	InfoDescription uint16 = 2
	InfoBlockSize   uint16 = 3
)

// Transmission flags (proto.md, "Transmission flags").
const (
	HasFlags        uint16 = 1 << 0
	ReadOnly        uint16 = 1 << 1
	SendFlush       uint16 = 1 << 2
	SendFUA         uint16 = 1 << 3
	Rotational      uint16 = 1 << 4
	SendTrim        uint16 = 1 << 5
	SendWriteZeroes uint16 = 1 << 6
	SendDF          uint16 = 1 << 7
	CanMultiConn    uint16 = 1 << 8
	SendCache       uint16 = 1 << 10
	SendFastZero    uint16 = 1 << 11
)

// Transmission (proto.md, "Transmission").
const (
	RequestMagic uint32 = 0x25609513
	SimpleMagic  uint32 = 0x67446698
	RequestLen          = 28

	// Extended headers (proto.md, extension EXTENDED_HEADERS).
	ExtendedRequestMagic uint32 = 0x21e41c71
	ExtendedReplyMagic   uint32 = 0x6e8a278c
	ExtendedLen                 = 32 // of a request and of a reply

	ReplyLen = 16

	CmdRead        uint16 = 0
	CmdWrite       uint16 = 1
	CmdDisc        uint16 = 2
	CmdFlush       uint16 = 3
	CmdTrim        uint16 = 4
	CmdCache       uint16 = 5
	CmdWriteZeroes uint16 = 6
	CmdBlockStatus uint16 = 7

	CmdFlagFUA      uint16 = 1 << 0
	CmdFlagNoHole   uint16 = 1 << 1
	CmdFlagDF       uint16 = 1 << 2
	CmdFlagReqOne   uint16 = 1 << 3
	CmdFlagFastZero uint16 = 1 << 4
	// CmdFlagPayload says that Length counts bytes that follow the header; with
	// extended headers only.
	CmdFlagPayload uint16 = 1 << 5

	// MaxPayload is the most data of one READ or WRITE, bytes.
	MaxPayload = 32 << 20
	// MaxString is the longest export name, bytes.
	MaxString = 4096
)

// Structured replies (proto.md, "Structured reply chunk message").
const (
	StructuredMagic uint32 = 0x668e33ef
	ChunkLen               = 20 // header of a chunk
	MaxReplyHeader         = ExtendedLen + 8

	ChunkDone uint16 = 1 // flag: the last chunk

	ChunkNone        uint16 = 0
	ChunkOffsetData  uint16 = 1
	ChunkBlockStatus uint16 = 5
	// ChunkBlockStatusExt carries extents of 64 bits; with extended headers only.
	ChunkBlockStatusExt uint16 = 6
	ChunkError          uint16 = 1<<15 + 1

	// BaseAllocation is the context that tells where data is; its status bits follow.
	BaseAllocation        = "base:allocation"
	StateHole      uint32 = 1
	StateZero      uint32 = 2
)

// PutChunk writes the header of the only chunk of a reply into b (ChunkLen
// bytes); n is the length of what follows.
func PutChunk(b []byte, typ uint16, cookie uint64, n int) {
	be := binary.BigEndian
	be.PutUint32(b, StructuredMagic)
	be.PutUint16(b[4:], ChunkDone)
	be.PutUint16(b[6:], typ)
	be.PutUint64(b[8:], cookie)
	be.PutUint32(b[16:], uint32(n))
}

// PutExtendedChunk writes the header of the only chunk of a reply with extended
// headers into b (ExtendedLen bytes); offset is the request's, n the length of
// what follows.
func PutExtendedChunk(b []byte, typ uint16, cookie, offset uint64, n int) {
	be := binary.BigEndian
	be.PutUint32(b, ExtendedReplyMagic)
	be.PutUint16(b[4:], ChunkDone)
	be.PutUint16(b[6:], typ)
	be.PutUint64(b[8:], cookie)
	be.PutUint64(b[16:], offset)
	be.PutUint64(b[24:], uint64(n))
}

// Errno is an NBD error value (proto.md, "Error values"); the protocol fixes the
// numbers, whatever the system's are.
type Errno uint32

const (
	OK        Errno = 0
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// Request is the header of a command.
type Request struct {
	Flags, Type uint16
	Cookie      uint64
	Offset      uint64 // bytes
	Length      uint64 // bytes; 32 bits of it without extended headers
}

// ParseRequest reads a header of RequestLen bytes; false: the magic is wrong,
// and nothing after it can be understood.
func ParseRequest(b []byte) (r Request, ok bool) {
	_ = b[RequestLen-1]
	be := binary.BigEndian
	return Request{Flags: be.Uint16(b[4:]), Type: be.Uint16(b[6:]), Cookie: be.Uint64(b[8:]), Offset: be.Uint64(b[16:]), Length: uint64(be.Uint32(b[24:]))},
		be.Uint32(b) == RequestMagic
}

// ParseExtendedRequest reads a header of ExtendedLen bytes; false: the magic is
// wrong, and nothing after it can be understood.
func ParseExtendedRequest(b []byte) (r Request, ok bool) {
	_ = b[ExtendedLen-1]
	be := binary.BigEndian
	return Request{Flags: be.Uint16(b[4:]), Type: be.Uint16(b[6:]), Cookie: be.Uint64(b[8:]), Offset: be.Uint64(b[16:]), Length: be.Uint64(b[24:])},
		be.Uint32(b) == ExtendedRequestMagic
}

// PutExtendedRequest writes a header into b (ExtendedLen bytes).
func PutExtendedRequest(b []byte, r Request) {
	PutRequest(b, r)
	be := binary.BigEndian
	be.PutUint32(b, ExtendedRequestMagic)
	be.PutUint64(b[24:], r.Length)
}

// PutRequest writes a header into b (RequestLen bytes).
func PutRequest(b []byte, r Request) {
	be := binary.BigEndian
	be.PutUint32(b, RequestMagic)
	be.PutUint16(b[4:], r.Flags)
	be.PutUint16(b[6:], r.Type)
	be.PutUint64(b[8:], r.Cookie)
	be.PutUint64(b[16:], r.Offset)
	be.PutUint32(b[24:], uint32(r.Length))
}

// PutReply writes a simple reply header into b (ReplyLen bytes).
func PutReply(b []byte, e Errno, cookie uint64) {
	be := binary.BigEndian
	be.PutUint32(b, SimpleMagic)
	be.PutUint32(b[4:], uint32(e))
	be.PutUint64(b[8:], cookie)
}

// Limits are what an export allows.
type Limits struct {
	Size     int64  // bytes
	Block    int    // smallest block, bytes
	Flags    uint16 // transmission flags sent
	MaxBytes int    // of one READ or WRITE
	Status   bool   // the client negotiated a meta context
	Extended bool   // the client negotiated extended headers
}

// Validate checks a request against its export: OK, or the error to answer
// with. CmdDisc is the caller's.
func Validate(r Request, l Limits) Errno {
	var allowed uint16
	if l.Flags&SendFUA != 0 {
		allowed |= CmdFlagFUA
	}
	write := false
	switch r.Type {
	case CmdRead:
		if l.Flags&SendDF != 0 {
			allowed |= CmdFlagDF
		}
	case CmdCache:
	case CmdBlockStatus:
		if !l.Status || r.Length == 0 {
			return EINVAL
		}
		allowed |= CmdFlagReqOne
	case CmdWrite:
		write = true
		if l.Extended {
			allowed |= CmdFlagPayload
		}
	case CmdFlush:
		if l.Flags&SendFlush == 0 || r.Offset != 0 || r.Length != 0 || r.Flags&^allowed != 0 {
			return EINVAL
		}
		return OK
	case CmdTrim:
		if l.Flags&SendTrim == 0 {
			return EINVAL
		}
		write = true
	case CmdWriteZeroes:
		if l.Flags&SendWriteZeroes == 0 {
			return EINVAL
		}
		write = true
		allowed |= CmdFlagNoHole
		if l.Flags&SendFastZero != 0 {
			allowed |= CmdFlagFastZero
		}
	default:
		return EINVAL
	}
	if r.Flags&^allowed != 0 {
		return EINVAL
	}
	if write && l.Flags&ReadOnly != 0 {
		return EPERM
	}
	if (r.Type == CmdRead || r.Type == CmdWrite) && r.Length > uint64(l.MaxBytes) {
		return EOVERFLOW
	}
	if r.Offset > uint64(l.Size) || r.Length > uint64(l.Size)-r.Offset {
		if r.Type == CmdWrite || r.Type == CmdWriteZeroes {
			return ENOSPC
		}
		return EINVAL
	}
	mask := uint64(l.Block - 1)
	if r.Type == CmdRead || r.Type == CmdWrite || r.Type == CmdWriteZeroes || r.Type == CmdBlockStatus {
		if (r.Offset|r.Length)&mask != 0 {
			return EINVAL
		}
	}
	return OK
}
