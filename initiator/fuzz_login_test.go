package initiator_test

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
)

// Secrets of the fuzzed logins: they appear in nothing that is sent or said.
const (
	fuzzSecret = "one-way-secret-0123"
	fuzzMutual = "mutual-secret-98765"
)

// Modes of a login.
const (
	loginCHAP byte = 1 << iota
	loginMutual
	loginDigests
	loginDiscovery
)

// Repairs of a login answer.
const (
	loginStatSN byte = 1 << iota // the StatSN that is due
	loginOpcode                  // a login response, version 0, no additional header
	loginLength                  // the length of the text that follows
	loginStages                  // the stages that were asked for, success
	loginProof                   // a right mutual CHAP response is appended
	loginCut                     // the connection ends behind this answer
)

// answerRecord is how fuzzed login answers are written down: repairs, header,
// length of the text (two bytes), text.
func answerRecord(fix byte, h pdu.Header, kv ...string) []byte {
	text := keys(kv...)
	return append(append(append([]byte{fix}, h[:]...), byte(len(text)>>8), byte(len(text))), text...)
}

// answerer is the target's end of a login: it answers each request with the
// next record of the input.
type answerer struct {
	in     []byte
	statSN uint32
	proved bool   // it sent a right mutual response
	sent   []byte // all that the initiator sent
}

// serve answers until the input or the connection ends.
func (a *answerer) serve(c net.Conn, textOnly bool) {
	defer c.Close()
	var challenge, id, alg string
	for {
		var rq pdu.Header
		if _, err := io.ReadFull(c, rq[:]); err != nil {
			return
		}
		data := make([]byte, rq.DataLen()+pdu.Pad(rq.DataLen()))
		if _, err := io.ReadFull(c, data); err != nil {
			return
		}
		data = data[:rq.DataLen()]
		a.sent = append(a.sent, data...)
		ks, err := pdu.ParseKeys(data)
		if err != nil {
			panic(err) // of what we sent
		}
		for _, k := range ks {
			switch k.Name {
			case "CHAP_C":
				challenge = k.Value
			case "CHAP_I":
				id = k.Value
			}
		}
		h, text, fix, ok := a.next()
		if !ok {
			return
		}
		if i := bytes.Index(text, []byte("CHAP_A=")); i >= 0 && i+7 < len(text) {
			alg = string(text[i+7 : i+8])
		}
		if fix&loginProof != 0 && challenge != "" && alg == "5" {
			text = pdu.AppendKey(pdu.AppendKey(bytes.Clone(text), "CHAP_N", "target"), "CHAP_R", proof(id, challenge))
			a.proved = true
		}
		if fix&loginStatSN != 0 {
			h.SetStatSN(a.statSN)
			a.statSN++
		}
		if fix&loginOpcode != 0 {
			h[0], h[2], h[3], h[4] = uint8(pdu.OpLoginResp), 0, 0, 0
			if textOnly {
				h[0] = uint8(pdu.OpTextResp)
			}
		}
		if fix&loginLength != 0 {
			h.SetDataLen(len(text))
		}
		if fix&loginStages != 0 {
			h[1], h[36], h[37] = rq[1], 0, 0
			h.SetTSIH(7)
		}
		wrong := h.AHSLen() != 0 || h.DataLen() != len(text)
		if wrong { // both would wait for the other
			c.SetDeadline(time.Now().Add(time.Millisecond))
		}
		c.Write(append(append(append([]byte(nil), h[:]...), text...), make([]byte, pdu.Pad(len(text)))...))
		if fix&loginCut != 0 || wrong {
			return
		}
	}
}

func (a *answerer) next() (h pdu.Header, text []byte, fix byte, ok bool) {
	if len(a.in) < 1+pdu.HeaderLen+2 {
		return h, nil, 0, false
	}
	fix = a.in[0]
	copy(h[:], a.in[1:])
	n := int(a.in[49])<<8 | int(a.in[50])
	a.in = a.in[51:]
	n = min(n, len(a.in))
	text, a.in = a.in[:n], a.in[n:]
	return h, text, fix, true
}

