package initiator_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/faultnet"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/scsi"
)

// A path that lets single bytes through keeps its session for as long as they
// come: a PDU that takes many times FailoverTime, and a write that is asked for
// in little pieces.
func TestBytesThatTrickleAreSignsOfLife(t *testing.T) {
	for name, c := range map[string]struct {
		dir      initiator.Direction
		size     int
		failover time.Duration
		times    time.Duration // at least so many FailoverTime
	}{"one Data-In": {initiator.DataIn, 2560, 500 * time.Millisecond, 6}, "a write on R2T": {initiator.DataOut, 3072, 3 * time.Second, 1}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lu, err := target.NewLU(1<<20, 512, target.DefaultIdentity("trickle"))
			require.NoError(t, err)
			srv, err := target.New(target.Config{Targets: []*target.Target{{Name: iqn, LUs: []*target.LU{lu}}}, MaxBurst: 512, InitialR2T: true, NoImmediateData: true})
			require.NoError(t, err)
			defer srv.Kill()
			portal, err := srv.Listen("127.0.0.1:0")
			require.NoError(t, err)
			proxy, err := faultnet.New("127.0.0.1:0", portal.Addr())
			require.NoError(t, err)
			defer proxy.Close()
			ev := &events{}
			s, err := initiator.Open(context.Background(), initiator.Config{Address: proxy.Addr(), TargetName: iqn, InitiatorName: "iqn.2026-11.example:i", ISID: [6]byte{0x80, 3},
				FailoverTime: c.failover, OnState: ev.on, Offer: initiator.Offer{MaxR2T: 1}})
			require.NoError(t, err)
			defer func() { s.Abort(errors.New("test ends")); <-s.Done() }()
			data := bytes.Repeat([]byte("drop by drop... "), c.size/16)
			if c.dir == initiator.DataIn {
				lu.WriteAt(data, 0)
			}
			proxy.Trickle(1500 * time.Microsecond) // a byte: at least 3.8 s
			cmd := &initiator.Command{Dir: c.dir, Data: make([]byte, len(data))}
			if c.dir == initiator.DataIn {
				scsi.Read(&cmd.CDB, 0, uint32(len(data)/512), true)
			} else {
				copy(cmd.Data, data)
				scsi.Write(&cmd.CDB, 0, uint32(len(data)/512), false, true)
			}
			began := time.Now()
			require.NoError(t, s.Do(t.Context(), cmd))
			took := time.Since(began)
			t.Logf("%v, %.1f times FailoverTime", took, float64(took)/float64(c.failover))
			require.Greater(t, took, c.times*c.failover)
			got := cmd.Data
			if c.dir == initiator.DataOut {
				got = make([]byte, len(data))
				lu.ReadAt(got, 0)
			}
			require.True(t, bytes.Equal(data, got))
			require.NoError(t, s.Err())
			require.NotContains(t, ev.list(), initiator.Dead)
		})
	}
}
