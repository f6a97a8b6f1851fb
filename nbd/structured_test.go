package nbd

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"io"
	"math/big"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/nbd/proto"
)

// mapped is a ram disk that knows where it holds data.
type mapped struct{ *ram }

func (m mapped) Extents(_ context.Context, off, n int64, limit int) []block.Extent {
	es := []block.Extent{{Len: min(4096, n)}, {Len: n - 4096, Hole: true, Zero: true}}
	if n <= 4096 || limit == 1 {
		return es[:1]
	}
	return es
}

func context1(name string, queries ...string) []byte {
	b := append(be.AppendUint32(nil, uint32(len(name))), name...)
	b = be.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = append(be.AppendUint32(b, uint32(len(q))), q...)
	}
	return b
}

// structured goes to transmission with structured replies and contexts.
func (p *peer) structured(queries ...string) *peer {
	p.t.Helper()
	return p.with(proto.OptStructuredReply, queries...)
}

// with goes to transmission after an option without data and contexts.
func (p *peer) with(opt uint32, queries ...string) *peer {
	p.t.Helper()
	p.hello(3)
	p.Write(option(opt, nil))
	_, typ, _ := p.reply()
	require.Equal(p.t, proto.RepAck, typ)
	if len(queries) > 0 {
		p.Write(option(proto.OptSetMetaContext, context1("disk", queries...)))
		for typ = 0; typ != proto.RepAck; {
			_, typ, _ = p.reply()
		}
	}
	p.Write(option(proto.OptGo, name("disk")))
	for typ = 0; typ != proto.RepAck; {
		_, typ, _ = p.reply()
	}
	return p
}

func (p *peer) chunk() (typ uint16, done bool, cookie uint64, body []byte) {
	p.t.Helper()
	b := p.get(proto.ChunkLen)
	require.Equal(p.t, proto.StructuredMagic, be.Uint32(b))
	return be.Uint16(b[6:]), be.Uint16(b[4:])&proto.ChunkDone != 0, be.Uint64(b[8:]), p.get(int(be.Uint32(b[16:])))
}

func TestStructuredRepliesCarryOffsetsAndReasons(t *testing.T) {
	_, d, dial := newServer(t, Config{})
	copy(d.data[8192:], "hello")
	p := dial().structured()
	p.ask(proto.CmdRead, proto.CmdFlagDF, 7, 8192, 512, nil)
	typ, done, cookie, body := p.chunk()
	require.Equal(t, proto.ChunkOffsetData, typ)
	require.True(t, done)
	require.EqualValues(t, 7, cookie)
	require.EqualValues(t, 8192, binary.BigEndian.Uint64(body))
	require.Equal(t, d.data[8192:8192+512], body[8:])

	p.ask(proto.CmdWrite, 0, 8, 0, 512, bytes.Repeat([]byte{1}, 512))
	typ, done, cookie, body = p.chunk()
	require.Equal(t, []any{proto.ChunkNone, true, uint64(8), 0}, []any{typ, done, cookie, len(body)})

	p.ask(proto.CmdRead, 0, 9, 64<<20, 512, nil)
	typ, _, cookie, body = p.chunk()
	require.Equal(t, proto.ChunkError, typ)
	require.EqualValues(t, 9, cookie)
	require.EqualValues(t, proto.EINVAL, be.Uint32(body))
	require.Equal(t, "invalid request: alignment, flags or end of the device", string(body[6:]))
	require.EqualValues(t, len(body)-6, be.Uint16(body[4:]))

	p.ask(proto.CmdBlockStatus, 0, 10, 0, 512, nil) // no context was negotiated
	typ, _, _, body = p.chunk()
	require.Equal(t, proto.ChunkError, typ)
	require.EqualValues(t, proto.EINVAL, be.Uint32(body))
}

func TestBlockStatusAnswersEachContext(t *testing.T) {
	s := NewServer(Config{})
	d := mapped{&ram{data: make([]byte, 1<<20)}}
	require.NoError(t, s.AddExport(Export{Name: "disk", Device: d}))
	ln, err := net.Listen("unix", t.TempDir()+"/n")
	require.NoError(t, err)
	go s.Serve(ln, Access{})
	t.Cleanup(func() { s.Shutdown(context.Background()) })
	dial := func() *peer {
		c, err := net.Dial("unix", ln.Addr().String())
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(20 * time.Second))
		return &peer{t, c}
	}
	p := dial().structured("base:allocation", "x-mpathd:path", "qemu:dirty-bitmap:x")
	p.ask(proto.CmdBlockStatus, 0, 1, 0, 65536, nil)
	typ, done, _, body := p.chunk()
	require.Equal(t, proto.ChunkBlockStatus, typ)
	require.False(t, done)
	want := []uint32{contextAllocation, 4096, 0, 61440, 3}
	for i, w := range want {
		require.Equal(t, w, be.Uint32(body[4*i:]))
	}
	_, done, _, body = p.chunk()
	require.True(t, done)
	require.EqualValues(t, contextPath, be.Uint32(body))
	require.EqualValues(t, 65536, be.Uint32(body[4:]))
	p.ask(proto.CmdBlockStatus, proto.CmdFlagReqOne, 2, 0, 65536, nil)
	_, _, _, body = p.chunk()
	require.Len(t, body, 4+8)
	p.chunk()

	// A context of one export says nothing about another one.
	require.NoError(t, s.AddExport(Export{Name: "other", Device: &ram{data: make([]byte, 4096)}}))
	q := dial()
	q.hello(3)
	q.Write(option(proto.OptStructuredReply, nil))
	q.reply()
	q.Write(option(proto.OptSetMetaContext, context1("other", "base:allocation")))
	q.reply()
	q.reply()
	q.Write(option(proto.OptGo, name("disk")))
	for typ := uint32(0); typ != proto.RepAck; {
		_, typ, _ = q.reply()
	}
	q.ask(proto.CmdBlockStatus, 0, 3, 0, 4096, nil)
	kind, _, _, _ := q.chunk()
	require.Equal(t, proto.ChunkError, kind)
}

