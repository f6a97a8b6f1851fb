package initiator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/sys"
)

// Limits of one login.
const (
	loginExchanges = 32              // requests, whatever the target does
	loginMaxData   = 8 << 10         // bytes in one response before we declared more (RFC 7143 13.12)
	connectTime    = 2 * time.Second // for a portal to accept the connection
)

// login is the state of one login on one connection.
type login struct {
	tactics
	conn      net.Conn
	address   string // of conn, before it was resolved
	c         *Config
	params    Params
	tpgt      uint16
	cmdSN     uint32
	expStatSN uint32
	expCmdSN  uint32
	maxCmdSN  uint32
	first     bool // the next response is the first
	exchanges int
	maxData   int // bytes that one response may bring
	text      []byte
	out       []byte            // text of the next request
	offered   map[string]string // our keys, each said once
	seen      map[string]bool   // the target's keys, each taken once
	auth      map[string]string // those of authentication
	answered  bool              // a CHAP response went out
	secured   bool              // the security stage is over
}

// tactics are what a login does otherwise than the one before it, because of
// what that met.
type tactics struct {
	md5Only bool // offer CHAP_A=5 alone
	direct  bool // start at the operational stage
	lowered bool // name the target in lower case
}

// connectAndLogin dials the portal, follows redirects and logs in.
func connectAndLogin(ctx context.Context, c *Config) (net.Conn, *login, error) {
	if err := c.Credentials.Check(); err != nil {
		return nil, nil, err
	}
	var how tactics
	hop := route{address: c.Home.Address(c.Address)}
	for {
		lg, err := attempt(ctx, c, hop.address, how)
		if err == nil {
			return lg.conn, lg, nil
		}
		if ctx.Err() != nil {
			if lg != nil {
				err = errNoAnswer
			}
			return nil, nil, hop.explain(err)
		}
		var moved *redirect
		switch {
		case errors.As(err, &moved):
			if err := hop.follow(moved, c); err != nil {
				return nil, nil, err
			}
		case lg == nil:
			return nil, nil, hop.explain(err)
		case lg.adapt(err, &how):
		default:
			return nil, nil, hop.explain(lg.explain(err))
		}
	}
}

var (
	errHungUp   = errors.New("the target closed the connection during login")
	errReset    = errors.New("the target reset the connection during login")
	errNoAnswer = errors.New("the portal accepts connections but does not answer the login in time")
	errEndless  = fmt.Errorf("the target does not end the login within %d exchanges", loginExchanges)
)

// Unanswered tells whether err, of Open, means that nothing came from the portal
// in time.
func Unanswered(err error) bool {
	var ne net.Error
	return errors.Is(err, errNoAnswer) || errors.Is(err, syscall.EHOSTUNREACH) || errors.As(err, &ne) && ne.Timeout()
}

// attempt connects and logs in once. The login is nil if there was no
// connection; with an error the connection is closed.
func attempt(ctx context.Context, c *Config, address string, how tactics) (*login, error) {
	dialing, cancel := context.WithTimeout(ctx, connectTime)
	conn, err := c.Dial(dialing, "tcp", address)
	cancel()
	if err != nil {
		return nil, dialError(err)
	}
	if tc, ok := conn.(*net.TCPConn); ok {
		if err := sys.TuneTCP(tc, c.FailoverTime); err != nil {
			conn.Close()
			return nil, err
		}
	}
	lg := &login{tactics: how, conn: conn, address: address, c: c, first: true, maxData: loginMaxData, offered: map[string]string{}, seen: map[string]bool{}, auth: map[string]string{}}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	err = lg.run()
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return lg, err
	}
	conn.SetDeadline(time.Time{})
	return lg, nil
}

