package simulate

import (
	"slices"
	"strconv"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// tconn is the target's end of a connection, and its session.
type tconn struct {
	c        *conn
	s        *server
	buf      []byte
	dead     bool
	full     bool // in full feature phase
	entering bool
	secure   bool // the login began at CSG 0
	begun    bool
	isid     [6]byte
	statSN   uint32
	expCmdSN uint32
	maxCmdSN uint32
	tasks    []*task
	ua       []sense
}

// ping finds out, with a NOP-In now and then, about a peer that is gone and
// whose reset was lost. Without it one half-open session that owes data would
// hold up a serial target for ever.
func (tc *tconn) ping() {
	tc.s.w.after(tc.s.pings, func() {
		switch {
		case tc.dead:
			return
		case !tc.s.hung && tc.c.isClosed():
			tc.kill()
			return
		}
		tc.ping()
	})
}

// receive takes bytes off the network.
func (tc *tconn) receive(b []byte) {
	tc.buf = append(tc.buf, b...)
	tc.process()
}

func (tc *tconn) process() {
	for !tc.s.hung && !tc.dead && !tc.entering && len(tc.buf) >= pdu.HeaderLen {
		h := pdu.Header(tc.buf[:pdu.HeaderLen])
		n := h.DataLen()
		total := pdu.HeaderLen + n + pdu.Pad(n)
		if len(tc.buf) < total {
			return
		}
		data := slices.Clone(tc.buf[pdu.HeaderLen : pdu.HeaderLen+n])
		tc.buf = tc.buf[total:]
		tc.handle(h, data)
	}
}

// hungUp: the initiator closed, and whatever came before was received.
func (tc *tconn) hungUp() {
	if tc.s.hung { // found out when the process goes on
		tc.c.w.after(50*time.Millisecond, func() {
			if !tc.dead {
				tc.hungUp()
			}
		})
		return
	}
	tc.kill()
}

// kill ends the connection and its session. What is in the backend goes on.
func (tc *tconn) kill() {
	if tc.dead {
		return
	}
	tc.dead = true
	tc.buf = nil
	tc.c.push(&tc.c.down, chunk{end: true})
	s := tc.s
	s.conns = slices.DeleteFunc(s.conns, func(o *tconn) bool { return o == tc })
	for _, t := range slices.Clone(tc.tasks) {
		if t.inWork || t.ready() {
			continue
		}
		if s.serial && len(s.queue) > 0 && s.queue[0] == t { // the worker waits in vain for a while
			s.w.after(s.dataTimeout, func() { s.end(t) })
			continue
		}
		s.end(t)
	}
}

func (tc *tconn) send(h *pdu.Header, data []byte, status bool) {
	if tc.dead {
		return
	}
	h.SetDataLen(len(data))
	h.SetStatSN(tc.statSN)
	if status {
		tc.statSN++
	}
	h.SetExpCmdSN(tc.expCmdSN)
	if sn := tc.expCmdSN + uint32(tc.s.w.set.Window-1-len(tc.tasks)); pdu.SerialLess(tc.maxCmdSN, sn) {
		tc.maxCmdSN = sn
	}
	h.SetMaxCmdSN(tc.maxCmdSN)
	b := append(append(make([]byte, 0, pdu.HeaderLen+len(data)+3), h[:]...), data...)
	tc.c.send(append(b, make([]byte, pdu.Pad(len(data)))...))
}

func (tc *tconn) handle(h pdu.Header, data []byte) {
	if !tc.full {
		tc.login(&h, data)
		return
	}
	if !h.IsImmediate() && h.Opcode() == pdu.OpSCSICommand {
		tc.expCmdSN = h.CmdSN() + 1
	}
	switch h.Opcode() {
	case pdu.OpSCSICommand:
		tc.command(h, data)
	case pdu.OpDataOut:
		for _, t := range tc.tasks {
			if t.h.ITT() == h.ITT() && !t.ended {
				t.data = append(t.data, data...)
				if h.IsFinal() {
					t.unasked = false
					tc.s.commit(t)
					tc.s.advance(t)
				}
				return
			}
		}
	case pdu.OpNopOut:
		if h.ITT() != pdu.NoTag {
			var a pdu.Header
			a[0], a[1] = uint8(pdu.OpNopIn), pdu.Final
			a.SetITT(h.ITT())
			a.SetTTT(pdu.NoTag)
			tc.send(&a, nil, true)
		}
	case pdu.OpLogoutReq:
		var a pdu.Header
		a[0], a[1] = uint8(pdu.OpLogoutResp), pdu.Final
		a.SetITT(h.ITT())
		tc.send(&a, nil, true)
		tc.kill()
	case pdu.OpTaskMgmtReq:
		tc.manage(h)
	}
}

// login answers the two stages; what ends the old session is enter.
func (tc *tconn) login(h *pdu.Header, _ []byte) {
	if !tc.begun {
		tc.begun, tc.secure, tc.isid, tc.statSN = true, h.CSG() == pdu.StageSecurity, h.ISID(), 1
		tc.expCmdSN, tc.maxCmdSN = h.CmdSN(), h.CmdSN()
	}
	var a pdu.Header
	a[0], a[1] = uint8(pdu.OpLoginResp), h.Flags()
	a.SetISID(tc.isid)
	a.SetITT(h.ITT())
	if h.CSG() == pdu.StageSecurity {
		b := pdu.AppendKey(pdu.AppendKey(nil, "AuthMethod", "None"), "TargetPortalGroupTag", "1")
		tc.send(&a, b, true)
		return
	}
	yes := map[bool]string{false: "No", true: "Yes"}
	set := &tc.s.w.set
	var b []byte
	for _, kv := range [][2]string{{"HeaderDigest", "None"}, {"DataDigest", "None"}, {"InitialR2T", yes[set.InitialR2T]}, {"ImmediateData", yes[set.Immediate]},
		{"MaxRecvDataSegmentLength", strconv.Itoa(blockSize)}, {"MaxBurstLength", strconv.Itoa(set.Burst)}, {"FirstBurstLength", strconv.Itoa(min(set.Burst, 2*blockSize))}, {"MaxOutstandingR2T", "1"}} {
		b = pdu.AppendKey(b, kv[0], kv[1])
	}
	a.SetTSIH(1)
	tc.entering = true
	tc.s.enter(tc, func() {
		tc.entering, tc.full = false, true
		if set.LoginPower {
			tc.ua = append(tc.ua, powerOn)
		} else if set.LoginUA {
			tc.ua = append(tc.ua, sense{6, 0x29, 0})
		}
		tc.send(&a, b, true)
		tc.process()
	})
}

// enter ends the old sessions of this initiator port and lets the login go on.
func (s *server) enter(tc *tconn, done func()) {
	var old []*tconn
	for _, o := range s.conns {
		if o != tc && (o.full || o.entering) && o.isid == tc.isid {
			old = append(old, o)
		}
	}
	if s.keeps || s.secure && !tc.secure {
		old = nil
	}
	end := func() {
		if tc.dead {
			return
		}
		var left []*task
		for _, o := range old {
			o.kill()
			if s.loginWaits {
				left = append(left, o.tasks...)
			}
		}
		s.wait(left, func() {
			if !tc.dead {
				done()
			}
		})
	}
	if len(old) > 0 && s.loginTakes > 0 {
		s.w.after(s.loginTakes, end)
		return
	}
	end()
}
