package compat

import (
	"encoding/json"
	"errors"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/paths"
)

// peerState is what the recorded multipathd had: two paths of scsi_debug, one of
// them down.
func peerState() View {
	path := func(name, place, number, state, checker string, prio int, failures, due, every int64) paths.PathStatus {
		return paths.PathStatus{Name: "/dev/" + name, URL: "file:///dev/" + name, Place: place, Number: number, State: state, CheckerState: checker, Checker: "tur", Prio: prio, Failures: failures,
			LUNHex: "0x0000000000000000", Serial: "2000", PortGroup: -1, Target: undefined, NextCheckMS: due, CheckEveryMS: every, Access: "active/optimized"}
	}
	return View{Maps: []paths.MapStatus{{Alias: "mpatha", WWID: "1Linux_scsi_debug_2000", Vendor: "Linux", Product: "scsi_debug", Revision: "0191", Size: 64 << 20, Queueing: true,
		Retry: "12", Failback: paths.Manual, Paths: paths.PathCounts{Total: 2, Usable: 1, Active: 1}, NBD: paths.NBDStatus{Device: "/dev/dm-0"},
		Groups: []paths.GroupStatus{{Selector: "service-time 0", Prio: 50, State: "active", Paths: []paths.PathStatus{
			path("sda", "2:0:0:0", "8:0", "down", "down", 1, 3, 4000, 5000), path("sdb", "3:0:0:0", "8:16", "up", "up", 50, 0, 4000, 10000)}}}}}}
}

// TestOutputIsThePeers compares with what multipathd 0.9.4 of Debian printed in
// an emulated machine. What differs by nature is levelled: when the next check
// is, whether the kernel still has the disk of a path that is down, the last
// action of the device mapper, and our wildcards that it has not.
func TestOutputIsThePeers(t *testing.T) {
	b, err := os.ReadFile("testdata/multipathd-0.9.4.txt")
	require.NoError(t, err)
	level := func(s string) string {
		for _, x := range [][2]string{{`[X.]{10} *\d+/\d+ *`, "NEXT"}, {`next_check *`, "next_check"}, {`offline`, "running"}, {`create: `, ""}, {`"create"`, `""`}, {`action create`, "action"},
			{`(?m)(1 alua +)(create|      ) `, "$1"}, {`1 alua\|create\|`, "1 alua||"}, {`1     active rw(\s)`, "1     active rw$1"},
			{`"path_faults" : \d`, `"path_faults" : N`}, {`mpatha [23] `, "mpatha N "}, {`(\|||create|\|\|) ?[23]\|0\|1\|0\|0`, "|N|0|1|0|0"}} {
			s = regexp.MustCompile(x[0]).ReplaceAllString(s, x[1])
		}
		return s
	}
	d := &fakeDaemon{view: peerState()}
	n := 0
	for _, section := range strings.Split(string(b), "=== multipathd ")[1:] {
		cmd, want, _ := strings.Cut(section, "\n")
		if i := strings.Index(cmd, "%"); i >= 0 {
			cmd = cmd[:i] + `"` + cmd[i:] + `"`
		}
		cmd = strings.ReplaceAll(cmd, "|%A|%x", "||%x") // %A came later
		cmd = strings.ReplaceAll(cmd, "|%A\"", "|\"")
		t.Run(strings.ReplaceAll(cmd, "%", ""), func(t *testing.T) { require.Equal(t, level(want), level(Run(d, cmd))) })
		n++
	}
	require.Equal(t, 16, n)
}

func TestJSONParses(t *testing.T) {
	v := peerState()
	v.Maps = append(v.Maps, v.Maps[0])
	v.Maps[1].Alias = "a \"quoted\" \x01\\ <alias>"
	for _, v := range []View{v, {}} {
		var out struct {
			Maps []struct {
				Name  string
				Paths int
			}
		}
		require.NoError(t, json.Unmarshal([]byte(jsonMaps(&v)), &out))
		require.Len(t, out.Maps, len(v.Maps))
		if len(v.Maps) > 1 {
			require.Equal(t, v.Maps[1].Alias, out.Maps[1].Name)
		}
	}
}

// TestWildcards compares with what libmultipath 0.9.4 lists (snprint_wildcards);
// %k and %A came later.
func TestWildcards(t *testing.T) {
	want, err := os.ReadFile("testdata/wildcards-0.9.4.txt")
	require.NoError(t, err)
	got := Run(&fakeDaemon{view: peerState()}, "show wildcards")
	for _, later := range []string{"%k  max_sectors_kb\n", "%A  TPG\n"} {
		require.Contains(t, got, later)
		got = strings.ReplaceAll(got, later, "")
	}
	require.Equal(t, string(want), got)
}

func TestMarginalGroupsInJSON(t *testing.T) {
	v := peerState()
	require.NotContains(t, jsonMaps(&v), `"marginal"`)
	v.Maps[0].Groups[0].Marginal = true
	require.Equal(t, 1, strings.Count(jsonMaps(&v), `"marginal_st" : "marginal"`))
}

