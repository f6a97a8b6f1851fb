package initiator_test

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/paths"
)

// Login: LG.
var loginCases = map[string]conformanceCase{
	"LG01": {"logs us in; our first request and keys are looked at", "starts at CSG 0, TSIH 0, its stable ISID, each key once", func(t *testing.T) {
		seen := make(chan *raw, 1)
		logsIn(t, func(r *raw) { r.login(); seen <- r; r.drain() })
		r := <-seen
		require.True(t, r.first.IsImmediate())
		require.True(t, r.first.IsFinal())
		require.Equal(t, []uint8{0, 1}, []uint8{r.first.CSG(), r.first.NSG()})
		require.Zero(t, r.first.TSIH())
		require.Equal(t, [2]byte{0, 0}, [2]byte(r.first[2:4]), "VersionMax, VersionMin")
		require.Equal(t, [6]byte{0x80, 1, 2, 3, 4, 5}, r.first.ISID())
		once := map[string]int{}
		for _, k := range append(r.firstKeys, r.offered...) {
			once[k.Name]++
		}
		for _, name := range []string{"InitiatorName", "SessionType", "TargetName", "AuthMethod", "MaxRecvDataSegmentLength", "ErrorRecoveryLevel"} {
			require.Equal(t, 1, once[name], name)
		}
		for name, n := range once {
			require.Equal(t, 1, n, name)
		}
	}},
	"LG02": {"stays in the security stage twice", "goes on with empty requests, same tag", func(t *testing.T) {
		logsIn(t, func(r *raw) {
			h, _, _ := r.read()
			itt := h.ITT()
			for range 2 {
				r.loginResponse(h, 0, nil, nil)
				h, _, _ = r.read()
				if h.ITT() != itt || h.ExpStatSN() != r.statSN {
					return
				}
			}
			r.loginResponse(h, toOperational, keys("AuthMethod", "None"), nil)
			h, _, _ = r.read()
			r.loginResponse(h, toFullFeature, nil, nil)
			r.drain()
		})
	}},
	"LG03": {"begins StatSN anywhere, also at its wrap; skips one", "takes it as the origin and wraps with it; drops", func(t *testing.T) {
		for _, sn := range []uint32{0, 0xffffffff, 0xfffffffe, 0x7fffffff, 4711} {
			s := logsIn(t, func(r *raw) {
				r.statSN = sn
				if r.login() {
					h, _, _ := r.command()
					r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
					r.drain()
				}
			})
			require.NoError(t, read8(t, s).result(t).Err)
		}
		refuses(t, "StatSN 102 where 101 was due", func(_ int, r *raw) {
			h, _, _ := r.read()
			r.loginResponse(h, toOperational, nil, nil)
			h, _, _ = r.read()
			r.statSN++
			r.loginResponse(h, toFullFeature, nil, nil)
			r.drain()
		})
	}},
	"LG04": {"ends the login without a session handle", "drops", func(t *testing.T) {
		refuses(t, "without a session handle", func(_ int, r *raw) {
			h, _, _ := r.read()
			r.loginResponse(h, toOperational, nil, nil)
			h, _, _ = r.read()
			r.loginResponse(h, toFullFeature, nil, func(h *pdu.Header) { h.SetTSIH(0) })
			r.drain()
		})
	}},
	"LG05": {"names stages that are not due", "drops", func(t *testing.T) {
		refuses(t, "login stage", loginStep(pdu.Final|pdu.StageSecurity<<2|2, nil, nil))
		refuses(t, "login stage", loginStep(pdu.Final|pdu.StageOperational<<2|pdu.StageFullFeature, nil, nil))
		refuses(t, "login stage 0 to 3", loginStep(pdu.Final|pdu.StageSecurity<<2|pdu.StageFullFeature, nil, nil)) // we never ask for that
		for _, csg := range []uint8{pdu.StageOperational, 2, pdu.StageFullFeature} {
			refuses(t, "login stage", loginStep(csg<<2, nil, nil))
		}
		refuses(t, "login stage", func(_ int, r *raw) { // our request for the rest does not ask to leave
			h, _, _ := r.read()
			r.loginResponse(h, pdu.Continue, keys("AuthMethod", "None"), nil)
			h, _, _ = r.read()
			r.loginResponse(h, toOperational, nil, nil)
			r.drain()
		})
	}},
	"LG06": {"is final and continued at once", "drops", func(t *testing.T) {
		refuses(t, "both final and continued", loginStep(toOperational|pdu.Continue, nil, nil))
	}},
	"LG07": {"splits keys over continued responses", "asks for the rest with empty requests, joins, parses once", func(t *testing.T) {
		logsIn(t, func(r *raw) {
			text := keys("AuthMethod", "None", "TargetPortalGroupTag", "1", "TargetAlias", "split in the middle")
			h, _, _ := r.read()
			for i := 0; i < len(text)-9; i += 9 {
				r.loginResponse(h, pdu.Continue, text[i:i+9], nil)
				if h, _, _ = r.read(); h.DataLen() != 0 {
					return
				}
				if i+18 >= len(text) {
					r.loginResponse(h, 0, text[i+9:], nil)
				}
			}
			h, _, _ = r.read()
			r.loginResponse(h, toOperational, nil, nil)
			h, _, _ = r.read()
			long := strings.Repeat("x", 5000) // more than 8 KiB in one response, once we have declared to take it
			r.loginResponse(h, toFullFeature, keys("TargetAddress", long, "InitiatorAlias", long), nil)
			r.drain()
		})
	}},
	"LG08": {"never ends a stage", "gives up at its limits", func(t *testing.T) {
		for _, flags := range []uint8{0, pdu.Continue} {
			refuses(t, "does not end the", func(_ int, r *raw) {
				for {
					h, _, ok := r.read()
					if !ok {
						return
					}
					r.loginResponse(h, flags, nil, nil)
				}
			})
		}
		refuses(t, "login text without end", func(_ int, r *raw) {
			for h, _, ok := r.read(); ok; h, _, ok = r.read() {
				r.loginResponse(h, pdu.Continue, bytes.Repeat([]byte("x"), 8<<10), nil)
			}
		})
	}},
	"LG09": {"asks for keys nobody knows, or later ones", "answers NotUnderstood, or with what RFC 7143 has", func(t *testing.T) {
		said := make(chan []byte, 1)
		logsIn(t, func(r *raw) {
			h, _, _ := r.read()
			r.loginResponse(h, toOperational, nil, nil)
			h, _, _ = r.read()
			r.loginResponse(h, pdu.StageOperational<<2, keys("X-foo", "1", "Foo", "2", "TaskReporting", "FastAbort,RFC3720", "iSCSIProtocolLevel", "2"), nil)
			h, data, _ := r.read()
			said <- data
			r.loginResponse(h, toFullFeature, nil, nil)
			r.drain()
		})
		require.Equal(t, keys("X-foo", "NotUnderstood", "Foo", "NotUnderstood", "TaskReporting", "RFC3720", "iSCSIProtocolLevel", "1"), <-said)
		logsIn(t, func(r *raw) {
			h, _, _ := r.read()
			r.loginResponse(h, toOperational, nil, nil)
			h, _, _ = r.read()
			r.loginResponse(h, pdu.StageOperational<<2, keys("TaskReporting", "FastAbort", "iSCSIProtocolLevel", "0"), nil)
			h, data, _ := r.read()
			said <- data
			r.loginResponse(h, toFullFeature, nil, nil)
			r.drain()
		})
		require.Equal(t, keys("TaskReporting", "Reject", "iSCSIProtocolLevel", "0"), <-said)
		refuses(t, "iSCSIProtocolLevel", answers("iSCSIProtocolLevel", "32"))
	}},
	"LG10": {"answers a key twice", "drops", func(t *testing.T) {
		refuses(t, "twice", answers("InitialR2T", "No", "InitialR2T", "Yes"))
	}},
	"LG11": {"picks a digest that was not offered", "drops", func(t *testing.T) { refuses(t, "was not offered", answers("HeaderDigest", "CRC32C")) }},
	"LG12": {"answers beyond our offers", "drops", func(t *testing.T) {
		for _, kv := range [][2]string{{"MaxOutstandingR2T", "9"}, {"MaxConnections", "2"}, {"ErrorRecoveryLevel", "1"}, {"DefaultTime2Retain", "1"}, {"DefaultTime2Wait", "-1"},
			{"DefaultTime2Wait", "3601"}, {"DataPDUInOrder", "No"}, {"DataSequenceInOrder", "No"}, {"InitialR2T", "Maybe"}, {"FirstBurstLength", "262145"}} {
			refuses(t, kv[0], answers(kv[0], kv[1]))
		}
		refuses(t, "MaxBurstLength", answers("MaxBurstLength", "16777215"))
		refuses(t, "FirstBurstLength", answers("MaxBurstLength", "1024", "FirstBurstLength", "2048"))
		s := logsIn(t, answering("MaxBurstLength", "1024"))
		require.Equal(t, 1024, s.Negotiated().FirstBurst, "a default beyond MaxBurstLength")
	}},
	"LG13": {"spells numbers in hex, and wrongly", "takes hex in range, drops the rest", func(t *testing.T) {
		logsIn(t, func(r *raw) { r.login("MaxBurstLength", "0x10000", "FirstBurstLength", "512"); r.drain() })
		for _, bad := range []string{"16777216", "0", "-1", "1000000000000000000000000000000", "", "12x"} {
			refuses(t, "MaxRecvDataSegmentLength", answers("MaxRecvDataSegmentLength", bad))
		}
	}},
	"LG15": {"answers every key with Irrelevant, Reject, NotUnderstood", "keeps the default of each key", func(t *testing.T) {
		for _, word := range []string{"Irrelevant", "Reject", "NotUnderstood"} {
			s := logsIn(t, func(r *raw) {
				r.login("HeaderDigest", word, "DataDigest", word, "InitialR2T", word, "ImmediateData", word, "MaxBurstLength", word, "FirstBurstLength", word,
					"MaxConnections", word, "MaxOutstandingR2T", word, "DefaultTime2Wait", word, "DefaultTime2Retain", word, "ErrorRecoveryLevel", word)
				r.drain()
			})
			p := s.Negotiated()
			require.Equal(t, []any{true, true, 65536, 262144, 8192, 1}, []any{p.InitialR2T, p.ImmediateData, p.FirstBurst, p.MaxBurst, p.TargetMaxData, p.MaxR2T}, word)
		}
	}},
	"LG16": {"wants markers", "answers Reject", func(t *testing.T) {
		said := make(chan []byte, 1)
		logsIn(t, func(r *raw) {
			h, _, _ := r.read()
			r.loginResponse(h, toOperational, nil, nil)
			h, _, _ = r.read()
			r.loginResponse(h, pdu.StageOperational<<2, keys("OFMarker", "Yes", "IFMarker", "Yes", "IFMarkInt", "1~2"), nil)
			h, data, _ := r.read()
			said <- data
			r.loginResponse(h, toFullFeature, nil, nil)
			r.drain()
		})
		require.Equal(t, keys("OFMarker", "Reject", "IFMarker", "Reject", "IFMarkInt", "Reject"), <-said)
	}},
	"LG17": {"takes 512 bytes per PDU", "chops immediate data and Data-Out to 512", func(t *testing.T) {
		sizes := make(chan []int, 1)
		s := logsIn(t, func(r *raw) {
			r.login("MaxRecvDataSegmentLength", "512", "InitialR2T", "No", "ImmediateData", "Yes", "FirstBurstLength", "4096", "MaxBurstLength", "4096")
			h, data, _ := r.command()
			got := []int{len(data)}
			for n := len(data); n < 4096; {
				_, data, ok := r.read()
				if !ok {
					return
				}
				got = append(got, len(data))
				n += len(data)
			}
			sizes <- got
			r.good(h.ITT(), nil)
			r.drain()
		})
		require.NoError(t, write(t, s, 4096).result(t).Err)
		require.Equal(t, []int{512, 512, 512, 512, 512, 512, 512, 512}, <-sizes)
	}},
	"LG19": {"redirects to an IPv4 address, a name, and IPv6 with port and tag", "logs in there with the same names and ISID, and begins at the first portal the next time", func(t *testing.T) {
		for _, host := range []string{"127.0.0.1", "localhost", "[::1]"} {
			ln, err := net.Listen("tcp", cmp.Or(map[string]string{"[::1]": "[::1]:0"}[host], "127.0.0.1:0"))
			if err != nil && host == "[::1]" && os.Getenv("CI") != "true" {
				t.Logf("no IPv6 loopback here: %v", err)
				continue
			}
			require.NoError(t, err)
			seen := make(chan *raw, 2)
			other := scriptedOn(t, ln, func(_ int, r *raw) {
				if r.login() {
					seen <- r
					r.drain()
				}
			})
			_, port, _ := net.SplitHostPort(other.Address)
			asked := 0
			c := scripted(t, func(_ int, r *raw) {
				h, _, _ := r.read()
				asked++
				r.loginResponse(h, 0, keys("TargetAddress", host+":"+port+",1"), func(h *pdu.Header) { h.SetLoginStatus(1, 1) })
			})
			c.Home = &initiator.Home{}
			for range 2 {
				s, err := initiator.Open(context.Background(), c)
				require.NoError(t, err, host)
				r := <-seen
				require.Equal(t, c.ISID, r.first.ISID())
				require.Zero(t, r.first.TSIH())
				require.Subset(t, r.firstKeys, []pdu.Key{{Name: "TargetName", Value: iqn}, {Name: "InitiatorName", Value: c.InitiatorName}})
				s.Abort(fmt.Errorf("test"))
				<-s.Done()
			}
			require.Equal(t, 2, asked)
		}
	}},
	"LG21": {"redirects in circles, or nowhere", "gives up after 8 hops", func(t *testing.T) {
		var c initiator.Config
		c = scripted(t, func(_ int, r *raw) {
			h, _, _ := r.read()
			r.loginResponse(h, 0, keys("TargetAddress", c.Address+",1"), func(h *pdu.Header) { h.SetLoginStatus(1, 1) })
		})
		_, err := initiator.Open(context.Background(), c)
		require.ErrorContains(t, err, "redirects")
		for detail := range uint8(3) {
			refuses(t, "without an address", loginStep(0, nil, func(h *pdu.Header) { h.SetLoginStatus(1, detail) }))
		}
		for _, bad := range []string{"", "[::1", "10.0.0.1:0", "a b:3260", "10.0.0.1:3260,65536", "evil\x1b[2J"} {
			refuses(t, "redirect to", loginStep(0, keys("TargetAddress", bad), func(h *pdu.Header) { h.SetLoginStatus(1, 1) }))
		}
		// 0100 has no meaning of its own: with an address it is temporary.
		other := scripted(t, answers())
		c = scripted(t, loginStep(0, keys("TargetAddress", other.Address), func(h *pdu.Header) { h.SetLoginStatus(1, 0) }))
		c.Home = &initiator.Home{}
		s, err := initiator.Open(context.Background(), c)
		require.NoError(t, err)
		s.Abort(fmt.Errorf("test"))
		<-s.Done()
		require.Equal(t, c.Address, c.Home.Address(c.Address))
		c.RedirectTo = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
		_, err = initiator.Open(context.Background(), c)
		require.ErrorContains(t, err, "redirect_allow does not cover")
	}},
	"LG22": {"refuses with each status", "maps each to a retry class and a sentence", func(t *testing.T) {
		for _, c := range []struct {
			class, detail uint8
			retry         initiator.RetryClass
			say           string
		}{
			{2, 0, initiator.RetrySlowly, "initiator error"}, {2, 1, initiator.RetrySlowly, "set a CHAP user and secret"}, {2, 2, initiator.RetrySlowly, "not allowed: check the target's ACL"},
			{2, 3, initiator.RetrySlowly, "does not exist there"}, {2, 4, initiator.RetrySlowly, "was removed"}, {2, 5, initiator.RetrySlowly, "another iSCSI version"},
			{2, 6, initiator.RetrySoon, "too many connections"}, {2, 7, initiator.RetrySlowly, "misses a parameter"}, {2, 8, initiator.RetrySlowly, "into the session"},
			{2, 9, initiator.RetrySlowly, "session type"}, {2, 10, initiator.RetrySoon, "a new one is begun"}, {2, 11, initiator.RetrySlowly, "invalid during login"},
			{2, 77, initiator.RetrySlowly, "for a reason of its own (status 024d)"}, {3, 0, initiator.RetrySoon, "internal error"}, {3, 1, initiator.RetrySoon, "unavailable"},
			{3, 2, initiator.RetrySoon, "out of resources"}, {3, 99, initiator.RetrySoon, "fails for a reason of its own"}, {9, 9, initiator.RetrySoon, "does not know (status 0909)"},
		} {
			// The serial numbers of a refusal mean nothing: those of the second
			// response here would be a breach otherwise.
			_, err := initiator.Open(context.Background(), scripted(t, func(_ int, r *raw) {
				h, _, _ := r.read()
				r.loginResponse(h, toOperational, keys("AuthMethod", "None"), nil)
				h, _, _ = r.read()
				r.statSN, r.expCmdSN = 0xdeadbeef, 0x80000000
				r.loginResponse(h, 0, nil, func(h *pdu.Header) { h.SetLoginStatus(c.class, c.detail) })
				r.drain()
			}))
			require.ErrorContains(t, err, c.say)
			var le *initiator.LoginError
			require.ErrorAs(t, err, &le)
			require.Equal(t, c.retry, initiator.Retry(err), "%02x%02x", c.class, c.detail)
		}
	}},
	"LG23": {"falls silent, hangs up or sends half a response", "fails within its limits", func(t *testing.T) {
		refuses(t, "does not answer the login", func(_ int, r *raw) { r.read(); time.Sleep(2500 * time.Millisecond) })
		refuses(t, "closed the connection", func(_ int, r *raw) { r.read() })
		refuses(t, "closed the connection", func(_ int, r *raw) { r.read(); r.Write(make([]byte, 20)) })
		refuses(t, "closed the connection", func(_ int, r *raw) { // in the middle of the text
			h, _, _ := r.read()
			a := pdu.Header{0: uint8(pdu.OpLoginResp), 1: toOperational}
			a.SetITT(h.ITT())
			a.SetDataLen(100)
			r.Write(append(a[:], "AuthMethod=No"...))
		})
		refuses(t, "reset the connection", func(_ int, r *raw) { r.read(); r.Conn.(*net.TCPConn).SetLinger(0) })
		var most time.Duration // for a portal to accept the connection
		far := initiator.Config{Address: "192.0.2.1:3260", TargetName: iqn, InitiatorName: "iqn.2026-11.example:i", LoginTimeout: time.Hour}
		far.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
			end, _ := ctx.Deadline()
			most = time.Until(end)
			return nil, os.ErrDeadlineExceeded
		}
		_, err := initiator.Open(context.Background(), far)
		require.ErrorContains(t, err, "portal does not answer: check address")
		require.True(t, initiator.Unanswered(err))
		require.LessOrEqual(t, most, 2*time.Second)
		// A portal that hangs in login takes nothing from the path beside it.
		hung := scripted(t, func(_ int, r *raw) { r.read(); r.drain() })
		m := newMapped(t, 1, options{})
		_, err = m.g.AddPath(paths.PathConfig{Name: "hung", Portal: hung.Address, Target: iqn, Order: 1,
			Open: func(ctx context.Context, _ func(initiator.State, error), _ func(*block.Plug)) (paths.Session, error) {
				s, err := initiator.Open(ctx, hung)
				if err != nil {
					return nil, err
				}
				return s, nil
			}}, nil)
		require.NoError(t, err)
		for range 100 {
			require.NoError(t, m.io(block.Read, 0, 4096))
		}
		require.Equal(t, 1, m.g.Snapshot().Paths.Usable)
	}},
	"LG25": {"sends other PDUs during login", "drops", func(t *testing.T) {
		for _, op := range []pdu.Opcode{pdu.OpNopIn, pdu.OpSCSIResponse, pdu.OpReject, pdu.OpTextResp} {
			refuses(t, "during login", loginStep(toOperational, nil, func(h *pdu.Header) { h.SetOpcode(op) }))
		}
		refuses(t, "task tag 0x00000007 where 0 was due", loginStep(toOperational, nil, func(h *pdu.Header) { h.SetITT(7) }))
	}},
	"LG28": {"speaks another version", "drops", func(t *testing.T) {
		refuses(t, "iSCSI version 1", loginStep(toOperational, nil, func(h *pdu.Header) { h[3] = 1 }))
	}},
	"LG29": {"sends malformed text, or announces 16 MiB of it", "drops, no panic", func(t *testing.T) {
		for _, text := range [][]byte{[]byte("AuthMethod=None"), append(bytes.Repeat([]byte("K"), 64), "=x\x00"...), {0xff, 0xfe, '=', 0}, {0}, make([]byte, 64), []byte("=x\x00"),
			[]byte("lower=x\x00"), []byte("Novalue\x00")} {
			refuses(t, "protocol error", loginStep(toOperational, text, nil))
		}
		refuses(t, "login response of", func(_ int, r *raw) {
			h, _, _ := r.read()
			var a pdu.Header
			a[0], a[1] = uint8(pdu.OpLoginResp), toOperational
			a.SetITT(h.ITT())
			a.SetDataLen(1<<24 - 1)
			r.Write(a[:])
			r.drain()
		})
	}},
}
