package target

import (
	"bytes"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
)

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, uint64(n)))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func TestReadBackEveryWayOfWriting(t *testing.T) {
	_, p, lu := newServer(t, Config{})
	c := session(t, p, 1)
	tests := []struct {
		name                         string
		size, immediate, unsolicited int
	}{
		{"immediate", 4096, 4096, 4096},
		{"R2T only", 8192, 0, 0},
		{"unsolicited only", 65536, 0, 65536},
		{"all three, several bursts", 3<<20 + 512, 4096, 65536},
		{"crossing a chunk", 2 << 20, 0, 0},
	}
	lba := uint64(2047)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want := random(tt.size)
			if status, sense := c.write(lba, want, tt.immediate, tt.unsolicited); status != 0 {
				t.Fatalf("write: status %d sense %x", status, sense)
			}
			got, status := c.read(lba, tt.size/512)
			if status != 0 || !bytes.Equal(got, want) {
				t.Fatalf("read: status %d, equal %v", status, bytes.Equal(got, want))
			}
			lba += uint64(tt.size / 512)
		})
	}
	if a := lu.Allocated(); a == 0 || a > 16<<20 {
		t.Errorf("allocated %d bytes", a)
	}
}

func TestErrorsCarrySense(t *testing.T) {
	_, p, lu := newServer(t, Config{})
	c := session(t, p, 1)
	if b, status := c.read(lu.Size()/512, 1); status != 2 || b[14] != 0x21 {
		t.Errorf("read beyond the end: status %d sense %x", status, b)
	}
	if b, status := c.dataIn([16]byte{0xc1}, 16); status != 2 || b[14] != 0x20 {
		t.Errorf("unknown opcode: status %d sense %x", status, b)
	}
	lu.SetReadOnly(true)
	if status, b := c.write(0, random(131072), 0, 65536); status != 2 || b[4] != 7 {
		t.Errorf("write to a protected LU: status %d sense %x", status, b)
	}
	// LUN 0 of the other target does not exist.
	c2 := dial(t, p)
	c2.loginTo("iqn.test:b", 2, fast...)
	if b, status := c2.read(0, 1); status != 2 || b[4] != 5 || b[14] != 0x25 {
		t.Errorf("wrong LUN: status %d sense %x", status, b)
	}
	b, status := c2.dataIn([16]byte{opReportLUNs, 9: 64}, 64)
	if status != 0 || len(b) != 16 || b[9] != 1 {
		t.Errorf("REPORT LUNS: status %d %x", status, b)
	}
}

func TestReinstatementEndsTheOldSessionAndItsLateWrites(t *testing.T) {
	srv, p, lu := newServer(t, Config{})
	old := session(t, p, 1)
	other := session(t, p, 2)
	srv.OnCommand(func(c *Cmd) Action {
		if c.Op() == opWrite16 {
			return Action{Delay: 150 * time.Millisecond, Orphan: true}
		}
		return Action{}
	})
	old.command(rw(opWrite16, 0, 8), pdu.CmdWrite, 4096, random(4096), false)
	other.command(rw(opWrite16, 8, 8), pdu.CmdWrite, 4096, random(4096), false)
	time.Sleep(30 * time.Millisecond)
	_ = other.nc.Close() // its write is a ghost that nobody fences
	again := session(t, p, 1)
	if _, _, err := old.tryRecv(); err == nil {
		t.Error("the old session still answers")
	}
	time.Sleep(200 * time.Millisecond)
	srv.OnCommand(nil)
	b := make([]byte, 4096)
	_, _ = lu.ReadAt(b, 0)
	if !bytes.Equal(b, make([]byte, 4096)) {
		t.Error("a write of the old session took effect after reinstatement")
	}
	_, _ = lu.ReadAt(b, 4096)
	if !bytes.Equal(b, random(4096)) {
		t.Error("the ghost write never came")
	}
	if _, status := again.read(0, 8); status != 0 {
		t.Errorf("the new session: status %d", status)
	}
}