// adapt changes how to log in after err, and tells whether that is worth
// another attempt. It happens once for each tactic.
func (lg *login) adapt(err error, how *tactics) bool {
	c := lg.c
	var denied *LoginError
	refused := errors.As(err, &denied)
	switch {
	case c.User != "" && !how.md5Only && lg.offersMore() && c.Algorithms.allows(MD5) && lg.algorithmsRefused(err):
		how.md5Only = true
	case c.TargetName == "" && c.User == "" && !how.direct && errors.Is(err, errHungUp):
		// gotgt looks for SessionType in the operational stage only, and
		// misses a target name before. Discovery has no old session to end.
		how.direct = true
	case refused && denied.Class == 2 && denied.Detail == 3 && !how.lowered && c.TargetName != strings.ToLower(c.TargetName):
		// Names are compared in lower case (RFC 7143 4.2.7.1), but some targets
		// (LIO, Synology) know only their own spelling: that one went first.
		how.lowered = true
	default:
		return false
	}
	return true
}

// explain says what to do about a refusal where its status alone does not.
func (lg *login) explain(err error) error {
	if lg.c.User == "" && errors.Is(err, errHungUp) && !lg.secured { // so does LIO where it wants CHAP
		return fmt.Errorf("%w: if it wants authentication, set a CHAP user and secret", err)
	}
	var denied *LoginError
	if !errors.As(err, &denied) || denied.Class != 2 {
		return err
	}
	switch {
	case lg.answered && denied.Detail == 0: // tgt says so for a wrong secret
		return fmt.Errorf("authentication failed: check user and secret: %w", err)
	case lg.c.User == "" && denied.Detail == 1:
		return fmt.Errorf("the target wants authentication: set a CHAP user and secret: %w", err)
	}
	return err
}

// dialError puts the usual reasons in plain words.
func dialError(err error) error {
	var ne net.Error
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns):
		return fmt.Errorf("portal name does not resolve: %w", err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("connection refused: is the target service running there? (%w)", err)
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return fmt.Errorf("portal unreachable: check address and routes (%w)", err)
	case errors.As(err, &ne) && ne.Timeout():
		return fmt.Errorf("portal does not answer: check address, routes and firewall (%w)", err)
	}
	return err
}

// run takes the connection from CSG 0 to full feature phase. It always begins
// at the security stage and passes the operational one, authentication or not:
// tgt reinstates a session only on the way from the one to the other.
func (lg *login) run() error {
	c := lg.c
	c.Offer.complete()
	lg.params = c.Offer.defaults()
	lg.say("InitiatorName", c.InitiatorName)
	if c.TargetName == "" {
		lg.say("SessionType", "Discovery")
	} else {
		lg.say("SessionType", "Normal")
		name := c.TargetName
		if lg.lowered {
			name = strings.ToLower(name)
		}
		lg.say("TargetName", name)
	}
	if !lg.direct {
		if err := lg.security(); err != nil {
			return err
		}
	}
	lg.secured = true
	lg.offer()
	for {
		h, err := lg.exchange(pdu.StageOperational, pdu.StageFullFeature, true)
		if err != nil {
			return err
		}
		if h.IsFinal() {
			if h.TSIH() == 0 && !c.Lenient {
				return breach("final login response without a session handle (TSIH 0): `lenient` takes such a target")
			}
			return lg.check()
		}
	}
}

// say puts a key into the next request. Each goes out once per login: some
// targets hang up on a second InitiatorName.
func (lg *login) say(name, value string) {
	lg.offered[name] = value
	lg.out = pdu.AppendKey(lg.out, name, value)
}

// exchange sends what is in out, joins the answer over continued responses and
// takes its keys. The header is that of the last response.
func (lg *login) exchange(csg, nsg uint8, transit bool) (*pdu.Header, error) {
	lg.text = lg.text[:0]
	for {
		h, data, err := lg.request(csg, nsg, transit)
		if err != nil {
			return nil, err
		}
		if len(lg.text)+len(data) > pdu.MaxTextLen {
			return nil, breach("login text without end")
		}
		lg.text = append(lg.text, data...)
		if h.Flags()&pdu.Continue == 0 {
			keys, err := pdu.ParseKeys(lg.text)
			if err != nil {
				return nil, breach("%v", err)
			}
			return h, lg.settle(keys)
		}
		if h.IsFinal() {
			return nil, breach("login response both final and continued")
		}
		transit = false // an empty request asks for the rest
	}
}

