package target

import (
	"encoding/binary"
	"hash/crc32"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// client is an initiator of PDUs, without any sense of its own.
type client struct {
	t     testing.TB
	nc    net.Conn
	cmdSN uint32
	itt   uint32
	buf   []byte
	tx    []byte
	head  pdu.Header // of the last PDU received
	on    digests    // in full feature phase
	spoil int        // byte of the next PDU that is damaged on its way, if positive
}

func newServer(t testing.TB, cfg Config) (*Server, *Portal, *LU) {
	t.Helper()
	lu, err := NewLU(64<<20, 512, DefaultIdentity("unit-test"))
	if err != nil {
		t.Fatal(err)
	}
	cfg.Targets = []*Target{{Name: "iqn.test:a", LUs: []*LU{lu}}, {Name: "iqn.test:b", LUs: []*LU{nil, lu}}}
	srv, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	p, err := srv.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(srv.Kill)
	return srv, p, lu
}

func dial(t testing.TB, p *Portal) *client {
	t.Helper()
	nc, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(time.Minute))
	return &client{t: t, nc: nc, itt: 1, buf: make([]byte, 1<<20), tx: make([]byte, 0, 1<<20)}
}

func (c *client) send(h *pdu.Header, data []byte) {
	c.t.Helper()
	h.SetDataLen(len(data))
	c.tx = append(c.tx[:0], h[:]...)
	if c.on.header {
		c.tx = binary.LittleEndian.AppendUint32(c.tx, crc(c.tx))
	}
	at := len(c.tx)
	c.tx = append(append(c.tx, data...), make([]byte, pdu.Pad(len(data)))...)
	if c.on.data && len(data) > 0 {
		c.tx = binary.LittleEndian.AppendUint32(c.tx, crc(c.tx[at:]))
	}
	if c.spoil > 0 {
		c.tx[c.spoil] ^= 0x10
		c.spoil = 0
	}
	if _, err := c.nc.Write(c.tx); err != nil {
		c.t.Fatal(err)
	}
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func crc(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// recv gives the next PDU; its data is valid until the next call.
func (c *client) recv() (*pdu.Header, []byte) {
	c.t.Helper()
	h, data, err := c.tryRecv()
	if err != nil {
		c.t.Fatal(err)
	}
	return h, data
}

func (c *client) tryRecv() (*pdu.Header, []byte, error) {
	if _, err := io.ReadFull(c.nc, c.head[:]); err != nil {
		return nil, nil, err
	}
	if c.on.header {
		c.digest(c.head[:])
	}
	n := c.head.DataLen()
	_, err := io.ReadFull(c.nc, c.buf[:n+pdu.Pad(n)])
	if c.on.data && n > 0 && err == nil {
		c.digest(c.buf[:n+pdu.Pad(n)])
	}
	return &c.head, c.buf[:n], err
}

// digest takes the digest of b.
func (c *client) digest(b []byte) {
	c.t.Helper()
	d := c.buf[len(c.buf)-pdu.DigestLen:]
	if _, err := io.ReadFull(c.nc, d); err != nil || binary.LittleEndian.Uint32(d) != crc(b) {
		c.t.Fatalf("digest %x of PDU %x: %v", d, c.head, err)
	}
}

func (c *client) loginTo(target string, isid byte, keys ...string) (class, detail uint8) {
	c.t.Helper()
	var h pdu.Header
	h.SetOpcode(pdu.OpLoginReq)
	h.SetImmediate()
	h.SetFlags(pdu.Final | pdu.StageOperational)
	h.SetISID([6]byte{0x80, 0, 0, 0, 0, isid})
	b := pdu.AppendKey(nil, "InitiatorName", "iqn.test:client")
	if target == "" {
		b = pdu.AppendKey(b, "SessionType", "Discovery")
	} else {
		b = pdu.AppendKey(b, "TargetName", target)
	}
	b = pdu.AppendKey(b, "AuthMethod", "None")
	c.send(&h, b)
	a, _ := c.recv()
	if class, detail = a.LoginStatus(); class != 0 {
		return class, detail
	}
	h.SetFlags(pdu.Final | pdu.StageOperational<<2 | pdu.StageFullFeature)
	b = b[:0]
	for i := 0; i < len(keys); i += 2 {
		b = pdu.AppendKey(b, keys[i], keys[i+1])
	}
	c.send(&h, b)
	a, _ = c.recv()
	if class, detail = a.LoginStatus(); class == 0 && a.TSIH() == 0 {
		c.t.Fatal("TSIH 0 in the final response")
	}
	answers := string(c.buf[:c.head.DataLen()])
	c.on = digests{strings.Contains(answers, "HeaderDigest=CRC32C"), strings.Contains(answers, "DataDigest=CRC32C")}
	return class, detail
}

var fast = []string{
	"InitialR2T", "No", "ImmediateData", "Yes",
	"MaxRecvDataSegmentLength", "262144", "MaxBurstLength", "1048576", "FirstBurstLength", "65536", "MaxOutstandingR2T", "4",
}

func session(t testing.TB, p *Portal, isid byte) *client {
	t.Helper()
	return digestSession(t, p, isid, "None", "None")
}

func digestSession(t testing.TB, p *Portal, isid byte, header, data string) *client {
	t.Helper()
	c := dial(t, p)
	if class, detail := c.loginTo("iqn.test:a", isid, append([]string{"HeaderDigest", header, "DataDigest", data}, fast...)...); class != 0 {
		t.Fatalf("login status %d/%d", class, detail)
	}
	return c
}

// command sends a SCSI Command PDU; more says that unsolicited data follows.
func (c *client) command(cdb [16]byte, flags uint8, edtl int, data []byte, more bool) uint32 {
	var h pdu.Header
	h.SetOpcode(pdu.OpSCSICommand)
	if !more {
		flags |= pdu.Final
	}
	h.SetFlags(flags | pdu.AttrSimple)
	c.itt++
	h.SetITT(c.itt)
	h.SetEDTL(uint32(edtl))
	h.SetCmdSN(c.cmdSN)
	c.cmdSN++
	*h.CDB() = cdb
	c.send(&h, data)
	return c.itt
}

func rw(op byte, lba uint64, blocks int) (cdb [16]byte) {
	cdb[0] = op
	binary.BigEndian.PutUint64(cdb[2:], lba)
	binary.BigEndian.PutUint32(cdb[10:], uint32(blocks))
	return cdb
}

// read runs a READ(16) and gives data, status and the last header.
func (c *client) read(lba uint64, blocks int) ([]byte, uint8) {
	c.t.Helper()
	return c.dataIn(rw(opRead16, lba, blocks), blocks*512)
}

func (c *client) dataIn(cdb [16]byte, edtl int) ([]byte, uint8) {
	c.t.Helper()
	c.command(cdb, pdu.CmdRead, edtl, nil, false)
	var all []byte
	for {
		h, data := c.recv()
		switch h.Opcode() {
		case pdu.OpDataIn:
			if int(h.BufferOffset()) != len(all) {
				c.t.Fatalf("Data-In at %d, want %d", h.BufferOffset(), len(all))
			}
			all = append(all, data...)
			if h.Flags()&pdu.StatusBit != 0 {
				return all, h.Status()
			}
		case pdu.OpSCSIResponse:
			return append([]byte(nil), data...), h.Status()
		default:
			c.t.Fatalf("unexpected opcode %#x", h.Opcode())
		}
	}
}

// write runs a WRITE(16) with this much immediate and unsolicited data, the
// rest as R2Ts ask for it, and gives status and sense.
func (c *client) write(lba uint64, data []byte, immediate, unsolicited int) (uint8, []byte) {
	c.t.Helper()
	itt := c.command(rw(opWrite16, lba, len(data)/512), pdu.CmdWrite, len(data), data[:immediate], unsolicited > immediate)
	c.out(itt, pdu.NoTag, data, immediate, unsolicited)
	for {
		h, b := c.recv()
		switch h.Opcode() {
		case pdu.OpR2T:
			at := int(h.BufferOffset())
			c.out(itt, h.TTT(), data, at, at+int(h.DesiredLen()))
		case pdu.OpSCSIResponse:
			return h.Status(), append([]byte(nil), b...)
		default:
			c.t.Fatalf("unexpected opcode %#x", h.Opcode())
		}
	}
}

// out sends data[at:end] in Data-Out PDUs.
func (c *client) out(itt, ttt uint32, data []byte, at, end int) {
	for at < end {
		n := min(end-at, 40<<10)
		var h pdu.Header
		h.SetOpcode(pdu.OpDataOut)
		h.SetITT(itt)
		h.SetTTT(ttt)
		h.SetBufferOffset(uint32(at))
		if at+n == end {
			h.SetFlags(pdu.Final)
		}
		c.send(&h, data[at:at+n])
		at += n
	}
}
