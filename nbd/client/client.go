// Package client is a small pipelined NBD client (simple replies) for drills
// and tests.
package client

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/mpathd/mpathd/nbd/proto"
)

// Client is one connection. Its methods are safe for concurrent use.
type Client struct {
	c     net.Conn
	size  int64
	flags uint16

	wmu  sync.Mutex
	mu   sync.Mutex
	next uint64
	wait map[uint64]*call
	err  error
}

type call struct {
	data []byte // destination of a read
	done chan error
}

// Dial connects and opens the export (proto.md, NBD_OPT_EXPORT_NAME); the empty name
// is the server's default. A server says nothing of why it refuses this option: the
// name may be wrong, or TLS wanted.
func Dial(network, address, export string) (*Client, error) {
	c, err := net.Dial(network, address)
	if err != nil {
		return nil, err
	}
	return Open(c, export)
}

// Open opens the export on a connection, which it owns.
func Open(c net.Conn, export string) (*Client, error) {
	cl, err := open(c, export)
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("NBD export %q: %w", export, err)
	}
	go cl.receive()
	return cl, nil
}

func open(c net.Conn, export string) (*Client, error) {
	be := binary.BigEndian
	var b [18]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return nil, err
	}
	if be.Uint64(b[:]) != proto.Magic || be.Uint64(b[8:]) != proto.OptionMagic {
		return nil, errors.New("no newstyle NBD server")
	}
	out := be.AppendUint32(nil, uint32(proto.FlagFixedNewstyle|proto.FlagNoZeroes))
	out = be.AppendUint64(out, proto.OptionMagic)
	out = be.AppendUint32(out, proto.OptExportName)
	out = be.AppendUint32(out, uint32(len(export)))
	if _, err := c.Write(append(out, export...)); err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(c, b[:10]); err != nil {
		return nil, errors.New("unknown export")
	}
	return &Client{c: c, size: int64(be.Uint64(b[:])), flags: be.Uint16(b[8:]), wait: map[uint64]*call{}}, nil
}

// Trims tells whether the export takes TRIM.
func (c *Client) Trims() bool { return c.flags&proto.SendTrim != 0 }

// Size is the export's, in bytes.
func (c *Client) Size() int64 { return c.size }

// Close says goodbye (NBD_CMD_DISC) and disconnects; requests under way fail.
func (c *Client) Close() error {
	c.send(proto.Request{Type: proto.CmdDisc}, nil)
	return c.c.Close()
}

func (c *Client) send(r proto.Request, data []byte) error {
	b := make([]byte, proto.RequestLen, proto.RequestLen+len(data))
	proto.PutRequest(b, r)
	c.wmu.Lock()
	defer c.wmu.Unlock()
	_, err := c.c.Write(append(b, data...))
	return err
}

func (c *Client) do(r proto.Request, out, in []byte) error {
	cl := &call{data: in, done: make(chan error, 1)}
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return c.err
	}
	c.next++
	r.Cookie = c.next
	c.wait[r.Cookie] = cl
	c.mu.Unlock()
	if err := c.send(r, out); err != nil {
		return err
	}
	return <-cl.done
}

func (c *Client) receive() {
	err := c.loop()
	c.mu.Lock()
	c.err = err
	for _, cl := range c.wait {
		cl.done <- err
	}
	clear(c.wait)
	c.mu.Unlock()
}

func (c *Client) loop() error {
	be := binary.BigEndian
	var b [proto.ReplyLen]byte
	for {
		if _, err := io.ReadFull(c.c, b[:]); err != nil {
			return err
		}
		if be.Uint32(b[:]) != proto.SimpleMagic {
			return errors.New("bad reply magic")
		}
		c.mu.Lock()
		cl := c.wait[be.Uint64(b[8:])]
		delete(c.wait, be.Uint64(b[8:]))
		c.mu.Unlock()
		if cl == nil {
			return errors.New("reply to nothing")
		}
		var err error
		if e := be.Uint32(b[4:]); e != 0 {
			err = fmt.Errorf("NBD error %d", e)
		} else if len(cl.data) > 0 {
			if _, err := io.ReadFull(c.c, cl.data); err != nil {
				cl.done <- err
				return err
			}
		}
		cl.done <- err
	}
}

// ReadAt fills p from off; offsets and lengths are bytes, whole blocks, and p at most
// proto.MaxPayload. The error is the server's errno or the connection's; the number
// means nothing then.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	return len(p), c.do(proto.Request{Type: proto.CmdRead, Offset: uint64(off), Length: uint64(len(p))}, nil, p)
}

// WriteAt writes p at off, as ReadAt reads; p is the caller's again afterwards.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	return len(p), c.do(proto.Request{Type: proto.CmdWrite, Offset: uint64(off), Length: uint64(len(p))}, p, nil)
}

// WriteFUA is WriteAt that returns when the data is durable.
func (c *Client) WriteFUA(p []byte, off int64) (int, error) {
	return len(p), c.do(proto.Request{Type: proto.CmdWrite, Flags: proto.CmdFlagFUA, Offset: uint64(off), Length: uint64(len(p))}, p, nil)
}

// Flush makes the writes durable that were answered before it.
func (c *Client) Flush() error { return c.do(proto.Request{Type: proto.CmdFlush}, nil, nil) }

// WriteZeroes zeroes n bytes at off.
func (c *Client) WriteZeroes(off int64, n uint32) error {
	return c.do(proto.Request{Type: proto.CmdWriteZeroes, Offset: uint64(off), Length: uint64(n)}, nil, nil)
}

// Trim discards n bytes at off: what they read as then is anything.
func (c *Client) Trim(off int64, n uint32) error {
	return c.do(proto.Request{Type: proto.CmdTrim, Offset: uint64(off), Length: uint64(n)}, nil, nil)
}
