package initiator_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/paths"
)

// tap stands before a portal and keeps the first request of each connection.
type tap struct {
	ln     net.Listener
	change func(h *pdu.Header) // of each Login Request

	mu    sync.Mutex
	first []pdu.Header
	keys  [][]pdu.Key
	conns []net.Conn
}

func newTap(t *testing.T, portal string, change func(h *pdu.Header)) *tap {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &tap{ln: ln, change: change}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("tcp", portal)
			if err != nil {
				c.Close()
				continue
			}
			wg.Go(func() { io.Copy(c, to); c.Close() })
			wg.Go(func() { p.pass(c, to); to.Close() })
		}
	})
	t.Cleanup(func() { ln.Close(); p.cut(); wg.Wait() })
	return p
}

// pass hands on, login request by login request, then everything.
func (p *tap) pass(c, to net.Conn) {
	r := &raw{Conn: c}
	for n := 0; ; n++ {
		h, data, ok := r.read()
		if !ok {
			return
		}
		if n == 0 {
			ks, _ := pdu.ParseKeys(data)
			p.mu.Lock()
			p.first, p.keys, p.conns = append(p.first, h), append(p.keys, ks), append(p.conns, c)
			p.mu.Unlock()
		}
		login := h.Opcode() == pdu.OpLoginReq
		if login && p.change != nil {
			p.change(&h)
		}
		to.Write(append(append(h[:], data...), make([]byte, pdu.Pad(len(data)))...))
		if !login {
			io.Copy(to, c)
			return
		}
	}
}

// cut ends all connections.
func (p *tap) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
}

func (p *tap) logins() ([]pdu.Header, [][]pdu.Key) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]pdu.Header(nil), p.first...), append([][]pdu.Key(nil), p.keys...)
}

// tapped runs a daemon over portals of one server, each behind a tap, until
// all its paths are up.
func tapped(t *testing.T, n int, change func(h *pdu.Header)) (*daemon.Daemon, *target.Server, []*target.Portal, []*tap, *logged) {
	t.Helper()
	lu, err := target.NewLU(mappedSize, 512, target.DefaultIdentity("nexus"))
	require.NoError(t, err)
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: iqn, LUs: []*target.LU{lu}}}})
	require.NoError(t, err)
	t.Cleanup(srv.Kill)
	var portals []*target.Portal
	var taps []*tap
	dir, log := t.TempDir(), &logged{}
	o := daemon.Options{NBD: "unix:" + filepath.Join(dir, "n"), Control: filepath.Join(dir, "c"), InitiatorName: "iqn.2026-11.example:i", FailoverTime: 2 * time.Second,
		Logger: slog.New(slog.NewTextHandler(log, nil)), Policy: paths.Config{Alias: "m", NoPathRetry: paths.Queue}}
	for range n {
		p, err := srv.Listen("127.0.0.1:0")
		require.NoError(t, err)
		tp := newTap(t, p.Addr(), change)
		portals, taps = append(portals, p), append(taps, tp)
		o.URLs = append(o.URLs, "iscsi://"+tp.ln.Addr().String()+"/"+iqn+"/0")
	}
	d, err := daemon.Start(o)
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		d.Stop(ctx)
	})
	usable(t, d, n)
	return d, srv, portals, taps, log
}

func usable(t *testing.T, d *daemon.Daemon, n int) {
	t.Helper()
	require.Eventually(t, func() bool {
		s := d.Snapshot()
		return len(s.Maps) == 1 && s.Maps[0].Paths.Usable == n
	}, 20*time.Second, 5*time.Millisecond)
}

func trusts(d *daemon.Daemon) (out []paths.Trust) {
	for _, g := range d.Snapshot().Maps[0].Groups {
		for _, p := range g.Paths {
			out = append(out, p.Trust)
		}
	}
	return out
}

