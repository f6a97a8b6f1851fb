package initiator_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/scsi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const iqn = "iqn.2026-11.example:t"

type events struct {
	mu     sync.Mutex
	states []initiator.State
}

func (e *events) on(st initiator.State, _ error) {
	e.mu.Lock()
	e.states = append(e.states, st)
	e.mu.Unlock()
}

func (e *events) list() []initiator.State {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]initiator.State(nil), e.states...)
}

func start(t *testing.T, tc target.Config, c initiator.Config) (*target.Server, *target.Portal, *initiator.Session, *events) {
	t.Helper()
	lu, err := target.NewLU(64<<20, 512, target.DefaultIdentity("t"))
	require.NoError(t, err)
	tc.Targets = []*target.Target{{Name: iqn, LUs: []*target.LU{lu}}}
	srv, err := target.New(tc)
	require.NoError(t, err)
	t.Cleanup(srv.Kill)
	p, err := srv.Listen("127.0.0.1:0")
	require.NoError(t, err)
	ev := &events{}
	c.Address, c.TargetName, c.InitiatorName, c.OnState = p.Addr(), iqn, "iqn.2026-11.example:i", ev.on
	c.ISID = initiator.PathISID(c.InitiatorName, iqn, p.Addr())
	s, err := initiator.Open(context.Background(), c)
	require.NoError(t, err)
	t.Cleanup(func() { s.Abort(errors.New("test ends")); <-s.Done() })
	return srv, p, s, ev
}

type count struct {
	n    atomic.Int64
	mu   sync.Mutex
	errs []error
}

func (c *count) Done(cmd *initiator.Command, _ *block.Plug) {
	c.mu.Lock()
	c.errs = append(c.errs, cmd.Result.Err)
	c.mu.Unlock()
	c.n.Add(1)
}

func reads(s *initiator.Session, n int, owner initiator.Doner) int {
	var p block.Plug
	took := 0
	for i := range n {
		c := &initiator.Command{Dir: initiator.DataIn, Data: make([]byte, 4096), Owner: owner}
		scsi.Read(&c.CDB, uint64(i*8), 8, true)
		if s.Submit(c, &p) {
			took++
		}
	}
	p.Flush()
	return took
}

func TestDataSurvivesEveryWayToSendIt(t *testing.T) {
	for _, tc := range []struct {
		name string
		c    target.Config
	}{
		{"immediate and unsolicited", target.Config{}},
		{"R2T only", target.Config{InitialR2T: true, NoImmediateData: true}},
		{"small segments, window of 2", target.Config{MaxRecvSegment: 8192, Window: 2, InitialR2T: true}},
		{"window of 1", target.Config{Window: 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, _, s, _ := start(t, tc.c, initiator.Config{})
			for _, n := range []int{512, 4096, 64 << 10, 256<<10 - 512, 256 << 10, 256<<10 + 512, 4 << 20} {
				out := make([]byte, n)
				for i := range out {
					out[i] = byte(i>>9 + i*7 + n)
				}
				w := &initiator.Command{Dir: initiator.DataOut, Data: out}
				scsi.Write(&w.CDB, 8, uint32(n/512), false, true)
				require.NoError(t, s.Do(t.Context(), w))
				require.Equal(t, scsi.StatusGood, w.Result.Status)
				r := &initiator.Command{Dir: initiator.DataIn, Data: make([]byte, n)}
				scsi.Read(&r.CDB, 8, uint32(n/512), true)
				require.NoError(t, s.Do(t.Context(), r))
				require.Equal(t, out, r.Data)
			}
			info, err := initiator.Identify(t.Context(), s, [8]byte{})
			require.NoError(t, err)
			require.EqualValues(t, 64<<20, info.Size())
			require.Equal(t, target.WWID("t"), info.WWID)
			require.NoError(t, s.Close(t.Context()))
		})
	}
}

func TestHungTargetIsSuspectThenDead(t *testing.T) {
	srv, _, s, ev := start(t, target.Config{}, initiator.Config{FailoverTime: 500 * time.Millisecond})
	srv.Hang()
	var c count
	took := reads(s, 32, &c)
	<-s.Done()
	require.EqualValues(t, took, c.n.Load(), "each command comes back exactly once")
	for _, err := range c.errs {
		require.ErrorIs(t, err, initiator.ErrSessionLost)
	}
	require.Equal(t, []initiator.State{initiator.Suspect, initiator.Dead}, ev.list())
	require.False(t, s.Submit(&initiator.Command{Owner: &c}, &block.Plug{}))
}

func TestResetGivesCommandsBackOnce(t *testing.T) {
	srv, _, s, ev := start(t, target.Config{}, initiator.Config{})
	srv.OnCommand(func(*target.Cmd) target.Action { return target.Action{Silent: true} })
	var c count
	took := reads(s, 100, &c)
	srv.DropAll()
	<-s.Done()
	require.EqualValues(t, took, c.n.Load())
	require.Equal(t, initiator.Dead, ev.list()[len(ev.list())-1])
}

// order notes the tags of commands as they come back.
type order struct{ tags []uint64 }

func (o *order) Done(c *initiator.Command, _ *block.Plug) { o.tags = append(o.tags, c.Tag) }

