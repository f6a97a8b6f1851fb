package nbd

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/nbd/proto"
)

const (
	headerBuffer = 64 << 10
	iovecs       = 512

	// sendBuffer is how many bytes of replies the kernel takes from a local
	// connection before its client reads them: a large one in one piece, without a
	// wake-up for each fifth of it. TCP finds its own size.
	sendBuffer = 1 << 20

	// With this many requests in flight the reader lets the client run first:
	// it then finds more of them per wake-up.
	yieldDepth = 4
)

// conn is one client in transmission. Its reader goroutine decodes requests
// into slots and submits them; replies are in reply.go.
type conn struct {
	c      net.Conn
	in     io.Reader // of c, or of TLS over it
	s      *Server
	x      *export
	vec    sys.Writer
	via    net.Listener // nil if it came without one
	access Access
	nth    uint64 // in the order in which the server got them
	agreed agreed
	buf    []byte
	r, w   int  // unread bytes are buf[r:w]
	inside bool // reader: a header was taken, its payload perhaps not yet
	plug   block.Plug
	// Odd while the reader is in the device, which never waits; see Server.Hangs.
	steps, stepsSeen atomic.Uint64

	// Buffers come from arena, at most share bytes of them at a time, or one.
	arena *block.Arena
	share int
	held  atomic.Int64
	// Where nothing is left, one small buffer comes from reserve: lent, by its address.
	reserve *block.Arena
	lent    atomic.Pointer[byte]
	// How many bytes moved to and from the kernel, and how many goroutines wait for
	// the client to read or to send the rest of a write. seen and seenAt are those
	// of clients.evict.
	moved  atomic.Int64
	awaits atomic.Int32
	seen   int64
	seenAt time.Time

	// See HandOver. kernel and export are set before the reader starts.
	kernel  bool
	export  string
	leaving atomic.Bool
	given   chan *os.File

	mu       sync.Mutex
	room     sync.Cond // a slot became free, or the sender stopped
	slots    []slot
	free     []uint16
	pend     []uint16 // completed, reply not yet taken by the sender
	cur      []uint16 // owned by the sender
	sending  bool
	dead     bool // the client is gone: replies are dropped
	changing int  // slots whose request is a change that has begun and not ended
	orphan   bool // no change of it begins any more; set under orphans.mu too
	starved  bool // the reader waits for its share of buffers
	takeOver chan struct{}
	iov      [][]byte
}

// slot is one request in flight and its reply.
type slot struct {
	req     block.Request
	cookie  uint64
	data    bool // the reply carries req.Data
	hdr     [proto.MaxReplyHeader]byte
	head    int    // bytes of hdr in use
	tail    []byte // what follows header and data: an error text, extents
	offset  uint64 // as asked for
	begun   bool   // counted in conn.changing
	tracked bool   // see aligner.enter
	sent    int    // bytes of the reply that the kernel took
}