// proof is the MD5 response of one who knows the mutual secret.
func proof(id, challenge string) string {
	n, _ := strconv.Atoi(id)
	c, _ := hex.DecodeString(challenge[2:])
	sum := md5.Sum(append(append([]byte{byte(n)}, fuzzMutual...), c...))
	return "0x" + hex.EncodeToString(sum[:])
}

func loginSeeds(f *testing.F) {
	const all = loginStatSN | loginOpcode | loginLength | loginStages
	operational := []string{"HeaderDigest", "None", "DataDigest", "None", "InitialR2T", "No", "ImmediateData", "Yes", "MaxRecvDataSegmentLength", "262144",
		"MaxBurstLength", "262144", "FirstBurstLength", "65536", "MaxOutstandingR2T", "1", "MaxConnections", "1", "ErrorRecoveryLevel", "0",
		"DefaultTime2Wait", "2", "DefaultTime2Retain", "0", "DataPDUInOrder", "Yes", "DataSequenceInOrder", "Yes", "TargetAlias", "a", "X-com.example.k", "1"}
	digests := append([]string{"HeaderDigest", "CRC32C", "DataDigest", "CRC32C"}, operational[4:]...)
	var none pdu.Header
	add := func(mode byte, records ...[]byte) { f.Add(append([]byte{mode}, bytes.Join(records, nil)...)) }
	first := answerRecord(all, none, "AuthMethod", "None", "TargetPortalGroupTag", "1")
	add(0, first, answerRecord(all, none, operational...))
	add(loginDigests, first, answerRecord(all, none, digests...))
	add(loginDigests, first, answerRecord(all, none, operational...))
	add(loginDiscovery, answerRecord(all, none, "AuthMethod", "None"), answerRecord(all, none, "MaxRecvDataSegmentLength", "8192"))
	chap := answerRecord(all, none, "AuthMethod", "CHAP", "TargetPortalGroupTag", "1")
	for _, c := range [][2]string{{"5", "0x0102030405060708090a0b0c0d0e0f10"}, {"8", "0bAAECAwQFBgcICQ=="}, {"7", "0x"}, {"9", "0x00"}} {
		challenge := answerRecord(all, none, "CHAP_A", c[0], "CHAP_I", "7", "CHAP_C", c[1])
		add(loginCHAP, chap, challenge, answerRecord(all, none), answerRecord(all, none, operational...))
		add(loginCHAP|loginMutual, chap, challenge, answerRecord(all|loginProof, none), answerRecord(all, none, operational...))
		add(loginCHAP|loginMutual, chap, challenge, answerRecord(all, none, "CHAP_N", "target", "CHAP_R", "0x00112233445566778899aabbccddeeff"), answerRecord(all, none, operational...))
		add(loginCHAP|loginMutual, chap, challenge, answerRecord(all, none), answerRecord(all, none, operational...))
	}
	add(loginCHAP, answerRecord(all, none, "AuthMethod", "None"), answerRecord(all, none, operational...))
	add(loginCHAP, chap, answerRecord(all, none, "CHAP_A", "Reject"), chap, answerRecord(all, none, "CHAP_A", "5", "CHAP_I", "0", "CHAP_C", "0xff"))
	status := func(class, detail uint8, kv ...string) []byte {
		var h pdu.Header
		h.SetLoginStatus(class, detail)
		return answerRecord(loginStatSN|loginOpcode|loginLength|loginCut, h, kv...)
	}
	add(0, status(1, 1, "TargetAddress", "10.0.0.1:3260,1"), first, answerRecord(all, none, operational...))
	add(0, status(1, 2, "TargetAddress", "[fe80::1%eth0]:3260"), status(1, 1, "TargetAddress", "host"), status(1, 1, "TargetAddress", ":::"))
	for class := uint8(1); class < 5; class++ {
		add(0, status(class, 0))
		add(loginCHAP, status(class, 1), status(class, 6))
	}
	var more pdu.Header
	more[1] = pdu.Continue
	add(0, answerRecord(loginStatSN|loginOpcode|loginLength, more, "AuthMethod", "None"), answerRecord(all, none, "TargetPortalGroupTag", "1"), answerRecord(all, none, operational...))
	add(0, first, answerRecord(all, none, "MaxBurstLength", "16777216"))
	add(0, first, answerRecord(all, none, "FirstBurstLength", "0x10000", "MaxBurstLength", "512"))
	add(0, first, answerRecord(all, none, "InitialR2T", "Reject", "ImmediateData", "Irrelevant", "MaxBurstLength", "NotUnderstood", "OFMarker", "Yes"))
}

