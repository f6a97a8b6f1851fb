package initiator_test

import (
	"context"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
)

// gotgt ends its logins with TSIH 0: refused, unless the config is lenient.
func TestLoginWithoutASessionHandle(t *testing.T) {
	config := scripted(t, func(_ int, r *raw) {
		h, _, _ := r.read()
		r.loginResponse(h, toOperational, keys("AuthMethod", "None"), nil)
		if h, _, ok := r.read(); ok {
			r.loginResponse(h, toFullFeature, keys("MaxRecvDataSegmentLength", "8192"), func(h *pdu.Header) { h.SetTSIH(0) })
		}
		r.drain()
	})
	_, err := initiator.Open(context.Background(), config)
	require.ErrorContains(t, err, "`lenient` takes")
	config.Lenient = true
	s, err := initiator.Open(context.Background(), config)
	require.NoError(t, err)
	s.Abort(io.EOF)
	<-s.Done()
}

// gotgt takes a discovery login in its operational stage only; at any other
// start it hangs up. A login to a target is not tried that way: it would not
// end an old session.
func TestDiscoveryStartsAtTheOperationalStageIfTheSecurityStageIsHungUpOn(t *testing.T) {
	stages := make(chan uint8, 8)
	config := scripted(t, func(_ int, r *raw) {
		h, data, _ := r.read()
		stages <- h.CSG()
		if h.CSG() == pdu.StageSecurity {
			return
		}
		names, _ := pdu.ParseKeys(data)
		require.Contains(t, names, pdu.Key{Name: "SessionType", Value: "Discovery"})
		require.Contains(t, names, pdu.Key{Name: "InitiatorName", Value: "iqn.2026-11.example:i"})
		r.loginResponse(h, toFullFeature, nil, nil)
		h, _, _ = r.read()
		var a pdu.Header
		a[0], a[1] = uint8(pdu.OpTextResp), pdu.Final
		a.SetITT(h.ITT())
		a.SetTTT(pdu.NoTag)
		r.send(a, keys("TargetName", iqn, "TargetAddress", "127.0.0.1:3260,1"), true)
		r.drain()
	})
	found, err := initiator.Discover(context.Background(), config)
	require.NoError(t, err)
	require.Len(t, found.Targets, 1)
	require.Equal(t, []uint8{0, 1}, []uint8{<-stages, <-stages})

	_, err = initiator.Open(context.Background(), config)
	require.ErrorContains(t, err, "closed the connection during login")
	require.EqualValues(t, 0, <-stages)
	require.Empty(t, stages)
}

// gotgt numbers an answer by what its request expected: two commands sent
// together get the same StatSN.
func TestAnswersWithOneStatSN(t *testing.T) {
	for _, lenient := range []bool{false, true} {
		config := scripted(t, func(_ int, r *raw) {
			if !r.login() {
				return
			}
			a, _, _ := r.command()
			b, _, ok := r.command()
			if !ok {
				return
			}
			sn := r.statSN
			for _, h := range []pdu.Header{a, b} {
				r.statSN = sn
				r.dataIn(h.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
			}
			c, _, ok := r.command()
			if ok {
				require.Equal(t, sn+1, c.ExpStatSN())
				r.dataIn(c.ITT(), pdu.Final|pdu.StatusBit, 0, 0, pattern)
			}
			r.drain()
		})
		config.Lenient = lenient
		s, err := initiator.Open(context.Background(), config)
		require.NoError(t, err)
		a, b := read8(t, s), read8(t, s)
		require.NoError(t, a.result(t).Err)
		if !lenient {
			require.ErrorIs(t, b.result(t).Err, initiator.ErrSessionLost)
			require.ErrorContains(t, s.Err(), "was due: `lenient`")
			continue
		}
		require.NoError(t, b.result(t).Err)
		require.NoError(t, read8(t, s).result(t).Err)
		s.Abort(io.EOF)
		<-s.Done()
	}
}

// LIO hangs up, without a status, on an initiator that offers no
// authentication where it wants CHAP.
func TestHungUpOnWithoutAuthentication(t *testing.T) {
	config := scripted(t, func(_ int, r *raw) { r.read() })
	_, err := initiator.Open(context.Background(), config)
	require.ErrorContains(t, err, "set a CHAP user and secret")
	config.User, config.Secret = "hannibal", "over-the-alps"
	_, err = initiator.Open(context.Background(), config)
	require.ErrorContains(t, err, "closed the connection during login")
	require.NotContains(t, err.Error(), "set a CHAP")
}

// istgt counts an immediate Text Request of a discovery session in ExpCmdSN.
func TestDiscoveryOfATargetThatCountsImmediateRequests(t *testing.T) {
	config := scripted(t, func(_ int, r *raw) {
		if !r.login("HeaderDigest", "None") {
			return
		}
		for {
			h, _, ok := r.read()
			if !ok {
				return
			}
			r.expCmdSN = h.CmdSN() + 1
			switch h.Opcode() {
			case pdu.OpTextReq:
				var a pdu.Header
				a[0], a[1] = uint8(pdu.OpTextResp), pdu.Final
				a.SetITT(h.ITT())
				a.SetTTT(pdu.NoTag)
				r.send(a, keys("TargetName", iqn, "TargetAddress", "127.0.0.1:3260,1"), true)
			case pdu.OpLogoutReq:
				return
			}
		}
	})
	config.TargetName = ""
	found, err := initiator.Discover(context.Background(), config)
	require.NoError(t, err)
	require.Len(t, found.Targets, 1)
}
