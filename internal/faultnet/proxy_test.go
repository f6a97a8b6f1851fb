package faultnet

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// echo is an upstream that sends everything back.
func echo(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}()
		}
	}()
	return ln.Addr().String()
}

func newProxy(t *testing.T) *Proxy {
	t.Helper()
	up := echo(t)
	p, err := New("127.0.0.1:0", up)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

func dial(t *testing.T, p *Proxy) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	return c.(*net.TCPConn)
}

// unit is a PDU with n bytes of data, all equal to fill.
func unit(n int, fill byte) []byte {
	b := bytes.Repeat([]byte{fill}, 48+(n+3)&^3)
	b[4] = 0
	b[5], b[6], b[7] = byte(n>>16), byte(n>>8), byte(n)
	return b
}

func send(t *testing.T, c net.Conn, b []byte) {
	t.Helper()
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
}

func receive(t *testing.T, c net.Conn, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
	return b
}

// silent checks that nothing arrives, neither bytes nor an end.
func silent(t *testing.T, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(80 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("read %d bytes, %v; want silence", n, err)
	}
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
}

// reset checks that exactly n bytes and then RST arrive.
func reset(t *testing.T, c net.Conn, n int) {
	t.Helper()
	got, err := io.ReadAll(c)
	if len(got) != n || !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read %d bytes, %v; want %d and a reset", len(got), err, n)
	}
}

func TestPassesAndCounts(t *testing.T) {
	p := newProxy(t)
	c := dial(t, p)
	want := append(unit(100001, 1), unit(0, 2)...)
	send(t, c, want)
	if !bytes.Equal(receive(t, c, len(want)), want) {
		t.Fatal("other bytes came back")
	}
	if got := p.Count(ToTarget); got != (Count{uint64(len(want)), 2}) || p.Count(ToInitiator) != got {
		t.Errorf("counts %v %v", got, p.Count(ToInitiator))
	}
	_ = c.CloseWrite() // FIN passes through and comes back
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("after FIN: %d %v", n, err)
	}
}

func TestResetAndRefuse(t *testing.T) {
	p := newProxy(t)
	c := dial(t, p)
	send(t, c, unit(0, 1))
	receive(t, c, 48)
	p.Refuse()
	if _, err := net.Dial("tcp", p.Addr()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial: %v", err)
	}
	send(t, c, unit(0, 1)) // old connections stay
	receive(t, c, 48)
	p.Reset()
	reset(t, c, 0)
	if err := p.Heal(); err != nil {
		t.Fatal(err)
	}
	c = dial(t, p)
	send(t, c, unit(0, 1))
	receive(t, c, 48)
}

func TestBlackholeAndHeal(t *testing.T) {
	p := newProxy(t)
	used, idle := dial(t, p), dial(t, p)
	for _, c := range []net.Conn{used, idle} {
		send(t, c, unit(0, 1))
		receive(t, c, 48)
	}
	p.Blackhole()
	send(t, used, unit(4096, 1))
	silent(t, used)
	fresh := dial(t, p)
	send(t, fresh, unit(0, 1))
	silent(t, fresh)
	if err := p.Heal(); err != nil {
		t.Fatal(err)
	}
	reset(t, used, 0)
	reset(t, fresh, 0)
	send(t, idle, unit(0, 3)) // it lost nothing
	receive(t, idle, 48)
}

func TestStallLosesNothing(t *testing.T) {
	p := newProxy(t)
	c := dial(t, p)
	for _, d := range []Direction{ToTarget, ToInitiator} {
		p.Stall(d)
		send(t, c, unit(1000, 7))
		silent(t, c)
		if err := p.Heal(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(receive(t, c, 1048), unit(1000, 7)) {
			t.Fatal("other bytes came back")
		}
	}
	p.Stall(ToInitiator)
	send(t, c, unit(0, 1))
	p.Reset() // a stalled connection can be reset
	reset(t, c, 0)
}

func TestDelayHoldsBytesNotThroughput(t *testing.T) {
	p := newProxy(t)
	c := dial(t, p)
	p.Delay(30 * time.Millisecond)
	start := time.Now()
	want := unit(2<<20, 1)
	go func() { _, _ = c.Write(want) }()
	receive(t, c, len(want))
	if d := time.Since(start); d < 60*time.Millisecond || d > 2*time.Second {
		t.Errorf("took %v", d)
	}
}

func TestCorruptFlipsOneByte(t *testing.T) {
	p := newProxy(t)
	c := dial(t, p)
	p.Corrupt(ToInitiator, 60)
	send(t, c, append(unit(0, 1), unit(100, 2)...)) // the first is too short
	got, want := receive(t, c, 48+148), append(unit(0, 1), unit(100, 2)...)
	want[48+60] ^= 0xff
	if !bytes.Equal(got, want) {
		t.Error("another byte, or none, was flipped")
	}
}

func TestCuts(t *testing.T) {
	three := append(append(unit(8, 1), unit(200, 2)...), unit(300, 3)...)
	tests := []struct {
		name string
		arm  func(*Proxy)
		want int
	}{
		{"before any", func(p *Proxy) { p.CutAtPDU(ToTarget, 0) }, 0},
		{"after one", func(p *Proxy) { p.CutAtPDU(ToInitiator, 1) }, 56},
		{"after three", func(p *Proxy) { p.CutAtPDU(ToInitiator, 3) }, len(three)},
		{"in a header", func(p *Proxy) { p.CutInsidePDU(ToInitiator, 1, 10) }, 66},
		{"in data", func(p *Proxy) { p.CutInsidePDU(ToInitiator, 2, 148) }, 56 + 248 + 148},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := newProxy(t)
			tt.arm(p)
			c := dial(t, p)
			send(t, c, three)
			reset(t, c, tt.want)
		})
	}
	t.Run("into a blackhole", func(t *testing.T) {
		p := newProxy(t)
		p.Arm(Cut{Direction: ToInitiator, PDUs: 1, Offset: 20, Then: ThenBlackhole})
		c := dial(t, p)
		send(t, c, three)
		receive(t, c, 56+20)
		silent(t, c)
		if err := p.Heal(); err != nil {
			t.Fatal(err)
		}
		reset(t, c, 0)
	})
}

func TestTrickle(t *testing.T) {
	p := newProxy(t)
	c := dial(t, p)
	p.Trickle(2 * time.Millisecond)
	began := time.Now()
	want := bytes.Repeat([]byte("drop"), 50)
	if _, err := c.Write(want); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	n, err := c.Read(got)
	if err != nil || n > len(want)/2 {
		t.Fatalf("%d bytes at once, %v", n, err)
	}
	if _, err := io.ReadFull(c, got[n:]); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%q, %v", got, err)
	}
	if took := time.Since(began); took < 200*2*time.Millisecond {
		t.Errorf("200 bytes took %v", took)
	}
}
