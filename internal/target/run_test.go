package target

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
)

func TestIdentities(t *testing.T) {
	tgt := TGTIdentity(1, 1)
	if got := fmt.Sprintf("%x", tgt.Designators); got != "02010010"+fmt.Sprintf("%x", "IET     00010001")+"01030008"+"3000000100000001" {
		t.Errorf("tgt: %s", got)
	}
	var id [16]byte
	copy(id[:], "149455403f160c00")
	if got := fmt.Sprintf("%x", IETIdentity(id).Designators); got != "01010018"+"494554000000000031343934353534303366313630633030" {
		t.Errorf("IET: %s", got)
	}
	if w := WWID("x"); len(w) != 33 || w[:2] != "36" || w == WWID("y") {
		t.Errorf("WWID %s", w)
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]uint64{"4096": 4096, "1G": 1 << 30, "512m": 512 << 20, "2KiB": 2048, "1TB": 1 << 40} {
		if got, err := ParseSize(s); err != nil || got != want {
			t.Errorf("%s: %d %v", s, got, err)
		}
	}
	for _, s := range []string{"", "G", "-1", "99999999999T", "1X"} {
		if _, err := ParseSize(s); err == nil {
			t.Errorf("%q accepted", s)
		}
	}
}

func TestRunPrintsPortals(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, RunOptions{Size: "16M", Portals: []string{"127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"}, Targets: []string{"iqn.t:1", "iqn.t:2"}}, w)
	}()
	sc := bufio.NewScanner(r)
	for i := range 3 {
		sc.Scan()
		if l := sc.Text(); !strings.HasPrefix(l, "listening iscsi://127.0.0.1:") || !strings.HasSuffix(l, fmt.Sprintf("/iqn.t:%d/0", i%2+1)) {
			t.Errorf("line %q", l)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	var errs strings.Builder
	if code := Main([]string{"--size", "nonsense"}, io.Discard, &errs); code != 2 || !strings.Contains(errs.String(), "nonsense") {
		t.Errorf("exit %d: %s", code, errs.String())
	}
	if code := Main([]string{"--no-such-flag"}, io.Discard, io.Discard); code != 2 {
		t.Errorf("exit %d", code)
	}
}

// Whatever arrives, the process lives and serves the next session.
func TestSurvivesRandomPDUs(t *testing.T) {
	_, p, _ := newServer(t, Config{})
	r := rand.New(rand.NewPCG(3, 4))
	ops := []pdu.Opcode{pdu.OpNopOut, pdu.OpSCSICommand, pdu.OpTaskMgmtReq, pdu.OpLoginReq, pdu.OpTextReq, pdu.OpDataOut, pdu.OpSNACK, 0x1f}
	for i := range 150 {
		c := dial(t, p)
		switch i % 3 {
		case 0:
			c.loginTo("iqn.test:a", byte(i), fast...)
		case 1:
			c.loginTo("", byte(i), fast...)
		}
		go func() { _, _ = io.Copy(io.Discard, c.nc) }()
		for range 20 {
			var h pdu.Header
			for j := range h {
				if r.IntN(3) == 0 {
					h[j] = byte(r.Uint32())
				}
			}
			h.SetOpcode(ops[r.IntN(len(ops))])
			h[4] = 0
			if r.IntN(2) == 0 {
				h.SetLUN([8]byte{})
			}
			if r.IntN(4) > 0 {
				h.SetImmediate()
			}
			h.SetDataLen(4 * r.IntN(64))
			b := make([]byte, h.DataLen())
			if _, err := c.nc.Write(append(h[:], b...)); err != nil {
				break
			}
		}
		_ = c.nc.Close()
	}
	time.Sleep(10 * time.Millisecond)
	c := session(t, p, 200)
	if _, status := c.read(0, 8); status != 0 {
		t.Errorf("status %d", status)
	}
}
