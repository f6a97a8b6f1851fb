// Package initiator is an iSCSI initiator (RFC 7143): one session with one
// connection, from login to logout. Wire bytes are in initiator/pdu, CDBs and
// sense in scsi.
//
// Discover lists the targets of a portal, Open logs in. Session.Do issues a
// command and waits for it. Session.Submit issues without waiting, for many at a
// time, and allocates nothing; what it lists leaves when the caller flushes the
// plug, and Command.Owner takes the command back, exactly once.
//
// From Submit to Done the command and its Data belong to the session. After Done
// nothing touches them, whatever the target sends.
//
// A session watches for signs of life and aborts commands that hang. It does not
// log in again: when it ends, Session.Err says why, and each command comes back
// with ErrSessionLost and with how much of it the target may have (Delivery). To
// take its place, open one with the same ISID, after Session.Time2Wait; Retry
// says whether to try a failed login again soon. Groups of paths are package paths.
package initiator

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/internal/sys"
)

// State of a session.
type State int32

const (
	// Up: serving.
	Up State = iota
	// Suspect: busy and silent for too long; new I/O should go elsewhere.
	Suspect
	// Leaving: the target asked for a logout. Commands in flight may still end,
	// new ones are refused; the session logs out and is then Dead.
	Leaving
	// Dead: the connection is closed; final.
	Dead
)

func (st State) String() string { return [...]string{"up", "suspect", "leaving", "down"}[st] }

// Config says whom to log in to and how.
type Config struct {
	Address string // host:port
	Home    *Home  // shared by all sessions through Address; may be nil
	// RedirectTo are the networks to which a target may redirect; empty: anywhere.
	RedirectTo               []netip.Prefix
	TargetName               string  // as the target spells it; empty: a discovery session
	InitiatorName            string  // iqn., eui. or naa., in lower case
	ISID                     [6]byte // stable per path, see PathISID
	Credentials                      // CHAP
	HeaderDigest, DataDigest Digest
	Offer                    Offer // of bursts and R2Ts
	// Lenient takes what RFC 7143 forbids and gotgt does: a login that ends
	// without a session handle (11.13.3), of no use to one connection; answers
	// of which several carry one StatSN (4.2.2.2), which TCP keeps in order
	// anyway; and pings that count as commands in ExpCmdSN (4.2.2.1).
	Lenient        bool
	FailoverTime   time.Duration // silence that ends a busy session; default 1 s
	CommandTimeout time.Duration // after which a command that hangs is aborted, default 30 s
	// KeepDataOut answers R2Ts of a unit's commands until the target has answered
	// LOGICAL UNIT RESET, as RFC 7143 4.2.3.3 describes; some targets
	// (EqualLogic) wait for that. By default their data stops with the request,
	// as with TaskReporting=FastAbort, so that none of it can arrive late.
	KeepDataOut  bool
	LoginTimeout time.Duration // connect and login together; default 5 s
	QueueDepth   int           // commands in flight, default 128, at most 4096
	// Dial connects to host:port; nil is net.Dialer.DialContext.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// OnState is told of Suspect, Up (again), Leaving and Dead, never with a lock held.
	// Dead comes before the outstanding commands are handed back.
	OnState func(st State, cause error)
	// OnRoom is told that a session that refused a command has room again. It runs
	// on the session's reader, which flushes p, and must not block.
	OnRoom func(p *block.Plug)
}

// Session is one logged-in session. All methods are safe for concurrent use.
type Session struct {
	cfg       Config
	conn      net.Conn
	vec       sys.Writer
	params    Params
	tpgt      uint16
	elsewhere string // see Redirected

	state  atomic.Int32
	dying  chan struct{} // closed by the first fail
	done   chan struct{} // closed when all commands are handed back
	err    error         // set before dying is closed
	failed sync.Once
	alive  sync.WaitGroup // reader, escalation, logout

	rx        atomic.Uint64 // reads that brought bytes: signs of life
	expStatSN atomic.Uint32
	maxCmdSN  atomic.Uint32
	expCmdSN  atomic.Uint32

	ticks      atomic.Uint32 // of watch
	hangTicks  uint32        // after which a command hangs: CommandTimeout
	escalating atomic.Bool   // one hanging command at a time
	leaving    atomic.Bool
	orderly    atomic.Bool // the target has confirmed our logout
	wait       atomic.Pointer[time2Wait]
	onNotice   atomic.Pointer[func(Notice)]

	mu       sync.Mutex
	idle     sync.Cond // sending became false
	cmdSN    uint32    // of the next command
	slots    []slot
	free     []uint16
	refused  bool
	outgoing        // what waits to be sent
	sending  bool   // somebody owns cur
	closed   bool   // the Logout Request is listed: nothing follows it
	closing  error  // why
	ping     uint32 // ITT of the ping in flight, 0 if none
	pingSeq  uint32
	repings  int  // times that the ping was rejected
	tmf      *tmf // the task management request in flight
	tmfSeq   uint32
	tmfTurn  chan struct{} // full while a task management request is unanswered
	text     *text         // the text negotiation in flight
	textSeq  uint32
	cur      []item // on its way out; owned by the sender
	curAt    int
	iov      [][]byte
	sendPlug block.Plug // the sender's
	park     func()     // what a sender that has to wait runs as; made once
	watch
}

