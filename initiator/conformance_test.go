package initiator_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/scsi"
)

// The cases of TestConformance are named by their ids; docs/conformance.md is
// made from them by `make conformance`.

// refuses is a login that must fail with these words.
func refuses(t *testing.T, why string, script func(n int, r *raw)) {
	t.Helper()
	s, err := initiator.Open(context.Background(), scripted(t, script))
	if err == nil {
		s.Abort(fmt.Errorf("test"))
		<-s.Done()
	}
	require.ErrorContains(t, err, why)
}

// answers logs in with other operational keys.
func answers(kv ...string) func(int, *raw) {
	return func(_ int, r *raw) {
		if r.login(kv...) {
			r.drain()
		}
	}
}

func TestConformance(t *testing.T) {
	pattern := bytes.Repeat([]byte("0123456789abcdef"), 256)
	// fails runs a READ and requires that what the script sends ends the session.
	readDrops := func(why string, script func(r *raw, itt uint32)) func(t *testing.T) {
		return func(t *testing.T) {
			s := logsIn(t, func(r *raw) {
				if r.login() {
					if h, _, ok := r.command(); ok {
						script(r, h.ITT())
						r.drain()
					}
				}
			})
			w := read8(t, s)
			dropped(t, s, why)
			require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
		}
	}
	writeDrops := func(why string, script func(r *raw, itt uint32)) func(t *testing.T) {
		return func(t *testing.T) {
			s := logsIn(t, func(r *raw) {
				if r.login("InitialR2T", "Yes", "ImmediateData", "No", "MaxBurstLength", "65536") {
					if h, _, ok := r.command(); ok {
						script(r, h.ITT())
						r.drain()
					}
				}
			})
			w := write(t, s, 256<<10)
			dropped(t, s, why)
			require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
		}
	}
	// reads runs a READ that must end with a result.
	reads := func(script func(r *raw, itt uint32), check func(t *testing.T, w *waited)) func(t *testing.T) {
		return func(t *testing.T) {
			s := logsIn(t, func(r *raw) {
				if r.login() {
					if h, _, ok := r.command(); ok {
						script(r, h.ITT())
						r.drain()
					}
				}
			})
			w := read8(t, s)
			w.result(t)
			check(t, w)
			require.NoError(t, s.Err())
		}
	}
	whole := func(t *testing.T, w *waited) {
		require.NoError(t, w.c.Result.Err)
		require.Equal(t, pattern, w.c.Data)
	}
	loginStep := func(flags uint8, kv []byte, change func(h *pdu.Header)) func(int, *raw) {
		return func(_ int, r *raw) {
			if h, _, ok := r.read(); ok {
				r.loginResponse(h, flags, kv, change)
				r.drain()
			}
		}
	}
	cases := map[string]func(t *testing.T){
		"LG01": func(t *testing.T) {
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
		},
		"LG02": func(t *testing.T) {
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
		},
		"LG03": func(t *testing.T) {
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
		},
		"LG04": func(t *testing.T) {
			refuses(t, "without a session handle", func(_ int, r *raw) {
				h, _, _ := r.read()
				r.loginResponse(h, toOperational, nil, nil)
				h, _, _ = r.read()
				r.loginResponse(h, toFullFeature, nil, func(h *pdu.Header) { h.SetTSIH(0) })
				r.drain()
			})
		},
		"LG05": func(t *testing.T) {
			refuses(t, "login stage", loginStep(pdu.Final|pdu.StageSecurity<<2|2, nil, nil))
			refuses(t, "login stage", loginStep(pdu.Final|pdu.StageOperational<<2|pdu.StageFullFeature, nil, nil))
		},
		"LG06": func(t *testing.T) {
			refuses(t, "both final and continued", loginStep(toOperational|pdu.Continue, nil, nil))
		},
		"LG07": func(t *testing.T) {
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
				r.loginResponse(h, toFullFeature, nil, nil)
				r.drain()
			})
		},
		"LG08": func(t *testing.T) {
			for _, flags := range []uint8{0, pdu.Continue} {
				refuses(t, "does not end the", func(_ int, r *raw) {
					for {
						h, _, ok := r.read()
						if !ok {
							return
						}
						r.loginResponse(h, flags, keys("TargetAlias", "x")[:0], nil)
					}
				})
			}
		},
		"LG09": func(t *testing.T) {
			said := make(chan []byte, 1)
			logsIn(t, func(r *raw) {
				h, _, _ := r.read()
				r.loginResponse(h, toOperational, nil, nil)
				h, _, _ = r.read()
				r.loginResponse(h, pdu.StageOperational<<2, keys("X-foo", "1", "Foo", "2"), nil)
				h, data, _ := r.read()
				said <- data
				r.loginResponse(h, toFullFeature, nil, nil)
				r.drain()
			})
			require.Equal(t, keys("X-foo", "NotUnderstood", "Foo", "NotUnderstood"), <-said)
		},
		"LG10": func(t *testing.T) {
			refuses(t, "twice", answers("InitialR2T", "No", "InitialR2T", "Yes"))
		},
		"LG11": func(t *testing.T) { refuses(t, "was not offered", answers("HeaderDigest", "CRC32C")) },
		"LG12": func(t *testing.T) {
			refuses(t, "MaxBurstLength", answers("MaxBurstLength", "16777215"))
			refuses(t, "FirstBurstLength", answers("MaxBurstLength", "1024", "FirstBurstLength", "2048"))
		},
		"LG13": func(t *testing.T) {
			logsIn(t, func(r *raw) { r.login("MaxBurstLength", "0x10000", "FirstBurstLength", "512"); r.drain() })
			for _, bad := range []string{"16777216", "0", "-1", "1000000000000000000000000000000", "", "12x"} {
				refuses(t, "MaxRecvDataSegmentLength", answers("MaxRecvDataSegmentLength", bad))
			}
		},
		"LG15": func(t *testing.T) {
			for _, word := range []string{"Irrelevant", "Reject", "NotUnderstood"} {
				s := logsIn(t, func(r *raw) {
					r.login("HeaderDigest", word, "DataDigest", word, "InitialR2T", word, "ImmediateData", word, "MaxBurstLength", word, "FirstBurstLength", word,
						"MaxConnections", word, "MaxOutstandingR2T", word, "DefaultTime2Wait", word, "DefaultTime2Retain", word, "ErrorRecoveryLevel", word)
					r.drain()
				})
				p := s.Negotiated()
				require.Equal(t, []any{true, true, 65536, 262144, 8192, 1}, []any{p.InitialR2T, p.ImmediateData, p.FirstBurst, p.MaxBurst, p.TargetMaxData, p.MaxR2T}, word)
			}
		},
		"LG16": func(t *testing.T) {
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
		},
		"LG17": func(t *testing.T) {
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
		},
		"LG19": func(t *testing.T) {
			other := scripted(t, func(_ int, r *raw) {
				if r.login() {
					r.drain()
				}
			})
			c := scripted(t, func(_ int, r *raw) {
				h, _, _ := r.read()
				r.loginResponse(h, 0, keys("TargetAddress", other.Address+",1"), func(h *pdu.Header) { h.SetLoginStatus(1, 1) })
			})
			s, err := initiator.Open(context.Background(), c)
			require.NoError(t, err)
			s.Abort(fmt.Errorf("test"))
			<-s.Done()
		},
		"LG21": func(t *testing.T) {
			var c initiator.Config
			c = scripted(t, func(_ int, r *raw) {
				h, _, _ := r.read()
				r.loginResponse(h, 0, keys("TargetAddress", c.Address+",1"), func(h *pdu.Header) { h.SetLoginStatus(1, 1) })
			})
			_, err := initiator.Open(context.Background(), c)
			require.ErrorContains(t, err, "redirects")
			refuses(t, "without an address", loginStep(0, nil, func(h *pdu.Header) { h.SetLoginStatus(1, 1) }))
		},
		"LG22": func(t *testing.T) {
			for _, c := range []struct {
				class, detail uint8
				permanent     bool
				say           string
			}{{2, 0, true, "initiator error"}, {2, 2, true, "not allowed"}, {2, 3, true, "does not exist"}, {2, 4, true, "removed"}, {2, 6, false, "too many connections"}, {3, 0, false, "internal error"},
				{3, 1, false, "unavailable"}, {3, 2, false, "out of resources"}, {9, 9, false, "refused"}} {
				_, err := initiator.Open(context.Background(), scripted(t, loginStep(0, nil, func(h *pdu.Header) { h.SetLoginStatus(c.class, c.detail) })))
				require.ErrorContains(t, err, c.say)
				var le *initiator.LoginError
				require.ErrorAs(t, err, &le)
				require.Equal(t, c.permanent, le.Permanent(), "%02x%02x", c.class, c.detail)
			}
		},
		"LG23": func(t *testing.T) {
			refuses(t, "does not answer the login", func(_ int, r *raw) { r.read(); time.Sleep(2500 * time.Millisecond) })
			refuses(t, "closed the connection", func(_ int, r *raw) { r.read() })
			refuses(t, "login", func(_ int, r *raw) { r.read(); r.Write(make([]byte, 20)) })
		},
		"LG25": func(t *testing.T) {
			for _, op := range []pdu.Opcode{pdu.OpNopIn, pdu.OpSCSIResponse, pdu.OpReject, pdu.OpTextResp} {
				refuses(t, "during login", loginStep(toOperational, nil, func(h *pdu.Header) { h.SetOpcode(op) }))
			}
		},
		"LG28": func(t *testing.T) {
			refuses(t, "iSCSI version 1", loginStep(toOperational, nil, func(h *pdu.Header) { h[3] = 1 }))
		},
		"LG29": func(t *testing.T) {
			for _, text := range [][]byte{[]byte("AuthMethod=None"), append(bytes.Repeat([]byte("K"), 70), "=x\x00"...), {0xff, 0xfe, '=', 0}} {
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
		},
		"FF01": func(t *testing.T) {
			sns := make(chan []uint32, 1)
			s := logsIn(t, func(r *raw) {
				r.login()
				var got []uint32
				for range 16 {
					h, _, ok := r.command()
					if !ok {
						break
					}
					got = append(got, h.CmdSN())
				}
				sns <- got
				r.drain()
			})
			for range 16 {
				go read8(t, s)
			}
			for i, sn := range <-sns {
				require.EqualValues(t, i, sn)
			}
		},
		"FF02": func(t *testing.T) {
			opened := make(chan bool)
			s := logsIn(t, func(r *raw) {
				r.window = 0
				r.login()
				<-opened
				r.window = 4
				var h pdu.Header
				h[0], h[1] = uint8(pdu.OpNopIn), pdu.Final
				h.SetITT(pdu.NoTag)
				h.SetTTT(pdu.NoTag)
				h.SetStatSN(r.statSN)
				r.send(h, nil, false)
				c, _, _ := r.command()
				r.dataIn(c.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				r.drain()
			})
			go func() { time.Sleep(200 * time.Millisecond); opened <- true }()
			c := &initiator.Command{Dir: initiator.DataIn, Data: make([]byte, 4096)}
			scsi.Read(&c.CDB, 0, 8, true)
			began := time.Now()
			require.NoError(t, s.Do(context.Background(), c))
			require.Greater(t, time.Since(began), 150*time.Millisecond, "sent into a closed window")
		},
		"FF09": readDrops("StatSN", func(r *raw, itt uint32) {
			r.statSN++
			r.dataIn(itt, pdu.Final|pdu.StatusBit, 0, 0, pattern)
		}),
		"DI01": reads(func(r *raw, itt uint32) { r.dataIn(itt, pdu.Final|pdu.StatusBit, 0, 0, pattern) }, whole),
		"DI02": reads(func(r *raw, itt uint32) {
			for i := range uint32(8) {
				r.dataIn(itt, 0, i, i*512, pattern[i*512:][:512])
			}
			r.good(itt, nil)
		}, whole),
		"DI03": reads(func(r *raw, itt uint32) {
			r.dataIn(itt, pdu.Final, 0, 0, pattern[:2048])
			r.dataIn(itt, pdu.Final|pdu.StatusBit, 1, 2048, pattern[2048:])
		}, whole),
		"DI04": func(t *testing.T) {
			for _, sn := range []uint32{1, 2, 0xffffffff} {
				t.Run(fmt.Sprint(sn), readDrops("DataSN", func(r *raw, itt uint32) { r.dataIn(itt, 0, sn, 0, pattern[:512]) }))
			}
		},
		"DI05": func(t *testing.T) {
			for _, off := range []uint32{0, 256, 1024} {
				t.Run(fmt.Sprint(off), readDrops("Data-In of", func(r *raw, itt uint32) {
					r.dataIn(itt, 0, 0, 0, pattern[:512])
					r.dataIn(itt, 0, 1, off, pattern[:512])
				}))
			}
		},
		"DI06": func(t *testing.T) {
			t.Run("beyond", readDrops("Data-In of", func(r *raw, itt uint32) { r.dataIn(itt, 0, 0, 0, make([]byte, 4097)) }))
			t.Run("wraps", readDrops("Data-In of", func(r *raw, itt uint32) { r.dataIn(itt, 0, 0, 0xfffffe00, make([]byte, 1024)) }))
		},
		"DI07": readDrops("bytes of data in one PDU", func(r *raw, itt uint32) {
			var h pdu.Header
			h[0] = uint8(pdu.OpDataIn)
			h.SetITT(itt)
			h.SetDataLen(1<<24 - 1)
			r.Write(h[:])
		}),
		"DI08": func(t *testing.T) {
			for name, itt := range map[string]uint32{"unknown": 0x00010007, "none": pdu.NoTag, "beyond": 0x0001ffff} {
				t.Run(name, readDrops("unknown task tag", func(r *raw, _ uint32) { r.dataIn(itt, 0, 0, 0, pattern[:512]) }))
			}
			t.Run("completed", func(t *testing.T) {
				s := logsIn(t, func(r *raw) {
					r.login()
					h, _, _ := r.command()
					r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
					r.dataIn(h.ITT(), 0, 0, 0, pattern[:512])
					r.drain()
				})
				require.NoError(t, read8(t, s).result(t).Err)
				dropped(t, s, "unknown task tag")
			})
			t.Run("for a write", writeDrops("reads nothing", func(r *raw, itt uint32) { r.dataIn(itt, 0, 0, 0, pattern[:512]) }))
		},
		"DI09": func(t *testing.T) {
			t.Run("not final", readDrops("not final", func(r *raw, itt uint32) { r.dataIn(itt, pdu.StatusBit, 0, 0, pattern) }))
			t.Run("and a response", func(t *testing.T) {
				s := logsIn(t, func(r *raw) {
					r.login()
					h, _, _ := r.command()
					r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
					r.good(h.ITT(), nil)
					r.drain()
				})
				require.NoError(t, read8(t, s).result(t).Err)
				dropped(t, s, "unknown task tag")
			})
		},
		"DI10": func(t *testing.T) {
			t.Run("underflow", reads(func(r *raw, itt uint32) {
				r.dataIn(itt, pdu.Final, 0, 0, pattern[:2048])
				r.good(itt, func(h *pdu.Header) { h[1] |= pdu.Underflow; h.SetResidual(2048) })
			}, func(t *testing.T, w *waited) {
				require.ErrorIs(t, w.c.Result.Err, initiator.ErrShort)
				require.EqualValues(t, 2048, w.c.Result.Residual)
			}))
			t.Run("both", readDrops("overflow and underflow", func(r *raw, itt uint32) {
				r.good(itt, func(h *pdu.Header) { h[1] |= pdu.Underflow | pdu.Overflow })
			}))
		},
		"DI11": reads(func(r *raw, itt uint32) {
			r.dataIn(itt, pdu.Final, 0, 0, pattern[:2048])
			r.good(itt, nil)
		}, func(t *testing.T, w *waited) { require.ErrorIs(t, w.c.Result.Err, initiator.ErrShort) }),
		"DI13": reads(func(r *raw, itt uint32) {
			r.dataIn(itt, 0, 0, 0, nil)
			r.dataIn(itt, 0, 1, 0, pattern[:1021])
			r.dataIn(itt, pdu.Final|pdu.StatusBit, 2, 1021, pattern[1021:])
		}, whole),
		"WR05": writeDrops("R2T for", func(r *raw, itt uint32) { r.r2t(itt, 1, 0, 0, 65537) }),
		"WR06": func(t *testing.T) {
			for name, c := range map[string]struct {
				ttt, off, n uint32
				why         string
			}{"empty": {1, 0, 0, "R2T for"}, "no tag": {pdu.NoTag, 0, 512, "without a transfer tag"}, "beyond": {1, 256<<10 - 512, 1024, "R2T for"}, "wraps": {1, 0xfffffe00, 1024, "R2T for"}} {
				t.Run(name, writeDrops(c.why, func(r *raw, itt uint32) { r.r2t(itt, c.ttt, 0, c.off, c.n) }))
			}
			t.Run("unknown task", writeDrops("unknown task tag", func(r *raw, _ uint32) { r.r2t(0x00050003, 1, 0, 0, 512) }))
			t.Run("for a read", readDrops("writes nothing", func(r *raw, itt uint32) { r.r2t(itt, 1, 0, 0, 512) }))
		},
		"WR07": writeDrops("R2TSN", func(r *raw, itt uint32) { r.r2t(itt, 1, 1, 0, 512) }),
		"WR09": func(t *testing.T) {
			type out struct {
				ttt, sn, off uint32
				final        bool
				n            int
				lun          [8]byte
			}
			seen := make(chan []out, 1)
			s := logsIn(t, func(r *raw) {
				r.login("InitialR2T", "Yes", "ImmediateData", "No", "MaxBurstLength", "65536", "MaxRecvDataSegmentLength", "32768")
				h, _, _ := r.command()
				var got []out
				for i := range uint32(2) {
					var q pdu.Header
					q[0], q[1] = uint8(pdu.OpR2T), pdu.Final
					q.SetLUN(h.LUN())
					q.SetITT(h.ITT())
					q.SetTTT(77 + i)
					q.SetStatSN(r.statSN)
					q.SetDataSN(i)
					q.SetBufferOffset(i * 65536)
					q.SetDesiredLen(65536)
					r.send(q, nil, false)
					for range 2 {
						d, data, _ := r.read()
						got = append(got, out{d.TTT(), d.DataSN(), d.BufferOffset(), d.IsFinal(), len(data), d.LUN()})
					}
				}
				seen <- got
				r.good(h.ITT(), nil)
				r.drain()
			})
			require.NoError(t, write(t, s, 128<<10).result(t).Err)
			require.Equal(t, []out{{77, 0, 0, false, 32768, [8]byte{}}, {77, 1, 32768, true, 32768, [8]byte{}}, {78, 0, 65536, false, 32768, [8]byte{}}, {78, 1, 98304, true, 32768, [8]byte{}}}, <-seen)
		},
		"NP01": func(t *testing.T) {
			pong := make(chan pdu.Header, 1)
			logsIn(t, func(r *raw) {
				r.login()
				var h pdu.Header
				h[0], h[1] = uint8(pdu.OpNopIn), pdu.Final
				h.SetLUN([8]byte{0, 9})
				h.SetITT(pdu.NoTag)
				h.SetTTT(0x55)
				h.SetStatSN(r.statSN)
				r.send(h, nil, false)
				a, _, _ := r.read()
				pong <- a
				r.drain()
			})
			a := <-pong
			require.Equal(t, pdu.OpNopOut, a.Opcode())
			require.True(t, a.IsImmediate())
			require.Equal(t, []uint32{pdu.NoTag, 0x55}, []uint32{a.ITT(), a.TTT()})
			require.Equal(t, [8]byte{0, 9}, a.LUN())
		},
		"NP05": func(t *testing.T) { // pings answered, the command late: not dead
			s := logsIn(t, func(r *raw) {
				r.login()
				h, _, _ := r.command()
				for end := time.Now().Add(2500 * time.Millisecond); time.Now().Before(end); {
					q, _, ok := r.read()
					if !ok {
						return
					}
					if q.Opcode() == pdu.OpNopOut {
						r.pong(q)
					}
				}
				r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				r.drain()
			})
			require.NoError(t, read8(t, s).result(t).Err)
		},
		"LO01": func(t *testing.T) {
			after := make(chan int, 1)
			s := logsIn(t, func(r *raw) {
				r.login()
				n := -1
				for {
					h, _, ok := r.read()
					if !ok {
						break
					}
					if h.Opcode() == pdu.OpLogoutReq && h.IsImmediate() {
						n = 0
						var a pdu.Header
						a[0], a[1] = uint8(pdu.OpLogoutResp), pdu.Final
						a.SetITT(h.ITT())
						r.send(a, nil, true)
					} else if n >= 0 {
						n++
					}
				}
				after <- n
			})
			began := time.Now()
			require.NoError(t, s.Close(context.Background()))
			require.Less(t, time.Since(began), 1500*time.Millisecond)
			require.Zero(t, <-after, "something followed the logout")
		},
		"LO02": func(t *testing.T) {
			s := logsIn(t, func(r *raw) { r.login(); r.drain() })
			began := time.Now()
			require.NoError(t, s.Close(context.Background()))
			require.Less(t, time.Since(began), 4*time.Second)
		},
		"RJ01": func(t *testing.T) {
			for _, reason := range []uint8{pdu.RejectDataDigest, pdu.RejectProtocol, pdu.RejectNotSupported, pdu.RejectInvalidField} {
				t.Run(fmt.Sprintf("%02x", reason), readDrops("rejected a PDU", func(r *raw, itt uint32) {
					var h pdu.Header
					h[0], h[1] = uint8(pdu.OpReject), pdu.Final
					h.SetResponse(reason)
					h.SetITT(pdu.NoTag)
					var bad pdu.Header
					bad.SetITT(itt)
					r.send(h, bad[:], true)
				}))
			}
		},
		"AS01": readDrops("asked us to log out", func(r *raw, _ uint32) { r.async(pdu.AsyncLogoutRequest) }),
		"AS04": readDrops("asked us to log out", func(r *raw, _ uint32) { r.async(pdu.AsyncRenegotiate) }),
		"AS06": func(t *testing.T) {
			s := logsIn(t, func(r *raw) {
				r.login()
				h, _, _ := r.command()
				for _, e := range []uint8{5, 200, 255} {
					r.async(e)
				}
				r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
				r.drain()
			})
			require.NoError(t, read8(t, s).result(t).Err)
			require.NoError(t, s.Err())
		},
		"CH05": func(t *testing.T) {
			c := scripted(t, func(_ int, r *raw) {
				h, _, _ := r.read()
				r.loginResponse(h, 0, keys("AuthMethod", "None"), nil)
				r.drain()
			})
			c.User, c.Secret = "hannibal", "elephants-over-alps"
			_, err := initiator.Open(context.Background(), c)
			require.ErrorContains(t, err, "does not authenticate with CHAP")
		},
		"CH04": func(t *testing.T) { chapRefuses(t, "was not offered", "CHAP_A", "9", "CHAP_I", "1", "CHAP_C", "0x11") },
		"CH02": func(t *testing.T) {
			for _, c := range []string{"0x" + string(bytes.Repeat([]byte("ab"), 1025)), "0xabc", "0b!!!", "", "plain"} {
				chapRefuses(t, "bad CHAP challenge", "CHAP_A", "5", "CHAP_I", "1", "CHAP_C", c)
			}
		},
		"CH03": func(t *testing.T) {
			for _, id := range []string{"256", "-1", "", "x"} {
				chapRefuses(t, "CHAP_I", "CHAP_A", "5", "CHAP_I", id, "CHAP_C", "0x11")
			}
		},
		"HM02": func(t *testing.T) {
			for _, op := range []pdu.Opcode{0x3a, 0x1c, pdu.OpSCSICommand, pdu.OpDataOut, pdu.OpLoginResp, pdu.OpTextResp} {
				t.Run(fmt.Sprintf("%02x", op), readDrops("unexpected opcode", func(r *raw, itt uint32) {
					var h pdu.Header
					h[0] = uint8(op)
					h.SetITT(itt)
					r.send(h, nil, false)
				}))
			}
		},
		"HM01": func(t *testing.T) {
			for _, op := range []pdu.Opcode{pdu.OpSCSIResponse, pdu.OpNopIn, pdu.OpAsync, pdu.OpReject, pdu.OpR2T, pdu.OpTaskMgmtResp} {
				t.Run(fmt.Sprintf("%02x", op), readDrops("protocol error", func(r *raw, _ uint32) {
					var h pdu.Header
					h[0], h[4] = uint8(op), 255
					h.SetDataLen(1<<24 - 1)
					r.Write(h[:])
				}))
			}
		},
		"HM03": func(t *testing.T) {
			s := logsIn(t, func(r *raw) {
				r.login()
				h, _, _ := r.command()
				var a pdu.Header
				a[0], a[1] = uint8(pdu.OpDataIn), pdu.Final|pdu.StatusBit
				a.SetITT(h.ITT())
				a.SetStatSN(r.statSN)
				a.SetExpCmdSN(r.expCmdSN)
				a.SetMaxCmdSN(r.expCmdSN + 31)
				a.SetDataLen(4096)
				for _, b := range append(a[:], pattern...) {
					r.Write([]byte{b})
				}
				r.drain()
			})
			w := read8(t, s)
			w.result(t)
			whole(t, w)
		},
		"HM04": readDrops("bytes of sense", func(r *raw, itt uint32) {
			var h pdu.Header
			h[0], h[1] = uint8(pdu.OpSCSIResponse), pdu.Final
			h.SetITT(itt)
			h.SetStatus(2)
			r.send(h, []byte{0xff, 0xff, 0x70, 0}, true)
		}),
		"HM05": readDrops("unknown task tag", func(r *raw, itt uint32) { r.good(itt+1<<16, nil) }),
		"HM07": readDrops("StatSN", func(r *raw, itt uint32) { r.statSN += 1 << 31; r.good(itt, nil) }),
		"DG03": digestCase("data digest error", func(a []byte) { a[48+4+100] ^= 1 }),
		"DG02": digestCase("header digest error", func(a []byte) { a[9] ^= 1 }),
		"DG01": digestCase("", func([]byte) {}),
	}
	results := &outcomesOf{m: map[string]bool{}}
	t.Run("cases", func(t *testing.T) {
		for id, run := range cases {
			t.Run(id, func(t *testing.T) {
				t.Parallel()
				defer func() { results.set(id, !t.Failed()) }()
				run(t)
			})
		}
	})
	results.write(t)
}

