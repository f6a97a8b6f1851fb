package initiator_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
)

// textResponse answers a Text Request; ttt is NoTag on the last one.
func (r *raw) textResponse(rq pdu.Header, flags uint8, ttt uint32, data []byte) {
	var h pdu.Header
	h[0], h[1] = uint8(pdu.OpTextResp), flags
	h.SetITT(rq.ITT())
	h.SetTTT(ttt)
	r.send(h, data, true)
}

// tells answers SendTargets with one PDU.
func tells(text []byte) func(*raw, pdu.Header) {
	return func(r *raw, h pdu.Header) { r.textResponse(h, pdu.Final, pdu.NoTag, text) }
}

// discovers plays script on the Text Request of a discovery and a logout that
// is answered.
func discovers(t *testing.T, script func(r *raw, h pdu.Header)) (initiator.Discovered, error) {
	t.Helper()
	c := scripted(t, func(_ int, r *raw) {
		if !r.login("MaxRecvDataSegmentLength", "8192") {
			return
		}
		h, data, ok := r.read()
		if !ok || h.Opcode() != pdu.OpTextReq || !h.IsFinal() || h.TTT() != pdu.NoTag || string(data) != "SendTargets=All\x00" || !h.IsImmediate() && h.CmdSN() != r.expCmdSN {
			return // the discovery fails then
		}
		script(r, h)
		r.endsWithLogout()
	})
	unhurried(&c)
	return initiator.Discover(context.Background(), c)
}

func (r *raw) endsWithLogout() {
	for {
		h, _, ok := r.read()
		if !ok {
			return
		}
		if h.Opcode() == pdu.OpLogoutReq {
			var a pdu.Header
			a[0], a[1] = uint8(pdu.OpLogoutResp), pdu.Final
			a.SetITT(h.ITT())
			r.send(a, nil, true)
			r.drain()
			return
		}
	}
}

func at(address string, group int) initiator.Portal {
	return initiator.Portal{Address: address, Group: group}
}

