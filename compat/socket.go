package compat

import (
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/mpathd/mpathd/internal/sys"
)

// The peer's protocol: a message is its length as a size_t of the machine,
// which counts the final NUL, and the text with the NUL, both ways; many
// commands per connection (libmpathcmd).
const (
	// AbstractName is the peer's socket, in the abstract namespace.
	AbstractName = "@/org/kernel/linux/storage/multipathd"

	maxCommand = 4096 // bytes; the peer takes 512
	maxReply   = 32 << 20
	maxClients = 64
	idleTime   = time.Minute      // of a connection, between commands
	moveTime   = 10 * time.Second // for one message, either way
)

// Server answers the peer's clients. Those who are not root may only look.
type Server struct {
	Run func(cmd string) string
	Log *slog.Logger

	mu      sync.Mutex
	clients map[net.Conn]bool
	closed  bool
	wg      sync.WaitGroup
}

// Serve accepts until the listener is closed.
func (s *Server) Serve(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(100 * time.Millisecond) // out of descriptors, say
			continue
		}
		s.mu.Lock()
		if s.closed || len(s.clients) >= maxClients {
			s.mu.Unlock()
			c.Close()
			continue
		}
		if s.clients == nil {
			s.clients = map[net.Conn]bool{}
		}
		s.clients[c] = true
		s.wg.Add(1)
		s.mu.Unlock()
		go func() {
			defer s.wg.Done()
			s.serve(c.(*net.UnixConn))
			c.Close()
			s.mu.Lock()
			delete(s.clients, c)
			s.mu.Unlock()
		}()
	}
}

// Close ends all connections; the listener is the caller's.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	for c := range s.clients {
		c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *Server) serve(c *net.UnixConn) {
	uid, err := sys.PeerUID(c)
	if err != nil {
		s.Log.Error("client of the multipathd socket not known", "cause", err)
		return
	}
	for {
		c.SetReadDeadline(time.Now().Add(idleTime))
		cmd, err := receive(c)
		if err != nil {
			return
		}
		answer := Denied
		if uid == 0 || Unprivileged(cmd) {
			answer = s.Run(cmd)
			if strings.HasPrefix(answer, "fail\n") {
				answer = "fail\n" // clients up to 0.9.4 compare the whole answer
			}
		}
		c.SetWriteDeadline(time.Now().Add(moveTime))
		if send(c, answer) != nil {
			return
		}
	}
}

// receive reads a message. Its length is no reason to allocate as much.
func receive(c net.Conn) (string, error) {
	var head [8]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return "", err
	}
	n := binary.NativeEndian.Uint64(head[:])
	if n == 0 || n > maxCommand {
		return "", errors.New("length of a command out of range")
	}
	c.SetReadDeadline(time.Now().Add(moveTime))
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		return "", err
	}
	for i, x := range b {
		if x == 0 {
			return string(b[:i]), nil
		}
	}
	return string(b), nil
}

func send(c net.Conn, text string) error {
	if len(text) >= maxReply {
		text = "fail\nthe answer is too long\n"
	}
	b := binary.NativeEndian.AppendUint64(make([]byte, 0, len(text)+9), uint64(len(text)+1))
	b = append(append(b, text...), 0)
	_, err := c.Write(b)
	return err
}
