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
	"strconv"
	"strings"
	"sync"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// security passes CSG 0: no authentication, or CHAP in one direction or both (RFC 7143 12.1).
func (lg *login) security() error {
	if lg.c.User == "" {
		lg.out = pdu.AppendKey(lg.out, "AuthMethod", "None")
		for range loginExchanges {
			keys, h, err := lg.exchange(pdu.StageSecurity, pdu.StageOperational, true)
			if err != nil {
				return err
			}
			if m, ok := find(keys, "AuthMethod"); ok && m != "None" {
				return errors.New("the target wants authentication: set a CHAP user and secret")
			}
			if err := lg.settle(keys); err != nil {
				return err
			}
			if h.IsFinal() {
				return nil
			}
		}
		return errors.New("the target does not end the security stage")
	}
	lg.out = pdu.AppendKey(lg.out, "AuthMethod", "CHAP")
	keys, h, err := lg.exchange(pdu.StageSecurity, 0, false)
	if err != nil {
		return err
	}
	if m, _ := find(keys, "AuthMethod"); m != "CHAP" || h.IsFinal() {
		return errors.New("the target does not authenticate with CHAP although a user is configured")
	}
	if err := lg.settle(keys); err != nil {
		return err
	}
	algorithms := "8,7,6,5"
	if lg.md5Only {
		algorithms = "5"
	}
	lg.out = pdu.AppendKey(lg.out, "CHAP_A", algorithms)
	if keys, _, err = lg.exchange(pdu.StageSecurity, 0, false); err != nil {
		return err
	}
	if a, _ := find(keys, "CHAP_A"); a == "Reject" || a == "NotUnderstood" {
		return errAlgorithms
	}
	mutual := lg.c.MutualSecret != ""
	if mutual && lg.c.MutualSecret == lg.c.Secret {
		return errors.New("mutual CHAP: both directions have the same secret, which proves nothing: choose another one")
	}
	alg, _ := find(keys, "CHAP_A")
	if lg.md5Only && alg != "5" {
		return breach("CHAP algorithm %.16q was not offered", alg)
	}
	answer, err := chapResponse(keys, lg.c.Secret)
	if err != nil {
		return err
	}
	lg.answered = true
	lg.out = pdu.AppendKey(lg.out, "CHAP_N", lg.c.User)
	lg.out = pdu.AppendKey(lg.out, "CHAP_R", "0x"+hex.EncodeToString(answer))
	var challenge [32]byte
	var id [1]byte
	if mutual {
		rand.Read(challenge[:])
		rand.Read(id[:])
		challenges.Store(challenge, true)
		defer challenges.Delete(challenge)
		lg.out = pdu.AppendKey(lg.out, "CHAP_I", strconv.Itoa(int(id[0])))
		lg.out = pdu.AppendKey(lg.out, "CHAP_C", "0x"+hex.EncodeToString(challenge[:]))
	}
	if keys, h, err = lg.exchange(pdu.StageSecurity, pdu.StageOperational, true); err != nil {
		return err
	}
	if mutual {
		if err := lg.proveTarget(keys, alg, id[0], challenge[:], answer); err != nil {
			return err
		}
	}
	if !h.IsFinal() {
		return breach("it took our CHAP answer and did not go on")
	}
	return nil
}

// errAlgorithms: the target rejected our list of CHAP algorithms.
var errAlgorithms = errors.New("the target knows none of the CHAP algorithms offered")

// challenges are those of all logins under way: a target that sends one back
// wants us to compute its own answer (RFC 7143 9.2.1).
var challenges sync.Map

// proveTarget checks the target's answer to our challenge.
func (lg *login) proveTarget(keys []pdu.Key, alg string, id byte, challenge, ours []byte) error {
	name, ok := find(keys, "CHAP_N")
	text, ok2 := find(keys, "CHAP_R")
	if !ok || !ok2 {
		return errors.New("mutual CHAP: the target did not prove who it is")
	}
	answer, err := binaryValue(text)
	if err != nil {
		return breach("bad CHAP response")
	}
	if subtle.ConstantTimeCompare(answer, ours) == 1 {
		return errors.New("mutual CHAP: the target reflected our own answer")
	}
	if lg.c.MutualUser != "" && name != lg.c.MutualUser {
		return fmt.Errorf("mutual CHAP: the target calls itself %.64q, mutual_chap_user says %q", name, lg.c.MutualUser)
	}
	h := chapHash(alg)
	h.Write([]byte{id})
	h.Write([]byte(lg.c.MutualSecret))
	h.Write(challenge)
	if subtle.ConstantTimeCompare(answer, h.Sum(nil)) != 1 {
		return errors.New("mutual CHAP: the target does not know the mutual secret: check mutual_chap_secret_file, or whom you are talking to")
	}
	return nil
}

// chapHash is the algorithm of a CHAP_A number, nil for one that was not offered.
func chapHash(alg string) hash.Hash {
	switch alg {
	case "5":
		return md5.New()
	case "6":
		return sha1.New()
	case "7":
		return sha256.New()
	case "8":
		return sha3.New256()
	}
	return nil
}

func find(keys []pdu.Key, name string) (string, bool) {
	for _, k := range keys {
		if k.Name == name {
			return k.Value, true
		}
	}
	return "", false
}

// chapResponse is H(identifier, secret, challenge) (RFC 1994 4.1).
func chapResponse(keys []pdu.Key, secret string) ([]byte, error) {
	alg, _ := find(keys, "CHAP_A")
	h := chapHash(alg)
	if h == nil {
		return nil, breach("CHAP algorithm %.16q was not offered", alg)
	}
	idText, _ := find(keys, "CHAP_I")
	id, err := strconv.ParseUint(idText, 0, 8)
	if err != nil {
		return nil, breach("CHAP_I=%.16q", idText)
	}
	text, _ := find(keys, "CHAP_C")
	challenge, err := binaryValue(text)
	if err != nil || len(challenge) == 0 || len(challenge) > 1024 {
		return nil, breach("bad CHAP challenge")
	}
	if len(challenge) == 32 {
		if _, reflected := challenges.Load([32]byte(challenge)); reflected {
			return nil, errors.New("CHAP: the target sent a challenge of ours back: it does not know the secret itself")
		}
	}
	h.Write([]byte{byte(id)})
	h.Write([]byte(secret))
	h.Write(challenge)
	return h.Sum(nil), nil
}

// binaryValue decodes 0x hex and 0b base64 (RFC 7143 6.1).
func binaryValue(v string) ([]byte, error) {
	switch {
	case strings.HasPrefix(v, "0x"), strings.HasPrefix(v, "0X"):
		return hex.DecodeString(v[2:])
	case strings.HasPrefix(v, "0b"), strings.HasPrefix(v, "0B"):
		return base64.StdEncoding.DecodeString(v[2:])
	}
	return nil, errors.New("neither hex nor base64")
}