// transmit serves requests until the client leaves, then waits for what is in
// flight: buffers never go back while the device holds them.
func (cn *conn) transmit() (err error) {
	n, x := cn.s.cfg.MaxRequests, cn.x
	over := cn.c
	if cn.agreed.tls != nil {
		over = cn.agreed.tls
	}
	if rc, err := sys.RawConn(over); err == nil {
		cn.vec, cn.in = sys.NewVecWriter(rc), sys.NewReader(rc)
	} else {
		cn.vec, cn.in = sys.ParkedWriter{Conn: over}, over
	}
	if _, local := cn.c.(*net.UnixConn); local {
		sys.SendBuffer(cn.c, sendBuffer)
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

	x.orphans.arrive(cn)
	for err == nil {
		err = cn.next()
	}
	cn.plug.Flush()
	x.orphans.leave(cn)
	cn.mu.Lock()
	for len(cn.free) < n || cn.sending {
		cn.room.Wait()
	}
	cn.mu.Unlock()
	close(stop)
	writer.Wait()
	return err
}

var errDisc = errors.New("client disconnected")

// fill reads once; everything plugged goes out first, because this may wait.
func (cn *conn) fill(into []byte) (int, error) {
	cn.steps.Add(1)
	cn.plug.Flush()
	cn.steps.Add(1)
	cn.mu.Lock()
	busy := len(cn.slots)-len(cn.free) >= yieldDepth
	cn.mu.Unlock()
	if busy {
		sys.Yield()
	}
	n, err := cn.in.Read(into)
	if n > 0 {
		cn.moved.Add(int64(n))
		return n, nil
	}
	if cn.leaving.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
		if cn.r == cn.w && !cn.inside {
			return 0, errHandedOver
		}
		cn.c.SetReadDeadline(time.Time{}) // the rest of a request is on its way
		return cn.fill(into)
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return 0, err
}

// upTo is where to read: as much as there is room for, but no further than to
// the end of the request under way when the connection is about to be handed
// over. A client that never pauses would leave it in the middle of another
// request each time.
func (cn *conn) upTo(lacks int, room []byte) []byte {
	if cn.leaving.Load() {
		return room[:min(lacks, len(room))]
	}
	return room
}

// next takes one request from the stream and submits it.
func (cn *conn) next() error {
	size := proto.RequestLen
	if cn.agreed.extended {
		size = proto.ExtendedLen
	}
	if cn.r == cn.w && cn.leaving.Load() {
		return errHandedOver
	}
	cn.inside = false
	if cn.w-cn.r < size {
		if len(cn.buf)-cn.r < headerBuffer/2 || cn.r == cn.w {
			copy(cn.buf, cn.buf[cn.r:cn.w])
			cn.w -= cn.r
			cn.r = 0
		}
		for cn.w-cn.r < size {
			n, err := cn.fill(cn.upTo(size-(cn.w-cn.r), cn.buf[cn.w:]))
			if err != nil {
				return err
			}
			cn.w += n
		}
	}
	parse := proto.ParseRequest
	if cn.agreed.extended {
		parse = proto.ParseExtendedRequest
	}
	rq, ok := parse(cn.buf[cn.r:])
	if !ok {
		return errors.New("bad request magic")
	}
	cn.r += size
	cn.inside = true
	if rq.Type == proto.CmdDisc {
		return errDisc
	}
	l := *cn.x.limits.Load()
	if cn.agreed.structured {
		l.Flags |= proto.SendDF
		l.Status = cn.agreed.contexts != [contextCount]bool{}
	}
	l.Extended = cn.agreed.extended
	bs := int64(l.Block)
	l.Block = 1 // parts of blocks are served too, see unaligned
	e := proto.Validate(rq, l)
	if e != proto.OK && (rq.Type == proto.CmdWrite || l.Extended && rq.Flags&proto.CmdFlagPayload != 0) {
		if rq.Length > 2*proto.MaxPayload {
			return errors.New("payload far beyond the maximum")
		}
		if err := cn.discard(int(rq.Length)); err != nil {
			return err
		}
	}
	switch rq.Type {
	case proto.CmdWrite, proto.CmdWriteZeroes, proto.CmdTrim, proto.CmdFlush:
		if cn.x.orphans.n.Load() > 0 { // before it has a slot and a buffer that an orphan may need
			cn.plug.Flush()
			cn.x.orphans.wait(cn)
		}
	}
	idx, ok := cn.slot()
	if !ok {
		return errOrphan
	}
	sl := &cn.slots[idx]
	sl.cookie, sl.sent, sl.data, sl.begun, sl.tail, sl.offset = rq.Cookie, 0, false, false, nil, rq.Offset
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
		mask := bs - 1
		start, end := (sl.req.Off+mask)&^mask, (sl.req.Off+sl.req.Len)&^mask
		if end <= start {
			cn.answer(uint16(idx), proto.OK, &cn.plug)
			return nil
		}
		sl.req.Off, sl.req.Len = start, end-start
	}
	if rq.Type == proto.CmdRead || rq.Type == proto.CmdWrite {
		if sl.req.Data = cn.buffer(int(rq.Length)); sl.req.Data == nil {
			sl.data = false
			if rq.Type == proto.CmdWrite {
				if err := cn.discard(int(rq.Length)); err != nil {
					cn.giveBack(idx)
					return err
				}
			}
			cn.answer(uint16(idx), proto.ESHUTDOWN, &cn.plug)
			return nil
		}
		if cn.lent.Load() != &sl.req.Data[0] {
			sl.req.Arena = cn.arena
		}
		if rq.Type == proto.CmdWrite {
			if err := cn.payload(sl.req.Data); err != nil {
				cn.giveBack(idx)
				return err
			}
		}
	}
	if changes(sl.req.Op) && !cn.begins(sl) {
		cn.giveBack(idx)
		return errOrphan
	}
	if isUnaligned(rq, bs) {
		go cn.unaligned(idx, bs)
		return nil
	}
	if changes(sl.req.Op) {
		sl.tracked = cn.x.align.enter(span{sl.req.Off, sl.req.Off + sl.req.Len}, bs, cn.plug.Flush)
	}
	cn.steps.Add(1)
	cn.x.Device.Submit(&sl.req, &cn.plug)
	cn.steps.Add(1)
	return nil
}

