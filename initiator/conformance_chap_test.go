package initiator_test

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
)

const (
	chapUser   = "hannibal"
	chapSecret = "elephants-over-alps"
	peerSecret = "rome-wasnt-built"
)

// chapVectors are H(0x1f, "elephants-over-alps", 00 01 .. 0f), computed elsewhere.
var chapVectors = map[string]string{
	"5": "68122790ac9809721482a885b49d231c",
	"6": "018b70ab7edb04d46d0deb5401b73556c312d1ab",
	"7": "54c7c398523559f36acd2696e66ab822e20c9650f152a39740575747d27f2a0a",
	"8": "0b2370bd832f53913b6f595f556d7cdbca55a851b8df4103e406a51c869899b9",
}

const toLeave = pdu.Final | pdu.StageSecurity<<2 | pdu.StageOperational

// chapTarget is the target's side of CHAP. Each field left empty is what a good
// target does.
type chapTarget struct {
	algorithm, id, challenge string
	proof                    func(id byte, challenge []byte, answer string) []string // its last keys, nil: none
	last                     uint8                                                   // flags of the answer to ours; 0: go on
	status                   uint8                                                   // detail of a refusal of class 2 of our answer
	refuseList               bool                                                    // 0201 for any list of algorithms
	asked                    func(flags []uint8, said map[string]string)             // what the initiator sent
}

func (c chapTarget) serve(_ int, r *raw) {
	said, flags := map[string]string{}, []uint8{}
	read := func() (pdu.Header, bool) {
		h, data, ok := r.read()
		flags = append(flags, h.Flags()&(pdu.Final|pdu.Continue))
		ks, _ := pdu.ParseKeys(data)
		for _, k := range ks {
			said[k.Name] = k.Value
		}
		return h, ok
	}
	h, ok := read()
	if !ok {
		return
	}
	r.loginResponse(h, 0, keys("AuthMethod", "CHAP", "TargetPortalGroupTag", "1"), nil)
	if h, ok = read(); !ok {
		return
	}
	if c.refuseList && strings.Contains(said["CHAP_A"], ",") {
		r.loginResponse(h, 0, nil, func(h *pdu.Header) { h.SetLoginStatus(2, 1) })
		return
	}
	def := func(v, d string) string {
		if v == "" {
			return d
		}
		return v
	}
	r.loginResponse(h, 0, keys("CHAP_A", def(c.algorithm, "5"), "CHAP_I", def(c.id, "0x1f"), "CHAP_C", def(c.challenge, "0x000102030405060708090a0b0c0d0e0f")), nil)
	if h, ok = read(); !ok {
		return
	}
	if c.asked != nil {
		c.asked(flags, said)
	}
	if c.status != 0 {
		r.loginResponse(h, 0, nil, func(h *pdu.Header) { h.SetLoginStatus(2, c.status) })
		return
	}
	var proof []byte
	if c.proof != nil {
		var id byte
		fmt.Sscan(said["CHAP_I"], &id)
		challenge, _ := hex.DecodeString(strings.TrimPrefix(said["CHAP_C"], "0x"))
		proof = keys(c.proof(id, challenge, said["CHAP_R"])...)
	}
	if c.last != 0 { // stays in the stage first
		r.loginResponse(h, c.last&^pdu.Final&^3, proof, nil)
		proof = nil
		if h, ok = read(); !ok {
			return
		}
	}
	r.loginResponse(h, toLeave, proof, nil)
	if h, ok = read(); !ok {
		return
	}
	r.loginResponse(h, toFullFeature, nil, nil)
	r.drain()
}

// opens logs in to c with CHAP and ends the session.
func (c chapTarget) opens(t *testing.T, change func(*initiator.Config)) error {
	t.Helper()
	config := scripted(t, c.serve)
	config.User, config.Secret = chapUser, chapSecret
	if change != nil {
		change(&config)
	}
	s, err := initiator.Open(context.Background(), config)
	if err == nil {
		s.Abort(errors.New("test"))
		<-s.Done()
		return nil
	}
	for _, secret := range []string{chapSecret, peerSecret} {
		require.NotContains(t, err.Error(), secret)
	}
	return err
}

func proves(secret string) func(byte, []byte, string) []string {
	return func(id byte, challenge []byte, _ string) []string {
		sum := md5.Sum(append(append([]byte{id}, secret...), challenge...))
		return []string{"CHAP_N", "storage", "CHAP_R", "0x" + hex.EncodeToString(sum[:])}
	}
}