// slot is a task: the life of one command. Guarded by Session.mu, except that
// the reader alone uses the fields below reader.
type slot struct {
	cmd      *Command
	gen      uint16
	cmdSN    uint32
	due      uint32 // the tick at which it counts as hanging
	unsent   bool   // the command itself waits in its lane
	bursting bool   // its unsolicited data is going out
	leaving  int32  // items in cur that point into cmd
	finished bool   // completed by the target while it was listed
	aborting bool   // a task management request names it: it gets no more data
	starved  bool   // data was asked for that it did not get
	doubted  bool   // the unit was reset since: it may never be answered
	touched  bool   // some byte was handed to the kernel

	// The sequences that R2Ts asked for and the ring of tasks that have some:
	// see outgoing.
	first, last int32
	r2ts        int
	nextReady   int32
	isReady     bool

	// reader:
	off    uint32 // bytes of Data-In received, or of Data-Out asked for
	dataSN uint32
	r2tSN  uint32
}

// listed tells whether anything that points into the command waits or leaves.
func (sl *slot) listed() bool {
	return sl.unsent || sl.bursting || sl.leaving > 0 || sl.first != 0
}

// delivery is what the kernel took of the command, once nobody sends any more.
func (sl *slot) delivery() Delivery {
	switch {
	case !sl.touched:
		return NotSent
	case sl.listed() || sl.cmd.Dir == DataOut && int(sl.off) < len(sl.cmd.Data):
		return PartlySent
	}
	return Sent
}

// A session keeps its errors few; cause tells more.
var (
	errClosed = errors.New("closed by us")
	errSilent = errors.New("no sign of life from the target")

	errTargetClosed = errors.New("connection closed by the target")
	errDropped      = errors.New("the target drops the")
)

// ClosedByTarget tells of a session's end (Session.Err) whether the target's end
// of the connection closed it, by FIN, reset or announcement.
func ClosedByTarget(err error) bool {
	for _, by := range []error{errTargetClosed, errAskedToLeave, errDropped, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, by) {
			return true
		}
	}
	return false
}

// Open connects to the portal and logs in (RFC 7143 clause 6), CSG 0 first so
// that every target reinstates the session of an earlier login with this ISID.
// ctx and LoginTimeout bound the login, not the session. The error wraps a
// *LoginError if the target refused, ErrProtocol if it broke the protocol; Retry
// says when to try again.
func Open(ctx context.Context, c Config) (*Session, error) {
	c.complete()
	s, err := open(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("login to %s at %s: %w", orDiscovery(c.TargetName), c.Address, err)
	}
	return s, nil
}

const defaultLoginTimeout = 5 * time.Second

// complete fills in the defaults.
func (c *Config) complete() {
	if c.FailoverTime <= 0 {
		c.FailoverTime = time.Second
	}
	if c.LoginTimeout <= 0 {
		c.LoginTimeout = defaultLoginTimeout
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
		cfg: c, conn: conn, params: lg.params, tpgt: lg.tpgt, elsewhere: lg.elsewhere(),
		dying: make(chan struct{}), done: make(chan struct{}),
		slots: make([]slot, c.QueueDepth), free: make([]uint16, 0, c.QueueDepth),
		cmdSN: lg.cmdSN, tmfTurn: make(chan struct{}, 1),
	}
	s.hangTicks = uint32(c.CommandTimeout / s.tickTime())
	s.wireSN.Store(s.cmdSN)
	s.idle.L = &s.mu
	for i := len(s.slots) - 1; i >= 0; i-- {
		s.free = append(s.free, uint16(i))
	}
	s.expStatSN.Store(lg.expStatSN)
	s.expCmdSN.Store(lg.expCmdSN)
	s.maxCmdSN.Store(lg.maxCmdSN)
	if rc, err := sys.RawConn(conn); err == nil {
		s.vec = sys.NewVecWriter(rc)
		if tc, ok := conn.(*net.TCPConn); ok {
			s.info = sys.NewTCPInfoReader(rc)
			// From here on silence is what kills: a target that reads nothing
			// for a while, but talks, is busy. Its commands time out first.
			sys.UserTimeout(tc, c.CommandTimeout+2*tmfTime)
		}
	} else {
		s.vec = sys.ParkedWriter{Conn: conn}
	}
	s.park = s.routineSend
	s.alive.Add(1)
	go s.routineReceive()
	s.startWatch()
	unlink := s.watchLink()
	go s.routineEnd(unlink)
	return s, nil
}