func TestHangKeepsConnectionsAndResumeAnswers(t *testing.T) {
	srv, p, _ := newServer(t, Config{})
	c := session(t, p, 1)
	srv.Hang()
	c.command(rw(opRead16, 0, 1), pdu.CmdRead, 512, nil, false)
	_ = c.nc.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if _, _, err := c.tryRecv(); err == nil {
		t.Fatal("a hung target answered")
	}
	_ = c.nc.SetReadDeadline(time.Now().Add(5 * time.Second))
	srv.Resume()
	if h, _ := c.recv(); h.Opcode() != pdu.OpDataIn {
		t.Fatalf("opcode %#x after Resume", h.Opcode())
	}
	// A hung portal can be killed, and starts again on its address.
	addr := p.Addr()
	srv.Hang()
	c.command(rw(opRead16, 0, 1), pdu.CmdRead, 512, nil, false)
	srv.Kill()
	srv.Resume()
	if _, err := net.Dial("tcp", addr); err == nil {
		t.Fatal("a killed portal accepts")
	}
	if err := p.Start(); err != nil || p.Addr() != addr {
		t.Fatal(err, p.Addr())
	}
	session(t, p, 1)
}

func TestHookActions(t *testing.T) {
	srv, p, _ := newServer(t, Config{})
	c := session(t, p, 1)
	var act atomic.Pointer[Action]
	seen := make(chan struct{}, 64)
	srv.OnCommand(func(*Cmd) Action { seen <- struct{}{}; return *act.Load() })
	do := func(a Action) { act.Store(&a) }

	do(Action{Status: 2, Sense: Sense{2, 4, 1}})
	if b, status := c.read(0, 8); status != 2 || b[4] != 2 || b[14] != 4 || b[15] != 1 {
		t.Errorf("sense: %d %x", status, b)
	}
	if status, _ := c.write(0, random(131072), 4096, 65536); status != 2 {
		t.Errorf("write: status %d", status)
	}
	do(Action{Status: 8})
	if _, status := c.read(0, 8); status != 8 {
		t.Errorf("busy: %d", status)
	}
	do(Action{Response: 1})
	if _, _ = c.read(0, 8); c.head.Response() != 1 {
		t.Errorf("response: %d", c.head.Response())
	}
	do(Action{ShortBy: 512})
	if b, status := c.read(0, 8); status != 0 || len(b) != 4096-512 || c.head.Residual() != 0 {
		t.Errorf("short: %d %d bytes", status, len(b))
	}
	do(Action{ShortBy: -512})
	if b, _ := c.read(0, 8); len(b) != 4096+512 {
		t.Errorf("long: %d bytes", len(b))
	}
	do(Action{Delay: 50 * time.Millisecond})
	start := time.Now()
	if _, status := c.read(0, 8); status != 0 || time.Since(start) < 50*time.Millisecond {
		t.Errorf("delay: %d after %v", status, time.Since(start))
	}
	if status, _ := c.write(0, random(4096), 4096, 4096); status != 0 {
		t.Errorf("late write: %d", status)
	}
	do(Action{Silent: true})
	for len(seen) > 0 {
		<-seen
	}
	silent := c.command(rw(opRead16, 0, 1), pdu.CmdRead, 512, nil, false)
	<-seen
	do(Action{})
	if b, status := c.read(0, 8); status != 0 || !bytes.Equal(b, random(4096)) || c.head.ITT() == silent {
		t.Errorf("after silence: %d", status)
	}
	p.Ping()
	if h, _ := c.recv(); h.Opcode() != pdu.OpNopIn {
		t.Errorf("ping: %#x", h.Opcode())
	}
	p.Inject(bytes.Repeat([]byte{0x3f}, 48)[:48])
	if _, err := c.nc.Read(c.buf[:48]); err != nil || c.buf[0] != 0x3f {
		t.Errorf("inject: %v", err)
	}
	do(Action{Reset: true})
	c.command(rw(opRead16, 0, 1), pdu.CmdRead, 512, nil, false)
	if _, _, err := c.tryRecv(); err == nil || !strings.Contains(err.Error(), "reset") {
		t.Errorf("reset: %v", err)
	}
}