// Cases of login that take several of them: names, ISIDs, redirects.
var nexusCases = map[string]conformanceCase{
	"LG14": {"answers InitialR2T=No to Yes, ImmediateData=Yes to No", "drops", func(t *testing.T) {
		for _, c := range []struct{ key, value string }{{"InitialR2T", "No"}, {"ImmediateData", "Yes"}} {
			config := scripted(t, answers(c.key, c.value))
			config.Offer = initiator.Offer{InitialR2T: true, NoImmediateData: true}
			_, err := initiator.Open(context.Background(), config)
			require.ErrorContains(t, err, c.key+"="+c.value)
			require.ErrorIs(t, err, initiator.ErrProtocol)
		}
	}},
	"LG18": {"declares MaxRecvDataSegmentLength in the security stage only, or twice; answers other keys before they are offered", "applies the first, drops the others", func(t *testing.T) {
		early := func(security []string, operational ...string) func(*raw) {
			return func(r *raw) {
				h, _, _ := r.read()
				r.loginResponse(h, toOperational, keys(append([]string{"AuthMethod", "None"}, security...)...), nil)
				if h, _, ok := r.read(); ok {
					r.loginResponse(h, toFullFeature, keys(operational...), nil)
					r.drain()
				}
			}
		}
		s := logsIn(t, early([]string{"MaxRecvDataSegmentLength", "4096"}))
		require.Equal(t, 4096, s.Negotiated().TargetMaxData)
		refuses(t, "MaxRecvDataSegmentLength twice", func(_ int, r *raw) {
			early([]string{"MaxRecvDataSegmentLength", "4096"}, "MaxRecvDataSegmentLength", "8192")(r)
		})
		refuses(t, "MaxBurstLength before it was offered", func(_ int, r *raw) { early([]string{"MaxBurstLength", "4096"})(r) })
	}},
	"LG20": {"says that it moved for good; elsewhere, that it is away for a while", "begins there for the life of the process; asks the first portal again each time", func(t *testing.T) {
		for _, permanent := range []bool{true, false} {
			isids := make(chan [6]byte, 16)
			other := scripted(t, func(_ int, r *raw) {
				if r.login() {
					isids <- r.first.ISID()
					require.Contains(t, r.firstKeys, pdu.Key{Name: "TargetName", Value: iqn})
					r.drain()
				}
			})
			var asked atomic.Int32
			c := scripted(t, func(_ int, r *raw) {
				h, _, _ := r.read()
				asked.Add(1)
				isids <- h.ISID()
				r.loginResponse(h, 0, keys("TargetAddress", other.Address+",1"), func(h *pdu.Header) {
					h.SetLoginStatus(1, map[bool]uint8{true: 2, false: 1}[permanent])
				})
			})
			c.Home = &initiator.Home{}
			for range 3 {
				s, err := initiator.Open(context.Background(), c)
				require.NoError(t, err)
				require.Equal(t, other.Address, s.Redirected())
				s.Abort(errors.New("test"))
				<-s.Done()
			}
			require.Equal(t, map[bool]int32{true: 1, false: 3}[permanent], asked.Load())
			require.Equal(t, map[bool]string{true: other.Address, false: c.Address}[permanent], c.Home.Address(c.Address))
			for range asked.Load() + 3 {
				require.Equal(t, c.ISID, <-isids)
			}
		}
		// A move for good of the place where it is for a while is no move of the first portal.
		last := scripted(t, answers())
		to := func(address string, detail uint8) string {
			return scripted(t, loginStep(0, keys("TargetAddress", address), func(h *pdu.Header) { h.SetLoginStatus(1, detail) })).Address
		}
		c := last
		c.Address, c.Home = to(to(last.Address, 2), 1), &initiator.Home{}
		s, err := initiator.Open(context.Background(), c)
		require.NoError(t, err)
		require.Equal(t, last.Address, s.Redirected())
		s.Abort(errors.New("test"))
		<-s.Done()
		require.Equal(t, c.Address, c.Home.Address(c.Address))
	}},
	"LG24": {"is found in another portal group than before", "says so, believes nothing of the old nexus, tests anew", func(t *testing.T) {
		d, _, portals, taps, log := tapped(t, 1, nil)
		require.Equal(t, []paths.Trust{paths.Reinstates}, trusts(d))
		was, _ := taps[0].logins()
		portals[0].SetGroup(7)
		taps[0].cut()
		require.Eventually(t, func() bool { return log.has("another nexus than before") }, 20*time.Second, 5*time.Millisecond)
		usable(t, d, 1)
		now, _ := taps[0].logins()
		require.GreaterOrEqual(t, len(now)-len(was), 2, "the self-test logs in once more")
		require.Equal(t, []paths.Trust{paths.Reinstates}, trusts(d))
	}},
	"LG26": {"drops the session", "logs in anew with the same ISID and TSIH 0", func(t *testing.T) {
		d, srv, _, taps, _ := tapped(t, 1, nil)
		was, _ := taps[0].logins()
		path := was[len(was)-1].ISID()
		srv.DropAll()
		require.Eventually(t, func() bool { now, _ := taps[0].logins(); return len(now) > len(was) }, 20*time.Second, 5*time.Millisecond)
		usable(t, d, 1)
		now, _ := taps[0].logins()
		for _, h := range now[len(was):] {
			require.Equal(t, path, h.ISID())
			require.Zero(t, h.TSIH())
			require.EqualValues(t, 2, path[0]>>6, "ISID of the random form")
		}
	}},
	"LG27": {"has two portals in one portal group", "logs in with an ISID for each, so that both sessions live", func(t *testing.T) {
		d, _, _, taps, _ := tapped(t, 2, nil)
		a, _ := taps[0].logins()
		b, _ := taps[1].logins()
		require.NotEqual(t, a[0].ISID(), b[0].ISID())
		time.Sleep(300 * time.Millisecond)
		usable(t, d, 2)
		require.Zero(t, d.Snapshot().Maps[0].Groups[0].Paths[0].Failures)
	}},
	"LG30": {"asks for no authentication", "begins each login at CSG 0 all the same, with AuthMethod", func(t *testing.T) {
		_, _, _, taps, _ := tapped(t, 2, nil)
		for _, tp := range taps {
			hs, ks := tp.logins()
			require.GreaterOrEqual(t, len(hs), 3, "probe, path and self-test")
			for i, h := range hs {
				require.Equal(t, []uint8{0, 1}, []uint8{h.CSG(), h.NSG()})
				require.Contains(t, ks[i], pdu.Key{Name: "AuthMethod", Value: "None"})
			}
		}
	}},
	"LG31": {"ends the old session when its ISID logs in again, through either portal; or does not", "classes it: reinstates, or untrusted", func(t *testing.T) {
		d, _, _, taps, _ := tapped(t, 2, nil)
		require.Equal(t, []paths.Trust{paths.Reinstates, paths.Reinstates}, trusts(d))
		crossed := 0 // logins with the ISID of the other's path
		a, _ := taps[0].logins()
		b, _ := taps[1].logins()
		for _, x := range a {
			for _, y := range b {
				if x.ISID() == y.ISID() {
					crossed++
				}
			}
		}
		require.Positive(t, crossed, "the other portal was tried")
		var n byte
		var mu sync.Mutex
		d, _, _, _, log := tapped(t, 1, func(h *pdu.Header) { // each connection looks new to the target
			if h.CSG() == 0 {
				mu.Lock()
				n++
				mu.Unlock()
			}
			isid := h.ISID()
			isid[5] += n
			h.SetISID(isid)
		})
		require.Equal(t, []paths.Trust{paths.Untrusted}, trusts(d))
		require.True(t, log.has("late writes cannot be ruled out"))
	}},
}
