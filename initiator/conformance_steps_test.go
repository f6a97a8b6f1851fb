package initiator_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
)

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
	return func(_ int, r *raw) { answering(kv...)(r) }
}

func answering(kv ...string) func(*raw) {
	return func(r *raw) {
		if r.login(kv...) {
			r.drain()
		}
	}
}

var pattern = bytes.Repeat([]byte("0123456789abcdef"), 256)

// fails runs a READ and requires that what the script sends ends the session.
func readDrops(why string, script func(r *raw, itt uint32)) func(t *testing.T) {
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
func writeDrops(why string, script func(r *raw, itt uint32)) func(t *testing.T) {
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
func readEnds(script func(r *raw, itt uint32), check func(t *testing.T, w *waited)) func(t *testing.T) {
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
func whole(t *testing.T, w *waited) {
	require.NoError(t, w.c.Result.Err)
	require.Equal(t, pattern, w.c.Data)
}
func loginStep(flags uint8, kv []byte, change func(h *pdu.Header)) func(int, *raw) {
	return func(_ int, r *raw) {
		if h, _, ok := r.read(); ok {
			r.loginResponse(h, flags, kv, change)
			r.drain()
		}
	}
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
		c.HeaderDigest, c.DataDigest = initiator.DigestRequired, initiator.DigestRequired
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
