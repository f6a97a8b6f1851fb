package scsi

import (
	"encoding/hex"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPersistentReservationsOnTheWire(t *testing.T) {
	in := PersistentIn(InReadReservation, 256)
	require.Equal(t, "5e010000000000010000", hex.EncodeToString(in[:10]))
	out, list := PersistentOut(OutPreemptAbort, WriteExclusiveAll, 0x1122334455667788, 0x99aabbccddeeff00)
	require.Equal(t, "5f050700000000001800", hex.EncodeToString(out[:10]))
	require.Equal(t, "112233445566778899aabbccddeeff000000000000000000", hex.EncodeToString(list))
	keys, err := ParseKeys(bin("00000007 00000010 1122334455667788 99aabbccddeeff00"))
	require.NoError(t, err)
	require.Equal(t, []uint64{0x1122334455667788, 0x99aabbccddeeff00}, keys)
	r, err := ParseReservation(bin("00000007 00000010 1122334455667788 00000000 00 05 0000"))
	require.NoError(t, err)
	require.Equal(t, &Reservation{0x1122334455667788, 5}, r)
	r, err = ParseReservation(bin("00000007 00000000"))
	require.NoError(t, err)
	require.Nil(t, r)
	for _, b := range []string{"", "00000007 000000", "00000007 00000010 1122334455667788", "00000007 ffffffff"} {
		_, err = ParseKeys(bin(b))
		require.Error(t, err, b)
		_, err = ParseReservation(bin(b))
		require.Error(t, err, b)
	}
	_, err = ParseReservation(bin("00000007 00000008 1122334455667788"))
	require.Error(t, err)
}

func FuzzPersistentIn(f *testing.F) {
	for _, s := range []string{"00000007 00000010 1122334455667788 99aabbccddeeff00", "00000007 00000010 1122334455667788 00000000 00 05 0000", "00000007 ffffffff", "", "0000000100000003010203"} {
		f.Add(bin(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		unchanged(t, b, func(b []byte) {
			keys, err := ParseKeys(b)
			if err != nil && keys != nil || len(keys) > len(b)/8 {
				t.Fatalf("%d keys out of %d bytes, %v", len(keys), len(b), err)
			}
			if r, err := ParseReservation(b); err != nil && r != nil || r != nil && r.Type > 15 {
				t.Fatalf("%+v, %v", r, err)
			}
		})
	})
}