func TestWordsAreThePeers(t *testing.T) {
	for in, want := range map[string]string{
		"show paths": "list paths", "list paths": "list paths", "lis paths": "list paths", "maps show": "list maps", "show multipaths": "list maps",
		"li topo": "list topology", `show paths raw format "%d %t"`: "format list paths raw", "fail path sda": "fail path", "switch map a group 2": "group map switch",
		"switchgroup multipath a group 2": "group map switch", "reconf": "reconfigure", "show map json json": "json list map",
	} {
		c, ok := parse(in)
		require.True(t, ok, in)
		require.Equal(t, want, c.name, in)
	}
	c, _ := parse(`show map "my map" format "%n  %d"`)
	require.Equal(t, map[string]string{"map": "my map", "format": "%n  %d"}, c.params)
	for _, in := range []string{"li ma", "show pa", "sh", "fail path", "show bogus", "", `"show paths"`, "re"} {
		_, ok := parse(in)
		require.False(t, ok, in)
	}
	for in, want := range map[string]bool{"show maps": true, "list daemon": true, "fail path a": false, "reconfigure": false, "": true, "shut": false, "s": false, "quit": true} {
		require.Equal(t, want, Unprivileged(in), in)
	}
}

func TestActions(t *testing.T) {
	d := &fakeDaemon{view: peerState()}
	for cmd, want := range map[string]string{
		"fail path sda": "fail /dev/sda", "fail path 8:16": "fail /dev/sdb", "fail path /dev/sda": "fail /dev/sda", "reinstate path sdb": "reinstate /dev/sdb",
		"switch map dm-0 group 1": "switch 1Linux_scsi_debug_2000 1", "disablequeueing map mpatha": "stop 1Linux_scsi_debug_2000", "restorequeueing maps": "restore 1Linux_scsi_debug_2000",
		"resize map mpatha": "resize 1Linux_scsi_debug_2000", "reconfigure all": "reconfigure",
	} {
		d.did = nil
		require.Equal(t, "ok\n", Run(d, cmd), cmd)
		require.Equal(t, []string{want}, d.did, cmd)
	}
	d.did = nil
	for _, cmd := range []string{"fail path sdz", "switch map mpatha group x", "switch map nosuch group 1", "suspend map mpatha", "show map nosuch topology", "show path sdz", "getprstatus map mpatha", "getprhold map mpatha"} {
		require.True(t, strings.HasPrefix(Run(d, cmd), "fail\n"), cmd)
	}
	require.Empty(t, d.did)
	d.err = errors.New("why not")
	require.Equal(t, "fail\nwhy not\n", Run(d, "fail path sda"))
	require.Contains(t, Run(d, "bogus \n"), "bogus \n: not found\n")
}

func TestMapsByTheirLinks(t *testing.T) {
	v := peerState()
	for _, word := range []string{"mpatha", "/dev/mpath/mpatha", "/dev/mapper/mpatha", "/dev/dm-0", "dm-0", "1Linux_scsi_debug_2000"} {
		require.NotNil(t, v.find(word), word)
		require.NotEmpty(t, Topology(&v, word, TopologyStyle{}), word)
	}
	require.Nil(t, v.find("/dev/mpath/mpathb"))
}

func TestOneOfSeveralMaps(t *testing.T) {
	v := peerState()
	v.Maps = append(v.Maps, peerState().Maps[0])
	v.Maps[1].Alias, v.Maps[1].WWID, v.Maps[1].NBD.Device = "mpathb", "3600", ""
	v.Maps[1].Groups[0].Paths = v.Maps[1].Groups[0].Paths[:1]
	v.Maps[1].Groups[0].Paths[0].Name, v.Maps[1].Groups[0].Paths[0].Number = "/dev/sdc", "8:32"
	aliases := func(word string) (out []string) {
		for _, m := range v.Named(word) {
			out = append(out, m.Alias)
		}
		return out
	}
	for word, want := range map[string][]string{"": {"mpatha", "mpathb"}, "mpathb": {"mpathb"}, "3600": {"mpathb"}, "sdc": {"mpathb"}, "8:32": {"mpathb"}, "sda": {"mpatha"}, "sdz": nil} {
		require.Equal(t, want, aliases(word), word)
		for _, m := range v.Maps {
			require.Equal(t, slices.Contains(want, m.Alias), strings.Contains(Topology(&v, word, TopologyStyle{}), m.Alias+" ("), "%s %s", word, m.Alias)
		}
	}
}

// A portal that does not answer is no path: it would be counted, and its name
// has blanks, which shift the columns of those who cut them.
func TestPortalsAreNoPaths(t *testing.T) {
	v := View{Pending: []Pending{{"discovery at 192.0.2.1:3260", "no answer"}, {"iscsi://192.0.2.1/iqn.a:b/0", "no answer"}}}
	d := &fakeDaemon{view: v}
	require.Equal(t, "iscsi://192.0.2.1/iqn.a:b/0 [orphan]\n", Run(d, `show paths raw format "%d %m"`))
	require.Contains(t, Run(d, "show status"), "\npaths: 1\n")
	require.NotContains(t, Run(d, "show devices"), "discovery")
}

func FuzzRun(f *testing.F) {
	for _, s := range []string{"show paths", `show paths format "%d %"`, `fail path "`, "list map mpatha raw format %n%%%", "show map", "switch map mpatha group 99999999999999999999"} {
		f.Add(s)
	}
	d := &fakeDaemon{view: peerState()}
	d.view.Pending = []Pending{{"iscsi://a/iqn.t/0", "no answer"}}
	f.Fuzz(func(t *testing.T, cmd string) {
		if Run(d, cmd) == "" {
			t.Error("no answer")
		}
	})
}
