package initiator

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// What we offer (RFC 7143 clause 13), bytes where they are sizes.
const (
	offeredMaxData    = 256 << 10 // MaxRecvDataSegmentLength: what one PDU may bring us
	offeredFirstBurst = 256 << 10
	offeredMaxBurst   = 1 << 20
	offeredR2T        = 8
)

// Params are the parameters that a login agreed on, or their defaults (RFC 7143
// clause 13).
type Params struct {
	InitialR2T               bool // no unsolicited Data-Out (13.10)
	ImmediateData            bool // data may follow a command in its own PDU (13.11)
	FirstBurst               int  // FirstBurstLength: unsolicited bytes of one command (13.14)
	MaxBurst                 int  // MaxBurstLength: bytes of one R2T or Data-In sequence (13.13)
	TargetMaxData            int  // the target's MaxRecvDataSegmentLength, bytes (13.12)
	MaxR2T                   int  // MaxOutstandingR2T of one command (13.17)
	HeaderDigest, DataDigest bool // CRC32C (13.1)
	Time2Wait                int  // DefaultTime2Wait, seconds
}

// Digest says how much CRC32C is wanted (RFC 7143 13.1), as the list that is offered.
type Digest uint8

const (
	// DigestNone offers None alone.
	DigestNone Digest = iota
	// DigestRequired offers CRC32C alone: a target that refuses is not used.
	DigestRequired
	// DigestPreferred offers CRC32C,None.
	DigestPreferred
	// DigestAccepted offers None,CRC32C: the target's choice.
	DigestAccepted
)

var digestLists = [...]string{"None", "CRC32C", "CRC32C,None", "None,CRC32C"}

// String is the list in lower case, as the configuration spells it.
func (d Digest) String() string { return strings.ToLower(digestLists[d]) }

// Set reads none, crc32c, "crc32c,none" or "none,crc32c", in any case.
func (d *Digest) Set(v string) error {
	i := slices.IndexFunc(digestLists[:], func(l string) bool { return strings.EqualFold(l, strings.ReplaceAll(v, " ", "")) })
	if i < 0 {
		return fmt.Errorf("%.40q: want none, crc32c, crc32c,none (preferred) or none,crc32c (accepted)", v)
	}
	*d = Digest(i)
	return nil
}

// Type makes a *Digest a flag.
func (Digest) Type() string { return "digest" }

// offer lists our operational keys; each goes out once per login.
func (lg *login) offer() {
	o, header, data := &lg.c.Offer, lg.c.HeaderDigest, lg.c.DataDigest
	if lg.c.TargetName == "" { // discovery moves no data
		header, data = DigestNone, DigestNone
	}
	lg.say("HeaderDigest", digestLists[header])
	lg.say("DataDigest", digestLists[data])
	lg.say("MaxRecvDataSegmentLength", strconv.Itoa(o.MaxData))
	lg.maxData = o.MaxData
	lg.say("DefaultTime2Wait", "0")
	lg.say("DefaultTime2Retain", "0")
	lg.say("ErrorRecoveryLevel", "0")
	if lg.c.TargetName == "" {
		return
	}
	lg.say("InitialR2T", yesNo(o.InitialR2T))
	lg.say("ImmediateData", yesNo(!o.NoImmediateData))
	lg.say("MaxBurstLength", strconv.Itoa(o.MaxBurst))
	lg.say("FirstBurstLength", strconv.Itoa(o.FirstBurst))
	lg.say("MaxConnections", "1")
	lg.say("MaxOutstandingR2T", strconv.Itoa(o.MaxR2T))
	lg.say("DataPDUInOrder", "Yes")
	lg.say("DataSequenceInOrder", "Yes")
}

// settle takes the target's keys, each once.
func (lg *login) settle(keys []pdu.Key) error {
	for _, k := range keys {
		if lg.seen[k.Name] {
			return breach("key %s twice", k.Name)
		}
		lg.seen[k.Name] = true
		if err := lg.take(k); err != nil {
			return err
		}
	}
	return nil
}

// take takes what the target declares or asks for; answers go to result.
func (lg *login) take(k pdu.Key) (err error) {
	switch k.Name {
	case "TargetPortalGroupTag":
		var tag int
		tag, err = number(k, 0, 65535)
		lg.tpgt = uint16(tag)
	case "MaxRecvDataSegmentLength": // each side's own, declared at any stage
		if !noAnswer(k.Value) {
			lg.params.TargetMaxData, err = number(k, 512, 1<<24-1)
		}
	case "TargetAlias", "TargetAddress", "TargetName", "InitiatorName", "InitiatorAlias", "SessionType":
	case "AuthMethod", "CHAP_A", "CHAP_I", "CHAP_C", "CHAP_N", "CHAP_R":
		if k.Name != "AuthMethod" && lg.offered["CHAP_A"] == "" {
			return breach("%s before CHAP was offered", k.Name)
		}
		lg.auth[k.Name] = k.Value
	case "IFMarker", "OFMarker", "IFMarkInt", "OFMarkInt": // obsolete (RFC 7143 13.25)
		lg.say(k.Name, "Reject")
	case "TaskReporting": // the other values change what task management does
		if answer := "RFC3720"; slices.Contains(strings.Split(k.Value, ","), answer) {
			lg.say(k.Name, answer)
		} else {
			lg.say(k.Name, "Reject")
		}
	case "iSCSIProtocolLevel":
		var level int
		level, err = number(k, 0, 31)
		lg.say(k.Name, strconv.Itoa(min(level, 1)))
	case "HeaderDigest", "DataDigest", "DefaultTime2Wait", "DefaultTime2Retain", "ErrorRecoveryLevel", "InitialR2T", "ImmediateData", "MaxBurstLength",
		"FirstBurstLength", "MaxConnections", "MaxOutstandingR2T", "DataPDUInOrder", "DataSequenceInOrder":
		if _, ok := lg.offered[k.Name]; ok {
			return lg.result(k)
		}
		if lg.c.TargetName != "" {
			return breach("%s before it was offered", k.Name)
		}
		lg.say(k.Name, "Irrelevant") // of discovery
	default:
		lg.say(k.Name, "NotUnderstood")
	}
	return err
}

