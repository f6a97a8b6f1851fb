// Package initiator is one iSCSI session (RFC 7143) with one connection:
// login, command window, send, receive, signs of life. It knows nothing of
// groups of paths. Wire bytes are in initiator/pdu.
package initiator

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/sys"
)

// State of a session.
type State int32

const (
	// Up: serving.
	Up State = iota
	// Suspect: busy and silent for too long; new I/O should go elsewhere.
	Suspect
	// Dead: the connection is closed; final.
	Dead
)

func (st State) String() string { return [...]string{"up", "suspect", "down"}[st] }

// Config says whom to log in to and how.
type Config struct {
	Address       string // host:port
	TargetName    string // empty: a discovery session
	InitiatorName string
	ISID          [6]byte // stable per path, see PathISID
	Credentials           // CHAP
	// HeaderDigest and DataDigest demand CRC32C (RFC 7143 13.1): a target that
	// refuses is not used.
	HeaderDigest, DataDigest bool
	FailoverTime             time.Duration // silence that ends a busy session; default 1 s
	CommandTimeout           time.Duration // after which a command that hangs is aborted, default 30 s
	LoginTimeout             time.Duration // connect and login together; default 5 s
	QueueDepth               int           // commands in flight, default 128, at most 4096
	// Dial replaces net.Dialer.DialContext in tests.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// OnState is told of Suspect, Up (again) and Dead, never with a lock held.
	// Dead comes before the outstanding commands are handed back.
	OnState func(st State, cause error)
	// OnRoom is told that a session that refused a command has room again.
	OnRoom func(p *block.Plug)
}

// Session is one logged-in session. All methods are safe for concurrent use.
type Session struct {
	cfg    Config
	conn   net.Conn
	vec    vecWriter
	params Params
	tpgt   uint16

	state  atomic.Int32
	dying  chan struct{} // closed by the first fail
	done   chan struct{} // closed when all commands are handed back
	err    error         // set before dying is closed
	failed sync.Once
	alive  sync.WaitGroup // reader, writer, watchdog

	rx        atomic.Uint64 // reads that brought bytes: signs of life
	expStatSN atomic.Uint32
	maxCmdSN  atomic.Uint32
	expCmdSN  atomic.Uint32

	ticks      atomic.Uint32 // of the watchdog
	escalating atomic.Bool   // one hanging command at a time

	mu       sync.Mutex
	idle     sync.Cond // sending became false
	cmdSN    uint32
	slots    []slot
	free     []uint16
	refused  bool
	pend     []item // listed, in wire order
	sending  bool   // somebody owns cur
	closed   bool
	ping     uint32 // ITT of the ping in flight, 0 if none
	pingSeq  uint32
	tmf      *tmf // the task management request in flight
	tmfSeq   uint32
	cur      []item // owned by the sender
	curAt    int
	iov      [][]byte
	takeOver chan struct{} // wakes the parked writer
}

// slot is a task: the life of one command. Guarded by Session.mu, except that
// the reader alone uses the fields below reader.
type slot struct {
	cmd      *Command
	gen      uint16
	cmdSN    uint32
	tick     uint32 // when it was submitted
	listed   int32  // items in pend or cur that point into cmd
	finished bool   // completed by the target while items were still listed
	sent     bool   // the last item so far was wholly handed to the kernel
	touched  bool   // some byte was handed to the kernel

	// reader:
	off    uint32 // bytes of Data-In received, or of Data-Out asked for
	dataSN uint32
	r2tSN  uint32
}

// A session keeps its errors few; cause tells more.
var (
	errClosed = errors.New("closed by us")
	errSilent = errors.New("no sign of life from the target")
)

// Open connects to the portal and logs in (RFC 7143 clause 6), CSG 0 first so
// that every target reinstates the session of an earlier login with this ISID.
func Open(ctx context.Context, c Config) (*Session, error) {
	if c.FailoverTime <= 0 {
		c.FailoverTime = time.Second
	}
	if c.LoginTimeout <= 0 {
		c.LoginTimeout = 5 * time.Second
	}
	if c.CommandTimeout <= 0 {
		c.CommandTimeout = 30 * time.Second
	}
	if c.QueueDepth <= 0 {
		c.QueueDepth = 128
	}
	c.QueueDepth = min(c.QueueDepth, 4096)
	if c.Dial == nil {
		c.Dial = defaultDial
	}
	s, err := open(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("login to %s at %s: %w", orDiscovery(c.TargetName), c.Address, err)
	}
	return s, nil
}

func orDiscovery(name string) string {
	if name == "" {
		return "discovery"
	}
	return name
}

