package target

import (
	"strconv"
	"strings"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// Login status (RFC 7143 11.13.5), class<<8 | detail.
const (
	loginOK        = 0x0000
	loginError     = 0x0200
	loginAuth      = 0x0201
	loginNotFound  = 0x0203
	loginVersion   = 0x0205
	loginMissing   = 0x0207
	loginNoSession = 0x020a
	loginInvalid   = 0x020b
	loginService   = 0x0301
)

// params are the negotiated values of a connection, lengths in bytes.
type params struct {
	peerSegment, maxBurst, firstBurst, maxR2T int
	initialR2T, immediate                     bool
	digests                                   digests
}

// defaultParams are the values of keys nobody mentions (RFC 7143 13).
func defaultParams() params {
	return params{peerSegment: 8192, maxBurst: 262144, firstBurst: 65536, maxR2T: 1, initialR2T: true, immediate: true}
}

// login is the state of the login phase.
type login struct {
	started, discovery  bool
	itt, cmdSN          uint32
	isid                [6]byte
	text                []byte // joined so far while C is set
	initiator, target   string
	toldGroup, declared bool
	answer              []byte
}

// loginRequest handles one Login Request (RFC 7143 6.3, 11.12).
func (c *conn) loginRequest(h *pdu.Header, data []byte) bool {
	l := &c.login
	flags := h.Flags()
	if !l.started {
		l.started, l.itt, l.cmdSN, l.isid = true, h.ITT(), h.CmdSN(), h.ISID()
		c.expCmdSN, c.maxCmdSN = l.cmdSN, l.cmdSN
		if r := c.p.reject.Load(); r != 0 {
			return c.loginEnd(h, int(r))
		}
	}
	switch {
	case h[3] != 0: // VersionMin
		return c.loginEnd(h, loginVersion)
	case h.TSIH() != 0: // no session takes a second connection
		return c.loginEnd(h, loginNoSession)
	case h.ITT() != l.itt || h.ISID() != l.isid || flags&(pdu.Final|pdu.Continue) == pdu.Final|pdu.Continue,
		len(l.text)+len(data) > pdu.MaxTextLen:
		return c.loginEnd(h, loginInvalid)
	}
	l.text = append(l.text, data...)
	if flags&pdu.Continue != 0 {
		a := c.loginResponse(h)
		a.SetFlags(flags &^ (pdu.Final | pdu.Continue | 3))
		return true
	}
	keys, err := pdu.ParseKeys(l.text)
	if err != nil {
		return c.loginEnd(h, loginError)
	}
	l.text = l.text[:0]
	l.answer = l.answer[:0]
	for _, k := range keys {
		if status := c.negotiate(k.Name, k.Value); status != loginOK {
			return c.loginEnd(h, status)
		}
	}
	if l.initiator == "" || (l.target == "" && !l.discovery) {
		return c.loginEnd(h, loginMissing)
	}
	if status := c.chooseTarget(); status != loginOK {
		return c.loginEnd(h, status)
	}
	if h.CSG() == pdu.StageOperational && !l.declared {
		l.declared = true
		l.answer = pdu.AppendKey(l.answer, "MaxRecvDataSegmentLength", strconv.Itoa(c.srv.cfg.MaxRecvSegment))
	}
	answerFlags := flags &^ 3
	final := false
	if flags&pdu.Final != 0 {
		switch move := h.CSG()<<4 | h.NSG(); move {
		case 0x01, 0x03, 0x13:
			answerFlags |= h.NSG()
			final = h.NSG() == pdu.StageFullFeature
		default:
			return c.loginEnd(h, loginInvalid)
		}
	}
	var tsih uint16
	if final {
		for tsih == 0 {
			tsih = uint16(c.srv.tsih.Add(1))
		}
		c.enter()
	}
	a := c.loginResponse(h)
	a.SetFlags(answerFlags)
	a.SetTSIH(tsih)
	a.SetDataLen(len(l.answer))
	c.payload(l.answer)
	if final {
		c.digests = c.params.digests // from the next PDU on (RFC 7143 13.1)
	}
	return true
}

// loginResponse begins the answer to h.
func (c *conn) loginResponse(h *pdu.Header) *pdu.Header {
	itt, isid := h.ITT(), h.ISID()
	a := c.header(pdu.OpLoginResp)
	a.SetITT(itt)
	a.SetISID(isid)
	c.status(a)
	return a
}

// loginEnd refuses the login with a status and ends the connection.
func (c *conn) loginEnd(h *pdu.Header, status int) bool {
	a := c.loginResponse(h)
	a.SetFlags(h.Flags() & 0x0c)
	a.SetLoginStatus(uint8(status>>8), uint8(status))
	c.ending = true
	return true
}

// chooseTarget finds the target named and tells its portal group once.
func (c *conn) chooseTarget() int {
	l := &c.login
	if l.discovery || l.toldGroup {
		return loginOK
	}
	for _, name := range c.p.targets {
		if name == l.target {
			l.toldGroup = true
			c.target = c.srv.targets[name]
			c.p.mu.Lock()
			group := c.p.group
			c.p.mu.Unlock()
			c.nexus = nexus{l.initiator, l.target, l.isid, group}
			l.answer = pdu.AppendKey(l.answer, "TargetPortalGroupTag", strconv.Itoa(int(group)))
			return loginOK
		}
	}
	return loginNotFound
}

// enter begins full feature phase: an older session of the same nexus ends
// first, with everything it left behind, so that none of its commands can
// take effect after this login.
func (c *conn) enter() {
	c.full = true
	_ = c.nc.SetReadDeadline(time.Time{})
	c.srv.stats.logins.Add(1)
	if c.login.discovery {
		c.nexus.initiator = c.login.initiator
		return
	}
	s := c.srv
	for {
		s.mu.Lock()
		old := s.sessions[c.nexus]
		if old == nil {
			s.sessions[c.nexus] = c
			c.session = true
			s.mu.Unlock()
			break
		}
		s.mu.Unlock()
		old.close(false)
		select {
		case <-old.done:
		case <-c.closed:
			c.ending = true
			return
		}
	}
	s.cancelLate(func(d *deferred) bool { return d.nexus == c.nexus })
	if s.cfg.PowerOnUA {
		for i := range c.target.units() {
			c.ua = append(c.ua, attention{i, 0x29, 0x00})
		}
	}
}

// negotiate answers one key by its result function (RFC 7143 6.2, 13).
func (c *conn) negotiate(name, value string) int {
	l, p, cfg := &c.login, &c.params, &c.srv.cfg
	say := func(v string) { l.answer = pdu.AppendKey(l.answer, name, v) }
	num := func(lo, hi int) (int, bool) {
		n, err := strconv.ParseUint(value, 0, 32)
		if err != nil || int(n) < lo || int(n) > hi {
			say("Reject")
			return 0, false
		}
		return int(n), true
	}
	pick := func(want string) bool {
		for v := range strings.SplitSeq(value, ",") {
			if v == want {
				say(want)
				return true
			}
		}
		say("Reject")
		return false
	}
	yes := value == "Yes"
	word := map[bool]string{true: "Yes", false: "No"}
	switch name {
	case "InitiatorName":
		l.initiator = strings.ToLower(value)
	case "TargetName":
		l.target = value
	case "SessionType":
		l.discovery = value == "Discovery"
	case "InitiatorAlias":
	case "AuthMethod":
		if !pick("None") {
			return loginAuth
		}
	case "HeaderDigest", "DataDigest":
		v := chooseDigest(value)
		say(v)
		switch {
		case v == "Reject":
			return loginError
		case name == "HeaderDigest":
			p.digests.header = v == "CRC32C"
		default:
			p.digests.data = v == "CRC32C"
		}
	case "MaxConnections":
		say("1")
	case "InitialR2T":
		p.initialR2T = yes || cfg.InitialR2T
		say(word[p.initialR2T])
	case "ImmediateData":
		p.immediate = yes && !cfg.NoImmediateData
		say(word[p.immediate])
	case "MaxRecvDataSegmentLength":
		if n, ok := num(512, 1<<24-1); ok {
			p.peerSegment = n
		}
	case "MaxBurstLength":
		if n, ok := num(512, 1<<24-1); ok {
			p.maxBurst = min(n, cfg.MaxBurst)
			say(strconv.Itoa(p.maxBurst))
		}
	case "FirstBurstLength":
		if n, ok := num(512, 1<<24-1); ok {
			p.firstBurst = min(n, cfg.FirstBurst)
			say(strconv.Itoa(p.firstBurst))
		}
	case "DefaultTime2Wait":
		if n, ok := num(0, 3600); ok {
			say(strconv.Itoa(max(n, cfg.Time2Wait)))
		}
	case "DefaultTime2Retain":
		say("0")
	case "MaxOutstandingR2T":
		if n, ok := num(1, 65535); ok {
			p.maxR2T = min(n, 16)
			say(strconv.Itoa(p.maxR2T))
		}
	case "DataPDUInOrder", "DataSequenceInOrder":
		say("Yes")
	case "ErrorRecoveryLevel":
		say("0")
	case "TaskReporting":
		pick("RFC3720")
	case "iSCSIProtocolLevel":
		say("1")
	case "IFMarker", "OFMarker":
		say("No")
	case "IFMarkInt", "OFMarkInt":
		say("Reject")
	default:
		say("NotUnderstood")
	}
	return loginOK
}

// textRequest answers SendTargets (RFC 7143 appendix C) and ignores the rest.
func (c *conn) textRequest(h *pdu.Header, data []byte) {
	if h.TTT() == pdu.NoTag {
		keys, err := pdu.ParseKeys(data)
		if err != nil || h.Flags()&pdu.Continue != 0 {
			c.rejectPDU(h, pdu.RejectProtocol)
			return
		}
		c.text = c.text[:0]
		for _, k := range keys {
			if k.Name == "SendTargets" {
				c.text = c.sendTargets(c.text, k.Value)
			} else {
				c.text = pdu.AppendKey(c.text, k.Name, "NotUnderstood")
			}
		}
	}
	n := min(len(c.text), c.params.peerSegment)
	itt, lun, last := h.ITT(), h.LUN(), n == len(c.text)
	a := c.header(pdu.OpTextResp)
	a.SetITT(itt)
	a.SetLUN(lun)
	a.SetTTT(pdu.NoTag)
	if !last {
		a.SetFlags(pdu.Continue)
		a.SetTTT(1)
	}
	a.SetDataLen(n)
	c.status(a)
	c.payload(c.text[:n])
	c.text = c.text[n:]
}

// sendTargets lists targets with the portals they are behind.
func (c *conn) sendTargets(b []byte, which string) []byte {
	portals := c.srv.Portals()
	for _, t := range c.srv.cfg.Targets {
		if which != "All" && which != t.Name && (which != "" || t != c.target) {
			continue
		}
		told := false
		for _, p := range portals {
			addr, ok := p.offers(t.Name, c.nc.LocalAddr())
			if !ok {
				continue
			}
			if !told {
				told = true
				b = pdu.AppendKey(b, "TargetName", t.Name)
			}
			b = pdu.AppendKey(b, "TargetAddress", addr)
		}
	}
	return b
}
