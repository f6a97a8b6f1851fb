package scsi

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func volumeAccess(pq, flags, state, reason, other byte) []byte {
	b := make([]byte, 48)
	b[0], b[1], b[3], b[8], b[10], b[11], b[12] = pq, 0xc9, 44, flags, state, reason, other
	return b
}

func TestVolumeAccess(t *testing.T) {
	for _, c := range []struct {
		page []byte
		want VolumeAccess
	}{
		{volumeAccess(0, 0x01, 0, 0, 0), VolumeAccess{Connected: true, Owner: true}},
		{volumeAccess(0, 0x20, 0, 0, 0), VolumeAccess{Connected: true, Sharing: true}},
		{volumeAccess(0x20, 0x01, 0, 0, 0), VolumeAccess{Owner: true}},
		{volumeAccess(0x7f, 0, 0, 0, 0), VolumeAccess{}},
		{volumeAccess(0, 0x10, 0xf3, 7, 0x01), VolumeAccess{Connected: true, Reported: true, State: 3, Reason: 7, Other: 1}},
	} {
		v, err := ParseVolumeAccess(c.page)
		require.NoError(t, err)
		require.Equal(t, c.want, v)
	}
	for _, bad := range [][]byte{nil, volumeAccess(0, 0, 0, 0, 0)[:13], make([]byte, 48)} {
		_, err := ParseVolumeAccess(bad)
		require.Error(t, err)
	}
}

func clariion(change func(b []byte)) []byte {
	b := make([]byte, 128)
	b[1], b[4], b[5], b[8], b[10], b[27], b[28], b[30] = 0xc0, 2, 1, 0, 0x60, 3, 4, 4
	change(b)
	return b
}

func TestClariionPath(t *testing.T) {
	c, err := ParseClariionPath(clariion(func([]byte) {}))
	require.NoError(t, err)
	require.Equal(t, ClariionPath{State: 2, WWN: [16]byte{0x60}, Configured: true}, c)
	for _, alter := range []func([]byte){func(b []byte) { b[27] = 0 }, func(b []byte) { b[28] = 5 }, func(b []byte) { b[30] = 0 }} {
		c, err = ParseClariionPath(clariion(alter))
		require.NoError(t, err)
		require.False(t, c.Configured)
	}
	c, _ = ParseClariionPath(clariion(func(b []byte) { b[8] = 1 }))
	require.True(t, c.Default, "the processor that answers is the one that owns it by configuration")
	c, _ = ParseClariionPath(clariion(func(b []byte) { b[28], b[48] = 6, 1 }))
	require.True(t, c.Configured && c.Busy)
	for _, alter := range []func([]byte){func(b []byte) { b[1] = 0x83 }, func(b []byte) { b[9] = 1 }} {
		_, err = ParseClariionPath(clariion(alter))
		require.Error(t, err)
	}
	_, err = ParseClariionPath(clariion(func([]byte) {})[:48])
	require.Error(t, err)
}

func FuzzVendorPages(f *testing.F) {
	f.Add(volumeAccess(0, 0x11, 3, 7, 1))
	f.Add(clariion(func([]byte) {}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if v, err := ParseVolumeAccess(b); err == nil {
			_ = RDACReason(v.Reason)
			require.Less(t, v.State, uint8(16))
		}
		ParseClariionPath(b)
	})
}