// FuzzLogin is a target that answers a login with anything: no panic, no wait
// beyond the time given, parameters in bounds, no secret sent or said, and no
// session with a target that did not prove itself where it had to.
func FuzzLogin(f *testing.F) {
	loginSeeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) == 0 || len(in) > 1<<18 {
			return
		}
		mode := in[0]
		c := initiator.Config{Address: "fuzz:3260", TargetName: iqn, InitiatorName: "iqn.2026-11.example:i", LoginTimeout: 30 * time.Second,
			HeaderDigest: digestPolicy(mode&loginDigests != 0), DataDigest: digestPolicy(mode&loginDigests != 0)}
		if mode&loginCHAP != 0 {
			c.User, c.Secret = "user", fuzzSecret
			if mode&loginMutual != 0 {
				c.MutualUser, c.MutualSecret = "target", fuzzMutual
			}
		}
		a := &answerer{in: in[1:], statSN: 100}
		served := make(chan struct{}, 64)
		dials := 0
		c.Dial = func(_ context.Context, _, address string) (net.Conn, error) {
			if _, _, err := net.SplitHostPort(address); err != nil {
				t.Errorf("dial of %q", address)
			}
			if dials++; dials > cap(served) {
				t.Error("dials without end")
				return nil, io.EOF
			}
			if dials > 1 {
				<-served // one connection at a time
			}
			near, far := net.Pipe()
			go func() { a.serve(far, false); served <- struct{}{} }()
			return near, nil
		}
		began := time.Now()
		var err error
		if mode&loginDiscovery != 0 {
			_, err = initiator.Discover(t.Context(), c)
		} else {
			var s *initiator.Session
			if s, err = initiator.Open(t.Context(), c); err == nil {
				checkParams(t, s.Negotiated(), mode)
				if c.MutualSecret != "" && !a.proved {
					t.Error("a session with a target that did not prove itself")
				}
				s.Abort(io.EOF)
				<-s.Done()
			}
		}
		<-served
		if time.Since(began) > 20*time.Second {
			t.Error("the login waits for nothing")
		}
		said := ""
		if err != nil {
			said = err.Error()
		}
		if mode&loginDiscovery == 0 && err == nil && len(a.sent) == 0 {
			t.Error("a session without a login")
		}
		for _, secret := range []string{fuzzSecret, fuzzMutual} {
			if strings.Contains(said, secret) || bytes.Contains(a.sent, []byte(secret)) {
				t.Errorf("a secret came out: %q", said)
			}
		}
		for _, r := range said {
			if r < 0x20 || r == 0x7f || r == 0xfffd {
				t.Errorf("error with control characters: %q", said)
			}
		}
		var le *initiator.LoginError
		if errors.As(err, &le) && le.Class == 0 {
			t.Error("refused with success")
		}
	})
}

func checkParams(t *testing.T, p initiator.Params, mode byte) {
	t.Helper()
	if p.FirstBurst < 512 || p.FirstBurst > p.MaxBurst || p.MaxBurst > 16<<20 || p.TargetMaxData < 512 || p.TargetMaxData > 1<<24 || p.MaxR2T < 1 || p.MaxR2T > 64 {
		t.Errorf("negotiated %+v", p)
	}
	if d := mode&loginDigests != 0; p.HeaderDigest != d || p.DataDigest != d {
		t.Errorf("digests %v negotiated: %+v", d, p)
	}
}