func mutually(c *initiator.Config) { c.MutualUser, c.MutualSecret = "storage", peerSecret }

// CHAP and digests in login: CH, DG04, DG05.
var chapCases = map[string]conformanceCase{
	"CH01": {"challenges with each algorithm, in hex and base64, either case of the prefix", "answers with the known values", func(t *testing.T) {
		raw := []byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
		for alg, want := range chapVectors {
			for _, c := range []string{"0x" + hex.EncodeToString(raw), "0X" + strings.ToUpper(hex.EncodeToString(raw)), "0b" + base64.StdEncoding.EncodeToString(raw), "0B" + base64.StdEncoding.EncodeToString(raw)} {
				got := map[string]string{}
				require.NoError(t, chapTarget{algorithm: alg, challenge: c, asked: func(_ []uint8, said map[string]string) { got = said }}.opens(t, nil))
				require.Equal(t, []string{"8,7,6,5", chapUser, "0x" + want}, []string{got["CHAP_A"], got["CHAP_N"], strings.ToLower(got["CHAP_R"])}, alg+" "+c)
			}
		}
	}},
	"CH02": {"sends challenges of 1, 1024 and 1025 bytes, and malformed ones", "answers the first two, refuses the others", func(t *testing.T) {
		for _, n := range []int{1, 1024} {
			require.NoError(t, chapTarget{challenge: "0x" + strings.Repeat("ab", n)}.opens(t, nil))
		}
		for _, c := range []string{"0x" + strings.Repeat("ab", 1025), "0xabc", "0b!!!", "0bAA\nA=", "0bAB==", "0x", "0b", "plain"} {
			require.ErrorContains(t, chapTarget{challenge: c}.opens(t, nil), "bad CHAP challenge", c)
		}
		chapRefuses(t, "bad CHAP challenge", "CHAP_A", "5", "CHAP_I", "1", "CHAP_C", "")
	}},
	"CH03": {"numbers its challenge 0, 255, 256, -1, 0x1f", "takes 0 to 255, refuses the others", func(t *testing.T) {
		for _, id := range []string{"0", "255", "0x1f", "0XFF"} {
			require.NoError(t, chapTarget{id: id}.opens(t, nil), id)
		}
		for _, id := range []string{"256", "-1", "x", "0x100", "1_0", "0b1", "+1"} {
			require.ErrorContains(t, chapTarget{id: id}.opens(t, nil), "CHAP_I", id)
		}
		chapRefuses(t, "CHAP_I", "CHAP_A", "5", "CHAP_I", "", "CHAP_C", "0x11")
	}},
	"CH04": {"picks an algorithm that was not offered", "refuses", func(t *testing.T) {
		for _, alg := range []string{"9", "4", "05", "5,6"} {
			require.ErrorContains(t, chapTarget{algorithm: alg}.opens(t, nil), "was not offered")
		}
		require.ErrorContains(t, chapTarget{algorithm: "5"}.opens(t, func(c *initiator.Config) { c.Algorithms = initiator.SHA256 | initiator.SHA3 }), "was not offered")
	}},
	"CH05": {"skips CHAP, leaves the stage before it is asked to, or sends keys of CHAP unasked", "refuses", func(t *testing.T) {
		for method, say := range map[string]string{"None": "does not authenticate with CHAP", "Reject": "does not authenticate with CHAP"} {
			c := scripted(t, loginStep(0, keys("AuthMethod", method), nil))
			c.User, c.Secret = chapUser, chapSecret
			_, err := initiator.Open(context.Background(), c)
			require.ErrorContains(t, err, say)
			require.Equal(t, initiator.RetrySlowly, initiator.Retry(err))
		}
		c := scripted(t, loginStep(toLeave, keys("AuthMethod", "None"), nil))
		c.User, c.Secret = chapUser, chapSecret
		_, err := initiator.Open(context.Background(), c)
		require.ErrorContains(t, err, "login stage 0 to 1")
		refuses(t, "CHAP_I before CHAP was offered", loginStep(toLeave, keys("AuthMethod", "None", "CHAP_I", "1"), nil))
		c = scripted(t, loginStep(0, keys("AuthMethod", "CHAP", "CHAP_A", "5", "CHAP_I", "1", "CHAP_C", "0x11"), nil))
		c.User, c.Secret = chapUser, chapSecret
		_, err = initiator.Open(context.Background(), c)
		require.ErrorContains(t, err, "CHAP_A before CHAP was offered")
	}},
	"CH06": {"proves itself, also a step late; does not; proves it wrongly, in short, or under another name", "takes the right proof only, before full feature phase", func(t *testing.T) {
		require.NoError(t, chapTarget{proof: proves(peerSecret)}.opens(t, mutually))
		require.NoError(t, chapTarget{proof: proves(peerSecret), last: toLeave}.opens(t, mutually))
		for why, proof := range map[string]func(byte, []byte, string) []string{
			"did not prove who it is":    nil,
			"did not prove":              func(byte, []byte, string) []string { return []string{"CHAP_N", "storage"} },
			"not prove who":              func(byte, []byte, string) []string { return []string{"CHAP_R", "0x00112233445566778899aabbccddeeff"} },
			"not know the mutual secret": proves("carthage-must-fall"),
			"bad CHAP response":          func(byte, []byte, string) []string { return []string{"CHAP_N", "storage", "CHAP_R", "0x0011"} },
			"bad CHAP response of 0":     func(byte, []byte, string) []string { return []string{"CHAP_N", "storage", "CHAP_R", "0xzz"} },
			`calls itself "somebody"`: func(id byte, c []byte, r string) []string {
				return append([]string{"CHAP_N", "somebody"}, proves(peerSecret)(id, c, r)[2:]...)
			},
		} {
			require.ErrorContains(t, chapTarget{proof: proof}.opens(t, mutually), why)
		}
	}},
	"CH07": {"sends our own challenge back on a second connection, or our own answer", "refuses", func(t *testing.T) {
		require.ErrorContains(t, chapTarget{proof: func(_ byte, _ []byte, answer string) []string { return []string{"CHAP_N", "storage", "CHAP_R", answer} }}.opens(t, mutually), "reflected our own answer")
		var inner error
		chapTarget{proof: func(id byte, challenge []byte, _ string) []string {
			inner = chapTarget{id: fmt.Sprint(id), challenge: "0x" + hex.EncodeToString(challenge)}.opens(t, nil)
			return nil
		}}.opens(t, mutually)
		require.ErrorContains(t, inner, "challenge of ours back")
	}},
	"CH08": {"is to be logged in to with equal secrets, short ones, or half of them", "does not even connect, or finds the target's equal secrets", func(t *testing.T) {
		for why, change := range map[string]func(c *initiator.Config){
			"same secret":                   func(c *initiator.Config) { c.MutualSecret = c.Secret },
			"less than 12 bytes":            func(c *initiator.Config) { c.Secret = "eleven-byte" },
			"mutual CHAP secret has":        func(c *initiator.Config) { c.MutualSecret = "eleven-byte" },
			"has no secret":                 func(c *initiator.Config) { c.Secret = "" },
			"without a user":                func(c *initiator.Config) { c.User = "" },
			"mutual_chap_secret_file needs": func(c *initiator.Config) { c.User, c.Secret, c.MutualSecret = "", "", peerSecret },
			"set mutual_chap_secret_":       func(c *initiator.Config) { c.MutualUser = "storage" },
		} {
			c := initiator.Config{Address: "192.0.2.1:3260", TargetName: iqn, InitiatorName: "iqn.2026-11.example:i"} // nothing answers there
			c.User, c.Secret = chapUser, chapSecret
			change(&c)
			_, err := initiator.Open(context.Background(), c)
			require.ErrorContains(t, err, why)
			require.Equal(t, initiator.RetrySlowly, initiator.Retry(err))
		}
		require.NoError(t, chapTarget{}.opens(t, func(c *initiator.Config) { c.Secret, c.ShortSecrets = "short", true }))
		require.ErrorContains(t, chapTarget{proof: proves(chapSecret)}.opens(t, mutually), "same secret for both directions")
	}},
	"CH09": {"refuses a list of algorithms with 0201, takes 5 alone", "tries 5 alone, once, if policy allows MD5", func(t *testing.T) {
		lists := []string{}
		note := func(_ []uint8, said map[string]string) { lists = append(lists, said["CHAP_A"]) }
		require.NoError(t, chapTarget{refuseList: true, asked: note}.opens(t, nil))
		require.Equal(t, []string{"5"}, lists)
		err := chapTarget{refuseList: true, asked: note}.opens(t, func(c *initiator.Config) { c.Algorithms = initiator.SHA256 | initiator.SHA1 })
		require.ErrorContains(t, err, "authentication failed")
		lists = nil
		require.ErrorContains(t, chapTarget{algorithm: "8", status: 1, asked: note}.opens(t, nil), "authentication failed")
		require.Equal(t, []string{"8,7,6,5"}, lists, "a refused answer is no refused list")
		lists = nil
		require.ErrorContains(t, chapTarget{algorithm: "5", refuseList: true, status: 1, asked: note}.opens(t, nil), "authentication failed")
		require.Equal(t, []string{"5"}, lists, "one fallback")
	}},
	"CH10": {"takes part in every step", "asks to leave the stage in its last request only", func(t *testing.T) {
		for _, change := range []func(*initiator.Config){nil, mutually} {
			var got []uint8
			require.NoError(t, chapTarget{proof: proves(peerSecret), asked: func(flags []uint8, _ map[string]string) { got = flags }}.opens(t, change))
			require.Equal(t, []uint8{0, 0, pdu.Final}, got)
		}
	}},
	"DG04": {"does one digest of the two, or lets policy decide", "frames PDUs accordingly, by what was negotiated", func(t *testing.T) {
		for _, on := range [][2]bool{{true, false}, {false, true}, {false, false}, {true, true}} {
			digestSession(t, on, initiator.DigestPreferred)
			digestSession(t, on, initiator.DigestAccepted)
		}
		digestSession(t, [2]bool{true, true}, initiator.DigestRequired)
		c := scripted(t, answers("HeaderDigest", "None", "DataDigest", "None"))
		c.DataDigest = initiator.DigestRequired
		_, err := initiator.Open(context.Background(), c)
		require.ErrorContains(t, err, "does not do CRC32C as DataDigest")
		require.Equal(t, initiator.RetrySlowly, initiator.Retry(err))
		c = scripted(t, answers("InitialR2T", "No"))
		c.HeaderDigest = initiator.DigestRequired
		_, err = initiator.Open(context.Background(), c)
		require.ErrorContains(t, err, "without a word about digests")
		require.Equal(t, initiator.RetrySlowly, initiator.Retry(err))
	}},
	"DG05": {"negotiates both digests", "sends none in login and both from the first PDU of full feature phase", func(t *testing.T) {
		digestSession(t, [2]bool{true, true}, initiator.DigestRequired) // r.login reads requests without digests
	}},
}