// request sends one Login Request with what is in out and checks the header of
// the response (RFC 7143 11.12, 11.13). ITT, CmdSN and CID are 0 throughout,
// and so is TSIH: a new session, or the reinstatement of one.
func (lg *login) request(csg, nsg uint8, transit bool) (*pdu.Header, []byte, error) {
	if lg.exchanges++; lg.exchanges > loginExchanges {
		return nil, nil, errEndless
	}
	var h pdu.Header
	h[0] = uint8(pdu.OpLoginReq) | pdu.Immediate
	h[1] = csg << 2
	if transit {
		h[1] |= pdu.Final | nsg
	}
	h.SetISID(lg.c.ISID)
	h.SetExpStatSN(lg.expStatSN)
	if len(lg.out) > loginMaxData {
		return nil, nil, errors.New("login text is too long")
	}
	if err := writePDU(lg.conn, &h, lg.out); err != nil {
		return nil, nil, lost(err)
	}
	lg.out = lg.out[:0]
	data, err := readPDU(lg.conn, &h, lg.maxData)
	if err != nil {
		return nil, nil, err
	}
	if h.Opcode() != pdu.OpLoginResp {
		return nil, nil, breach("opcode %#02x during login", h.Opcode())
	}
	if h.ITT() != 0 {
		return nil, nil, breach("login response with task tag %#08x where 0 was due", h.ITT())
	}
	if class, detail := h.LoginStatus(); class != 0 { // its serial numbers mean nothing
		return nil, nil, refusal(class, detail, data)
	}
	if h[3] != 0 {
		return nil, nil, breach("iSCSI version %d", h[3])
	}
	if !lg.first && h.StatSN() != lg.expStatSN {
		return nil, nil, breach("StatSN %d where %d was due", h.StatSN(), lg.expStatSN)
	}
	lg.first = false
	lg.expStatSN = h.StatSN() + 1
	lg.expCmdSN, lg.maxCmdSN = h.ExpCmdSN(), h.MaxCmdSN()
	if h.CSG() != csg || h.IsFinal() && (!transit || h.NSG() != nsg) {
		return nil, nil, breach("login stage %d to %d where %d to %d was due", h.CSG(), h.NSG(), csg, nsg)
	}
	return &h, data, nil
}

// writePDU and readPDU are the plain, blocking way of login.
func writePDU(w io.Writer, h *pdu.Header, data []byte) error {
	h.SetDataLen(len(data))
	b := append(append(make([]byte, 0, pdu.HeaderLen+len(data)+3), h[:]...), data...)
	b = append(b, zeroPad[:pdu.Pad(len(data))]...)
	_, err := w.Write(b)
	return err
}

// readPDU takes one PDU of at most maxData bytes of data, without digests.
func readPDU(r io.Reader, h *pdu.Header, maxData int) ([]byte, error) {
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return nil, lost(err)
	}
	n := h.DataLen()
	if n > maxData || h.AHSLen() > 0 {
		if op := h.Opcode(); op != pdu.OpLoginResp && op != pdu.OpReject {
			return nil, breach("its answer to a login begins with %q: is it an iSCSI target that listens there?", h[:16])
		}
		return nil, breach("login response of %d bytes with %d of extra header", n, h.AHSLen())
	}
	data := make([]byte, n+pdu.Pad(n))
	if _, err := io.ReadFull(r, data); err != nil {
		return nil, lost(err)
	}
	return data[:n], nil
}

// lost puts the ways in which a connection ends in plain words.
func lost(err error) error {
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errHungUp
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return errReset
	}
	return err
}
