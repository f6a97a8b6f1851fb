package config

import (
	"reflect"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// core is every option of multipath-tools that a user of iSCSI meets: how it is
// taken here, and a value that must change what For says. "" is for those that
// are warned about with a reason, "-" for those that the parser and Blacklisted
// use themselves.
var core = map[string]string{
	"polling_interval": "1", "max_polling_interval": "60", "checker_timeout": "3", "path_checker": "directio", "checker": "directio",
	"path_selector": `"round-robin 0"`, "path_grouping_policy": "multibus", "prio": "random", "prio_args": "x", "failback": "7",
	"rr_weight": "priorities", "rr_min_io_rq": "9", "no_path_retry": "12", "user_friendly_names": "yes", "alias_prefix": "disk",
	"wwid": "-", "alias": "x", "max_sectors_kb": "64", "auto_resize": "never", "marginal_pathgroups": "on",
	"san_path_err_threshold": "3", "san_path_err_forget_rate": "4", "san_path_err_recovery_time": "5", "delay_watch_checks": "6", "delay_wait_checks": "7",
	"marginal_path_double_failed_time": "1", "marginal_path_err_sample_time": "2", "marginal_path_err_rate_threshold": "3", "marginal_path_err_recheck_gap_time": "4",
	"ghost_delay": "9", "detect_prio": "no", "detect_checker": "no", "detect_pgpolicy": "no", "detect_pgpolicy_use_tpg": "yes",
	"vendor": "-", "product": "-", "revision": "-", "product_blacklist": "-", "type": "-",

	"verbosity": "", "features": "", "strict_timing": "", "force_sync": "", "log_checker_err": "", "queue_without_daemon": "", "find_multipaths": "", "uid_attribute": "",
	"recheck_wwid": "", "purge_disconnected": "", "fast_io_fail_tmo": "", "reservation_key": "", "all_tg_pt": "", "max_fds": "", "uxsock_timeout": "",
}

// An option of the peer is honoured and changes something, or it says why not.
func TestCoreOptionsAreHonouredOrSaidToDoNothing(t *testing.T) {
	// A unit of an array of the hardware table with asymmetric access: every
	// detection has something to say.
	lu := LU{WWID: "w", Vendor: "3PARdata", Product: "VV", ALUA: true}
	for name, value := range core {
		canonical := name
		if c, ok := synonyms[name]; ok {
			canonical = c
		}
		var o *option
		for i := range options {
			if options[i].name == canonical {
				o = &options[i]
			}
		}
		require.NotNil(t, o, "%s is missing", name)
		require.Equal(t, value == "", o.idle != "", "%s: honoured or warned about, not both", name)
		if value == "" || value == "-" {
			continue
		}
		section := func(body string) string {
			if o.scopes == "M" {
				return "multipaths {\n multipath {\n wwid w\n" + body + " }\n}\n"
			}
			return "defaults {\n" + body + "}\n"
		}
		extra := map[string]string{"prio_args": " prio iet\n", "detect_pgpolicy_use_tpg": " detect_pgpolicy yes\n"}[name]
		before := Parse("f", section(extra))
		after := Parse("f", section(extra+" "+name+" "+value+"\n"))
		require.NoError(t, after.Err(), name)
		same := true
		for _, u := range []LU{lu, {WWID: "w", Vendor: "x", Product: "y"}, {WWID: "w", Vendor: "x", Product: "y", ALUA: true}, {WWID: "w", Vendor: "SGI", Product: "IS", ALUA: true}} {
			same = same && reflect.DeepEqual(before.For(u), after.For(u))
		}
		require.False(t, same, "%s %s changes nothing", name, value)
	}
}

func TestDetectionYieldsToWhatTheFileSays(t *testing.T) {
	lu := LU{WWID: "w", Vendor: "SGI", Product: "IS", ALUA: true}
	s := Parse("f", "").For(lu)
	require.Equal(t, "group_by_prio", s.Policy)
	require.Equal(t, "tur", s.Checker, "an RDAC array in ALUA mode")
	s = Parse("f", "").For(LU{WWID: "w", Vendor: "SGI", Product: "IS"})
	require.Equal(t, "rdac", s.Checker)
	s = Parse("f", "").For(LU{ALUA: true})
	require.Equal(t, "group_by_prio", s.Policy)
	s = Parse("f", "multipaths {\n multipath {\n wwid w\n path_grouping_policy failover\n path_checker rdac\n }\n}\n").For(lu)
	require.Equal(t, "failover", s.Policy)
	require.Equal(t, "rdac", s.Checker)
	require.Equal(t, "failover", Parse("f", "").For(LU{}).Policy)
	s = Parse("f", "defaults {\n delay_watch_checks 6\n delay_wait_checks 2\n}\n").For(LU{})
	require.Equal(t, PathErrors{Threshold: 1, ForgetRate: 6, Recovery: 40 * time.Second}, s.PathErrors)
	s = Parse("f", "defaults {\n delay_watch_checks 6\n delay_wait_checks 2\n san_path_err_threshold 9\n}\n").For(LU{})
	require.Equal(t, PathErrors{Threshold: 9}, s.PathErrors, "the newer words go before the older ones")
}

func TestBlacklistByNodeProtocolAndProduct(t *testing.T) {
	c := Parse("f", "blacklist {\n devnode \"^sdb$\"\n devnode \"^sdc\"\n protocol \"scsi:(fcp|sas)\"\n}\nblacklist_exceptions {\n devnode \"^sdc1\"\n}\n")
	require.NoError(t, c.Err())
	for _, x := range []struct {
		lu  LU
		why string
	}{
		{LU{WWID: "w"}, ""},
		{LU{WWID: "w", Device: "sda"}, ""},
		{LU{WWID: "w", Device: "sdb"}, "devnode"},
		{LU{WWID: "w", Device: "sdc2"}, "devnode"},
		{LU{WWID: "w", Device: "sdc1"}, ""},
		{LU{WWID: "w", Device: "nbd0"}, "devnode"},
		{LU{WWID: "w", Device: "sda", Transport: "scsi:fcp"}, "protocol"},
		{LU{WWID: "w", Device: "sda", Transport: "scsi:unspec"}, ""},
		{LU{WWID: "w", Vendor: "SGI", Product: "Universal Xport"}, "product_blacklist"},
	} {
		require.Contains(t, c.Blacklisted(x.lu), x.why, "%+v", x.lu)
		require.Equal(t, x.why == "", c.Blacklisted(x.lu) == "", "%+v", x.lu)
	}
}

// Negation, and what stands in a device block beside vendor and product, mean
// what they mean to multipath-tools.
func TestNegationInBlacklists(t *testing.T) {
	lio := LU{WWID: "36001405a", Synonyms: []string{"1LIO-ORG_disk", "0LIO-ORG_disk_a"}, Vendor: "LIO-ORG", Product: "disk", Revision: "4.0"}
	other := LU{WWID: "3600a098b", Synonyms: []string{"1NETAPP_LUN_b"}, Vendor: "NETAPP", Product: "LUN C-Mode", Revision: "9"}
	for _, x := range []struct {
		conf       string
		lio, other bool // left alone
	}{
		{"blacklist {\n wwid \"!^36001405\"\n}\n", false, true}, // no other spelling of the unit makes it one of the others
		{"blacklist {\n wwid \"!^1LIO-ORG\"\n}\n", false, true},
		{"blacklist {\n wwid .*\n}\nblacklist_exceptions {\n wwid \"!^36001405\"\n}\n", true, false},
		{"blacklist {\n wwid \"\\!|^36001405\"\n}\n", true, false},
		{"blacklist {\n wwid \"\\!^36001405\"\n}\n", false, false}, // a plain !, which no ID has
		{"blacklist {\n device {\n vendor \"!LIO-ORG\"\n }\n}\n", false, true},
		{"blacklist {\n device {\n vendor NETAPP\n product \"!LUN\"\n }\n}\n", false, false},
		{"blacklist {\n device {\n product \"!LUN\"\n }\n}\n", true, false},
		{"blacklist {\n device {\n vendor .*\n }\n}\nblacklist_exceptions {\n device {\n vendor \"!NETAPP\"\n }\n}\n", false, true},
		{"blacklist {\n device {\n vendor LIO\n revision 5\n }\n}\n", true, false},
	} {
		c := Parse("f", x.conf)
		require.NoError(t, c.Err(), x.conf)
		require.Equal(t, x.lio, c.Blacklisted(lio) != "", x.conf)
		require.Equal(t, x.other, c.Blacklisted(other) != "", x.conf)
	}
	c := Parse("f", "blacklist_exceptions {\n device {\n vendor LIO\n revision 5\n }\n}\n")
	require.Len(t, c.Warnings, 1)
	require.Equal(t, "f:4: revision has no meaning in blacklist_exceptions device and is ignored", c.Warnings[0].Error())
}

// What only shows when a map is made is told by the check already, and keeps no
// map from coming up.
func TestPrioritizersAndSelectorsThatDoNotWorkAreToldWithTheirLine(t *testing.T) {
	for _, x := range []struct{ conf, at, says string }{
		{"multipaths {\n multipath {\n  wwid w\n  prio weightedpath\n  prio_args \"devname [\"\n }\n}\n", "f:5", "then pairs of expression and priority"},
		{"defaults {\n prio weightedpath\n prio_args \"hbtl 1:.* 1\"\n}\n", "f:3", "have no host:bus:target:lun"},
		{"defaults {\n prio ana\n}\n", "f:2", `prio "ana": want const, alua`},
		{"overrides {\n prio iet\n}\n", "f:2", "iet wants preferredip=ADDRESS"},
		{"defaults {\n path_selector \"io-affinity 0\"\n}\n", "f:2", "want failover, round-robin"},
		{"defaults {\n path_selector \"historical-service-time 1 x\"\n}\n", "f:2", "base_weight"},
	} {
		c := Parse("f", x.conf)
		require.NoError(t, c.Err(), x.conf)
		require.Len(t, c.Warnings, 1, x.conf)
		require.Equal(t, x.at, c.Warnings[0].Pos.String(), x.conf)
		require.Contains(t, c.Warnings[0].Text, x.says)
		s := c.For(LU{WWID: "w"})
		require.Empty(t, s.Prio, x.conf)
		require.Empty(t, s.PrioArgs, x.conf)
		require.Equal(t, "service-time 0", s.Selector)
	}
	c := Parse("f", "defaults {\n prio_args \"devname . 7\"\n}\noverrides {\n prio weightedpath\n}\n")
	require.Empty(t, c.Warnings)
	require.Equal(t, "devname . 7", c.For(LU{}).PrioArgs)
}

// Values that multipath-tools takes are no errors, whatever they do here.
func TestValuesOfMultipathTools(t *testing.T) {
	c := Parse("f", "defaults {\n checker_timeout 0\n dev_loss_tmo 4294967295\n}\n")
	require.NoError(t, c.Err())
	require.Equal(t, 30*time.Second, c.For(LU{}).CheckTimeout)
}

func TestAliasOfTwoSpellings(t *testing.T) {
	c := Parse("f", "multipaths {\n multipath {\n wwid 36001\n alias a\n }\n multipath {\n wwid 1LIO_x\n no_path_retry 3\n }\n}\n")
	require.NoError(t, c.Err())
	s := c.For(LU{WWID: "36001", Synonyms: []string{"1LIO_x"}})
	require.Equal(t, "a", s.Alias)
	require.Equal(t, 3, s.NoPathRetry)
}

// What glibc and Go write in different ways.
func TestExpressionsAreGlibcs(t *testing.T) {
	for _, x := range []struct {
		pattern, text string
		matches       bool
	}{
		{"^a{,3}b", "aaab", true}, {"^a{,3}b", "aaaab", false}, {"^a{,}b$", "aaaab", true}, {"^a{2,}b", "ab", false}, {"a{,2}", "a{,2}", true},
		{"^hd[a-z][[0-9]*]", "hda5]", true}, {`^[a\]]`, `\]`, true}, {`\<foo\>`, "a foo b", true}, {"a**b", "b", true},
	} {
		re, err := compile(x.pattern)
		require.NoError(t, err, x.pattern)
		require.Equal(t, x.matches, re.MatchString(x.text), "%s %s", x.pattern, x.text)
	}
}

func TestProtocolBlocksNameATransport(t *testing.T) {
	block := func(line string) *Config { return Parse("f", "overrides {\n protocol {\n"+line+"\n }\n}\n") }
	require.NoError(t, block(` type "scsi:iscsi"`).Err())
	require.ErrorContains(t, block(` type "scsi:foo"`).Err(), "f:3: type: \"scsi:foo\": want scsi:fcp")
}
