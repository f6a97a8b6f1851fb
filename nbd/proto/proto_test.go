package proto

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestValidate(t *testing.T) {
	rw := Limits{Size: 1 << 20, Block: 512, Flags: HasFlags | SendFlush | SendFUA | SendTrim | SendWriteZeroes, MaxBytes: MaxPayload}
	ro := rw
	ro.Flags |= ReadOnly
	for _, c := range []struct {
		name string
		r    Request
		l    Limits
		want Errno
	}{
		{"read", Request{Type: CmdRead, Length: 512}, rw, OK},
		{"read with FUA is legal", Request{Type: CmdRead, Length: 512, Flags: CmdFlagFUA}, rw, OK},
		{"read past the end", Request{Type: CmdRead, Offset: 1 << 20, Length: 512}, rw, EINVAL},
		{"write past the end", Request{Type: CmdWrite, Offset: 1<<20 - 512, Length: 1024}, rw, ENOSPC},
		{"offset that wraps", Request{Type: CmdWrite, Offset: 1<<64 - 512, Length: 1024}, rw, ENOSPC},
		{"misaligned", Request{Type: CmdWrite, Offset: 1, Length: 512}, rw, EINVAL},
		{"unknown flag", Request{Type: CmdWrite, Length: 512, Flags: 1 << 9}, rw, EINVAL},
		{"unknown command", Request{Type: 77}, rw, EINVAL},
		{"write on read-only", Request{Type: CmdWrite, Length: 512}, ro, EPERM},
		{"flush with a length", Request{Type: CmdFlush, Length: 1}, rw, EINVAL},
		{"zero length", Request{Type: CmdRead}, rw, OK},
		{"too large", Request{Type: CmdRead, Length: MaxPayload + 512}, rw, EOVERFLOW},
		{"no-hole write zeroes", Request{Type: CmdWriteZeroes, Length: 512, Flags: CmdFlagNoHole}, rw, OK},
	} {
		require.Equal(t, c.want, Validate(c.r, c.l), c.name)
	}
}
