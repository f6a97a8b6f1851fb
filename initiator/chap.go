package initiator

import (
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"hash"
	"strconv"
	"strings"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// security passes CSG 0: no authentication, or one-way CHAP (RFC 7143 12.1).
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
	lg.out = pdu.AppendKey(lg.out, "CHAP_A", "7,6,5")
	if keys, _, err = lg.exchange(pdu.StageSecurity, 0, false); err != nil {
		return err
	}
	answer, err := chapResponse(keys, lg.c.Secret)
	if err != nil {
		return err
	}
	lg.out = pdu.AppendKey(lg.out, "CHAP_N", lg.c.User)
	lg.out = pdu.AppendKey(lg.out, "CHAP_R", "0x"+hex.EncodeToString(answer))
	if _, h, err = lg.exchange(pdu.StageSecurity, pdu.StageOperational, true); err != nil {
		return err
	}
	if !h.IsFinal() {
		return breach("it took our CHAP answer and did not go on")
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
	var h hash.Hash
	switch alg {
	case "5":
		h = md5.New()
	case "6":
		h = sha1.New()
	case "7":
		h = sha256.New()
	default:
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
