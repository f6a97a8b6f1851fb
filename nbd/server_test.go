package nbd

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/nbd/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ram is a device in memory that completes at once, or when let go.
type ram struct {
	mu   sync.Mutex
	data []byte
	hold bool // all requests
	only bool // those that change the disk, with hold
	held []*block.Request
	seen []block.Request
	sent []byte // the first byte of each write, in order
}

func (d *ram) Geometry() block.Geometry {
	return block.Geometry{Size: int64(len(d.data)), BlockSize: 512, PhysicalBlock: 4096, Trim: true, WriteCache: true}
}

func (d *ram) Submit(r *block.Request, p *block.Plug) {
	d.mu.Lock()
	d.seen = append(d.seen, *r)
	if r.Op == block.Write {
		d.sent = append(d.sent, r.Data[0])
	}
	if d.hold && (!d.only || changes(r.Op)) {
		d.held = append(d.held, r)
		d.mu.Unlock()
		return
	}
	d.run(r)
	d.mu.Unlock()
	r.Owner.Complete(r, p)
}

func (d *ram) run(r *block.Request) {
	switch r.Op {
	case block.Read:
		copy(r.Data, d.data[r.Off:])
	case block.Write:
		copy(d.data[r.Off:], r.Data)
	case block.Trim, block.WriteZeroes:
		clear(d.data[r.Off : r.Off+r.Len])
	}
}

// bytes is a copy of n bytes from off on.
func (d *ram) bytes(off, n int) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Clone(d.data[off : off+n])
}

func (d *ram) requests() []block.Request {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.seen
}

func (d *ram) release() {
	d.mu.Lock()
	held := d.held
	d.held, d.hold = nil, false
	for _, r := range held {
		d.run(r)
	}
	d.mu.Unlock()
	var p block.Plug
	for i := len(held) - 1; i >= 0; i-- { // youngest first: replies need no order
		held[i].Owner.Complete(held[i], &p)
	}
	p.Flush()
}

// peer is a client without manners.
type peer struct {
	t testing.TB
	net.Conn
}

func listenUnix(t testing.TB, sock string) net.Listener {
	ln, err := net.Listen("unix", sock)
	require.NoError(t, err)
	return ln
}

func newServer(t testing.TB, c Config) (*Server, *ram, func() *peer) {
	s, d := NewServer(c), &ram{data: make([]byte, 64<<20)}
	require.NoError(t, s.AddExport(Export{Name: "disk", Aliases: []string{"3600"}, Description: "FAKE DISK", Device: d}))
	sock := filepath.Join(t.TempDir(), "n")
	ln := listenUnix(t, sock)
	go s.Serve(ln, Access{})
	t.Cleanup(func() {
		d.release()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		require.NoError(t, s.Shutdown(ctx))
	})
	return s, d, func() *peer {
		nc, err := net.Dial("unix", sock)
		require.NoError(t, err)
		t.Cleanup(func() { nc.Close() })
		nc.SetDeadline(time.Now().Add(20 * time.Second))
		return &peer{t, nc}
	}
}

func (p *peer) get(n int) []byte {
	p.t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(p, b)
	require.NoError(p.t, err)
	return b
}

// closed requires that the server hangs up, whatever it says before.
func (p *peer) closed() {
	p.t.Helper()
	_, err := io.Copy(io.Discard, p)
	if ne, ok := err.(net.Error); ok {
		require.False(p.t, ne.Timeout(), "the server keeps the connection")
	}
}

