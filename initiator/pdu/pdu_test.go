package pdu

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestKeys(t *testing.T) {
	b := AppendKey(AppendKey(nil, "InitialR2T", "No"), "TargetName", "iqn.a:b")
	ks, err := ParseKeys(b)
	require.NoError(t, err)
	require.Equal(t, []Key{{"InitialR2T", "No"}, {"TargetName", "iqn.a:b"}}, ks)
	for _, bad := range []string{"NoEnd=1", "=x\x00", "novalue\x00", "bad key=1\x00", "iSCSIProtocol=1\x00"} {
		_, err := ParseKeys([]byte(bad))
		require.Error(t, err, bad)
	}
	_, err = ParseKeys(make([]byte, MaxTextLen+1))
	require.Error(t, err)
}

func TestHeaderFields(t *testing.T) {
	var h Header
	h.SetDataLen(0x123456)
	require.Equal(t, 0x123456, h.DataLen())
	require.Equal(t, []byte{0x12, 0x34, 0x56}, h[5:8])
	h.SetITT(0xdeadbeef)
	require.Equal(t, []byte{0xde, 0xad, 0xbe, 0xef}, h[16:20])
	require.Equal(t, 3, Pad(5))
	require.True(t, SerialLess(0xffffffff, 0))
}

func FuzzKeys(f *testing.F) {
	f.Add([]byte("A=b\x00C=d\x00"))
	f.Add([]byte("iSCSIProtocolLevel=2\x00"))
	f.Fuzz(func(t *testing.T, b []byte) { ParseKeys(b) })
}
