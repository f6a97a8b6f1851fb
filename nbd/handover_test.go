package nbd

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/nbd/proto"
)

// A client in full flight passes through one server after the other: every
// request is answered once, in the same stream.
func TestAConnectionMovesToAnotherServerInFullFlight(t *testing.T) {
	d := &late{ram{data: make([]byte, 1<<20)}}
	server := func() *Server {
		s := NewServer(Config{MaxRequests: 16})
		require.NoError(t, s.AddExport(Export{Name: "disk", Device: d}))
		return s
	}
	s := server()
	kernel, mine, err := sys.SocketPair()
	require.NoError(t, err)
	go s.ServeTransmission(mine, "disk")
	c := fileConn(t, kernel)
	c.SetDeadline(time.Now().Add(60 * time.Second))
	const moves = 50
	var enough atomic.Bool
	var sent atomic.Int64 // how many requests there are in the end
	go func() {
		var stream bytes.Buffer
		i := 0
		for ; !enough.Load(); i++ {
			b := make([]byte, proto.RequestLen)
			rq := proto.Request{Type: proto.CmdRead, Cookie: uint64(i), Offset: uint64(i%64) * 512, Length: 512}
			if i%3 == 0 {
				rq.Type = proto.CmdWrite
			}
			proto.PutRequest(b, rq)
			stream.Write(b)
			if rq.Type == proto.CmdWrite {
				stream.Write(bytes.Repeat([]byte{byte(i % 64)}, 512))
			}
			for stream.Len() > 4096 { // cut anywhere
				c.Write(stream.Next(1 + rand.N(2000)))
				time.Sleep(time.Duration(rand.N(200)) * time.Microsecond)
			}
		}
		sent.Store(int64(i))
		c.Write(stream.Bytes())
	}()
	seen := map[uint64]int{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, proto.ReplyLen+512)
		for n := int64(0); sent.Load() == 0 || n < sent.Load(); n++ {
			if _, err := io.ReadFull(c, b[:proto.ReplyLen]); err != nil {
				t.Error(err)
				return
			}
			i := be.Uint64(b[8:])
			if be.Uint32(b) != proto.SimpleMagic || be.Uint32(b[4:]) != 0 {
				t.Errorf("bad reply % x", b[:proto.ReplyLen])
				return
			}
			seen[i]++
			if i%3 != 0 {
				if _, err := io.ReadFull(c, b[:512]); err != nil {
					t.Error(err)
					return
				}
				if k := byte(i % 64); b[0] != k && b[0] != 0 || !bytes.Equal(b[:512], bytes.Repeat(b[:1], 512)) {
					t.Errorf("wrong data for request %d", i)
				}
			}
		}
	}()
	for range moves {
		time.Sleep(2 * time.Millisecond)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		hs, err := s.HandOver(ctx)
		cancel()
		require.NoError(t, err)
		require.Len(t, hs, 1)
		require.Equal(t, "disk", hs[0].Export)
		require.NoError(t, s.Shutdown(context.Background()))
		s = server()
		go s.ServeHanded(hs[0].File, hs[0].Export)
		require.Eventually(t, func() bool { return s.Connections("disk") == 1 }, 5*time.Second, time.Millisecond)
	}
	enough.Store(true)
	<-done
	require.Len(t, seen, int(sent.Load()))
	for i, n := range seen {
		require.Equal(t, 1, n, "request %d", i)
	}
	t.Logf("%d requests, %d servers", len(seen), moves+1)
	c.Close()
	require.NoError(t, s.Shutdown(context.Background()))
}