// digestSession logs in without digests, then writes and reads with those that
// are on.
func digestSession(t *testing.T, on [2]bool, policy initiator.Digest) {
	t.Helper()
	word := map[bool]string{true: "CRC32C", false: "None"}
	offered := make(chan []pdu.Key, 1)
	c := scripted(t, func(_ int, r *raw) {
		if !r.login("HeaderDigest", word[on[0]], "DataDigest", word[on[1]], "MaxRecvDataSegmentLength", "8192") {
			return
		}
		offered <- r.offered
		for {
			h, data, ok := r.readDigested(on)
			if !ok {
				return
			}
			switch {
			case h.Opcode() == pdu.OpSCSICommand && h.Flags()&pdu.CmdRead != 0:
				r.sendDigested(on, pdu.OpDataIn, h.ITT(), pdu.Final|pdu.StatusBit, pattern)
			case h.Opcode() == pdu.OpSCSICommand && len(data) == 512:
				r.sendDigested(on, pdu.OpSCSIResponse, h.ITT(), pdu.Final, nil)
			}
		}
	})
	c.HeaderDigest, c.DataDigest = policy, policy
	s, err := initiator.Open(context.Background(), c)
	require.NoError(t, err)
	defer func() { s.Abort(errors.New("test")); <-s.Done() }()
	require.Equal(t, on, [2]bool{s.Negotiated().HeaderDigest, s.Negotiated().DataDigest})
	list := map[initiator.Digest]string{initiator.DigestRequired: "CRC32C", initiator.DigestPreferred: "CRC32C,None", initiator.DigestAccepted: "None,CRC32C"}[policy]
	require.Subset(t, <-offered, []pdu.Key{{Name: "HeaderDigest", Value: list}, {Name: "DataDigest", Value: list}})
	require.NoError(t, write(t, s, 512).result(t).Err)
	w := read8(t, s)
	require.NoError(t, w.result(t).Err)
	require.True(t, bytes.Equal(pattern, w.c.Data))
}