// FuzzSendTargets is a portal that answers SendTargets with anything, in as
// many responses as it likes.
func FuzzSendTargets(f *testing.F) {
	const all = loginStatSN | loginOpcode | loginLength
	final := pdu.Header{1: pdu.Final}
	final.SetTTT(pdu.NoTag)
	more := pdu.Header{1: pdu.Continue}
	more.SetTTT(9)
	for _, text := range [][]string{
		{"TargetName", "iqn.2009-01.nl.pref:storage.xensan2", "TargetAddress", "192.168.1.252:3260,1", "TargetAddress", "[2001:db8::1]:3260,2"},
		{"TargetName", "iqn.a:b", "TargetAddress", "san.example,1", "TargetName", "eui.0123456789abcdef", "TargetName", "naa.5005076800000001", "TargetAddress", "[fe80::1%eth0],65535"},
		{"TargetAddress", "10.0.0.1,1"}, {"TargetName", "../../etc"}, {"TargetName", "iqn.a;rm -rf"}, {"TargetName", "iqn.x", "TargetAddress", "a:99999,1"},
		{"TargetName", "iqn.\u00e9\u202e", "TargetAddress", "10.0.0.1:3260,99999999999999999999"}, {},
	} {
		f.Add(answerRecord(all, final, text...))
		f.Add(append(answerRecord(all, more, text...), answerRecord(all, final, text...)...))
	}
	f.Add(bytes.Repeat(answerRecord(all, more, "TargetName", "iqn.a:b"), 40))
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 1<<18 {
			return
		}
		near, far := net.Pipe()
		served := make(chan struct{})
		go func() {
			defer close(served)
			r := &raw{Conn: far, statSN: 100, window: 32}
			if r.login("MaxRecvDataSegmentLength", "8192") {
				(&answerer{in: in, statSN: r.statSN}).serve(far, true)
			}
			far.Close()
		}()
		found, err := initiator.Discover(t.Context(), initiator.Config{Address: "fuzz:3260", InitiatorName: "iqn.2026-11.example:i",
			Dial: func(context.Context, string, string) (net.Conn, error) { return near, nil }})
		<-served
		if err != nil && (len(found.Targets) > 0 || len(found.Skipped) > 0) {
			t.Error("targets with an error")
		}
		n := 0
		if len(found.Skipped) > 64 {
			t.Errorf("%d messages", len(found.Skipped))
		}
		for _, why := range found.Skipped {
			if strings.ContainsFunc(why, func(r rune) bool { return r < 0x20 || r >= 0x7f && r < 0xa0 }) {
				t.Errorf("message %q", why)
			}
		}
		for _, tg := range found.Targets {
			n += len(tg.Name)
			if len(tg.Name) > 223 || strings.ContainsAny(tg.Name, " /\\\x00\n\x1b;'\"") || !strings.Contains(tg.Name, ".") {
				t.Errorf("target %q", tg.Name)
			}
			for _, r := range tg.Name {
				if r < 0x20 || r == 0x7f || r == 0xfffd || r >= 0x80 && r < 0xa0 {
					t.Errorf("target %q", tg.Name)
				}
			}
			for _, p := range tg.Portals {
				n += len(p.Address)
				host, port, err := net.SplitHostPort(p.Address)
				if num, e := strconv.Atoi(port); err != nil || e != nil || host == "" || num < 1 || num > 65535 || p.Group < -1 || p.Group > 65535 {
					t.Errorf("portal %+v", p)
				}
				for _, r := range p.Address {
					if r < 0x21 || r == 0x7f || r == 0xfffd || r >= 0x80 && r < 0xa0 {
						t.Errorf("portal %q", p.Address)
					}
				}
			}
		}
		if n > 16*(len(in)+16) {
			t.Errorf("%d bytes of names out of %d", n, len(in))
		}
	})
}
