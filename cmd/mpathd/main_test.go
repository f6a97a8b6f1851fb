package main

import (
	"io"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/config"
	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/paths"
)

// Wrong usage exits with 2 and says what is wanted; a daemon that is not there
// is a failure, 1, and says where it was looked for.
func TestExitCodesAndMessages(t *testing.T) {
	none := "--control=" + filepath.Join(t.TempDir(), "none.sock")
	for _, x := range []struct {
		args []string
		code int
		says string
	}{
		{nil, 2, "want one of check, "},
		{[]string{"nope"}, 2, `unknown command "nope": want one of check, `},
		{[]string{"--bogus"}, 2, "unknown flag: --bogus"},
		{[]string{"--log-format=xml", "show", "maps"}, 2, "want text or json"},
		{[]string{"show"}, 2, "show: want one of config, maps, paths, status, topology"},
		{[]string{"show", "nope"}, 2, `show: unknown command "nope"`},
		{[]string{"show", "maps", "more"}, 2, "show maps: got more: want mpathd show maps"},
		{[]string{"show", "maps", none}, 1, "none.sock: no daemon answers"},
		{[]string{"fail"}, 2, "fail: got nothing: want mpathd fail PATH"},
		{[]string{"fail", "x", none}, 1, "no daemon answers"},
		{[]string{"switch", "map", "second", none}, 2, `group "second": want its number`},
		{[]string{"switch", "map", "-1", none}, 2, "unknown shorthand flag"},
		{[]string{"queue", "map", "maybe", none}, 2, "want on or off"},
		{[]string{"resize", none}, 2, "want mpathd resize MAP"},
		{[]string{"detach", "/dev/nbd9999", none}, 1, "/dev/nbd9999: there is no such device"},
		{[]string{"detach", "/dev/nbd", none}, 1, "want /dev/nbdX"},
		{[]string{"discover"}, 2, "want mpathd discover PORTAL..."},
		{[]string{"drill"}, 2, "want mpathd drill MAP [PATH ...]"},
		{[]string{"drill", "map", "--for=1h", none}, 2, "want 100ms to 10m"},
		{[]string{"drill", "map", none}, 1, "no daemon answers"},
		{[]string{"check", "/nonexistent"}, 1, "/nonexistent: no such file"},
		{[]string{"wwid"}, 2, "name a PATH-URL or --vpd83 FILE"},
		{[]string{"wwid", "--vpd83", "/dev/null"}, 1, "/dev/null"},
		{[]string{"run", "--nbd", "nowhere", "iscsi://127.0.0.1/iqn.a:b/0"}, 2, "want unix:PATH or tcp:HOST:PORT"},
		{[]string{"run", "--policy", "bad", "iscsi://127.0.0.1/iqn.a:b/0"}, 2, `path_grouping_policy "bad": want one of failover, `},
		{[]string{"run", "--prio", "iet", "iscsi://127.0.0.1/iqn.a:b/0"}, 2, "iet wants preferredip="},
		{[]string{"run", "--alias", "a/b", "iscsi://127.0.0.1/iqn.a:b/0"}, 2, "a name without slashes"},
		{[]string{"run", "--initiator", "host", "iscsi://127.0.0.1/iqn.a:b/0"}, 2, "begins with iqn., eui. or naa."},
		{[]string{"run", "--failover-time", "1ms", "iscsi://127.0.0.1/iqn.a:b/0"}, 2, "want 100ms or more"},
		{[]string{"run", "http://x"}, 2, "want iscsi://"},
		{[]string{"compat", "fdisk"}, 2, "multipath or multipathd"},
	} {
		logFormat = "text"
		root := rootCommand()
		root.SetArgs(x.args)
		root.SetOut(io.Discard)
		err := root.Execute()
		require.ErrorContains(t, err, x.says, "%v", x.args)
		require.Equal(t, x.code, exitCode(err), "%v: %v", x.args, err)
	}
}

// What `show config` prints of a run from PATH-URLs alone is a configuration.
func TestConfigOfARunWithoutAFileReadsBack(t *testing.T) {
	logFormat = "text"
	f := runCommand().Flags()
	require.NoError(t, f.Parse([]string{"--policy=multibus", "--replicated", "--fence-command=ssh pdu off", "--no-path-retry=12"}))
	u, err := initiator.ParseURL("iscsi://guest%twelve-bytes-@10.0.0.1/iqn.a:b/3")
	require.NoError(t, err)
	o := daemon.Options{InitiatorName: "iqn.a:host", NBD: "unix:/run/n", FailoverTime: 2 * time.Second, Targets: []initiator.URL{u}, Policy: paths.Config{PollingInterval: 3 * time.Second}}
	text := configText(flagConfig(f, &o, "none", 1), true)
	require.NotContains(t, text, "twelve")
	c := config.Parse("show config", text)
	require.Empty(t, c.Errors, "%s", text)
	require.Empty(t, c.Warnings, "%s", text)
	s := c.For(config.LU{WWID: "3600"})
	require.Equal(t, "multibus", s.Policy)
	require.Equal(t, 12, s.NoPathRetry)
	require.True(t, s.Replicated)
	require.Equal(t, 12*time.Second, s.MaxPollingInterval)
	require.Equal(t, "ssh pdu off", s.FenceCommand)
	require.Equal(t, config.Section{"url": "iscsi://guest@10.0.0.1:3260/iqn.a:b/3"}, c.Initiator.Target[0])
}

// A device that the daemon does not detach is somebody's: say whose, and what to do.
func TestDetachOfADeviceThatNoMapHas(t *testing.T) {
	m := &daemon.Maps{Maps: []paths.MapStatus{{Alias: "a", WWID: "3600", NBD: paths.NBDStatus{Device: "/dev/nbd0"}}, {Alias: "b", WWID: "3601"}}}
	require.NoError(t, refused("/dev/nbd0", "3600", m), "its own: the daemon's answer counts")
	require.ErrorContains(t, refused("/dev/nbd1", "3600", m), "/dev/nbd1 was attached for map a, which has /dev/nbd0 now: if it is left over")
	require.ErrorContains(t, refused("/dev/nbd1", "3601", m), "for map b, which has none now")
	require.ErrorContains(t, refused("/dev/nbd1", "3602", m), "for unit 3602, of which the daemon at")
}