func (r *raw) async(event uint8) {
	var h pdu.Header
	h[0], h[1] = uint8(pdu.OpAsync), pdu.Final
	h.SetITT(pdu.NoTag)
	h[36] = event
	r.send(h, nil, true)
}

// chapRefuses answers our list of algorithms; the login must end with why.
func chapRefuses(t *testing.T, why string, kv ...string) {
	t.Helper()
	c := scripted(t, func(_ int, r *raw) {
		h, _, _ := r.read()
		r.loginResponse(h, 0, keys("AuthMethod", "CHAP"), nil)
		if h, _, ok := r.read(); ok {
			r.loginResponse(h, 0, keys(kv...), nil)
			r.drain()
		}
	})
	c.User, c.Secret = "hannibal", "elephants-over-alps"
	_, err := initiator.Open(context.Background(), c)
	require.ErrorContains(t, err, why)
	require.NotContains(t, err.Error(), c.Secret)
}

// digestCase answers a READ with both digests, changed on the way.
func digestCase(why string, change func([]byte)) func(t *testing.T) {
	return func(t *testing.T) {
		data := bytes.Repeat([]byte{7}, 4096)
		c := scripted(t, func(_ int, r *raw) {
			if !r.login("HeaderDigest", "CRC32C", "DataDigest", "CRC32C", "InitialR2T", "No") {
				return
			}
			var h pdu.Header
			b := make([]byte, pdu.HeaderLen+4) // our header digest follows it
			if _, err := readFull(r, b); err != nil {
				return
			}
			copy(h[:], b)
			if binary.LittleEndian.Uint32(b[48:]) != crc(b[:48]) {
				return // we sent a wrong digest: the session dies otherwise
			}
			var a pdu.Header
			a[0], a[1] = uint8(pdu.OpDataIn), pdu.Final|pdu.StatusBit
			a.SetITT(h.ITT())
			a.SetStatSN(r.statSN)
			a.SetExpCmdSN(1)
			a.SetMaxCmdSN(32)
			a.SetDataLen(len(data))
			out := binary.LittleEndian.AppendUint32(append([]byte(nil), a[:]...), crc(a[:]))
			out = binary.LittleEndian.AppendUint32(append(out, data...), crc(data))
			change(out)
			r.Write(out)
			for {
				if _, err := r.Read(b); err != nil {
					return
				}
			}
		})
		c.HeaderDigest, c.DataDigest = true, true
		s, err := initiator.Open(context.Background(), c)
		require.NoError(t, err)
		defer func() { s.Abort(fmt.Errorf("test")); <-s.Done() }()
		w := read8(t, s)
		if why == "" {
			require.NoError(t, w.result(t).Err)
			require.Equal(t, data, w.c.Data)
			return
		}
		dropped(t, s, why)
		require.ErrorIs(t, w.result(t).Err, initiator.ErrSessionLost)
	}
}