func TestMetaContextRefusesGarbage(t *testing.T) {
	_, _, dial := newServer(t, Config{})
	p := dial()
	p.hello(3)
	p.Write(option(proto.OptSetMetaContext, context1("disk", "base:allocation")))
	_, typ, _ := p.reply()
	require.Equal(t, proto.RepErrInvalid, typ, "before structured replies")
	p.Write(option(proto.OptStructuredReply, nil))
	p.reply()
	for _, bad := range [][]byte{nil, {0, 0, 0, 9}, context1("disk", "x")[:13], append(context1("disk"), 1), be.AppendUint32(context1("disk")[:8], 1<<31)} {
		p.Write(option(proto.OptSetMetaContext, bad))
		_, typ, _ = p.reply()
		require.Equal(t, proto.RepErrInvalid, typ)
	}
	p.Write(option(proto.OptSetMetaContext, context1("nothing", "base:allocation")))
	_, typ, _ = p.reply()
	require.Equal(t, proto.RepErrUnknown, typ)
	p.Write(option(proto.OptListMetaContext, context1("disk")))
	for range 2 {
		_, typ, _ = p.reply()
		require.Equal(t, proto.RepMetaContext, typ)
	}
	p.reply()
	p.Write(option(proto.OptListMetaContext, context1("disk", "base:")))
	_, _, data := p.reply()
	require.Equal(t, "base:allocation", string(data[4:]))
}

func selfSigned(t *testing.T) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"nbd.example"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func tcpServer(t *testing.T, c Config, a Access) (*ram, func() *peer) {
	s, d := NewServer(c), &ram{data: make([]byte, 64<<20)}
	require.NoError(t, s.AddExport(Export{Name: "disk", Device: d}))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	go s.Serve(ln, a)
	t.Cleanup(func() { s.Shutdown(context.Background()) })
	return d, func() *peer {
		nc, err := net.Dial("tcp", ln.Addr().String())
		require.NoError(t, err)
		t.Cleanup(func() { nc.Close() })
		nc.SetDeadline(time.Now().Add(20 * time.Second))
		return &peer{t, nc}
	}
}

func TestTLSIsAskedForAndThenCarriesEverything(t *testing.T) {
	cert := selfSigned(t)
	pool := x509.NewCertPool()
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	require.NoError(t, err)
	pool.AddCert(leaf)
	d, dial := tcpServer(t, Config{TLS: &tls.Config{Certificates: []tls.Certificate{cert}}}, Access{TLS: TLSRequired})
	p := dial()
	p.hello(3)
	for _, o := range [][]byte{option(proto.OptGo, name("disk")), option(proto.OptList, nil), option(proto.OptStructuredReply, nil)} {
		p.Write(o)
		_, typ, _ := p.reply()
		require.Equal(t, proto.RepErrTLSReqd, typ)
	}
	p.Write(option(proto.OptStartTLS, []byte{0}))
	_, typ, _ := p.reply()
	require.Equal(t, proto.RepErrInvalid, typ, "STARTTLS with data")
	p.Write(option(proto.OptStartTLS, nil))
	_, typ, _ = p.reply()
	require.Equal(t, proto.RepAck, typ)
	tc := tls.Client(p.Conn, &tls.Config{RootCAs: pool, ServerName: "nbd.example"})
	require.NoError(t, tc.Handshake())
	p.Conn = tc
	p.Write(option(proto.OptStartTLS, nil))
	_, typ, _ = p.reply()
	require.Equal(t, proto.RepErrInvalid, typ, "STARTTLS within TLS")
	p.Write(option(proto.OptGo, name("disk")))
	for typ = 0; typ != proto.RepAck; {
		_, typ, _ = p.reply()
	}
	data := make([]byte, 1<<20)
	rand.Read(data)
	p.ask(proto.CmdWrite, 0, 1, 4096, uint32(len(data)), data)
	e, _ := p.answer()
	require.Equal(t, proto.OK, e)
	for i := range uint64(20) {
		p.ask(proto.CmdRead, 0, i, 4096, uint32(len(data)), nil)
	}
	for range 20 {
		e, _ = p.answer()
		require.Equal(t, proto.OK, e)
		require.True(t, bytes.Equal(data, p.get(len(data))))
	}
	require.Equal(t, data, d.data[4096:4096+len(data)])
	q := dial()
	q.hello(3)
	q.Write(option(proto.OptExportName, []byte("disk")))
	q.closed()

	// What comes in the clear behind STARTTLS is no part of the session.
	q = dial()
	q.hello(3)
	q.Write(append(option(proto.OptStartTLS, nil), option(proto.OptGo, name("disk"))...))
	_, typ, _ = q.reply()
	require.Equal(t, proto.RepAck, typ)
	rest, _ := io.ReadAll(q.Conn)
	require.Less(t, len(rest), 20, "an alert of TLS at most: % x", rest)
}

func TestOnlyAllowedAddressesAreServed(t *testing.T) {
	_, dial := tcpServer(t, Config{}, Access{Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}})
	dial().closed()
	_, dial = tcpServer(t, Config{}, Access{Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8")}})
	works(t, dial)
}
