package initiator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/sys"
)

// What we offer (RFC 7143 clause 13), bytes where they are sizes.
const (
	offeredMaxData    = 256 << 10 // MaxRecvDataSegmentLength: what one PDU may bring us
	offeredFirstBurst = 256 << 10
	offeredMaxBurst   = 1 << 20
	offeredR2T        = 8
	loginExchanges    = 32
	maxRedirects      = 8
)

// Params are the negotiated parameters.
type Params struct {
	InitialR2T               bool
	ImmediateData            bool
	FirstBurst               int // bytes
	MaxBurst                 int // bytes
	TargetMaxData            int // the target's MaxRecvDataSegmentLength, bytes
	MaxR2T                   int
	HeaderDigest, DataDigest bool // CRC32C
}

// LoginError is a login that the target refused (RFC 7143 11.13.5).
type LoginError struct{ Class, Detail uint8 }

var loginTexts = map[[2]uint8]string{
	{2, 0}: "the target found an initiator error", {2, 1}: "authentication failed: check user and secret",
	{2, 2}: "this initiator name is not allowed: check the target's ACL", {2, 3}: "the target name does not exist there",
	{2, 4}: "the target was removed", {2, 5}: "the target speaks another iSCSI version", {2, 6}: "too many connections",
	{2, 7}: "the target misses a parameter", {2, 9}: "the target does not do this session type", {2, 10}: "the session does not exist",
	{3, 0}: "the target has an internal error", {3, 1}: "the service is unavailable", {3, 2}: "the target is out of resources",
}

func (e *LoginError) Error() string {
	text := loginTexts[[2]uint8{e.Class, e.Detail}]
	if text == "" {
		text = "refused"
	}
	return fmt.Sprintf("%s (status %02x%02x)", text, e.Class, e.Detail)
}

// Permanent tells that only a change of configuration can help.
func (e *LoginError) Permanent() bool { return e.Class == 2 && e.Detail != 6 }

type redirect struct{ address string }

func (r *redirect) Error() string { return "redirected to " + r.address }

// login is the state of one login.
type login struct {
	conn      net.Conn
	c         *Config
	params    Params
	tpgt      uint16
	cmdSN     uint32
	expStatSN uint32
	expCmdSN  uint32
	maxCmdSN  uint32
	first     bool // the next response is the first
	text      []byte
	out       []byte
	seen      map[string]bool
	md5Only   bool // offer CHAP_A=5 alone
	answered  bool // a CHAP response went out
}

// connectAndLogin dials the portal, follows redirects and logs in.
func connectAndLogin(ctx context.Context, c *Config) (net.Conn, *login, error) {
	address, md5Only := c.Address, false
	for range maxRedirects {
		conn, err := c.Dial(ctx, "tcp", address)
		if err != nil {
			return nil, nil, dialError(err)
		}
		if tc, ok := conn.(*net.TCPConn); ok {
			if err := sys.TuneTCP(tc, c.FailoverTime); err != nil {
				conn.Close()
				return nil, nil, err
			}
		}
		stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
		lg := &login{conn: conn, c: c, first: true, md5Only: md5Only, seen: map[string]bool{}}
		err = lg.run()
		if !stop() && err == nil {
			err = ctx.Err()
		}
		if err == nil {
			conn.SetDeadline(time.Time{})
			return conn, lg, nil
		}
		conn.Close()
		var denied *LoginError
		refused := errors.As(err, &denied) && denied.Class == 2 && denied.Detail <= 1 || errors.Is(err, errAlgorithms)
		if c.User != "" && !md5Only && refused {
			// Old targets refuse any list (LIO before 3.15, Synology), and tgt
			// means SHA-1 by 7, where everybody else means SHA-256.
			md5Only = true
			continue
		}
		if lg.answered && errors.As(err, &denied) && denied.Class == 2 && denied.Detail == 0 { // tgt says so for a wrong secret
			err = fmt.Errorf("authentication failed: check user and secret: %w", err)
		}
		if c.User == "" && errors.As(err, &denied) && denied.Class == 2 && denied.Detail == 1 {
			err = fmt.Errorf("the target wants authentication: set a CHAP user and secret: %w", err)
		}
		var r *redirect
		if !errors.As(err, &r) {
			if ctx.Err() != nil {
				err = errors.New("the portal accepts connections but does not answer the login in time")
			}
			return nil, nil, err
		}
		address = r.address
	}
	return nil, nil, fmt.Errorf("more than %d redirects", maxRedirects)
}