// A client that never pauses keeps the socket full, and what is read at once does
// not end where a request ends.
func TestAConnectionIsHandedOverThoughItsClientNeverPauses(t *testing.T) {
	s, d, _ := newServer(t, Config{})
	kernel, mine, err := sys.SocketPair()
	require.NoError(t, err)
	go s.ServeTransmission(mine, "disk")
	c := fileConn(t, kernel)
	var batch []byte
	for i := range uint64(10000) {
		batch = append(batch, make([]byte, proto.RequestLen)...)
		proto.PutRequest(batch[len(batch)-proto.RequestLen:], proto.Request{Type: proto.CmdRead, Cookie: i, Length: 512})
	}
	require.NotZero(t, headerBuffer%proto.RequestLen)
	var client sync.WaitGroup
	client.Go(func() {
		for {
			if _, err := c.Write(batch); err != nil {
				return
			}
		}
	})
	client.Go(func() { io.Copy(io.Discard, c) })
	require.Eventually(t, func() bool { return len(d.requests()) > len(batch)/proto.RequestLen }, 30*time.Second, 10*time.Millisecond)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	hs, err := s.HandOver(ctx)
	require.NoError(t, err)
	require.Len(t, hs, 1)
	hs[0].File.Close()
	c.Close()
	client.Wait()
}

func TestAConnectionWhoseRequestsDoNotEndIsClosedInsteadOfHandedOver(t *testing.T) {
	s, d, _ := newServer(t, Config{})
	kernel, mine, err := sys.SocketPair()
	require.NoError(t, err)
	go s.ServeTransmission(mine, "disk")
	c := fileConn(t, kernel)
	defer c.Close()
	d.mu.Lock()
	d.hold = true
	d.mu.Unlock()
	(&peer{t, c}).ask(proto.CmdRead, 0, 1, 0, 512, nil)
	require.Eventually(t, func() bool { return len(d.requests()) == 1 }, 5*time.Second, time.Millisecond)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	hs, err := s.HandOver(ctx)
	require.Empty(t, hs)
	require.ErrorContains(t, err, "requests that do not end")
	c.SetDeadline(time.Now().Add(5 * time.Second))
	_, err = c.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
}

// Who serves the kernel learns whether it wants another connection: not after it
// left by itself, a hand-over or the end.
func TestTheEndOfAKernelConnectionIsToldApart(t *testing.T) {
	d := &late{ram{data: make([]byte, 1<<20)}}
	s := NewServer(Config{})
	require.NoError(t, s.AddExport(Export{Name: "disk", Device: d}))
	serve := func() (c net.Conn, end chan error) {
		kernel, mine, err := sys.SocketPair()
		require.NoError(t, err)
		end = make(chan error, 1)
		go func() { end <- s.ServeTransmission(mine, "disk") }()
		c = fileConn(t, kernel)
		b := make([]byte, proto.RequestLen)
		proto.PutRequest(b, proto.Request{Type: proto.CmdRead, Length: 512})
		_, err = c.Write(b)
		require.NoError(t, err)
		_, err = io.ReadFull(c, make([]byte, proto.ReplyLen+512))
		require.NoError(t, err)
		return c, end
	}
	arenas := func() int { s.mu.Lock(); defer s.mu.Unlock(); return len(s.exports["disk"].spare) }

	c, end := serve()
	c.Close()
	require.ErrorIs(t, <-end, io.EOF)
	require.Equal(t, 1, arenas(), "the memory of the one that ended")

	c, end = serve()
	require.Zero(t, arenas(), "the next one took it")
	_, err := c.Write(bytes.Repeat([]byte{1}, proto.RequestLen))
	require.NoError(t, err)
	require.ErrorContains(t, <-end, "magic")

	c, end = serve()
	b := make([]byte, proto.RequestLen)
	proto.PutRequest(b, proto.Request{Type: proto.CmdDisc})
	_, err = c.Write(b)
	require.NoError(t, err)
	require.NoError(t, <-end)

	_, end = serve()
	hs, err := s.HandOver(context.Background())
	require.NoError(t, err)
	require.Len(t, hs, 1)
	hs[0].File.Close()
	require.NoError(t, <-end)

	_, end = serve()
	require.NoError(t, s.Shutdown(context.Background()))
	require.NoError(t, <-end)
	require.Zero(t, arenas())
}