func TestLogin(t *testing.T) {
	srv, p, _ := newServer(t, Config{PowerOnUA: true})
	if class, detail := dial(t, p).loginTo("iqn.test:none", 1); class != 2 || detail != 3 {
		t.Errorf("unknown target: %d/%d", class, detail)
	}
	srv.RejectLogin(3, 1)
	if class, detail := dial(t, p).loginTo("iqn.test:a", 1); class != 3 || detail != 1 {
		t.Errorf("rejected: %d/%d", class, detail)
	}
	srv.RejectLogin(0, 0)
	c := session(t, p, 1)
	if b, status := c.read(0, 1); status != 2 || b[4] != 6 || b[14] != 0x29 {
		t.Errorf("power on: %d %x", status, b)
	}
	if _, status := c.read(0, 1); status != 0 {
		t.Errorf("second read: %d", status)
	}
	d := dial(t, p)
	if class, _ := d.loginTo("", 3); class != 0 {
		t.Fatal("discovery refused")
	}
	var h pdu.Header
	h.SetOpcode(pdu.OpTextReq)
	h.SetFlags(pdu.Final)
	h.SetITT(9)
	h.SetTTT(pdu.NoTag)
	d.send(&h, pdu.AppendKey(nil, "SendTargets", "All"))
	_, b := d.recv()
	want := "TargetName=iqn.test:a\x00TargetAddress=" + p.Addr() + ",1\x00TargetName=iqn.test:b\x00TargetAddress=" + p.Addr() + ",1\x00"
	if string(b) != want {
		t.Errorf("SendTargets: %q, want %q", b, want)
	}
}

func TestLUResetForgetsWaitingWrites(t *testing.T) {
	_, p, _ := newServer(t, Config{})
	a, b := session(t, p, 1), session(t, p, 2)
	a.command(rw(opWrite16, 0, 8), pdu.CmdWrite, 4096, nil, false)
	if h, _ := a.recv(); h.Opcode() != pdu.OpR2T {
		t.Fatalf("opcode %#x", h.Opcode())
	}
	var h pdu.Header
	h.SetOpcode(pdu.OpTaskMgmtReq)
	h.SetImmediate()
	h.SetFlags(pdu.Final | pdu.TMFLUReset)
	h.SetITT(77)
	h.SetCmdSN(b.cmdSN)
	b.send(&h, nil)
	if r, _ := b.recv(); r.Opcode() != pdu.OpTaskMgmtResp || r.Response() != 0 {
		t.Fatalf("LU RESET: %x", r)
	}
	if s, status := a.read(0, 1); status != 2 || s[4] != 6 || s[14] != 0x2f {
		t.Errorf("after another's reset: %d %x", status, s)
	}
	h.SetFlags(pdu.Final | pdu.TMFAbortTask)
	h.SetTTT(4242)
	b.send(&h, nil)
	if r, _ := b.recv(); r.Response() != pdu.TMFNoTask {
		t.Errorf("ABORT TASK of nothing: %d", r.Response())
	}
}

func TestNoAllocationPerIO(t *testing.T) {
	_, p, _ := newServer(t, Config{})
	noAllocationPerIO(t, session(t, p, 1))
}

func noAllocationPerIO(t *testing.T, c *client) {
	t.Helper()
	data := random(4096)
	read, write := rw(opRead16, 0, 8), rw(opWrite16, 0, 8)
	one := func() {
		c.command(write, pdu.CmdWrite, 4096, data, false)
		c.recv()
		c.command(read, pdu.CmdRead, 4096, nil, false)
		c.recv()
	}
	one()
	if n := testing.AllocsPerRun(500, one); n > 0.5 {
		t.Errorf("%.2f allocations per read and write", n)
	}
}
