package initiator

import (
	"crypto/md5"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha3"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// security passes CSG 0: no authentication, or CHAP in one direction or both (RFC 7143 12.1).
func (lg *login) security() error {
	if lg.c.User != "" {
		return lg.chap()
	}
	lg.say("AuthMethod", "None")
	for {
		h, err := lg.exchange(pdu.StageSecurity, pdu.StageOperational, true)
		if err != nil {
			return err
		}
		if m, ok := lg.auth["AuthMethod"]; ok && m != "None" {
			return settingError{errors.New("the target wants authentication: set a CHAP user and secret")}
		}
		if h.IsFinal() {
			return nil
		}
	}
}

// chap proves us to the target, and with a mutual secret the target to us. Only
// the request that carries our answer, and what follows it, asks to leave the
// stage: some targets fail otherwise.
func (lg *login) chap() error {
	lg.say("AuthMethod", "CHAP")
	if err := lg.await("AuthMethod"); err != nil {
		return err
	}
	if m := lg.auth["AuthMethod"]; m != "CHAP" {
		return unsettled("the target does not authenticate with CHAP although a user is configured (it says AuthMethod=%.16q)", m)
	}
	lg.say("CHAP_A", lg.algorithms())
	if err := lg.await("CHAP_A"); err != nil {
		return err
	}
	if noAnswer(lg.auth["CHAP_A"]) {
		return errAlgorithms
	}
	alg := lg.auth["CHAP_A"]
	if !slices.Contains(strings.Split(lg.offered["CHAP_A"], ","), alg) {
		return breach("CHAP algorithm %.16q was not offered", alg)
	}
	answer, err := lg.chapAnswer(alg)
	if err != nil {
		return err
	}
	lg.answered = true
	lg.say("CHAP_N", lg.c.User)
	lg.say("CHAP_R", "0x"+hex.EncodeToString(answer))
	if lg.c.MutualSecret == "" {
		return lg.leaveSecurity()
	}
	return lg.mutual(alg, answer)
}

// await goes on in the security stage, with empty requests if need be, until
// the target has said a key.
func (lg *login) await(name string) error {
	for {
		if _, err := lg.exchange(pdu.StageSecurity, 0, false); err != nil {
			return err
		}
		if _, ok := lg.auth[name]; ok {
			return nil
		}
	}
}

// leaveSecurity asks to go on until the target does.
func (lg *login) leaveSecurity() error {
	for {
		h, err := lg.exchange(pdu.StageSecurity, pdu.StageOperational, true)
		if err != nil || h.IsFinal() {
			return err
		}
	}
}

// errAlgorithms: the target rejected our list of CHAP algorithms.
var errAlgorithms error = settingError{errors.New("the target knows none of the CHAP algorithms offered: see chap_algs")}

// challenges are those of all logins under way: a target that sends one back
// wants us to compute its own answer (RFC 7143 9.2.1).
var challenges sync.Map

// mutual challenges the target with our answer, and checks its own before the
// stage is left: one that goes on without has proved nothing.
func (lg *login) mutual(alg string, ours []byte) error {
	var challenge [32]byte
	var id [1]byte
	rand.Read(challenge[:])
	rand.Read(id[:])
	challenges.Store(challenge, true)
	defer challenges.Delete(challenge)
	lg.say("CHAP_I", strconv.Itoa(int(id[0])))
	lg.say("CHAP_C", "0x"+hex.EncodeToString(challenge[:]))
	if err := lg.leaveSecurity(); err != nil {
		return err
	}
	name, named := lg.auth["CHAP_N"]
	text, answered := lg.auth["CHAP_R"]
	if !named || !answered {
		return settingError{errors.New("mutual CHAP: the target did not prove who it is: set an outgoing user and secret there")}
	}
	answer, err := binaryValue(text)
	if err != nil || len(answer) != len(ours) {
		return breach("bad CHAP response of %d bytes", len(answer))
	}
	if subtle.ConstantTimeCompare(answer, ours) == 1 {
		return settingError{errors.New("mutual CHAP: the target reflected our own answer")}
	}
	if lg.c.MutualUser != "" && name != lg.c.MutualUser {
		return unsettled("mutual CHAP: the target calls itself %.64q, mutual_chap_user says %q", name, lg.c.MutualUser)
	}
	switch {
	case subtle.ConstantTimeCompare(answer, chapHash(alg, id[0], lg.c.MutualSecret, challenge[:])) == 1:
		return nil
	case subtle.ConstantTimeCompare(answer, chapHash(alg, id[0], lg.c.Secret, challenge[:])) == 1:
		return settingError{errors.New("mutual CHAP: the target has the same secret for both directions, which proves nothing: choose another one there")}
	}
	return settingError{errors.New("mutual CHAP: the target does not know the mutual secret: check mutual_chap_secret_file, or whom you are talking to")}
}

// chapAnswer is our answer to the target's challenge.
func (lg *login) chapAnswer(alg string) ([]byte, error) {
	id, ok := parseNumber(lg.auth["CHAP_I"])
	if !ok || id > 255 {
		return nil, breach("CHAP_I=%.16q", lg.auth["CHAP_I"])
	}
	challenge, err := binaryValue(lg.auth["CHAP_C"])
	if err != nil || len(challenge) == 0 || len(challenge) > maxChallenge {
		return nil, breach("bad CHAP challenge")
	}
	if len(challenge) == 32 {
		if _, reflected := challenges.Load([32]byte(challenge)); reflected {
			return nil, settingError{errors.New("CHAP: the target sent a challenge of ours back: it does not know the secret itself")}
		}
	}
	return chapHash(alg, byte(id), lg.c.Secret, challenge), nil
}

const maxChallenge = 1024 // bytes of CHAP_C (RFC 7143 12.1.3)

// chapHash is H(identifier, secret, challenge) (RFC 1994 4.1).
func chapHash(alg string, id byte, secret Secret, challenge []byte) []byte {
	h := chapHashes[alg]()
	s := []byte(secret)
	h.Write([]byte{id})
	h.Write(s)
	h.Write(challenge)
	clear(s)
	return h.Sum(nil)
}

// chapHashes are the algorithms by their CHAP_A number (RFC 7143 12.1.3 for MD5,
// IANA's list of PPP authentication algorithms for the others).
var chapHashes = map[string]func() hash.Hash{
	"5": md5.New, "6": sha1.New, "7": sha256.New, "8": func() hash.Hash { return sha3.New256() },
}

// Algorithms is a set of CHAP algorithms; empty means all.
type Algorithms uint8

// The algorithms: CHAP_A 5 of RFC 7143 12.1.3, and 6, 7 and 8 of IANA's registry
// "PPP Authentication Algorithms".
const (
	MD5 Algorithms = 1 << iota
	SHA1
	SHA256
	SHA3
)

// chapNames are in the order in which algorithms are offered: by strength.
var chapNames = []struct {
	name, number string
	bit          Algorithms
}{{"SHA3-256", "8", SHA3}, {"SHA256", "7", SHA256}, {"SHA1", "6", SHA1}, {"MD5", "5", MD5}}

func (a Algorithms) allows(x Algorithms) bool { return a == 0 || a&x != 0 }

// ParseAlgorithms reads a list like "SHA3-256,SHA256,SHA1,MD5", in any order and
// case: the strongest is always offered first.
func ParseAlgorithms(v string) (a Algorithms, err error) {
next:
	for word := range strings.SplitSeq(v, ",") {
		for _, n := range chapNames {
			if strings.EqualFold(strings.TrimSpace(word), n.name) {
				a |= n.bit
				continue next
			}
		}
		return 0, fmt.Errorf("%.40q: want some of SHA3-256, SHA256, SHA1, MD5, with commas", v)
	}
	return a, nil
}

// algorithms is the value of CHAP_A.
func (lg *login) algorithms() string {
	var list []string
	for _, n := range chapNames {
		if lg.c.Algorithms.allows(n.bit) && (!lg.md5Only || n.bit == MD5) {
			list = append(list, n.number)
		}
	}
	return strings.Join(list, ",")
}

// offersMore tells whether something else than MD5 was offered.
func (lg *login) offersMore() bool { return lg.algorithms() != "5" }

// algorithmsRefused tells whether a login may have failed for the list of
// algorithms alone: LIO before 3.15 and Synology refuse any list, and tgt means
// SHA-1 by 7, where everybody else means SHA-256, so that our answer is wrong.
// A refusal of any other answer is about user or secret.
func (lg *login) algorithmsRefused(err error) bool {
	var denied *LoginError
	return errors.Is(err, errAlgorithms) ||
		errors.As(err, &denied) && denied.Class == 2 && denied.Detail <= 1 && (!lg.answered || lg.auth["CHAP_A"] == "7")
}

// binaryValue decodes 0x hex and 0b base64 (RFC 7143 6.1).
func binaryValue(v string) ([]byte, error) {
	switch {
	case strings.HasPrefix(v, "0x"), strings.HasPrefix(v, "0X"):
		return hex.DecodeString(v[2:])
	case strings.HasPrefix(v, "0b"), strings.HasPrefix(v, "0B"):
		if strings.ContainsAny(v, "\r\n") { // which the decoder would skip
			break
		}
		return base64.StdEncoding.Strict().DecodeString(v[2:])
	}
	return nil, errors.New("neither hex nor base64")
}
