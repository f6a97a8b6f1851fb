package nbd

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/nbd/proto"
)

const (
	headerBuffer = 64 << 10
	iovecs       = 512

	// With this many requests in flight the reader lets the client run first:
	// it then finds more of them per wake-up.
	yieldDepth = 4
)

// conn is one client in transmission. Its reader goroutine decodes requests
// into slots and submits them; replies are in reply.go.
type conn struct {
	c      net.Conn
	in     net.Conn // c, or TLS over it
	s      *Server
	x      *export
	vec    vecWriter
	agreed agreed
	buf    []byte
	r, w   int // unread bytes are buf[r:w]
	plug   block.Plug
	broken bool // reader: the stream cannot be continued

	mu       sync.Mutex
	room     sync.Cond // a slot became free, or the sender stopped
	slots    []slot
	free     []uint16
	pend     []uint16 // completed, reply not yet taken by the sender
	cur      []uint16 // owned by the sender
	sending  bool
	dead     bool // the client is gone: replies are dropped
	takeOver chan struct{}
	iov      [][]byte
}

// slot is one request in flight and its reply.
type slot struct {
	req    block.Request
	cookie uint64
	data   bool // the reply carries req.Data
	hdr    [proto.MaxReplyHeader]byte
	head   int    // bytes of hdr in use
	tail   []byte // what follows header and data: an error text, extents
	offset uint64 // as asked for
	sent   int    // bytes of the reply that the kernel took
}

// transmit serves requests until the client leaves, then waits for what is in
// flight: buffers never go back while the device holds them.
func (s *Server) transmit(cn *conn, x *export) {
	n := s.cfg.MaxRequests
	cn.s, cn.x, cn.in = s, x, cn.c
	if cn.agreed.tls != nil {
		cn.in = cn.agreed.tls
	}
	if rc, err := sys.RawConn(cn.in); err == nil {
		cn.vec = sys.NewVecWriter(rc)
	} else {
		cn.vec = parkedWriter{cn.in}
	}
	cn.buf = make([]byte, headerBuffer)
	cn.slots, cn.free = make([]slot, n), make([]uint16, 0, n)
	cn.pend, cn.cur = make([]uint16, 0, n), make([]uint16, 0, n)
	cn.takeOver, cn.iov = make(chan struct{}, 1), make([][]byte, 0, iovecs)
	cn.room.L = &cn.mu
	for i := n - 1; i >= 0; i-- {
		cn.free = append(cn.free, uint16(i))
	}
	x.connections.Add(1)
	defer x.connections.Add(-1)
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Add(1)
	go func() { defer writer.Done(); cn.routineReply(stop) }()

	for cn.next() == nil {
	}
	cn.plug.Flush()
	cn.mu.Lock()
	orphans := len(cn.free) < n
	if orphans {
		x.orphans.begin()
	}
	for len(cn.free) < n || cn.sending {
		cn.room.Wait()
	}
	cn.mu.Unlock()
	if orphans {
		x.orphans.end()
	}
	close(stop)
	writer.Wait()
}

// vecWriter hands buffers to the connection; see sys.VecWriter.
type vecWriter interface {
	Write(bufs [][]byte, park bool) (int, error)
}

// parkedWriter serves connections without a file descriptor of their own, TLS
// above all: only the parked writer goroutine may wait.
type parkedWriter struct{ c net.Conn }

func (w parkedWriter) Write(bufs [][]byte, park bool) (int, error) {
	if !park {
		return 0, sys.ErrWouldBlock
	}
	for _, b := range bufs {
		if len(b) > 0 {
			return w.c.Write(b)
		}
	}
	return 0, nil
}

var errDisc = errors.New("client disconnected")