// dialError puts the usual reasons in plain words.
func dialError(err error) error {
	var ne net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("connection refused: is the target service running there? (%w)", err)
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return fmt.Errorf("portal unreachable: check address and routes (%w)", err)
	case errors.As(err, &ne) && ne.Timeout():
		return fmt.Errorf("portal does not answer: check address, routes and firewall (%w)", err)
	}
	return err
}

func (lg *login) run() error {
	c := lg.c
	lg.params = Params{InitialR2T: true, ImmediateData: true, FirstBurst: 64 << 10, MaxBurst: 256 << 10, TargetMaxData: 8 << 10, MaxR2T: 1}
	lg.out = pdu.AppendKey(nil, "InitiatorName", c.InitiatorName)
	if c.TargetName == "" {
		lg.out = pdu.AppendKey(lg.out, "SessionType", "Discovery")
	} else {
		lg.out = pdu.AppendKey(lg.out, "SessionType", "Normal")
		lg.out = pdu.AppendKey(lg.out, "TargetName", c.TargetName)
	}
	if err := lg.security(); err != nil {
		return err
	}
	lg.offer()
	for range loginExchanges {
		keys, h, err := lg.exchange(pdu.StageOperational, pdu.StageFullFeature, true)
		if err != nil {
			return err
		}
		if err := lg.settle(keys); err != nil {
			return err
		}
		if h.IsFinal() {
			if h.TSIH() == 0 {
				return breach("final login response without a session handle")
			}
			return lg.check()
		}
	}
	return errors.New("the target does not end the login")
}

// offer lists our operational keys; each goes out once per login.
func (lg *login) offer() {
	digest := map[bool]string{false: "None", true: "CRC32C"}
	normal := lg.c.TargetName != ""
	for _, kv := range [][2]string{{"HeaderDigest", digest[normal && lg.c.HeaderDigest]}, {"DataDigest", digest[normal && lg.c.DataDigest]}, {"MaxRecvDataSegmentLength", strconv.Itoa(offeredMaxData)},
		{"DefaultTime2Wait", "0"}, {"DefaultTime2Retain", "0"}, {"ErrorRecoveryLevel", "0"}} {
		lg.out = pdu.AppendKey(lg.out, kv[0], kv[1])
	}
	if lg.c.TargetName == "" {
		return
	}
	for _, kv := range [][2]string{{"InitialR2T", "No"}, {"ImmediateData", "Yes"}, {"MaxBurstLength", strconv.Itoa(offeredMaxBurst)},
		{"FirstBurstLength", strconv.Itoa(offeredFirstBurst)}, {"MaxConnections", "1"}, {"MaxOutstandingR2T", strconv.Itoa(offeredR2T)},
		{"DataPDUInOrder", "Yes"}, {"DataSequenceInOrder", "Yes"}} {
		lg.out = pdu.AppendKey(lg.out, kv[0], kv[1])
	}
}

