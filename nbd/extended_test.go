package nbd

import (
	"bytes"
	"context"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/nbd/proto"
)

// huge is a disk larger than 32 bits count, which remembers the requests that
// move no data.
type huge struct {
	size int64
	got  chan block.Request
}

func (h huge) Geometry() block.Geometry {
	return block.Geometry{Size: h.size, BlockSize: 512, PhysicalBlock: 512, Trim: true, FastZero: true}
}

func (h huge) Submit(r *block.Request, p *block.Plug) {
	h.got <- *r
	r.Owner.Complete(r, p)
}

func (h huge) Extents(_ context.Context, off, n int64, limit int) []block.Extent {
	return []block.Extent{{Len: n, Hole: true, Zero: true}}
}

// extended goes to transmission with extended headers and contexts.
func (p *peer) extended(queries ...string) *peer {
	p.t.Helper()
	return p.with(proto.OptExtendedHeaders, queries...)
}

func (p *peer) askExtended(typ, flags uint16, cookie, off, n uint64, data []byte) {
	b := make([]byte, proto.ExtendedLen)
	proto.PutExtendedRequest(b, proto.Request{Flags: flags, Type: typ, Cookie: cookie, Offset: off, Length: n})
	p.Write(append(b, data...))
}

func (p *peer) extendedChunk() (typ uint16, cookie, off uint64, body []byte) {
	p.t.Helper()
	b := p.get(proto.ExtendedLen)
	require.Equal(p.t, proto.ExtendedReplyMagic, be.Uint32(b))
	require.Equal(p.t, proto.ChunkDone, be.Uint16(b[4:]))
	return be.Uint16(b[6:]), be.Uint64(b[8:]), be.Uint64(b[16:]), p.get(int(be.Uint64(b[24:])))
}

func TestExtendedHeadersCarryLengthsOf64Bits(t *testing.T) {
	s := NewServer(Config{})
	d := huge{16 << 30, make(chan block.Request, 16)}
	require.NoError(t, s.AddExport(Export{Name: "disk", Device: d}))
	a, b := net.Pipe()
	a.SetDeadline(time.Now().Add(20 * time.Second))
	done := make(chan struct{})
	go func() { defer close(done); s.ServeConn(b, Access{}) }()
	p := (&peer{t, a}).extended("base:allocation")

	p.askExtended(proto.CmdWriteZeroes, proto.CmdFlagFastZero, 1, 1<<30, 6<<30, nil)
	typ, cookie, off, body := p.extendedChunk()
	require.Equal(t, []any{proto.ChunkNone, uint64(1), uint64(1 << 30), 0}, []any{typ, cookie, off, len(body)})
	r := <-d.got
	require.Equal(t, []int64{1 << 30, 6 << 30}, []int64{r.Off, r.Len})
	p.askExtended(proto.CmdTrim, 0, 2, 0, 16<<30, nil)
	p.extendedChunk()
	require.EqualValues(t, 16<<30, (<-d.got).Len)

	p.askExtended(proto.CmdBlockStatus, 0, 3, 0, 12<<30, nil)
	typ, _, _, body = p.extendedChunk()
	require.Equal(t, proto.ChunkBlockStatusExt, typ)
	require.Equal(t, []uint64{contextAllocation<<32 | 1, 12 << 30, 3}, []uint64{be.Uint64(body), be.Uint64(body[8:]), be.Uint64(body[16:])})

	p.askExtended(proto.CmdTrim, 0, 4, 1<<63, 1<<63, nil) // the sum wraps
	typ, _, _, body = p.extendedChunk()
	require.Equal(t, proto.ChunkError, typ)
	require.EqualValues(t, proto.EINVAL, be.Uint32(body))
	p.askExtended(proto.CmdRead, 0, 5, 0, 5<<30, nil)
	typ, _, _, body = p.extendedChunk()
	require.Equal(t, proto.ChunkError, typ)
	require.EqualValues(t, proto.EOVERFLOW, be.Uint32(body))
	require.Empty(t, d.got)
	a.Close()
	<-done
}

func TestExtendedHeadersKeepTheStreamInStep(t *testing.T) {
	_, d, dial := newServer(t, Config{})
	p := dial().extended()
	data := bytes.Repeat([]byte("extended"), 512)
	p.askExtended(proto.CmdWrite, proto.CmdFlagPayload|proto.CmdFlagFUA, 1, 8192, uint64(len(data)), data)
	typ, _, _, _ := p.extendedChunk()
	require.Equal(t, proto.ChunkNone, typ)
	require.Equal(t, data, d.bytes(8192, len(data)))

	// A payload that does not belong there is skipped, whatever the command.
	for _, typ := range []uint16{proto.CmdRead, proto.CmdTrim, proto.CmdBlockStatus, 77} {
		p.askExtended(typ, proto.CmdFlagPayload, 2, 0, 512, data[:512])
		got, cookie, _, body := p.extendedChunk()
		require.Equal(t, []any{proto.ChunkError, uint64(2)}, []any{got, cookie})
		require.EqualValues(t, proto.EINVAL, be.Uint32(body))
	}
	p.askExtended(proto.CmdRead, 0, 3, 8192, uint64(len(data)), nil)
	typ, cookie, off, body := p.extendedChunk()
	require.Equal(t, []any{proto.ChunkOffsetData, uint64(3), uint64(8192)}, []any{typ, cookie, off})
	require.Equal(t, data, body[8:])

	p.askExtended(proto.CmdWrite, proto.CmdFlagPayload, 4, 0, 1<<40, nil)
	p.closed()
	works(t, dial)
}

func TestExtendedHeadersAreAgreedOnceAndForGO(t *testing.T) {
	_, _, dial := newServer(t, Config{})
	p := dial()
	p.hello(3)
	for _, c := range []struct {
		opt, want uint32
		data      []byte
	}{
		{proto.OptExtendedHeaders, proto.RepErrInvalid, []byte{1}},
		{proto.OptStructuredReply, proto.RepAck, nil},
		{proto.OptStructuredReply, proto.RepErrInvalid, nil},
		{proto.OptExtendedHeaders, proto.RepAck, nil},
		{proto.OptExtendedHeaders, proto.RepErrInvalid, nil},
		{proto.OptStructuredReply, proto.RepErrExtHeaderReqd, nil},
	} {
		p.Write(option(c.opt, c.data))
		_, typ, _ := p.reply()
		require.Equal(t, c.want, typ, "option %d", c.opt)
	}
	p.Write(option(proto.OptExportName, []byte("disk")))
	p.closed()
	works(t, dial)
}
