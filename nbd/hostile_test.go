package nbd

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/nbd/proto"
)

// twoExports serves "disk", full of 1s, and "other", full of 2s.
func twoExports(t *testing.T, c Config) (s *Server, dial func(export string) *peer) {
	s = NewServer(c)
	for i, name := range []string{"disk", "other"} {
		require.NoError(t, s.AddExport(Export{Name: name, Device: &ram{data: bytes.Repeat([]byte{byte(i + 1)}, 64<<20)}}))
	}
	sock := filepath.Join(t.TempDir(), "n")
	ln := listenUnix(t, sock)
	go s.Serve(ln, Access{})
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		require.NoError(t, s.Shutdown(ctx))
	})
	return s, func(export string) *peer {
		nc, err := net.Dial("unix", sock)
		require.NoError(t, err)
		t.Cleanup(func() { nc.Close() })
		nc.SetDeadline(time.Now().Add(2 * time.Minute))
		p := &peer{t, nc}
		if export != "" {
			p.hello(3)
			p.Write(option(proto.OptExportName, []byte(export)))
			p.get(10)
		}
		return p
	}
}

// reads takes n bytes within the given time and returns how long that took.
func (p *peer) reads(n uint32, within time.Duration) time.Duration {
	p.t.Helper()
	began := time.Now()
	p.SetDeadline(began.Add(within))
	p.ask(proto.CmdRead, 0, 77, 0, n, nil)
	e, c := p.answer()
	require.Equal(p.t, proto.OK, e)
	require.EqualValues(p.t, 77, c)
	p.get(int(n))
	return time.Since(began)
}

// unread asks for count times n bytes and takes none of the answers.
func (p *peer) unread(count int, n uint32) {
	for i := range count {
		p.ask(proto.CmdRead, 0, uint64(i), 0, n, nil)
	}
}

// Requests that the reader took from the socket together are submitted together:
// waiting for memory must not hold back those that will give some.
func TestRequestsBeyondTheBudgetInOneBatch(t *testing.T) {
	_, dial := twoExports(t, Config{MaxBytes: 4 << 20})
	p := dial("disk")
	var b []byte
	for i := range uint64(64) {
		rq := make([]byte, proto.RequestLen)
		proto.PutRequest(rq, proto.Request{Type: proto.CmdRead, Cookie: i, Length: 1 << 20})
		b = append(b, rq...)
	}
	p.Write(b)
	for range 64 {
		e, _ := p.answer()
		require.Equal(t, proto.OK, e)
		p.get(1 << 20)
	}
}

func TestAClientThatHoldsItsShareCostsNobodyElse(t *testing.T) {
	_, dial := twoExports(t, Config{MaxBytes: 8 << 20, stuck: time.Hour})
	greedy := dial("disk")
	greedy.unread(64, 1<<20)
	half := dial("disk") // a write whose payload never comes
	half.ask(proto.CmdWrite, 0, 1, 0, 2<<20, []byte("x"))
	time.Sleep(300 * time.Millisecond)
	for range 20 {
		dial("disk").reads(1<<20, 2*time.Second)
	}
	// A request larger than the whole budget has memory of its own.
	dial("other").reads(proto.MaxPayload, 10*time.Second)
}

// However many clients hold all buffers and wait for more, and however long: small
// requests are served, many at a time.
func TestClientsThatHoldAllBuffersStopNoSmallRequest(t *testing.T) {
	s, dial := twoExports(t, Config{MaxBytes: 4 << 20, stuck: time.Hour})
	for range 20 {
		dial("disk").ask(proto.CmdWrite, 0, 1, 0, 4<<20, []byte("x"))
	}
	clients := &s.exports["disk"].clients
	require.Eventually(t, func() bool {
		clients.mu.Lock()
		defer clients.mu.Unlock()
		return clients.arena != nil && clients.arena.Out() == s.cfg.MaxBytes
	}, 20*time.Second, time.Millisecond)
	p := dial("disk")
	data := bytes.Repeat([]byte{7}, 64<<10)
	const count = 100
	go func() { // all at once
		var b []byte
		for i := range uint64(count) {
			rq := make([]byte, proto.RequestLen)
			proto.PutRequest(rq, proto.Request{Type: proto.CmdWrite, Cookie: i, Offset: 16<<20 + i<<16, Length: 64 << 10})
			b = append(append(b, rq...), data...)
		}
		p.Write(b)
	}()
	for range count {
		e, _ := p.answer()
		require.Equal(t, proto.OK, e)
	}
	p.unread(count, 4096)
	for range count {
		e, _ := p.answer()
		require.Equal(t, proto.OK, e)
		p.get(4096)
	}
	require.Eventually(t, func() bool { return clients.reserve.Out() == 0 }, 20*time.Second, time.Millisecond)
}