// fill reads once; everything plugged goes out first, because this may wait.
func (cn *conn) fill(into []byte) (int, error) {
	cn.plug.Flush()
	cn.mu.Lock()
	busy := len(cn.slots)-len(cn.free) >= yieldDepth
	cn.mu.Unlock()
	if busy {
		sys.Yield()
	}
	n, err := cn.in.Read(into)
	if n > 0 {
		return n, nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return 0, err
}

// next takes one request from the stream and submits it.
func (cn *conn) next() error {
	if cn.w-cn.r < proto.RequestLen {
		if len(cn.buf)-cn.r < headerBuffer/2 || cn.r == cn.w {
			copy(cn.buf, cn.buf[cn.r:cn.w])
			cn.w -= cn.r
			cn.r = 0
		}
		for cn.w-cn.r < proto.RequestLen {
			n, err := cn.fill(cn.buf[cn.w:])
			if err != nil {
				return err
			}
			cn.w += n
		}
	}
	rq, ok := proto.ParseRequest(cn.buf[cn.r:])
	if !ok {
		return errors.New("bad request magic")
	}
	cn.r += proto.RequestLen
	if rq.Type == proto.CmdDisc {
		return errDisc
	}
	l := *cn.x.limits.Load()
	if cn.agreed.structured {
		l.Flags |= proto.SendDF
		l.Status = cn.agreed.contexts != [contextCount]bool{}
	}
	e := proto.Validate(rq, l)
	if e != proto.OK && rq.Type == proto.CmdWrite {
		if rq.Length > 2*proto.MaxPayload {
			return errors.New("write far beyond the maximum payload")
		}
		if err := cn.discard(int(rq.Length)); err != nil {
			return err
		}
	}
	idx := cn.slot()
	sl := &cn.slots[idx]
	sl.cookie, sl.sent, sl.data, sl.tail, sl.offset = rq.Cookie, 0, false, nil, rq.Offset
	sl.req = block.Request{Owner: cn, Tag: uint64(idx), Off: int64(rq.Offset), Len: int64(rq.Length)}
	if rq.Flags&proto.CmdFlagFUA != 0 {
		sl.req.Flags |= block.FUA
	}
	if rq.Flags&proto.CmdFlagNoHole != 0 {
		sl.req.Flags |= block.NoUnmap
	}
	if rq.Flags&proto.CmdFlagFastZero != 0 {
		sl.req.Flags |= block.FastZero
	}
	if e != proto.OK || rq.Type == proto.CmdCache || rq.Length == 0 && rq.Type != proto.CmdFlush {
		cn.answer(uint16(idx), e, &cn.plug)
		return nil
	}
	switch rq.Type {
	case proto.CmdBlockStatus:
		go cn.blockStatus(uint16(idx), rq)
		return nil
	case proto.CmdRead:
		sl.req.Op, sl.data = block.Read, true
	case proto.CmdWrite:
		sl.req.Op = block.Write
	case proto.CmdFlush:
		sl.req.Op = block.Flush
	case proto.CmdWriteZeroes:
		sl.req.Op = block.WriteZeroes
	case proto.CmdTrim: // a hint: rounded inward to whole blocks
		sl.req.Op = block.Trim
		mask := int64(cn.x.limits.Load().Block - 1)
		start, end := (sl.req.Off+mask)&^mask, (sl.req.Off+sl.req.Len)&^mask
		if end <= start {
			cn.answer(uint16(idx), proto.OK, &cn.plug)
			return nil
		}
		sl.req.Off, sl.req.Len = start, end-start
	}
	if rq.Type == proto.CmdRead || rq.Type == proto.CmdWrite {
		if sl.req.Data = cn.s.arena.Get(int(rq.Length)); sl.req.Data == nil {
			sl.data = false
			if rq.Type == proto.CmdWrite {
				if err := cn.discard(int(rq.Length)); err != nil {
					cn.drop(uint16(idx))
					return err
				}
			}
			cn.answer(uint16(idx), proto.ESHUTDOWN, &cn.plug)
			return nil
		}
		if rq.Type == proto.CmdWrite {
			if err := cn.payload(sl.req.Data); err != nil {
				cn.drop(uint16(idx))
				return err
			}
		}
	}
	if cn.x.orphans.n.Load() > 0 && sl.req.Op != block.Read {
		cn.plug.Flush()
		cn.x.orphans.wait()
	}
	cn.x.Device.Submit(&sl.req, &cn.plug)
	return nil
}

// orphans are connections that ended with requests in flight. Their clients
// may connect again and send the same writes anew, then overwrite the blocks:
// until the first copies have ended, nothing else of the export may change it.
type orphans struct {
	n    atomic.Int64
	mu   sync.Mutex
	cond *sync.Cond
}

func (o *orphans) begin() { o.n.Add(1) }

func (o *orphans) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.n.Add(-1) == 0 && o.cond != nil {
		o.cond.Broadcast()
	}
}

func (o *orphans) wait() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cond == nil {
		o.cond = sync.NewCond(&o.mu)
	}
	for o.n.Load() > 0 {
		o.cond.Wait()
	}
}

// slot takes a free slot, waiting for one: this and the arena are where a
// client that sends too much waits.
func (cn *conn) slot() uint16 {
	cn.mu.Lock()
	for len(cn.free) == 0 {
		cn.mu.Unlock()
		cn.plug.Flush()
		cn.mu.Lock()
		for len(cn.free) == 0 {
			cn.room.Wait()
		}
	}
	idx := cn.free[len(cn.free)-1]
	cn.free = cn.free[:len(cn.free)-1]
	cn.mu.Unlock()
	return idx
}

// payload reads a write's data into its buffer.
func (cn *conn) payload(dst []byte) error {
	n := copy(dst, cn.buf[cn.r:cn.w])
	cn.r += n
	for n < len(dst) {
		if rest := len(dst) - n; rest < 8<<10 { // read the next headers along
			cn.r, cn.w = 0, 0
			for cn.w < rest {
				k, err := cn.fill(cn.buf[cn.w:])
				if err != nil {
					return err
				}
				cn.w += k
			}
			cn.r = copy(dst[n:], cn.buf[:cn.w])
			return nil
		}
		k, err := cn.fill(dst[n:])
		if err != nil {
			return err
		}
		n += k
	}
	return nil
}

// discard skips n bytes of a write that is answered with an error.
func (cn *conn) discard(n int) error {
	for {
		k := min(n, cn.w-cn.r)
		cn.r += k
		if n -= k; n == 0 {
			return nil
		}
		cn.r, cn.w = 0, 0
		k, err := cn.fill(cn.buf)
		if err != nil {
			return err
		}
		cn.w = k
	}
}