// exchange sends what is in out and returns the joined answer.
func (lg *login) exchange(csg, nsg uint8, transit bool) ([]pdu.Key, *pdu.Header, error) {
	lg.text = lg.text[:0]
	for range loginExchanges {
		var h pdu.Header
		h[0] = uint8(pdu.OpLoginReq) | pdu.Immediate
		h[1] = csg << 2
		if transit {
			h[1] |= pdu.Final | nsg
		}
		h.SetISID(lg.c.ISID)
		h.SetExpStatSN(lg.expStatSN)
		if len(lg.out) > 8<<10 {
			return nil, nil, errors.New("login text is too long")
		}
		if err := writePDU(lg.conn, &h, lg.out); err != nil {
			return nil, nil, err
		}
		lg.out = lg.out[:0]
		data, err := readPDU(lg.conn, &h)
		if err != nil {
			return nil, nil, err
		}
		if h.Opcode() != pdu.OpLoginResp {
			return nil, nil, breach("opcode %#02x during login", h.Opcode())
		}
		if class, detail := h.LoginStatus(); class != 0 {
			return nil, nil, lg.refused(class, detail, data)
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
		if len(lg.text)+len(data) > pdu.MaxTextLen {
			return nil, nil, breach("login text without end")
		}
		lg.text = append(lg.text, data...)
		if h.Flags()&pdu.Continue == 0 {
			keys, err := pdu.ParseKeys(lg.text)
			if err != nil {
				return nil, nil, breach("%v", err)
			}
			return keys, &h, nil
		}
		if h.IsFinal() {
			return nil, nil, breach("login response both final and continued")
		}
		transit = false // an empty request asks for the rest
	}
	return nil, nil, errors.New("the target does not end the login")
}

func (lg *login) refused(class, detail uint8, data []byte) error {
	if class != 1 {
		return &LoginError{class, detail}
	}
	keys, err := pdu.ParseKeys(data)
	if err != nil {
		return breach("%v", err)
	}
	for _, k := range keys {
		if k.Name == "TargetAddress" {
			a, _, err := splitPortal(k.Value)
			if err != nil {
				return breach("redirect to %q", k.Value)
			}
			return &redirect{a}
		}
	}
	return breach("redirect without an address")
}

// settle takes the target's operational answers, each checked against what we
// offered and the key's result function (RFC 7143 6.2, clause 13).
func (lg *login) settle(keys []pdu.Key) error {
	p := &lg.params
	for _, k := range keys {
		if lg.seen[k.Name] {
			return breach("key %s twice", k.Name)
		}
		lg.seen[k.Name] = true
		if d := k.Name == "HeaderDigest" && lg.c.HeaderDigest || k.Name == "DataDigest" && lg.c.DataDigest; d && lg.c.TargetName != "" {
			if k.Value != "CRC32C" {
				return fmt.Errorf("the target does not do CRC32C as %s (it says %.16q): set it to none for this target", k.Name, k.Value)
			}
			p.HeaderDigest, p.DataDigest = p.HeaderDigest || k.Name == "HeaderDigest", p.DataDigest || k.Name == "DataDigest"
			continue
		}
		switch k.Value {
		case "Irrelevant", "NotUnderstood", "Reject":
			continue // the default stays
		}
		var err error
		switch k.Name {
		case "TargetPortalGroupTag":
			var v int
			v, err = number(k, 0, 65535)
			lg.tpgt = uint16(v)
		case "HeaderDigest", "DataDigest":
			if k.Value != "None" {
				return breach("%s=%s was not offered", k.Name, k.Value)
			}
		case "MaxRecvDataSegmentLength":
			p.TargetMaxData, err = number(k, 512, 1<<24-1)
		case "MaxBurstLength":
			p.MaxBurst, err = number(k, 512, offeredMaxBurst)
		case "FirstBurstLength":
			p.FirstBurst, err = number(k, 512, offeredFirstBurst)
		case "MaxOutstandingR2T":
			p.MaxR2T, err = number(k, 1, offeredR2T)
		case "MaxConnections":
			_, err = number(k, 1, 1)
		case "ErrorRecoveryLevel", "DefaultTime2Retain":
			_, err = number(k, 0, 0)
		case "DefaultTime2Wait":
			_, err = number(k, 0, 3600)
		case "InitialR2T":
			p.InitialR2T, err = boolean(k)
		case "ImmediateData":
			p.ImmediateData, err = boolean(k)
		case "DataPDUInOrder", "DataSequenceInOrder":
			var yes bool
			if yes, err = boolean(k); err == nil && !yes {
				return breach("%s=No was not offered", k.Name)
			}
		case "TargetAlias", "TargetAddress", "AuthMethod", "SessionType", "InitiatorName", "TargetName":
		case "IFMarker", "OFMarker", "IFMarkInt", "OFMarkInt":
			lg.out = pdu.AppendKey(lg.out, k.Name, "Reject")
		default:
			lg.out = pdu.AppendKey(lg.out, k.Name, "NotUnderstood")
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (lg *login) check() error {
	p := &lg.params
	if lg.c.TargetName != "" && (lg.c.HeaderDigest != p.HeaderDigest || lg.c.DataDigest != p.DataDigest) {
		return errors.New("the target ended the login without a word about digests")
	}
	if p.FirstBurst > p.MaxBurst {
		if lg.seen["FirstBurstLength"] && lg.seen["MaxBurstLength"] {
			return breach("FirstBurstLength %d is more than MaxBurstLength %d", p.FirstBurst, p.MaxBurst)
		}
		p.FirstBurst = p.MaxBurst
	}
	if p.TargetMaxData > 64 {
		p.TargetMaxData &^= 3
	}
	p.TargetMaxData = min(p.TargetMaxData, 1<<20)
	return nil
}

func number(k pdu.Key, low, high int) (int, error) {
	v, err := strconv.ParseUint(k.Value, 0, 32)
	if err != nil || int(v) < low || int(v) > high {
		return 0, breach("%s=%.32q, %d to %d was possible", k.Name, k.Value, low, high)
	}
	return int(v), nil
}

func boolean(k pdu.Key) (bool, error) {
	switch k.Value {
	case "Yes":
		return true, nil
	case "No":
		return false, nil
	}
	return false, breach("%s=%.32q", k.Name, k.Value)
}

// writePDU and readPDU are the plain, blocking way of login and discovery.
func writePDU(w io.Writer, h *pdu.Header, data []byte) error {
	h.SetDataLen(len(data))
	b := append(append(make([]byte, 0, pdu.HeaderLen+len(data)+3), h[:]...), data...)
	b = append(b, zeroPad[:pdu.Pad(len(data))]...)
	_, err := w.Write(b)
	return err
}

func readPDU(r io.Reader, h *pdu.Header) ([]byte, error) {
	if _, err := io.ReadFull(r, h[:]); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = errors.New("the target closed the connection during login")
		}
		return nil, err
	}
	n := h.DataLen()
	if n > offeredMaxData || h.AHSLen() > 0 {
		return nil, breach("login response of %d bytes with %d of extra header", n, h.AHSLen())
	}
	data := make([]byte, n+pdu.Pad(n))
	if _, err := io.ReadFull(r, data); err != nil {
		return nil, err
	}
	return data[:n], nil
}

// splitPortal reads host[:port][,tpgt], with IPv6 in brackets, as TargetAddress
// carries it; the port defaults to 3260.
func splitPortal(v string) (address string, tpgt int, err error) {
	if host, tag, ok := strings.Cut(v, ","); ok {
		if tpgt, err = strconv.Atoi(tag); err != nil || tpgt < 0 || tpgt > 65535 {
			return "", 0, fmt.Errorf("portal %q: bad group tag", v)
		}
		v = host
	}
	address, err = WithPort(v)
	return address, tpgt, err
}

// WithPort completes a portal with iSCSI's port 3260 if it names none.
func WithPort(v string) (string, error) {
	host, port, err := net.SplitHostPort(v)
	if err != nil {
		host, port = strings.Trim(v, "[]"), "3260"
		if strings.Contains(host, ":") && net.ParseIP(strings.SplitN(host, "%", 2)[0]) == nil {
			return "", fmt.Errorf("portal %q: want host[:port]", v)
		}
	}
	n, err := strconv.Atoi(port)
	if host == "" || err != nil || n < 1 || n > 65535 || strings.ContainsAny(host, " /\\@") {
		return "", fmt.Errorf("portal %q: want host[:port]", v)
	}
	return net.JoinHostPort(host, port), nil
}
