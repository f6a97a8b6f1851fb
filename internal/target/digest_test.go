package target

import (
	"bytes"
	"testing"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
)

func TestDigestsCoverWhatIsReadAndWritten(t *testing.T) {
	for _, on := range []digests{{true, false}, {false, true}, {true, true}} {
		_, p, lu := newServer(t, Config{})
		word := map[bool]string{true: "CRC32C,None", false: "None,CRC32C"}
		c := digestSession(t, p, 1, word[on.header], word[on.data])
		if c.on != on {
			t.Fatalf("digests %v, want %v", c.on, on)
		}
		want := random(3<<20 + 512)
		if status, sense := c.write(2047, want, 4096, 65536); status != 0 {
			t.Fatalf("write: status %d sense %x", status, sense)
		}
		if got, status := c.read(2047, len(want)/512); status != 0 || !bytes.Equal(got, want) {
			t.Fatalf("read: status %d, equal %v", status, bytes.Equal(got, want))
		}
		if b, status := c.read(lu.Size()/512, 1); status != 2 || b[14] != 0x21 { // sense
			t.Errorf("read beyond the end: status %d sense %x", status, b)
		}
		for n := range 5 { // paddings, and no data
			c.nopOut(random(n))
			if h, b := c.recv(); h.Opcode() != pdu.OpNopIn || !bytes.Equal(b, random(n)) {
				t.Errorf("ping of %d bytes: opcode %#x with %x", n, h.Opcode(), b)
			}
		}
	}
}

func (c *client) nopOut(data []byte) {
	var h pdu.Header
	h.SetOpcode(pdu.OpNopOut)
	h.SetImmediate()
	h.SetFlags(pdu.Final)
	h.SetITT(4711)
	h.SetTTT(pdu.NoTag)
	h.SetCmdSN(c.cmdSN)
	c.send(&h, data)
}

func TestDamageEndsTheConnectionAndReachesNoDisk(t *testing.T) {
	const data = pdu.HeaderLen + pdu.DigestLen
	for _, tt := range []struct {
		name   string
		spoil  int
		reject bool
	}{{"header", 20, false}, {"length", 6, false}, {"header digest", pdu.HeaderLen, false}, {"data", data + 100, true}, {"data digest", data + 512 + 3, true}} {
		t.Run(tt.name, func(t *testing.T) {
			_, p, lu := newServer(t, Config{})
			c := digestSession(t, p, 1, "CRC32C", "CRC32C")
			c.spoil = tt.spoil
			itt := c.command(rw(opWrite16, 0, 1), pdu.CmdWrite, 512, random(512), false)
			h, b, err := c.tryRecv()
			if tt.reject {
				if err != nil || h.Opcode() != pdu.OpReject || h.Response() != pdu.RejectDataDigest || (*pdu.Header)(b).ITT() != itt {
					t.Fatalf("%v: %x %x", err, h, b)
				}
				_, _, err = c.tryRecv()
			}
			if err == nil {
				t.Error("the connection lives on")
			}
			if lu.Allocated() != 0 {
				t.Error("damaged data is on the disk")
			}
		})
	}
}

// TestDigestsHoldWhileOthersWrite reads what another session writes meanwhile:
// whatever comes, its digest is right.
func TestDigestsHoldWhileOthersWrite(t *testing.T) {
	_, p, lu := newServer(t, Config{})
	c := digestSession(t, p, 1, "None", "CRC32C")
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for i := byte(0); ; i++ {
			select {
			case <-stop:
				return
			default:
				_, _ = lu.WriteAt(bytes.Repeat([]byte{i}, 256<<10), 0)
			}
		}
	}()
	for end := time.Now().Add(100 * time.Millisecond); time.Now().Before(end); {
		if _, status := c.read(0, 512); status != 0 {
			t.Fatalf("status %d", status)
		}
	}
	close(stop)
	<-stopped
}

func TestNoDigestThatIsUnknown(t *testing.T) {
	_, p, _ := newServer(t, Config{})
	if class, _ := dial(t, p).loginTo("iqn.test:a", 1, "HeaderDigest", "CRC64"); class != 2 {
		t.Errorf("status class %d", class)
	}
}

func TestNoAllocationPerIOWithDigests(t *testing.T) {
	_, p, _ := newServer(t, Config{})
	noAllocationPerIO(t, digestSession(t, p, 1, "CRC32C", "CRC32C"))
}