// Text and discovery: TX.
var discoveryCases = map[string]conformanceCase{
	"TX01": {"names several targets with IPv4, IPv6 and named portals, with and without ports and tags", "reads them in order, each name as spelled, each portal once", func(t *testing.T) {
		found, err := discovers(t, tells(keys("TargetName", "iqn.2009-01.nl.pref:storage.a", "TargetAddress", "192.168.1.252:3261,2", "TargetAddress", "[2001:db8::1]:3260,1", "TargetAddress", "[2001:db8::2],65535",
			"TargetAddress", "192.168.1.252:3261,2", "TargetName", "iqn.2000-01.com.synology:NAS.Target-1", "TargetAddress", "san.example.com,1", "TargetAddress", "10.0.0.1",
			"TargetName", "eui.02004567A425678D", "TargetAddress", "10.0.0.2,0")))
		require.NoError(t, err)
		require.Empty(t, found.Skipped)
		require.Equal(t, []initiator.DiscoveredTarget{
			{Name: "iqn.2009-01.nl.pref:storage.a", Portals: []initiator.Portal{at("192.168.1.252:3261", 2), at("[2001:db8::1]:3260", 1), at("[2001:db8::2]:3260", 65535)}},
			{Name: "iqn.2000-01.com.synology:NAS.Target-1", Portals: []initiator.Portal{at("san.example.com:3260", 1), at("10.0.0.1:3260", -1)}},
			{Name: "eui.02004567A425678D", Portals: []initiator.Portal{at("10.0.0.2:3260", 0)}},
		}, found.Targets)
		u := initiator.TargetURL(found.Targets[1].Portals[0], found.Targets[1].Name)
		require.Equal(t, []string{"iqn.2000-01.com.synology:nas.target-1", "iqn.2000-01.com.synology:NAS.Target-1"}, []string{u.Target, u.TargetName()})
		// A login names the target as it spells itself, and in lower case if it is not known so.
		var names []string
		c := scripted(t, func(_ int, r *raw) {
			h, data, _ := r.read()
			ks, _ := pdu.ParseKeys(data)
			for _, k := range ks {
				if k.Name == "TargetName" {
					names = append(names, k.Value)
				}
			}
			r.loginResponse(h, 0, nil, func(h *pdu.Header) { h.SetLoginStatus(2, 3) })
		})
		c.TargetName = u.TargetName()
		_, err = initiator.Open(context.Background(), c)
		require.ErrorContains(t, err, "does not exist there")
		require.Equal(t, []string{u.TargetName(), u.Target}, names)
	}},
	"TX02": {"answers in several PDUs, not final, with a transfer tag", "asks on with empty requests, same task tag, that transfer tag, the CmdSN of an immediate request", func(t *testing.T) {
		wrong := errors.New("no further request")
		found, err := discovers(t, func(r *raw, h pdu.Header) {
			for i := range 3 {
				r.textResponse(h, 0, uint32(0x700+i), keys("TargetName", fmt.Sprint("iqn.a:b", i), "TargetAddress", "10.0.0.1:3260,1"))
				more, data, ok := r.read()
				if !ok || more.Opcode() != pdu.OpTextReq || more.ITT() != h.ITT() || more.TTT() != uint32(0x700+i) || len(data) != 0 || !more.IsFinal() ||
					!more.IsImmediate() || more.CmdSN() != h.CmdSN() || more.ExpStatSN() != r.statSN {
					wrong = fmt.Errorf("request %d: % x", i, more[:])
					return
				}
				wrong = nil
			}
			r.textResponse(h, pdu.Final, pdu.NoTag, nil)
		})
		require.NoError(t, wrong)
		require.NoError(t, err)
		require.Len(t, found.Targets, 3)
		_, err = discovers(t, func(r *raw, h pdu.Header) { r.textResponse(h, 0, pdu.NoTag, nil) })
		require.ErrorContains(t, err, "no tag to go on with")
		_, err = discovers(t, func(r *raw, h pdu.Header) { r.textResponse(h, pdu.Final|pdu.Continue, pdu.NoTag, nil) })
		require.ErrorContains(t, err, "both final and continued")
	}},
	"TX03": {"splits keys over continued responses", "joins them", func(t *testing.T) {
		text := keys("TargetName", "iqn.2009-01.nl.pref:storage.a", "TargetAddress", "10.0.0.1:3260,1", "TargetAddress", "10.0.0.2:3260,1")
		found, err := discovers(t, func(r *raw, h pdu.Header) {
			for len(text) > 7 {
				r.textResponse(h, pdu.Continue, 9, text[:7])
				if _, _, ok := r.read(); !ok {
					return
				}
				text = text[7:]
			}
			r.textResponse(h, pdu.Final, pdu.NoTag, text)
		})
		require.NoError(t, err)
		require.Equal(t, []initiator.DiscoveredTarget{{Name: "iqn.2009-01.nl.pref:storage.a", Portals: []initiator.Portal{at("10.0.0.1:3260", 1), at("10.0.0.2:3260", 1)}}}, found.Targets)
	}},
	"TX04": {"names an address before any target, no address, hostile names and portals, 10000 targets, text without end", "errors, the portal asked, skips them and says so, errors at its limits", func(t *testing.T) {
		_, err := discovers(t, tells(keys("TargetAddress", "10.0.0.1:3260,1")))
		require.ErrorContains(t, err, "address before any target name")
		found, err := discovers(t, tells(keys("TargetName", "iqn.a:good", "TargetName", "iqn.a:../../etc", "TargetAddress", "10.0.0.9:3260,1", "TargetName", "iqn.a:\x1b[2J", "TargetName", "iqn.a:"+strings.Repeat("x", 230),
			"TargetName", "iqn.a:also", "TargetAddress", "evil\x1b[2J:3260,1", "TargetAddress", "10.0.0.1:99999,1", "TargetAddress", "10.0.0.1:3260,65536", "TargetAddress", "0.0.0.0:3260,1",
			"TargetAddress", "[fe80::1]:3260,1", "TargetAddress", "169.254.7.7:3260,1", "TargetAddress", "10.0.0.3:3260,1")))
		require.NoError(t, err)
		require.Len(t, found.Targets, 2)
		require.Equal(t, "iqn.a:good", found.Targets[0].Name)
		require.Equal(t, -1, found.Targets[0].Portals[0].Group, "without an address: the portal that was asked")
		require.Contains(t, found.Targets[0].Portals[0].Address, "127.0.0.1:")
		require.Equal(t, []initiator.Portal{at("10.0.0.3:3260", 1)}, found.Targets[1].Portals)
		require.Len(t, found.Skipped, 9)
		require.NotContains(t, strings.Join(found.Skipped, ""), "\x1b")

		many := func(n int) func(*raw, pdu.Header) {
			return func(r *raw, h pdu.Header) {
				for i := 0; i < n; i += 500 {
					var text []byte
					for j := i; j < i+500; j++ {
						text = append(text, keys("TargetName", fmt.Sprint("iqn.a:", j), "TargetAddress", "10.0.0.1:3260,1")...)
					}
					r.textResponse(h, 0, 1, text)
					if _, _, ok := r.read(); !ok {
						return
					}
				}
				r.textResponse(h, pdu.Final, pdu.NoTag, nil)
			}
		}
		found, err = discovers(t, many(4000))
		require.NoError(t, err)
		require.Len(t, found.Targets, 4000)
		_, err = discovers(t, many(10000))
		require.ErrorContains(t, err, "more than 4096 targets")
		_, err = discovers(t, many(1<<20))
		require.ErrorContains(t, err, "bytes or 4096 PDUs of text")

		// Each portal of each target would be a path that somebody brings up.
		portals := func(n int) func(*raw, pdu.Header) {
			return func(r *raw, h pdu.Header) {
				text := keys("TargetName", "iqn.a:b")
				for i := range n {
					text = append(text, keys("TargetAddress", fmt.Sprintf("10.0.%d.%d", i>>8, i&255))...)
					if len(text) > 60<<10 {
						r.textResponse(h, 0, 1, text)
						if _, _, ok := r.read(); !ok {
							return
						}
						text = nil
					}
				}
				r.textResponse(h, pdu.Final, pdu.NoTag, text)
			}
		}
		found, err = discovers(t, portals(8192))
		require.NoError(t, err)
		require.Len(t, found.Targets[0].Portals, 8192)
		_, err = discovers(t, portals(40000))
		require.ErrorContains(t, err, "more than 8192 portals")
	}},
	"TX05": {"rejects the Text Request", "fails the discovery with the reason", func(t *testing.T) {
		began := time.Now()
		_, err := discovers(t, func(r *raw, h pdu.Header) { r.rejectPDU(pdu.RejectNotSupported, h) })
		require.ErrorContains(t, err, "the target rejects the request, reason 0x05: command not supported")
		require.Less(t, time.Since(began), patience/2, "it waited for its time to end")
	}},
	"TX06": {"is asked SendTargets= in a normal session, also while it rejects that", "reads its portals, and the session goes on", func(t *testing.T) {
		s := logsIn(t, func(r *raw) {
			if !r.login() {
				return
			}
			for n := 0; ; n++ {
				h, data, ok := r.read()
				switch {
				case !ok:
					return
				case h.Opcode() == pdu.OpTextReq && n == 0 && string(data) == "SendTargets=\x00":
					r.textResponse(h, pdu.Final, pdu.NoTag, keys("TargetName", iqn, "TargetAddress", "10.0.0.1:3260,1", "TargetAddress", "10.0.0.2:3260,1"))
				case h.Opcode() == pdu.OpTextReq:
					r.rejectPDU(pdu.RejectNotSupported, h)
				case h.Opcode() == pdu.OpSCSICommand:
					r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				}
			}
		})
		found, err := s.SendTargets(t.Context(), "")
		require.NoError(t, err)
		require.Equal(t, []initiator.DiscoveredTarget{{Name: iqn, Portals: []initiator.Portal{at("10.0.0.1:3260", 1), at("10.0.0.2:3260", 1)}}}, found.Targets)
		_, err = s.SendTargets(t.Context(), "")
		require.ErrorContains(t, err, "command not supported")
		require.NoError(t, read8(t, s).result(t).Err)
		require.NoError(t, s.Err())
	}},
}