// Writes that a path lost are written again in the order in which they were sent.
func TestLostCommandsComeBackInTheOrderOfTheirCmdSN(t *testing.T) {
	s := logsIn(t, func(r *raw) {
		r.login()
		h, _, _ := r.command()
		r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
		r.drain()
	})
	first := read8(t, s)
	var o order
	submit := func(tag uint64) {
		c := &initiator.Command{Dir: initiator.DataIn, Data: make([]byte, 4096), Owner: &o, Tag: tag}
		scsi.Read(&c.CDB, 0, 8, true)
		var p block.Plug
		require.True(t, s.Submit(c, &p))
		p.Flush()
	}
	submit(1)
	submit(2)
	first.result(t)
	submit(3) // in the place of the first
	s.Abort(io.EOF)
	<-s.Done()
	require.Equal(t, []uint64{1, 2, 3}, o.tags)
}

func TestSlowUnitWithPingsIsNotDead(t *testing.T) {
	srv, _, s, ev := start(t, target.Config{}, initiator.Config{FailoverTime: 300 * time.Millisecond})
	srv.OnCommand(func(*target.Cmd) target.Action { return target.Action{Delay: 1500 * time.Millisecond} })
	var c count
	took := reads(s, 4, &c)
	require.Eventually(t, func() bool { return c.n.Load() == int64(took) }, 10*time.Second, 10*time.Millisecond)
	require.NotContains(t, ev.list(), initiator.Dead)
	for _, err := range c.errs {
		require.NoError(t, err)
	}
}

func TestRefusedLoginSaysWhy(t *testing.T) {
	srv, p, _, _ := start(t, target.Config{}, initiator.Config{})
	srv.RejectLogin(2, 2)
	_, err := initiator.Open(t.Context(), initiator.Config{Address: p.Addr(), TargetName: iqn, InitiatorName: "iqn.2026-11.example:x"})
	var le *initiator.LoginError
	require.ErrorAs(t, err, &le)
	require.Equal(t, initiator.RetrySlowly, initiator.Retry(err))
	require.ErrorContains(t, err, "ACL")
}

func TestSilentPortalIsBounded(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	began := time.Now()
	_, err = initiator.Open(t.Context(), initiator.Config{Address: l.Addr().String(), TargetName: iqn, InitiatorName: "iqn.2026-11.example:x", LoginTimeout: 300 * time.Millisecond})
	require.Error(t, err)
	require.Less(t, time.Since(began), 5*time.Second)
}

func TestGarbageEndsTheSessionOnly(t *testing.T) {
	srv, _, s, _ := start(t, target.Config{}, initiator.Config{})
	b := make([]byte, 48)
	b[0], b[5], b[6], b[7] = 0x25, 0xff, 0xff, 0xff // Data-In of 16 MiB for nobody
	srv.Inject(b)
	select {
	case <-s.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("the session believed it")
	}
	require.ErrorContains(t, s.Err(), "protocol error")
}

func TestDiscover(t *testing.T) {
	_, p, _, _ := start(t, target.Config{}, initiator.Config{})
	found, err := initiator.Discover(t.Context(), initiator.Config{Address: p.Addr(), InitiatorName: "iqn.2026-11.example:x"})
	require.NoError(t, err)
	require.Equal(t, []initiator.DiscoveredTarget{{Name: iqn, Portals: []initiator.Portal{{Address: p.Addr(), Group: 1}}}}, found.Targets)
	require.Empty(t, found.Skipped)
}

func TestURL(t *testing.T) {
	u, err := initiator.ParseURL("iscsi://user%geheim@[::1]:3261/iqn.2009-01.nl.pref:storage.xensan2/7")
	require.NoError(t, err)
	require.Equal(t, "[::1]:3261", u.Address)
	require.Equal(t, [8]byte{0, 7}, u.LUN)
	require.NotContains(t, u.String(), "geheim")
	for _, bad := range []string{"", "http://a/iqn.a:b", "iscsi:///iqn.a:b/0", "iscsi://a/b/0", "iscsi://a:99999/iqn.a:b/0", "iscsi://a/iqn.a:../0", "iscsi://a/iqn.a:b/x", "iscsi://a/iqn.a:b/16384", "iscsi://a/iqn.a:b/0x1"} {
		_, err := initiator.ParseURL(bad)
		require.Error(t, err, bad)
	}
}

func TestURLsOfTheKernelsPaths(t *testing.T) {
	u, err := initiator.ParseURL("kernel+iscsi://user%geheim@host/iqn.a:b/7")
	require.NoError(t, err)
	require.Equal(t, initiator.Kernel, u.Transport)
	require.Equal(t, "kernel+iscsi://user@host:3260/iqn.a:b/7", u.String())
	require.Equal(t, "kernel+host:3260/7", u.PathName())
	same, err := initiator.ParseURL(u.String())
	require.NoError(t, err)
	require.Equal(t, u.PathName(), same.PathName())
	u, err = initiator.ParseURL("file:///dev/disk/by-path/ip-10.0.0.1:3260-iscsi-iqn.a:b-lun-0")
	require.NoError(t, err)
	require.Equal(t, initiator.Local, u.Transport)
	require.Equal(t, "/dev/disk/by-path/ip-10.0.0.1:3260-iscsi-iqn.a:b-lun-0", u.PathName())
	require.Equal(t, "file://"+u.Device, u.String())
	for _, bad := range []string{"file://", "file:///", "file://dev/sda", "file:///dev/../etc/x", "file:///dev/sd\na", "kernel+iscsi://a/b/0", "kernel+file:///dev/sda"} {
		_, err := initiator.ParseURL(bad)
		require.Error(t, err, bad)
	}
}
