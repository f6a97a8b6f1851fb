package target

import (
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
)

const (
	outSize   = 512 << 10 // linear output per flush, bytes
	maxPieces = 512       // pieces of one gathering write
	copyLimit = 16 << 10  // data segments up to this are copied, larger ones gathered
)

// conn is one TCP connection. Its goroutine reads, executes and answers all
// that one read brought, then writes the answers at once. Other goroutines
// reach it through post only.
type conn struct {
	p   *Portal
	srv *Server
	nc  *net.TCPConn

	closeOnce sync.Once
	closed    chan struct{} // close was called
	done      chan struct{} // serve has returned

	amu     sync.Mutex
	async   []func()
	pending atomic.Int32

	wmu   sync.Mutex // guards all below; held while a batch is processed
	in    []byte
	r, w  int // in[r:w] is unparsed
	out   []byte
	start int // out[start:] is not in pieces yet
	open  int // where in out the header begins whose digest is due, -1 for none
	iov   [][]byte
	bufs  net.Buffers

	login    login
	full     bool // in full feature phase
	ending   bool // flush, then close
	target   *Target
	nexus    nexus
	session  bool // registered in srv.sessions
	params   params
	digests  digests // in force
	statSN   uint32
	expCmdSN uint32
	maxCmdSN uint32
	waiting  int // commands that hold a slot of the window
	tasks    map[uint32]*task
	free     []*task
	nextTTT  uint32
	ua       []attention
	text     []byte // rest of a long text answer
	count    uint64
	scratch  [4096]byte
	req      request // the command in hand, here so that it is not allocated
	cmd      Cmd     // what the hook sees
	tally    Stats
}

// attention is a pending UNIT ATTENTION of one LU (SAM-5 5.14).
type attention struct {
	lun       int
	asc, ascq uint8
}

func newConn(p *Portal, nc *net.TCPConn) *conn {
	seg := p.srv.cfg.MaxRecvSegment
	return &conn{
		p: p, srv: p.srv, nc: nc, closed: make(chan struct{}), done: make(chan struct{}),
		in: make([]byte, max(256<<10, 4*(seg+2048))), out: make([]byte, 0, outSize),
		iov: make([][]byte, 0, maxPieces+8), open: -1, tasks: map[uint32]*task{}, params: defaultParams(),
	}
}

// close ends the connection from any goroutine, with RST or FIN.
func (c *conn) close(reset bool) {
	c.closeOnce.Do(func() {
		if reset {
			_ = c.nc.SetLinger(0)
		}
		close(c.closed)
		_ = c.nc.Close()
	})
}

func (c *conn) serve() {
	defer c.srv.wg.Done()
	_ = c.nc.SetReadDeadline(time.Now().Add(loginTimeout))
	for c.step() {
	}
	c.close(false)
	c.leave()
	close(c.done)
}

// step reads once, processes what arrived and flushes the answers.
func (c *conn) step() bool {
	n, err := c.nc.Read(c.in[c.w:])
	if err != nil {
		return false
	}
	c.wmu.Lock()
	c.w += n
	ok := c.process() && c.flush() && !c.ending
	c.count2stats()
	c.wmu.Unlock()
	c.drainAsync()
	return ok
}

// leave takes the connection out of every table and cancels its late commands.
func (c *conn) leave() {
	c.p.mu.Lock()
	delete(c.p.conns, c)
	c.p.mu.Unlock()
	c.srv.mu.Lock()
	if c.session && c.srv.sessions[c.nexus] == c {
		delete(c.srv.sessions, c.nexus)
	}
	c.srv.mu.Unlock()
	c.srv.cancelLate(func(d *deferred) bool { return d.c == c && !d.act.Orphan })
}

// gate blocks while the portal hangs and tells whether to go on.
func (c *conn) gate() bool {
	for {
		ch := c.p.hung.Load()
		if ch == nil {
			return true
		}
		select {
		case <-*ch:
		case <-c.closed:
			return false
		}
	}
}

// post runs f with the connection's state, now or when its owner is done, and
// flushes what f wrote. It does not wait, not even on a hung portal.
func (c *conn) post(f func()) {
	c.amu.Lock()
	c.async = append(c.async, f)
	c.pending.Store(int32(len(c.async)))
	c.amu.Unlock()
	c.drainAsync()
}

