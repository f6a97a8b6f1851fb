package initiator_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/faultnet"
	"github.com/mpathd/mpathd/internal/target"
)

// Distance makes round trips the cost of a recovery: they are counted, not timed.
func TestRoundTripsOfLoginAndIdentity(t *testing.T) {
	for _, tc := range []struct {
		name   string
		c      target.Config
		c10    bool // no READ CAPACITY (16)
		window bool // too small for all questions at once
	}{
		{"quiet", target.Config{}, false, false},
		{"a unit attention for each new session", target.Config{PowerOnUA: true}, false, false},
		{"10-byte commands only", target.Config{}, true, false},
		{"window of 1", target.Config{Window: 1}, false, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			lu, err := target.NewLU(8<<20, 512, target.DefaultIdentity("t"))
			require.NoError(t, err)
			tc.c.Targets = []*target.Target{{Name: iqn, LUs: []*target.LU{lu}}}
			srv, err := target.New(tc.c)
			require.NoError(t, err)
			t.Cleanup(srv.Kill)
			if tc.c10 {
				srv.OnCommand(func(c *target.Cmd) target.Action {
					if c.Op() == 0x9e {
						return target.Action{Status: 2, Sense: target.Sense{Key: 5, ASC: 0x20}}
					}
					return target.Action{}
				})
			}
			at, err := srv.Listen("127.0.0.1:0")
			require.NoError(t, err)
			p, err := faultnet.New("127.0.0.1:0", at.Addr())
			require.NoError(t, err)
			t.Cleanup(func() { p.Close() })
			p.Delay(20 * time.Millisecond)
			s, err := initiator.Open(t.Context(), initiator.Config{Address: p.Addr(), TargetName: iqn, InitiatorName: "iqn.2026-11.example:i", ISID: [6]byte{0x80, 5}, FailoverTime: time.Minute})
			require.NoError(t, err)
			require.Equal(t, 2, p.RoundTrips(), "login")
			info, err := initiator.Identify(t.Context(), s, [8]byte{})
			require.NoError(t, err)
			require.Equal(t, target.WWID("t"), info.WWID)
			require.EqualValues(t, 8<<20, info.Size())
			require.Equal(t, !tc.c10, info.Use16)
			if tc.window {
				require.Greater(t, p.RoundTrips(), 4)
			} else {
				require.Equal(t, 4, p.RoundTrips(), "login and identity")
			}
			require.NoError(t, s.Close(t.Context()))
		})
	}
}

// The test of a reservation must not change what it tests.
func TestWriteRefusedChangesNothing(t *testing.T) {
	lu, err := target.NewLU(8<<20, 512, target.DefaultIdentity("t"))
	require.NoError(t, err)
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: iqn, LUs: []*target.LU{lu}}}})
	require.NoError(t, err)
	t.Cleanup(srv.Kill)
	at, err := srv.Listen("127.0.0.1:0")
	require.NoError(t, err)
	s, err := initiator.Open(t.Context(), initiator.Config{Address: at.Addr(), TargetName: iqn, InitiatorName: "iqn.2026-11.example:i", ISID: [6]byte{0x80, 5}})
	require.NoError(t, err)
	defer s.Close(t.Context())
	block := bytes.Repeat([]byte{'a'}, 512)
	refused := func() bool {
		t.Helper()
		refused, err := initiator.WriteRefused(t.Context(), s, [8]byte{}, 512, true)
		require.NoError(t, err)
		got := make([]byte, 512)
		lu.ReadAt(got, 0)
		require.Equal(t, block, got)
		return refused
	}
	lu.WriteAt(block, 0)
	require.False(t, refused())
	srv.OnCommand(func(c *target.Cmd) target.Action { // somebody writes in between
		if c.Op() == 0x89 {
			block = bytes.Repeat([]byte{'b'}, 512)
			lu.WriteAt(block, 0)
		}
		return target.Action{}
	})
	require.False(t, refused())
	lu.Register("iqn.2026-11.example:other", 0x1234, 7)
	require.True(t, refused())
	srv.OnCommand(func(c *target.Cmd) target.Action { // a unit without COMPARE AND WRITE
		if c.Op() == 0x89 {
			return target.Action{Status: 2, Sense: target.Sense{Key: 5, ASC: 0x20}}
		}
		return target.Action{}
	})
	require.True(t, refused())
}