// State tells whether the session serves, as of now: Submit may be refused all the
// same. Config.OnState hears of changes.
func (s *Session) State() State { return State(s.state.Load()) }

// Done is closed when the session has ended and every command was handed back.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err is why the session ended; nil while it lives. It is ErrProtocol to
// errors.Is if the target broke RFC 7143; ClosedByTarget tells who closed the connection.
func (s *Session) Err() error {
	select {
	case <-s.dying:
		return s.err
	default:
		return nil
	}
}

// TargetPortalGroup is the tag that the target named at login (RFC 7143 13.9): with
// ISID and names it makes the I_T nexus.
func (s *Session) TargetPortalGroup() uint16 { return s.tpgt }

// Redirected is the portal where the login ended, host:port, or empty if that
// is the one of Config.Address.
func (s *Session) Redirected() string { return s.elsewhere }

// Negotiated are the parameters in force.
func (s *Session) Negotiated() Params { return s.params }

// Abort ends the session with cause, at once and with a reset, and does not wait:
// commands come back with ErrSessionLost before Done is closed. A session that has
// ended already keeps its cause.
func (s *Session) Abort(cause error) { s.fail(cause) }

// fail ends the session: the first cause counts. It never waits.
func (s *Session) fail(cause error) {
	s.failed.Do(func() {
		s.err = cause
		s.state.Store(int32(Dead))
		if tc, ok := s.conn.(interface{ SetLinger(sec int) error }); ok && cause != errClosed {
			tc.SetLinger(0) // a reset drops what the kernel still holds: bytes that must not arrive late
		}
		s.conn.Close()
		close(s.dying)
	})
}

// routineEnd hands the outstanding commands back, in CmdSN order, once nobody
// can touch their buffers any more.
func (s *Session) routineEnd(unlink func()) {
	<-s.dying
	unlink()
	s.stopWatch()
	if s.cfg.OnState != nil {
		s.cfg.OnState(Dead, s.err)
	}
	s.alive.Wait()
	s.mu.Lock()
	s.closed = true // a timer that fires from here on finds nothing to do
	for s.sending {
		s.idle.Wait()
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
		c, delivery := sl.cmd, sl.delivery()
		sl.cmd = nil
		if !sl.finished { // else the target's own answer stands
			c.Result.Err, c.Result.Delivery = ErrSessionLost, delivery
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
	_, err := s.DoAll(ctx, []*Command{c})
	return err
}

// DoAll is Do for commands that do not need each other's answers: they leave
// together, as far as the command window allows, and cost one round trip. The
// error is that of the first of them that did not end well, which is cs[n]; the
// session may still own the later ones.
func (s *Session) DoAll(ctx context.Context, cs []*Command) (n int, err error) {
	ends := make([]waiter, len(cs))
	var p block.Plug
	for i, c := range cs {
		ends[i] = make(waiter, 1)
		c.Owner = ends[i]
		for !s.Submit(c, &p) {
			p.Flush()
			if n == i {
				err = s.awaitRoom(ctx)
			} else if err = s.await(ctx, cs[n], ends[n]); err == nil { // which made room
				n++
			}
			if err != nil {
				return n, err
			}
		}
	}
	p.Flush()
	for ; n < len(cs); n++ {
		if err := s.await(ctx, cs[n], ends[n]); err != nil {
			return n, err
		}
	}
	return n, nil
}

// awaitRoom gives a window that others keep full some time.
func (s *Session) awaitRoom(ctx context.Context) error {
	select {
	case <-s.dying:
		return fmt.Errorf("%w: %w", ErrSessionLost, s.err)
	case <-ctx.Done():
		return fmt.Errorf("command window stays full: %w", ctx.Err())
	case <-time.After(10 * time.Millisecond):
		return nil
	}
}

// await waits for the end of a command.
func (s *Session) await(ctx context.Context, c *Command, end waiter) error {
	select {
	case <-end:
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