// drainAsync runs posted functions unless another goroutine holds the state:
// that one calls drainAsync after it let go, so nothing is forgotten.
func (c *conn) drainAsync() {
	for c.pending.Load() > 0 && c.p.hung.Load() == nil {
		if !c.wmu.TryLock() {
			return
		}
		c.amu.Lock()
		fs := c.async
		c.async = nil
		c.pending.Store(0)
		c.amu.Unlock()
		for _, f := range fs {
			f()
		}
		if !c.flush() {
			c.close(false)
		}
		c.wmu.Unlock()
	}
}

// process handles every complete PDU of the input; false ends the connection.
func (c *conn) process() bool {
	for c.w-c.r >= pdu.HeaderLen && !c.ending {
		if !c.gate() {
			return false
		}
		h := (*pdu.Header)(c.in[c.r : c.r+pdu.HeaderLen])
		header := pdu.HeaderLen + h.AHSLen()
		total := header + c.digests.ofHeader()
		if c.wait(total) {
			return true
		}
		if !c.digests.intact(c.in[c.r:], header, total) {
			return c.fail("header digest error", h)
		}
		n := h.DataLen()
		if limit := c.srv.cfg.MaxRecvSegment; n > limit && (c.full || n > 8192) {
			return c.fail("data segment too long", h)
		}
		segment := c.in[c.r+total:]
		padded := n + pdu.Pad(n)
		end := padded + c.digests.ofData(n)
		if total += end; c.wait(total) {
			return true
		}
		if !c.digests.intact(segment, padded, end) {
			return c.dataDigestError(h)
		}
		c.r += total
		if !c.handle(h, segment[:n]) {
			return false
		}
	}
	if c.r == c.w {
		c.r, c.w = 0, 0
	} else if len(c.in)-c.r < pdu.HeaderLen+1020 {
		c.w = copy(c.in, c.in[c.r:c.w])
		c.r = 0
	}
	return true
}

// wait tells whether a PDU of n bytes is not all there yet, and makes room for it.
func (c *conn) wait(n int) bool {
	if c.w-c.r >= n {
		return false
	}
	if len(c.in)-c.r < n {
		c.w = copy(c.in, c.in[c.r:c.w])
		c.r = 0
	}
	return true
}

func (c *conn) handle(h *pdu.Header, data []byte) bool {
	op := h.Opcode()
	if !c.full {
		if op != pdu.OpLoginReq {
			return c.fail("not a Login Request before full feature phase", h)
		}
		return c.loginRequest(h, data)
	}
	if op == pdu.OpDataOut { // the only request without CmdSN
		return c.dataOut(h, data)
	}
	if !h.IsImmediate() {
		sn := h.CmdSN()
		if sn != c.expCmdSN || pdu.SerialLess(c.maxCmdSN, sn) {
			if pdu.SerialLess(sn, c.expCmdSN) {
				return true // a duplicate is ignored (RFC 7143 4.2.2.1)
			}
			return c.fail("CmdSN out of order or beyond the window", h)
		}
		c.expCmdSN++
	}
	switch op {
	case pdu.OpSCSICommand:
		if c.login.discovery {
			c.rejectPDU(h, pdu.RejectProtocol)
			return true
		}
		return c.scsiCommand(h, data)
	case pdu.OpNopOut:
		c.nopOut(h, data)
	case pdu.OpTaskMgmtReq:
		c.taskManagement(h)
	case pdu.OpTextReq:
		c.textRequest(h, data)
	case pdu.OpLogoutReq:
		a := c.header(pdu.OpLogoutResp)
		a.SetITT(h.ITT())
		a.SetU16(40, uint16(c.srv.cfg.Time2Wait))
		c.status(a)
		c.ending = true
	case pdu.OpSNACK:
		c.rejectPDU(h, pdu.RejectSNACK)
	default:
		c.rejectPDU(h, pdu.RejectNotSupported)
	}
	return true
}

// fail logs a protocol error and ends the connection, as level 0 recovery does.
func (c *conn) fail(why string, h *pdu.Header) bool {
	c.srv.cfg.Logger.Warn("iSCSI protocol error of the initiator: connection closed", "portal", c.p.Addr(),
		"initiator", c.nexus.initiator, "why", why, "header", h[:])
	return false
}

// room makes n bytes at the end of the output.
func (c *conn) room(n int) []byte {
	if len(c.out)+n > cap(c.out) || len(c.iov) >= maxPieces {
		c.flush()
	}
	at := len(c.out)
	c.out = c.out[:at+n]
	return c.out[at:]
}

