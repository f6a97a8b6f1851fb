package config

import (
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/checker"
	"github.com/mpathd/mpathd/selector/prio"
)

func TestBuiltInTableNamesWhatThereIs(t *testing.T) {
	for _, d := range builtin() {
		if p := d["prio"]; p != "" {
			require.Contains(t, prio.Names, p, "%v", d)
		}
		if c := d["path_checker"]; c != "" {
			require.Contains(t, checker.Names, c, "%v", d)
		}
		for k, v := range d {
			o := find(k, "V")
			if o == nil { // what the table says of the family
				continue
			}
			require.NoError(t, o.check(v), "%s %s of %v", k, v, d)
		}
		for _, k := range []string{"vendor", "product", "revision"} {
			_, err := compile(d[k])
			require.NoError(t, err, "%v", d)
		}
	}
}

func TestSettingsOfTargetsThatMultipathToolsDoesNotKnow(t *testing.T) {
	for _, lu := range []LU{
		{Vendor: "TrueNAS", Product: "iSCSI Disk"}, {Vendor: "FreeNAS", Product: "iSCSI Disk"}, {Vendor: "FreeBSD", Product: "iSCSI Disk"}, {Vendor: "FREEBSD", Product: "CTLDISK"},
		{Vendor: "SYNOLOGY", Product: "Storage"}, {Vendor: "SYNOLOGY", Product: "iSCSI Storage"}, {Vendor: "QNAP", Product: "iSCSI Storage"},
	} {
		for _, lu.ALUA = range []bool{true, false} {
			s := Parse("f", "").For(lu)
			require.Equal(t, "group_by_prio", s.Policy, "%+v", lu)
			require.Equal(t, "tur", s.Checker)
			require.Empty(t, s.Prio, "alua if the unit knows it")
		}
	}
	ceph := Parse("f", "").For(LU{Vendor: "LIO-ORG", Product: "TCMU device", ALUA: true})
	require.Equal(t, "failover", ceph.Policy, "two gateways that share I/O take the lock from each other")
	require.Equal(t, "queue-length 0", ceph.Selector)
	require.Equal(t, "tur", ceph.Checker)
	require.Equal(t, "exclusive_pref_bit", ceph.PrioArgs)
	require.Equal(t, 60*time.Second, ceph.FailbackAfter)
	require.Equal(t, -1, ceph.NoPathRetry)
	for _, lu := range []LU{{Vendor: "IET", Product: "VIRTUAL-DISK"}, {Vendor: "FreeBSD", Product: "iSCSI DISK"}} { // tgt and IET, istgt
		require.Equal(t, "failover", Parse("f", "").For(lu).Policy, "as any unit that nothing is known of")
		known := slices.ContainsFunc(builtin(), func(d Section) bool { return matches(d, lu) })
		require.True(t, known, "%+v", lu)
	}
}

// An array with a target name for each port keeps all its paths, though nobody
// said that they may share I/O.
func TestMultibusOfTheTableRefusesNoPath(t *testing.T) {
	lu := LU{Vendor: "XtremIO", Product: "XtremApp"}
	for conf, want := range map[string]string{"": "group_by_node_name", "defaults {\n multibus_servers yes\n}\n": "multibus",
		"overrides {\n path_grouping_policy multibus\n}\n": "multibus", "overrides {\n path_grouping_policy failover\n}\n": "failover"} {
		require.Equal(t, want, Parse("f", conf).For(lu).Policy, conf)
	}
}

// The table's prioritizer serves the units that do not know asymmetric access.
func TestPrioritizersOfTheTable(t *testing.T) {
	for _, x := range []struct {
		lu   LU
		conf string
		want string
	}{
		{LU{Vendor: "SGI", Product: "IS"}, "", "rdac"},
		{LU{Vendor: "SGI", Product: "IS", ALUA: true}, "", ""},
		{LU{Vendor: "SGI", Product: "IS", ALUA: true}, "overrides {\n detect_prio no\n}\n", "rdac"},
		{LU{Vendor: "SGI", Product: "IS", ALUA: true}, "defaults {\n prio const\n}\n", ""},
		{LU{Vendor: "DGC", Product: "RAID 5"}, "", "emc"},
		{LU{Vendor: "HITACHI", Product: "DF600F"}, "", "hds"},
		{LU{Vendor: "HP", Product: "MSA1000"}, "", "hp_sw"},
		{LU{Vendor: "3PARdata", Product: "VV"}, "", ""},
		{LU{Vendor: "3PARdata", Product: "VV"}, "overrides {\n prio alua\n}\n", "alua"},
	} {
		require.Equal(t, x.want, Parse("f", x.conf).For(x.lu).Prio, "%+v %s", x.lu, x.conf)
	}
}