func TestClientsThatHoldAllBuffersAndDoNothingAreCut(t *testing.T) {
	s, dial := twoExports(t, Config{MaxBytes: 8 << 20, stuck: 3 * time.Second})
	var stuck []*peer
	for range 2 {
		p := dial("disk")
		p.unread(64, 1<<20)
		stuck = append(stuck, p)
	}
	clients := &s.exports["disk"].clients
	require.Eventually(t, func() bool {
		clients.mu.Lock()
		defer clients.mu.Unlock()
		return clients.arena != nil && clients.arena.Out() == s.cfg.MaxBytes
	}, 5*time.Second, time.Millisecond)
	go func(p *peer) { // a little now and then is as good as nothing
		for b := make([]byte, 4096); ; time.Sleep(60 * time.Millisecond) {
			if _, err := p.Read(b); err != nil {
				return
			}
		}
	}(stuck[1])
	p := dial("disk")
	p.ask(proto.CmdWrite, 0, 1, 0, 4<<20, []byte("x"))
	stuck = append(stuck, p)
	time.Sleep(300 * time.Millisecond)
	require.Less(t, dial("other").reads(1<<20, 2*time.Second), time.Second, "another export has to wait")
	dial("disk").reads(8<<20, 20*time.Second)
	for _, p := range stuck {
		p.SetDeadline(time.Now().Add(10 * time.Second))
		p.closed()
	}
	require.Eventually(t, func() bool { return s.Connections("disk") <= 2 }, 5*time.Second, 10*time.Millisecond)
}

// A client that reads slowly is no stuck one, though the kernel holds much for it
// and takes nothing more for a while.
func TestAClientThatReadsSlowlyIsNotCut(t *testing.T) {
	_, dial := twoExports(t, Config{MaxBytes: 8 << 20, stuck: 500 * time.Millisecond})
	ended := make(chan error, 2)
	for range cap(ended) {
		p := dial("disk")
		p.unread(64, 1<<20)
		go func() {
			b := make([]byte, 32<<10)
			for range 4 * time.Second / (50 * time.Millisecond) {
				if _, err := io.ReadFull(p, b); err != nil {
					ended <- err
					return
				}
				time.Sleep(50 * time.Millisecond)
			}
			ended <- nil
		}()
	}
	time.Sleep(100 * time.Millisecond)
	p := dial("disk") // waits for their buffers
	p.unread(8, 1<<20)
	for range cap(ended) {
		require.NoError(t, <-ended)
	}
}

func TestAFloodOfSilentClientsKeepsNobodyOut(t *testing.T) {
	_, dial := twoExports(t, Config{MaxConnections: 8})
	for range 200 {
		dial("")
	}
	for range 8 {
		dial("disk").reads(4096, 2*time.Second)
	}
	before := runtime.NumGoroutine()
	for range 200 {
		dial("")
	}
	time.Sleep(200 * time.Millisecond)
	require.Less(t, runtime.NumGoroutine(), before+30, "silent clients pile up")
}

// Those who may not come at all take nobody's place in the handshake.
func TestClientsOfOtherNetworksKeepNobodyOut(t *testing.T) {
	s := NewServer(Config{MaxConnections: 1})
	require.NoError(t, s.AddExport(Export{Name: "disk", Device: &ram{data: make([]byte, 1<<20)}}))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	go s.Serve(ln, Access{Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}})
	t.Cleanup(func() { require.NoError(t, s.Shutdown(context.Background())) })
	from := func(ip string) *peer {
		nc, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}).Dial("tcp", ln.Addr().String())
		require.NoError(t, err)
		t.Cleanup(func() { nc.Close() })
		nc.SetDeadline(time.Now().Add(20 * time.Second))
		return &peer{t, nc}
	}
	p := from("127.0.0.2")
	p.hello(3)
	from("127.0.0.1").closed()
	p.Write(option(proto.OptExportName, []byte("disk")))
	p.get(10)
	p.Close()
}