// slot takes a free slot, waiting for one: this and the arena are where a
// client that sends too much waits. An orphan gets none.
func (cn *conn) slot() (idx uint16, ok bool) {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	if len(cn.free) == 0 {
		cn.mu.Unlock()
		cn.plug.Flush()
		cn.mu.Lock()
		for len(cn.free) == 0 && !cn.orphan {
			cn.room.Wait()
		}
	}
	if cn.orphan {
		return 0, false
	}
	idx = cn.free[len(cn.free)-1]
	cn.free = cn.free[:len(cn.free)-1]
	return idx, true
}

// begins counts a change that the device is about to get. An orphan begins none.
func (cn *conn) begins(sl *slot) bool {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	if cn.orphan {
		return false
	}
	sl.begun = true
	cn.changing++
	return true
}

// buffer is n bytes for a request, nil when the server stops or the client has
// gone. It waits while the connection has its share, or nothing is left.
func (cn *conn) buffer(n int) []byte {
	over := func() bool { h := cn.held.Load(); return h > 0 && int(h)+n > cn.share }
	var b []byte
	if !over() {
		b = cn.arena.TryGet(n)
	}
	if b == nil {
		cn.plug.Flush() // what is in there holds buffers
		if cn.reserve != nil && n <= reserved {
			return cn.small(n, over)
		}
		cn.mu.Lock()
		cn.starved = true
		for over() && !cn.dead && !cn.orphan {
			cn.room.Wait()
		}
		cn.starved = false
		gone := cn.orphan
		cn.mu.Unlock()
		if gone {
			return nil
		}
		if b = cn.arena.Get(n); b == nil {
			return nil
		}
	}
	cn.held.Add(int64(cap(b)))
	return b
}

// small is buffer for few bytes when nothing is left: the connection waits for
// its own piece of the reserve at most, not for other clients.
func (cn *conn) small(n int, over func() bool) (b []byte) {
	cn.mu.Lock()
	defer cn.mu.Unlock()
	cn.starved = true
	defer func() { cn.starved = false }()
	for !cn.orphan {
		if !over() {
			if b = cn.arena.TryGet(n); b != nil {
				cn.held.Add(int64(cap(b)))
				return b
			}
		}
		if cn.lent.Load() == nil {
			if b = cn.reserve.TryGet(n); b != nil {
				cn.lent.Store(&b[0])
			}
			return b // none: the server stops
		}
		cn.room.Wait()
	}
	return nil
}

// release gives a buffer back. The caller wakes who waits for room.
func (cn *conn) release(b []byte) {
	if cn.lent.Load() == &b[0] {
		cn.reserve.Put(b)
		cn.lent.Store(nil)
		return
	}
	cn.held.Add(-int64(cap(b)))
	cn.arena.Put(b)
}

// payload reads a write's data into its buffer.
func (cn *conn) payload(dst []byte) error {
	n := copy(dst, cn.buf[cn.r:cn.w])
	cn.r += n
	if n == len(dst) {
		return nil
	}
	cn.awaits.Add(1)
	defer cn.awaits.Add(-1)
	for n < len(dst) {
		if rest := len(dst) - n; rest < 8<<10 { // read the next headers along
			cn.r, cn.w = 0, 0
			for cn.w < rest {
				k, err := cn.fill(cn.upTo(rest-cn.w, cn.buf[cn.w:]))
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
		k, err := cn.fill(cn.upTo(n, cn.buf))
		if err != nil {
			return err
		}
		cn.w = k
	}
}