// noAnswer tells the words that leave a key at its default (RFC 7143 6.2).
func noAnswer(v string) bool { return v == "Irrelevant" || v == "NotUnderstood" || v == "Reject" }

// result takes the answer to an offer, checked against the offer by the key's
// result function (RFC 7143 6.2, clause 13).
func (lg *login) result(k pdu.Key) (err error) {
	p, o := &lg.params, &lg.c.Offer
	switch k.Name {
	case "HeaderDigest":
		p.HeaderDigest, err = lg.digest(k, lg.c.HeaderDigest)
		return err
	case "DataDigest":
		p.DataDigest, err = lg.digest(k, lg.c.DataDigest)
		return err
	}
	if noAnswer(k.Value) {
		return nil
	}
	switch k.Name {
	case "MaxBurstLength":
		p.MaxBurst, err = number(k, 512, o.MaxBurst)
	case "FirstBurstLength":
		p.FirstBurst, err = number(k, 512, o.FirstBurst)
	case "MaxOutstandingR2T":
		p.MaxR2T, err = number(k, 1, o.MaxR2T)
	case "MaxConnections":
		_, err = number(k, 1, 1)
	case "ErrorRecoveryLevel", "DefaultTime2Retain":
		_, err = number(k, 0, 0)
	case "DefaultTime2Wait":
		p.Time2Wait, err = number(k, 0, 3600)
	case "InitialR2T":
		if p.InitialR2T, err = boolean(k); err == nil && o.InitialR2T && !p.InitialR2T {
			return breach("%s=No, Yes was offered", k.Name)
		}
	case "ImmediateData":
		if p.ImmediateData, err = boolean(k); err == nil && o.NoImmediateData && p.ImmediateData {
			return breach("%s=Yes, No was offered", k.Name)
		}
	case "DataPDUInOrder", "DataSequenceInOrder":
		var yes bool
		if yes, err = boolean(k); err == nil && !yes {
			return breach("%s=No was not offered", k.Name)
		}
	}
	return err
}

// digest takes the target's choice from the list that policy offers.
func (lg *login) digest(k pdu.Key, policy Digest) (on bool, err error) {
	switch {
	case k.Value == "CRC32C" && lg.offered[k.Name] != "None":
		return true, nil
	case policy == DigestRequired && lg.c.TargetName != "":
		return false, unsettled("the target does not do CRC32C as %s (it says %.16q): set it to none, or crc32c,none", k.Name, k.Value)
	case k.Value != "None" && !noAnswer(k.Value):
		return false, breach("%s=%.32q was not offered", k.Name, k.Value)
	}
	return false, nil
}

// check looks at the whole once the login has ended.
func (lg *login) check() error {
	p := &lg.params
	if lg.c.TargetName != "" && (lg.c.HeaderDigest == DigestRequired && !p.HeaderDigest || lg.c.DataDigest == DigestRequired && !p.DataDigest) {
		return settingError{errors.New("the target ended the login without a word about digests: set them to none, or crc32c,none")}
	}
	if p.FirstBurst > p.MaxBurst {
		if lg.seen["FirstBurstLength"] && lg.seen["MaxBurstLength"] {
			return breach("FirstBurstLength %d is more than MaxBurstLength %d", p.FirstBurst, p.MaxBurst)
		}
		p.FirstBurst = p.MaxBurst
	}
	if p.TargetMaxData > 64 {
		p.TargetMaxData &^= 3
	}
	p.TargetMaxData = min(p.TargetMaxData, 1<<20)
	return nil
}

func number(k pdu.Key, low, high int) (int, error) {
	v, ok := parseNumber(k.Value)
	if !ok || v < low || v > high {
		return 0, breach("%s=%.32q, %d to %d was possible", k.Name, k.Value, low, high)
	}
	return v, nil
}

// parseNumber reads a decimal number, or hex behind 0x or 0X, of at most 32
// bits (RFC 7143 6.1).
func parseNumber(s string) (int, bool) {
	base := 10
	if len(s) > 2 && (s[:2] == "0x" || s[:2] == "0X") {
		base, s = 16, s[2:]
	}
	v, err := strconv.ParseUint(s, base, 32) // no sign, no underscore in these bases
	return int(v), err == nil
}

func boolean(k pdu.Key) (bool, error) {
	switch k.Value {
	case "Yes":
		return true, nil
	case "No":
		return false, nil
	}
	return false, breach("%s=%.32q", k.Name, k.Value)
}
