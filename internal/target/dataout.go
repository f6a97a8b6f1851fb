package target

import (
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// maxTasks bounds the writes of one connection that wait for data.
const maxTasks = 4096

// task is a command that waits for Data-Out PDUs.
type task struct {
	r          request
	want       uint32 // bytes to take: the shorter of EDTL and command
	got, asked uint32 // bytes received, and unsolicited or requested by R2T
	unasked    bool   // unsolicited data goes on
	r2ts       int    // outstanding
	r2tSN, ttt uint32
	buf        []byte // data kept for later; nil if it goes to the disk at once
	scripted   bool
	act        Action
}

// begin starts a command whose data did not all come with it.
func (c *conn) begin(r *request, data []byte, final, scripted bool, act *Action) bool {
	if len(c.tasks) >= maxTasks || c.tasks[r.itt] != nil {
		c.respond(r, 0x28, noSense, 0) // TASK SET FULL
		return true
	}
	var t *task
	if n := len(c.free); n > 0 {
		t, c.free = c.free[n-1], c.free[:n-1]
	} else {
		t = new(task)
	}
	*t = task{r: *r, want: uint32(min(r.n, uint64(r.edtl))), unasked: !final, scripted: scripted, buf: t.buf[:0]}
	if r.sense != noSense || (scripted && !r.block && r.n == 0) {
		t.want = 0 // nothing is asked for, what comes unasked is dropped
	}
	if scripted {
		t.act = *act
	}
	if r.block && !scripted {
		t.buf = nil
	} else if t.buf == nil {
		t.buf = make([]byte, 0, t.want) // want is at most maxTransfer
	}
	c.tasks[r.itt] = t
	c.waiting++
	t.take(data)
	return c.advance(t)
}

// take consumes the next piece of data.
func (t *task) take(data []byte) {
	at := t.got
	t.got += uint32(len(data))
	if at >= t.want {
		return
	}
	data = data[:min(len(data), int(t.want-at))]
	if t.buf != nil {
		t.buf = append(t.buf, data...)
	} else if len(data) > 0 {
		t.r.lu.write(data, t.r.off+uint64(at))
	}
}

// advance requests more data, or finishes the command when all is there.
func (c *conn) advance(t *task) bool {
	if t.unasked {
		return true
	}
	if t.got >= t.want {
		c.drop(t)
		return c.complete(t)
	}
	t.asked = max(t.asked, t.got)
	for t.asked < t.want && t.r2ts < c.params.maxR2T {
		n := min(t.want-t.asked, uint32(c.params.maxBurst))
		if t.ttt == 0 {
			for c.nextTTT++; c.nextTTT == pdu.NoTag || c.nextTTT == 0; {
				c.nextTTT++
			}
			t.ttt = c.nextTTT
		}
		a := c.header(pdu.OpR2T)
		a.SetLUN(t.r.lun)
		a.SetITT(t.r.itt)
		a.SetTTT(t.ttt)
		a.SetDataSN(t.r2tSN)
		a.SetBufferOffset(t.asked)
		a.SetDesiredLen(n)
		t.r2tSN++
		t.asked += n
		t.r2ts++
	}
	return true
}

// drop takes a task out of the table and gives its window slot back.
func (c *conn) drop(t *task) {
	delete(c.tasks, t.r.itt)
	c.waiting--
}

// complete finishes a task that has its data.
func (c *conn) complete(t *task) bool {
	ok := true
	switch {
	case t.scripted:
		ok = c.script(&t.r, t.buf, &t.act)
		t.buf = nil // a deferred command may keep it
	case t.r.block && t.r.sense == noSense:
		c.tally.Writes++
		c.tally.WrittenBytes += uint64(t.want)
		fallthrough
	default:
		c.finish(&t.r, t.buf, 0)
	}
	if len(c.free) < 256 && cap(t.buf) <= 64<<10 {
		c.free = append(c.free, t)
	}
	return ok
}

// dataOut takes one Data-Out PDU. Data comes in order, as negotiated.
func (c *conn) dataOut(h *pdu.Header, data []byte) bool {
	t := c.tasks[h.ITT()]
	if t == nil {
		return true // of an aborted command
	}
	solicited := h.TTT() != pdu.NoTag
	switch {
	case h.BufferOffset() != t.got:
		return c.fail("Data-Out at another offset than the next", h)
	case uint64(t.got)+uint64(len(data)) > uint64(t.r.edtl):
		return c.fail("Data-Out beyond the expected length", h)
	case !solicited && (!t.unasked || int(t.got)+len(data) > c.params.firstBurst):
		return c.fail("unsolicited Data-Out not allowed", h)
	case solicited && (t.unasked || h.TTT() != t.ttt || t.r2ts == 0 || t.got+uint32(len(data)) > t.asked):
		return c.fail("Data-Out nobody requested", h)
	}
	t.take(data)
	if !h.IsFinal() {
		return true
	}
	if solicited {
		t.r2ts--
	} else {
		t.unasked = false
	}
	return c.advance(t)
}

// taskManagement executes ABORT TASK, ABORT and CLEAR TASK SET and LOGICAL
// UNIT RESET (RFC 7143 11.5). Commands execute at once, so that only those
// waiting for data or made late by a script can be aborted.
func (c *conn) taskManagement(h *pdu.Header) {
	c.tally.TaskMgmt++
	lun, ref, itt := h.LUN(), h.TTT(), h.ITT()
	lu, _ := c.lookup(&lun)
	response := pdu.TMFComplete
	var act TaskAction
	if hook := c.srv.onTask.Load(); hook != nil {
		act = (*hook)(Task{c.p, h.Flags() &^ pdu.Final, lun})
	}
	if act.Silent {
		return
	}
	switch fn := h.Flags() &^ pdu.Final; {
	case act.Lie:
	case act.Response != 0:
		response = act.Response
	case lu == nil:
		response = pdu.TMFNoLUN
	case fn == pdu.TMFAbortTask:
		n := c.srv.cancelLate(func(d *deferred) bool { return d.c == c && d.r.itt == ref })
		if t := c.tasks[ref]; t != nil {
			c.drop(t)
			n++
		}
		if n == 0 {
			response = pdu.TMFNoTask
		}
	case fn == pdu.TMFClearACA:
	case fn == pdu.TMFAbortTaskSet:
		c.srv.cancelLate(func(d *deferred) bool { return d.nexus == c.nexus && d.r.lu == lu })
		c.abortLU(lu, false)
	case fn == pdu.TMFClearTaskSet || fn == pdu.TMFLUReset:
		if fn == pdu.TMFLUReset && c.srv.cfg.ResetEndsSessions > 0 {
			c.endOthers()
		}
		c.srv.cancelLate(func(d *deferred) bool { return d.r.lu == lu })
		c.abortLU(lu, false)
		for _, p := range c.srv.Portals() {
			for _, o := range p.list() {
				if o != c {
					o.post(func() {
						o.abortLU(lu, true)
						if fn == pdu.TMFLUReset {
							o.tellReset(lu)
						}
					})
				}
			}
		}
	default:
		response = pdu.TMFNotSupported
	}
	a := c.header(pdu.OpTaskMgmtResp)
	a.SetITT(itt)
	a.SetResponse(response)
	c.status(a)
}

// endOthers ends the other sessions of this initiator and target.
func (c *conn) endOthers() {
	time.Sleep(c.srv.cfg.ResetEndsSessions)
	c.srv.mu.Lock()
	var others []*conn
	for n, o := range c.srv.sessions {
		if o != c && n.initiator == c.nexus.initiator && n.target == c.nexus.target {
			others = append(others, o)
		}
	}
	c.srv.mu.Unlock()
	for _, o := range others {
		o.close(false)
		select {
		case <-o.done:
		case <-c.closed:
		}
	}
}

// tellReset leaves UNIT ATTENTION "bus device reset function occurred" (SAM-5 5.14).
func (c *conn) tellReset(lu *LU) {
	if !c.full || c.target == nil {
		return
	}
	for i, l := range c.target.LUs {
		if l == lu {
			c.ua = append(c.ua, attention{i, 0x29, 0x03})
		}
	}
}

// abortLU forgets the tasks of an LU; byOther leaves UNIT ATTENTION "commands
// cleared by another initiator" if there were any.
func (c *conn) abortLU(lu *LU, byOther bool) {
	if !c.full || c.target == nil {
		return
	}
	cleared := false
	for _, t := range c.tasks {
		if t.r.lu == lu {
			c.drop(t)
			cleared = true
		}
	}
	if cleared && byOther {
		for i, l := range c.target.units() {
			if l == lu {
				c.ua = append(c.ua, attention{i, 0x2f, 0x00})
			}
		}
	}
}
