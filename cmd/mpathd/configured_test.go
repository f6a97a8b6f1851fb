package main

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/config"
	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/initiator"
)

// Local disks are left alone by name and by transport, sessions by transport.
func TestPathsOfABlacklistAreRefused(t *testing.T) {
	refused := func(conf, url string) string {
		c := config.Parse("f", "blacklist {\n"+conf+"\n}\n")
		require.NoError(t, c.Err())
		var o daemon.Options
		attach := ""
		require.NoError(t, configure(&o, c, func(string) bool { return false }, &attach))
		u, err := initiator.ParseURL(url)
		require.NoError(t, err)
		return o.Refuse(u, &initiator.LUInfo{WWID: "w"})
	}
	const session, disk = "iscsi://127.0.0.1/iqn.a:b/0", "file:///dev/sdzzz"
	require.Empty(t, refused("", session))
	require.Empty(t, refused("", disk))
	require.Contains(t, refused(`devnode "^sdz"`, disk), "devnode")
	require.Empty(t, refused(`devnode "^sdz"`, session))
	require.Contains(t, refused("", "file:///dev/nbd0"), "devnode")
	require.Contains(t, refused(`protocol "scsi:iscsi"`, session), "protocol")
	require.Empty(t, refused(`protocol "scsi:iscsi"`, disk))
	require.Contains(t, refused(`protocol "scsi:unspec"`, disk), "protocol")
}
