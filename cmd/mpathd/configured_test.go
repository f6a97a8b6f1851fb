package main

import (
	"fmt"
	"strings"
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

// Who takes what is printed for a configuration has the same one.
func TestWhatIsPrintedReadsBack(t *testing.T) {
	for _, conf := range []string{"", "defaults {\n polling_interval 10\n}\n", "defaults {\n max_polling_interval 40\n}\n", "defaults {\n path_grouping_policy failover\n checker directio\n}\n",
		"devices {\n device {\n vendor V\n product \"a \"\"b\"\"\"\n failback 7\n }\n}\noverrides {\n prio random\n}\n"} {
		c := config.Parse("f", conf)
		require.Empty(t, c.Errors)
		var b strings.Builder
		printConfig(&b, c)
		again := config.Parse("printed", b.String())
		require.Empty(t, again.Errors)
		for _, lu := range []config.LU{{WWID: "w"}, {WWID: "w", ALUA: true}, {WWID: "w", Vendor: "3PARdata", Product: "VV", ALUA: true}, {WWID: "w", Vendor: "V", Product: `a "b"`}} {
			require.Equal(t, c.For(lu), again.For(lu), "%s\n%+v", conf, lu)
		}
		var twice strings.Builder
		printConfig(&twice, again)
		require.Equal(t, b.String(), twice.String())
	}
}

// What a reconfiguration does not apply it names.
func TestSettingsThatWaitForTheNextStartAreNamed(t *testing.T) {
	parse := func(text string) *config.Config {
		c := config.Parse("f", text)
		require.Empty(t, c.Errors)
		return c
	}
	const target = "initiator {\n target {\n url iscsi://192.0.2.1/iqn.a:b\n chap_user %s\n }\n target iscsi://u%%secretsecret@192.0.2.2/iqn.a:c\n}\n"
	before := parse("initiator {\n name iqn.a:b\n failover_time 1s\n discover 192.0.2.1\n}\nnbd {\n attach auto\n}\n" + fmt.Sprintf(target, "joe"))
	require.Empty(t, postponed(before, before))
	require.Empty(t, postponed(parse(""), parse("initiator {\n discover 192.0.2.1\n target iscsi://192.0.2.2/iqn.a:c\n}\n")))
	require.Equal(t, []string{"initiator failover_time", "initiator header_digest", "initiator name", "nbd attach"},
		postponed(before, parse("initiator {\n failover_time 2s\n header_digest crc32c\n}\n"+fmt.Sprintf(target, "jim"))))
}