// gather appends b, which must stay valid until the flush, to the output.
func (c *conn) gather(b []byte) {
	if len(c.out) > c.start {
		c.iov = append(c.iov, c.out[c.start:])
		c.start = len(c.out)
	}
	c.iov = append(c.iov, b)
}

// putBytes copies raw bytes to the output.
func (c *conn) putBytes(b []byte) {
	for len(b) > 0 {
		n := min(len(b), outSize/2)
		copy(c.room(n), b[:n])
		b = b[n:]
	}
}

// header begins an answer PDU of zeroes with the sequence numbers in place.
func (c *conn) header(op pdu.Opcode) *pdu.Header {
	c.seal()
	b := c.room(pdu.HeaderLen + c.digests.ofHeader())
	if c.digests.header {
		c.open = len(c.out) - len(b)
	}
	h := (*pdu.Header)(b)
	*h = pdu.Header{}
	h.SetOpcode(op)
	h.SetFlags(pdu.Final)
	h.SetStatSN(c.statSN)
	h.SetExpCmdSN(c.expCmdSN)
	if sn := c.expCmdSN + uint32(c.srv.cfg.Window) - 1 - uint32(c.waiting); pdu.SerialLess(c.maxCmdSN, sn) {
		c.maxCmdSN = sn // never moves back
	}
	h.SetMaxCmdSN(c.maxCmdSN)
	return h
}

// status numbers an answer that carries status.
func (c *conn) status(h *pdu.Header) {
	h.SetStatSN(c.statSN)
	c.statSN++
}

// payload appends a data segment to the output.
func (c *conn) payload(b []byte) {
	copy(c.room(len(b)), b)
	c.endPayload(len(b), c.digests.sum(0, b))
}

// flush writes the output; false means the connection is gone.
func (c *conn) flush() bool {
	if len(c.out) == 0 && len(c.iov) == 0 {
		return true
	}
	c.seal()
	var err error
	if !c.gate() {
		err = net.ErrClosed
	} else if len(c.iov) == 0 {
		_, err = c.nc.Write(c.out)
	} else {
		if len(c.out) > c.start {
			c.iov = append(c.iov, c.out[c.start:])
		}
		c.bufs = c.iov
		_, err = c.bufs.WriteTo(c.nc)
	}
	clear(c.iov)
	c.iov, c.out, c.start = c.iov[:0], c.out[:0], 0
	if err != nil {
		c.ending = true
	}
	return err == nil
}

func (c *conn) nopOut(h *pdu.Header, data []byte) {
	c.tally.Nops++
	if h.ITT() == pdu.NoTag { // answer to our own ping
		return
	}
	data = data[:min(len(data), c.params.peerSegment)]
	a := c.header(pdu.OpNopIn)
	a.SetLUN(h.LUN())
	a.SetITT(h.ITT())
	a.SetTTT(pdu.NoTag)
	a.SetDataLen(len(data))
	c.status(a)
	c.payload(data)
}

// nopIn asks the initiator for a sign of life.
func (c *conn) nopIn() {
	a := c.header(pdu.OpNopIn)
	a.SetITT(pdu.NoTag)
	a.SetTTT(0x70696e67)
}

// rejectPDU answers a PDU that cannot be processed (RFC 7143 11.17).
func (c *conn) rejectPDU(h *pdu.Header, reason uint8) {
	bad := *h // h is in the input, the answer must outlive it
	a := c.header(pdu.OpReject)
	a.SetResponse(reason)
	a.SetITT(pdu.NoTag)
	a.SetDataLen(len(bad))
	c.status(a)
	c.payload(bad[:])
}

// count2stats moves this batch's counts to the server's.
func (c *conn) count2stats() {
	t, s := &c.tally, &c.srv.stats
	if t.Commands|t.Nops|t.TaskMgmt == 0 {
		return
	}
	s.commands.Add(t.Commands)
	s.reads.Add(t.Reads)
	s.writes.Add(t.Writes)
	s.flushes.Add(t.Flushes)
	s.nops.Add(t.Nops)
	s.tmfs.Add(t.TaskMgmt)
	s.readBytes.Add(t.ReadBytes)
	s.writtenBytes.Add(t.WrittenBytes)
	*t = Stats{}
}