func option(opt uint32, data []byte) []byte {
	b := be.AppendUint64(nil, proto.OptionMagic)
	b = be.AppendUint32(b, opt)
	b = be.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func (p *peer) hello(flags uint32) {
	p.t.Helper()
	b := p.get(18)
	require.Equal(p.t, proto.Magic, be.Uint64(b))
	require.Equal(p.t, proto.OptionMagic, be.Uint64(b[8:]))
	p.Write(be.AppendUint32(nil, flags))
}

func (p *peer) reply() (opt, typ uint32, data []byte) {
	p.t.Helper()
	b := p.get(20)
	require.Equal(p.t, proto.ReplyMagic, be.Uint64(b))
	return be.Uint32(b[8:]), be.Uint32(b[12:]), p.get(int(be.Uint32(b[16:])))
}

func name(s string, infos ...uint16) []byte {
	b := append(be.AppendUint32(nil, uint32(len(s))), s...)
	b = be.AppendUint16(b, uint16(len(infos)))
	for _, i := range infos {
		b = be.AppendUint16(b, i)
	}
	return b
}

// enter goes to transmission.
func (p *peer) enter() *peer {
	p.t.Helper()
	p.hello(3)
	p.Write(option(proto.OptExportName, []byte("disk")))
	p.get(10)
	return p
}

func (p *peer) ask(typ, flags uint16, cookie, off uint64, n uint32, data []byte) {
	b := make([]byte, proto.RequestLen)
	proto.PutRequest(b, proto.Request{Flags: flags, Type: typ, Cookie: cookie, Offset: off, Length: uint64(n)})
	p.Write(append(b, data...))
}

func (p *peer) answer() (proto.Errno, uint64) {
	p.t.Helper()
	b := p.get(proto.ReplyLen)
	require.Equal(p.t, proto.SimpleMagic, be.Uint32(b))
	return proto.Errno(be.Uint32(b[4:])), be.Uint64(b[8:])
}

// works requires that a fresh client is served.
func works(t testing.TB, dial func() *peer) {
	t.Helper()
	p := dial().enter()
	p.ask(proto.CmdRead, 0, 9, 0, 4096, nil)
	e, c := p.answer()
	require.Equal(t, proto.OK, e)
	require.EqualValues(t, 9, c)
	p.get(4096)
	p.ask(proto.CmdDisc, 0, 0, 0, 0, nil)
	p.closed()
}

func TestOptionsAreAnsweredAsTheProtocolSays(t *testing.T) {
	_, _, dial := newServer(t, Config{})
	for _, c := range []struct {
		what string
		opt  uint32
		data []byte
		want uint32
	}{
		{"unknown option", 4711, []byte("xyz"), proto.RepErrUnsup},
		{"TLS without a certificate", proto.OptStartTLS, nil, proto.RepErrUnsup},
		{"list with data", proto.OptList, []byte{1}, proto.RepErrInvalid},
		{"info too short", proto.OptInfo, []byte{0, 0}, proto.RepErrInvalid},
		{"info with a name beyond its data", proto.OptInfo, []byte{0, 0, 1, 0, 'a', 0}, proto.RepErrInvalid},
		{"info with a length that wraps", proto.OptInfo, []byte{0xff, 0xff, 0xff, 0xff, 'a', 0, 0}, proto.RepErrInvalid},
		{"info with too few requests", proto.OptInfo, append(name("disk")[:8], 0, 9), proto.RepErrInvalid},
		{"info of an unknown export", proto.OptInfo, name("nothing"), proto.RepErrUnknown},
		{"go to an unknown export", proto.OptGo, name("nothing"), proto.RepErrUnknown},
	} {
		p := dial()
		p.hello(3)
		p.Write(option(c.opt, c.data))
		opt, typ, _ := p.reply()
		require.Equal(t, c.opt, opt, c.what)
		require.Equal(t, c.want, typ, c.what)
		p.Write(option(proto.OptList, nil)) // the connection is still good
		_, typ, data := p.reply()
		require.Equal(t, proto.RepServer, typ, c.what)
		require.Equal(t, "disk", string(data[4:]), c.what)
		_, typ, _ = p.reply()
		require.Equal(t, proto.RepAck, typ, c.what)
		p.Write(option(proto.OptAbort, nil))
		_, typ, _ = p.reply()
		require.Equal(t, proto.RepAck, typ, c.what)
		p.closed()
	}
}

func TestGoTellsSizeFlagsAndBlockSizes(t *testing.T) {
	_, _, dial := newServer(t, Config{})
	for _, export := range []string{"disk", "3600", ""} {
		p := dial()
		p.hello(3)
		p.Write(option(proto.OptGo, name(export, proto.InfoName, proto.InfoDescription, proto.InfoBlockSize, 99)))
		infos := map[uint16][]byte{}
		for {
			_, typ, data := p.reply()
			if typ == proto.RepAck {
				break
			}
			require.Equal(t, proto.RepInfo, typ)
			infos[be.Uint16(data)] = data[2:]
		}
		require.EqualValues(t, 64<<20, be.Uint64(infos[proto.InfoExport]))
		flags := be.Uint16(infos[proto.InfoExport][8:])
		require.Equal(t, proto.HasFlags|proto.SendCache|proto.SendFlush|proto.SendFUA|proto.SendTrim|proto.SendWriteZeroes|proto.CanMultiConn, flags)
		require.Equal(t, []uint32{512, 4096, proto.MaxPayload}, []uint32{be.Uint32(infos[proto.InfoBlockSize]), be.Uint32(infos[proto.InfoBlockSize][4:]), be.Uint32(infos[proto.InfoBlockSize][8:])})
		require.Equal(t, "disk", string(infos[proto.InfoName]))
		require.Equal(t, "FAKE DISK", string(infos[proto.InfoDescription]))
		p.ask(proto.CmdRead, 0, 1, 0, 512, nil)
		e, _ := p.answer()
		require.Equal(t, proto.OK, e)
	}
}

func TestExportNameWithoutNoZeroesSendsTheZeroes(t *testing.T) {
	_, _, dial := newServer(t, Config{})
	p := dial()
	p.hello(1)
	p.Write(option(proto.OptExportName, []byte("disk")))
	require.Equal(t, make([]byte, 124), p.get(134)[10:])
}

func TestHostileHandshakesCostTheirConnectionOnly(t *testing.T) {
	_, _, dial := newServer(t, Config{})
	for what, b := range map[string][]byte{
		"unknown client flags": {0, 0, 0, 0xff},
		"garbage option magic": append([]byte{0, 0, 0, 3}, bytes.Repeat([]byte{'x'}, 64)...),
		"option of 4 GiB":      append([]byte{0, 0, 0, 3}, append(option(proto.OptList, nil)[:12], 0xff, 0xff, 0xff, 0xff)...),
		"unknown export":       append([]byte{0, 0, 0, 3}, option(proto.OptExportName, []byte("nothing"))...),
		"options without end":  append([]byte{0, 0, 0, 3}, bytes.Repeat(option(4711, nil), 200)...),
		"go without its data":  append([]byte{0, 0, 0, 3}, append(option(proto.OptGo, nil), 0xff, 0xff, 0xff, 0xff)...),
	} {
		p := dial()
		p.get(18)
		go p.Write(b)
		p.closed()
		works(t, dial)
		_ = what
	}
	half := dial() // says nothing more: has until the deadline, and others do not wait for it
	half.get(18)
	half.Write([]byte{0, 0})
	works(t, dial)
}

func TestRequestsOutOfBoundsAreRefusedAndTheConnectionGoesOn(t *testing.T) {
	_, d, dial := newServer(t, Config{})
	p := dial().enter()
	big := make([]byte, proto.MaxPayload+512)
	for i, c := range []struct {
		typ, flags uint16
		off        uint64
		n          uint32
		data       []byte
		want       proto.Errno
	}{
		{proto.CmdRead, 0, 64 << 20, 512, nil, proto.EINVAL},
		{proto.CmdRead, 0, 1<<64 - 512, 1024, nil, proto.EINVAL},
		{proto.CmdRead, 0, 64<<20 - 100, 512, nil, proto.EINVAL},
		{proto.CmdRead, 0, 0, 1<<32 - 512, nil, proto.EOVERFLOW},
		{proto.CmdWrite, 0, 64<<20 - 512, 1024, big[:1024], proto.ENOSPC},
		{proto.CmdWrite, 0, 0, uint32(len(big)), big, proto.EOVERFLOW},
		{proto.CmdWrite, 1 << 9, 0, 512, big[:512], proto.EINVAL},
		{proto.CmdWriteZeroes, 0, 64 << 20, 512, nil, proto.ENOSPC},
		{proto.CmdTrim, 0, 64 << 20, 512, nil, proto.EINVAL},
		{proto.CmdFlush, 0, 512, 0, nil, proto.EINVAL},
		{77, 0, 0, 0, nil, proto.EINVAL},
		{proto.CmdRead, 0, 0, 0, nil, proto.OK},
		{proto.CmdWrite, 0, 0, 0, nil, proto.OK},
		{proto.CmdCache, 0, 0, 4096, nil, proto.OK},
		{proto.CmdTrim, 0, 100, 300, nil, proto.OK}, // no whole block in it
	} {
		go p.ask(c.typ, c.flags, uint64(i), c.off, c.n, c.data)
		e, cookie := p.answer()
		require.Equal(t, c.want, e, "case %d", i)
		require.EqualValues(t, i, cookie)
	}
	require.Empty(t, d.requests(), "a refused or empty request reached the device")
}

func TestCommandsArriveAsTheyWereSent(t *testing.T) {
	_, d, dial := newServer(t, Config{})
	p := dial().enter()
	data := bytes.Repeat([]byte{7}, 1024)
	p.ask(proto.CmdWrite, proto.CmdFlagFUA, 1, 512, 1024, data)
	p.ask(proto.CmdFlush, 0, 2, 0, 0, nil)
	p.ask(proto.CmdWriteZeroes, proto.CmdFlagNoHole, 3, 4096, 512, nil)
	p.ask(proto.CmdTrim, 0, 4, 700, 2000, nil)
	for range 4 {
		e, _ := p.answer()
		require.Equal(t, proto.OK, e)
	}
	seen := d.requests()
	require.Equal(t, block.Write, seen[0].Op)
	require.Equal(t, block.FUA, seen[0].Flags)
	require.Equal(t, block.Flush, seen[1].Op)
	require.Equal(t, block.NoUnmap, seen[2].Flags)
	require.Equal(t, [2]int64{1024, 1536}, [2]int64{seen[3].Off, seen[3].Len}, "trim is rounded inward")
	p.ask(proto.CmdRead, 0, 5, 512, 512, nil)
	p.answer()
	require.Equal(t, data[:512], p.get(512))
}

func TestRepliesComeInAnyOrderAndTheSameCookieIsTheClientsOwnAffair(t *testing.T) {
	_, d, dial := newServer(t, Config{})
	p := dial().enter()
	d.mu.Lock()
	d.hold = true
	d.mu.Unlock()
	for i := range uint64(100) {
		p.ask(proto.CmdRead, 0, i/2, i*512, 512, nil)
	}
	require.Eventually(t, func() bool { d.mu.Lock(); defer d.mu.Unlock(); return len(d.held) == 100 }, 5*time.Second, time.Millisecond)
	d.release()
	counts := map[uint64]int{}
	for range 100 {
		e, c := p.answer()
		require.Equal(t, proto.OK, e)
		counts[c]++
		p.get(512)
	}
	require.Len(t, counts, 50)
}

func TestBrokenTransmissionsCostTheirConnectionOnly(t *testing.T) {
	_, d, dial := newServer(t, Config{})
	for what, do := range map[string]func(p *peer){
		"bad magic":     func(p *peer) { p.Write(bytes.Repeat([]byte{0x55}, 64)) },
		"half a header": func(p *peer) { p.Write([]byte{0x25, 0x60}); p.Conn.(*net.UnixConn).CloseWrite() },
		"half a payload": func(p *peer) {
			p.ask(proto.CmdWrite, 0, 1, 0, 8192, make([]byte, 100))
			p.Conn.(*net.UnixConn).CloseWrite()
		},
		"write far beyond maximum": func(p *peer) { p.ask(proto.CmdWrite, 0, 1, 0, 1<<32-512, nil) },
	} {
		p := dial().enter()
		do(p)
		p.closed()
		works(t, dial)
		_ = what
	}
	for _, r := range d.requests() {
		require.NotEqual(t, block.Write, r.Op, "a write whose data did not come was submitted")
	}
	// Gone with requests in flight: they end, and their replies are dropped.
	p := dial().enter()
	d.mu.Lock()
	d.hold = true
	d.mu.Unlock()
	for i := range uint64(50) {
		p.ask(proto.CmdRead, 0, i, 0, 65536, nil)
	}
	require.Eventually(t, func() bool { d.mu.Lock(); defer d.mu.Unlock(); return len(d.held) == 50 }, 5*time.Second, time.Millisecond)
	p.Close()
	d.release()
	works(t, dial)
}

// A client that asks and never reads fills its own socket and its own slots.
func TestClientThatNeverReadsStallsNobodyElse(t *testing.T) {
	_, _, dial := newServer(t, Config{MaxRequests: 16})
	for range 4 {
		p := dial().enter()
		go func() {
			for i := range uint64(10000) {
				b := make([]byte, proto.RequestLen)
				proto.PutRequest(b, proto.Request{Type: proto.CmdRead, Cookie: i, Length: 64 << 10})
				if _, err := p.Write(b); err != nil {
					return
				}
			}
		}()
	}
	time.Sleep(200 * time.Millisecond)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 20 {
		works(t, dial)
	}
	runtime.ReadMemStats(&after)
	require.Less(t, after.HeapAlloc, before.HeapAlloc+32<<20)
}

func TestConnectionsBeyondTheLimitAreClosed(t *testing.T) {
	_, _, dial := newServer(t, Config{MaxConnections: 2})
	a, b := dial().enter(), dial().enter()
	for range 2 {
		for _, p := range []*peer{a, b} {
			p.ask(proto.CmdRead, 0, 1, 0, 512, nil)
			e, _ := p.answer()
			require.Equal(t, proto.OK, e)
			p.get(512)
		}
		dial().enter().closed()
	}
	a.Close()
	require.Eventually(t, func() bool {
		p := dial().enter()
		p.SetDeadline(time.Now().Add(time.Second))
		p.ask(proto.CmdRead, 0, 1, 0, 512, nil)
		_, err := io.ReadFull(p, make([]byte, proto.ReplyLen+512))
		return err == nil
	}, 5*time.Second, 10*time.Millisecond)
}

func FuzzHandshake(f *testing.F) {
	f.Add(append([]byte{0, 0, 0, 3}, option(proto.OptGo, name("disk", 3))...))
	f.Add(append([]byte{0, 0, 0, 1}, append(option(proto.OptList, nil), option(proto.OptAbort, nil)...)...))
	f.Add(append([]byte{0, 0, 0, 3}, append(option(proto.OptInfo, name("x", 1, 2, 3)), option(proto.OptExportName, []byte("disk"))...)...))
	f.Fuzz(func(t *testing.T, in []byte) {
		s := NewServer(Config{})
		s.AddExport(Export{Name: "disk", Device: &ram{data: make([]byte, 1<<20)}})
		a, b := net.Pipe()
		done := make(chan struct{})
		go func() { defer close(done); s.handshake(b, TLSOff); b.Close() }()
		go func() { a.Write(in); a.Close() }()
		io.Copy(io.Discard, a)
		<-done
	})
}

// FuzzTransmission sends any bytes after the handshake: the server must end
// with the connection, and each request it read must be answered or dropped.
func FuzzTransmission(f *testing.F) {
	rq := func(r proto.Request, data ...byte) []byte {
		b := make([]byte, proto.RequestLen)
		proto.PutRequest(b, r)
		return append(b, data...)
	}
	f.Add(false, rq(proto.Request{Type: proto.CmdRead, Length: 512}))
	f.Add(false, append(rq(proto.Request{Type: proto.CmdWrite, Length: 512}, make([]byte, 512)...), rq(proto.Request{Type: proto.CmdFlush})...))
	f.Add(false, append(rq(proto.Request{Type: proto.CmdTrim, Offset: 3, Length: 9999}), rq(proto.Request{Type: proto.CmdWriteZeroes, Length: 4096})...))
	f.Add(false, rq(proto.Request{Type: proto.CmdWrite, Length: 1 << 31}))
	wide := func(r proto.Request, data ...byte) []byte {
		b := make([]byte, proto.ExtendedLen)
		proto.PutExtendedRequest(b, r)
		return append(b, data...)
	}
	f.Add(true, wide(proto.Request{Type: proto.CmdRead, Length: 512}))
	f.Add(true, append(wide(proto.Request{Type: proto.CmdWrite, Flags: proto.CmdFlagPayload, Length: 512}, make([]byte, 512)...), wide(proto.Request{Type: proto.CmdFlush})...))
	f.Add(true, append(wide(proto.Request{Type: 99, Flags: proto.CmdFlagPayload, Length: 16}, make([]byte, 16)...), wide(proto.Request{Type: proto.CmdTrim, Length: 1 << 62})...))
	f.Fuzz(func(t *testing.T, extended bool, in []byte) {
		s := NewServer(Config{MaxRequests: 4})
		s.AddExport(Export{Name: "disk", Device: &ram{data: make([]byte, 1<<20)}})
		dir := t.TempDir()
		ln, err := net.Listen("unix", filepath.Join(dir, "n"))
		require.NoError(t, err)
		defer ln.Close()
		c, err := net.Dial("unix", filepath.Join(dir, "n"))
		require.NoError(t, err)
		sc, err := ln.Accept()
		require.NoError(t, err)
		done := make(chan struct{})
		cn, ok := s.enter(sc, nil, Access{})
		require.True(t, ok)
		cn.agreed = agreed{structured: extended, extended: extended}
		x := s.find("disk")
		cn.s, cn.x = s, x
		require.True(t, x.clients.enter(cn, &s.cfg))
		go func() { defer close(done); cn.transmit(); x.clients.leave(cn); s.leave(cn) }()
		go func() { c.Write(in); c.(*net.UnixConn).CloseWrite() }()
		io.Copy(io.Discard, c)
		<-done
		c.Close()
		require.NoError(t, s.Shutdown(context.Background()))
	})
}

// A client whose connection broke sends its writes again and goes on: what the
// first connection left behind must not land on top of what follows.
func TestWritesWaitForThoseOfAConnectionThatEnded(t *testing.T) {
	_, d, dial := newServer(t, Config{})
	d.mu.Lock()
	d.hold = true
	d.mu.Unlock()
	a := dial().enter()
	a.ask(proto.CmdWrite, 0, 1, 0, 512, bytes.Repeat([]byte{'a'}, 512))
	require.Eventually(t, func() bool { return len(d.requests()) == 1 }, 5*time.Second, time.Millisecond)
	a.Close()
	b := dial().enter()
	b.ask(proto.CmdRead, 0, 2, 0, 512, nil) // reads do not wait
	require.Eventually(t, func() bool { return len(d.requests()) == 2 }, 5*time.Second, time.Millisecond)
	b.ask(proto.CmdWrite, 0, 3, 0, 512, bytes.Repeat([]byte{'b'}, 512))
	time.Sleep(100 * time.Millisecond)
	require.Len(t, d.requests(), 2, "the second write overtook the first")
	d.release()
	for range 2 {
		e, cookie := b.answer()
		require.Equal(t, proto.OK, e)
		if cookie == 2 {
			b.get(512)
		}
	}
	d.mu.Lock()
	require.Equal(t, byte('b'), d.data[0])
	d.mu.Unlock()
}

func fileConn(t *testing.T, f *os.File) net.Conn {
	c, err := net.FileConn(f)
	require.NoError(t, err)
	f.Close()
	return c
}