// A flood that comes over TCP keeps no client of the unix socket out.
func TestSilentClientsOfOneListenerKeepNobodyOutOfAnother(t *testing.T) {
	s, dial := twoExports(t, Config{MaxConnections: 1})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	go s.Serve(ln, Access{})
	p := dial("")
	p.hello(3)
	for range 3 {
		nc, err := net.Dial("tcp", ln.Addr().String())
		require.NoError(t, err)
		t.Cleanup(func() { nc.Close() })
		(&peer{t, nc}).get(18) // it is in
	}
	p.Write(option(proto.OptExportName, []byte("disk")))
	p.get(10)
	p.reads(4096, 20*time.Second)
}

// All that one export's clients get is that export's, whatever they ask for
// and however it ends.
func TestNoReplyCarriesAnotherExportsData(t *testing.T) {
	_, dial := twoExports(t, Config{MaxBytes: 4 << 20, MaxRequests: 8})
	const rounds = 3000
	done := make(chan struct{})
	other := dial("other")
	go func() { // keeps buffers full of the other export's data moving
		defer close(done)
		for range rounds {
			other.ask(proto.CmdRead, 0, 1, 0, 64<<10, nil)
			io.ReadFull(other, make([]byte, proto.ReplyLen+64<<10))
		}
	}()
	p, own := dial("disk"), bytes.Repeat([]byte{1}, 128<<10)
	r := rand.New(rand.NewPCG(1, 2))
	for range rounds {
		n, off := uint32(r.IntN(128<<10)), uint64(r.Int64N(66<<20))
		if r.IntN(8) == 0 {
			off = r.Uint64()
		}
		p.ask(proto.CmdRead, uint16(r.IntN(2)*r.IntN(32)), 5, off, n, nil)
		e, _ := p.answer()
		if e != proto.OK {
			continue
		}
		require.LessOrEqual(t, off+uint64(n), uint64(64<<20))
		if got := p.get(int(n)); !bytes.Equal(got, own[:n]) {
			t.Fatalf("of %d bytes at %d, %d are this export's", n, off, bytes.Count(got, own[:1]))
		}
	}
	<-done
}

// sticky is a device whose Submit does not return, which no device may do.
type sticky struct {
	ram
	stuck chan struct{}
}

func (s *sticky) Submit(r *block.Request, p *block.Plug) {
	if r.Op == block.Flush {
		<-s.stuck
	}
	s.ram.Submit(r, p)
}

func TestAReaderThatIsStuckInTheDeviceIsTold(t *testing.T) {
	d := &sticky{ram{data: make([]byte, 1<<20)}, make(chan struct{})}
	s := NewServer(Config{})
	require.NoError(t, s.AddExport(Export{Name: "disk", Aliases: []string{"3600"}, Device: d}))
	kernel, mine, err := sys.SocketPair()
	require.NoError(t, err)
	ended := make(chan error)
	go func() { ended <- s.ServeTransmission(mine, "disk") }()
	c := fileConn(t, kernel)
	ask := func(typ uint16, n uint32) {
		b := make([]byte, proto.RequestLen)
		proto.PutRequest(b, proto.Request{Type: typ, Length: uint64(n)})
		_, err := c.Write(b)
		require.NoError(t, err)
	}
	answer := func(n int) {
		_, err := io.ReadFull(c, make([]byte, proto.ReplyLen+n))
		require.NoError(t, err)
	}
	ask(proto.CmdRead, 512)
	answer(512)
	idle := func() { // for any time
		looks := 0
		require.Eventually(t, func() bool {
			if looks++; len(s.Hangs()) > 0 { // it was just about to leave the device
				looks = 0
			}
			return looks == 10
		}, 20*time.Second, 5*time.Millisecond)
	}
	idle()
	ask(proto.CmdFlush, 0)
	require.Eventually(t, func() bool { return len(s.Hangs()) > 0 }, 20*time.Second, 10*time.Millisecond)
	require.Equal(t, []string{"disk"}, s.Hangs())
	close(d.stuck)
	answer(0)
	idle()
	c.Close()
	require.Error(t, <-ended)
}