func open(ctx context.Context, c Config) (*Session, error) {
	ctx, cancel := context.WithTimeout(ctx, c.LoginTimeout)
	defer cancel()
	conn, lg, err := connectAndLogin(ctx, &c)
	if err != nil {
		return nil, err
	}
	s := &Session{
		cfg: c, conn: conn, params: lg.params, tpgt: lg.tpgt,
		dying: make(chan struct{}), done: make(chan struct{}),
		slots: make([]slot, c.QueueDepth), free: make([]uint16, 0, c.QueueDepth),
		pend: make([]item, 0, 4*c.QueueDepth), cur: make([]item, 0, 4*c.QueueDepth),
		iov: make([][]byte, 0, sys.MaxIovecs), takeOver: make(chan struct{}, 1),
		cmdSN: lg.cmdSN,
	}
	s.idle.L = &s.mu
	for i := len(s.slots) - 1; i >= 0; i-- {
		s.free = append(s.free, uint16(i))
	}
	s.expStatSN.Store(lg.expStatSN)
	s.expCmdSN.Store(lg.expCmdSN)
	s.maxCmdSN.Store(lg.maxCmdSN)
	if rc, err := sys.RawConn(conn); err == nil {
		s.vec = sys.NewVecWriter(rc)
	} else {
		s.vec = parkedWriter{conn}
	}
	s.alive.Add(3)
	go s.routineReceive()
	go s.routineSend()
	go s.routineWatch()
	go s.routineEnd()
	return s, nil
}

// State tells whether the session serves.
func (s *Session) State() State { return State(s.state.Load()) }

// Done is closed when the session has ended and every command was handed back.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err is why the session ended; nil while it lives.
func (s *Session) Err() error {
	select {
	case <-s.dying:
		return s.err
	default:
		return nil
	}
}

// TargetPortalGroup is the tag that the target named at login.
func (s *Session) TargetPortalGroup() uint16 { return s.tpgt }

// Negotiated are the parameters in force.
func (s *Session) Negotiated() Params { return s.params }

// Abort ends the session at once with a reset; commands come back with
// ErrSessionLost.
func (s *Session) Abort(cause error) { s.fail(cause) }

// Close logs out (RFC 7143 11.14), waits at most two seconds for the answer,
// closes the connection and waits until all commands are handed back.
func (s *Session) Close(ctx context.Context) error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		it := s.list(nil, -1)
		it.hdr[0] = uint8(pdu.OpLogoutReq) | pdu.Immediate
		it.hdr[1] = pdu.Final // reason 0: close the session
		it.hdr.SetITT(logoutITT)
		it.hdr.SetCmdSN(s.cmdSN)
		it.hdr.SetExpStatSN(s.expStatSN.Load())
	}
	s.mu.Unlock()
	s.Kick()
	t := time.NewTimer(2 * time.Second)
	defer t.Stop()
	select {
	case <-s.dying:
	case <-t.C:
	case <-ctx.Done():
	}
	s.fail(errClosed)
	<-s.done
	return nil
}

// fail ends the session: the first cause counts. It never waits.
func (s *Session) fail(cause error) {
	s.failed.Do(func() {
		s.err = cause
		s.state.Store(int32(Dead))
		if tc, ok := s.conn.(*net.TCPConn); ok && cause != errClosed {
			tc.SetLinger(0) // a reset drops what the kernel still holds: bytes that must not arrive late
		}
		s.conn.Close()
		close(s.dying)
	})
}

// routineEnd hands the outstanding commands back, in CmdSN order, once nobody
// can touch their buffers any more.
func (s *Session) routineEnd() {
	<-s.dying
	if s.cfg.OnState != nil {
		s.cfg.OnState(Dead, s.err)
	}
	s.alive.Wait()
	s.mu.Lock()
	for s.sending {
		select {
		case <-s.takeOver: // handed to a writer that is gone
			s.sending = false
		default:
			s.idle.Wait()
		}
	}
	lost := make([]*slot, 0, len(s.slots))
	for i := range s.slots {
		if s.slots[i].cmd != nil {
			lost = append(lost, &s.slots[i])
		}
	}
	s.mu.Unlock()
	slices.SortFunc(lost, func(a, b *slot) int { return int(int32(a.cmdSN - b.cmdSN)) })
	var p block.Plug
	for _, sl := range lost {
		c := sl.cmd
		sl.cmd = nil
		if !sl.finished { // else the target's own answer stands
			c.Result.Err = ErrSessionLost
			switch {
			case sl.sent:
				c.Result.Delivery = Sent
			case sl.touched:
				c.Result.Delivery = PartlySent
			}
		}
		c.Owner.Done(c, &p)
	}
	p.Flush()
	close(s.done)
}

// Do submits c and waits for its end; it is for control paths. The error is
// ctx's or the transport's (Result.Err); SCSI status stays in c.Result. Owner
// is overwritten. When ctx ends first, the session still owns c and c.Data:
// neither may be reused.
func (s *Session) Do(ctx context.Context, c *Command) error {
	w := make(waiter, 1)
	c.Owner = w
	var p block.Plug
	for !s.Submit(c, &p) {
		select {
		case <-s.dying:
			return fmt.Errorf("%w: %w", ErrSessionLost, s.err)
		case <-ctx.Done():
			return fmt.Errorf("command window stays full: %w", ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
	p.Flush()
	select {
	case <-w:
		if c.Result.Err == ErrSessionLost {
			return fmt.Errorf("%w: %w", ErrSessionLost, s.Err())
		}
		return c.Result.Err
	case <-ctx.Done():
		return fmt.Errorf("no answer from the logical unit: %w", ctx.Err())
	}
}

type waiter chan struct{}

func (w waiter) Done(*Command, *block.Plug) { w <- struct{}{} }
