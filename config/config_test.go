package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var xensan = LU{WWID: "1494554000000000031343934353534303366313630633030", Vendor: "IET", Product: "VIRTUAL-DISK", Revision: "0"}

func errorsOf(c *Config) (out []string) {
	for _, e := range c.Errors {
		out = append(out, e.Error())
	}
	return out
}

func TestReferenceConfiguration(t *testing.T) {
	c, err := Load("../docs/examples/reference.conf")
	require.NoError(t, err)
	require.Empty(t, errorsOf(c))
	var warnings []string
	for _, w := range c.Warnings {
		require.Positive(t, w.Line)
		warnings = append(warnings, w.Text)
	}
	require.Len(t, warnings, 2, "%q", warnings)
	require.Contains(t, warnings[0], "udev_dir does nothing here")
	require.Contains(t, warnings[1], "default_getuid_callout does nothing here")
	s := c.For(xensan)
	require.Equal(t, "xensan", s.Alias)
	require.True(t, s.Named)
	require.Equal(t, "failover", s.Policy)
	require.Equal(t, "round-robin 0", s.Selector)
	require.Equal(t, "readsector0", s.Checker)
	require.Equal(t, 5*time.Second, s.PollingInterval)
	require.Equal(t, 20*time.Second, s.MaxPollingInterval)
	require.Equal(t, "immediate", s.Failback)
	require.Equal(t, -1, s.NoPathRetry)
	require.Empty(t, s.Approximations)
	require.Empty(t, c.Blacklisted(xensan))
	require.NotEmpty(t, c.Blacklisted(LU{WWID: "200d04b651805e38e"}))
	require.Len(t, c.Initiator.Target, 2)
	require.Equal(t, "1s", c.Initiator.Settings["failover_time"])
}

// What multipath-tools loses in silence is an error with its place.
func TestSilentLossesAreErrors(t *testing.T) {
	for _, c := range []struct{ what, text, want string }{
		{"brace on the next line", "defaults\n{\n polling_interval 5\n}\n", "f:1: `{` is missing behind defaults"},
		{"two values in a section of our own", "initiator {\n name iqn.a:b iqn.c:d\n}\n", "f:2: only one value is read"},
		{"keyword without value in a section on one line", "nbd { listen }\n", "f:1: listen has no value"},
		{"text behind a section on one line", "nbd { attach auto } x\n", "f:1: nothing may follow `}`"},
		{"section of our own not closed", "nbd { attach auto\n", "the section nbd is not closed"},
		{"brace alone in a section of our own", "nbd { {\n", "f:1: `{` belongs behind"},
		{"section on one line", "defaults { user_friendly_names yes }\n", "f:1: nothing may follow `{`"},
		{"text behind a closing brace", "defaults {\n} blacklist {\n", "f:2: nothing may follow `}`"},
		{"stray closing brace", "}\n", "f:1: `}` closes nothing"},
		{"section not closed", "defaults {\n", "f:1: the section defaults is not closed"},
		{"unknown section not closed", "junk {\ndefaults {\n}\n", "f:1: the section junk is not closed"},
		{"not a number", "defaults {\n polling_interval often\n}\n", `f:2: polling_interval: "often" is no number`},
		{"negative number", "defaults {\n polling_interval -1\n}\n", "f:2: polling_interval: -1 is out of range"},
		{"number out of range", "defaults {\n max_polling_interval 99999999999999999999\n}\n", "f:2: max_polling_interval:"},
		{"no value", "defaults {\n path_checker\n}\n", "f:2: path_checker has no value"},
		{"more than one value", "defaults {\n path_selector round-robin 0\n}\n", "f:2: only one value is read"},
		{"broken expression", "blacklist {\n devnode \"^(a\"\n}\n", "f:2: regular expression"},
		{"broken reservation key", "defaults {\n reservation_key xyz\n}\n", "f:2: reservation_key"},
		{"count of selector words", "defaults {\n path_selector \"round-robin 2 x\"\n}\n", "f:2: path_selector"},
		{"string without end", "defaults {\n path_selector \"round-robin 0\n}\n", "f:2: the string has no end"},
		{"typo in a new section", "initiator {\n nmae iqn.a:b\n}\n", `is "name" meant?`},
		{"wrong url", "initiator {\n target http://x\n}\n", "f:2: target: path URL"},
		{"time without unit", "initiator {\n failover_time 1\n}\n", "has no unit"},
		{"ghost protection", "defaults {\n ghost_protection maybe\n}\n", "want hold, strict, shadow, off"},
		{"two maps on one device", "multipaths {\n multipath {\n wwid a\n nbd_device /dev/nbd0\n }\n multipath {\n wwid b\n nbd_device /dev/nbd0\n }\n}\n", "f:8: nbd_device /dev/nbd0 is given to both a (f:4) and b"},
		{"two maps of one name", "multipaths {\n multipath {\n wwid a\n alias x\n }\n multipath {\n wwid b\n alias x\n }\n}\n", "f:8: alias x is given to both a (f:4) and b"},
		{"device without product", "devices {\n device {\n vendor x\n }\n}\n", "f:2: a device section needs both vendor and product"},
		{"target without url", "initiator {\n target iscsi://h/iqn.a:b\n target {\n  chap_user x\n }\n}\n", "f:3: a target block has no url"},
		{"multipath without wwid", "multipaths {\n multipath {\n alias x\n }\n}\n", "f:2: a multipath section has no wwid"},
	} {
		parsed := Parse("f", c.text)
		for _, e := range parsed.Errors {
			require.Contains(t, e.Detail(), "\n    ", c.what)
			require.True(t, strings.HasSuffix(e.Detail(), "^"), c.what)
		}
		got := errorsOf(parsed)
		require.NotEmpty(t, got, c.what)
		require.Contains(t, strings.Join(got, "\n"), c.want, c.what)
	}
}

func TestGrammar(t *testing.T) {
	c := Parse("f", "defaults{\n\tpath_selector\"round-robin 0\" # comment\n ! another\n alias_prefix \"a \"\"b\"\"\"\n}\r\nblacklist {\n device {\n vendor \"X#1\"\n }\n devnode \"!^sd\"\n}\n")
	require.Empty(t, errorsOf(c))
	require.Equal(t, "round-robin 0", c.Defaults["path_selector"])
	require.Equal(t, `a "b"`, c.Defaults["alias_prefix"])
	require.Equal(t, "X#1", c.Blacklist.Device[0]["vendor"])
	require.Equal(t, []string{"!^sd"}, c.Blacklist.Devnode)
}

// Whatever ends the lines of a file, no line hides in the comment before it.
func TestLineEnds(t *testing.T) {
	const text = "# comment\ndefaults {\n polling_interval 7 # seven\n failback 3\n nonsense x\n}\n"
	for _, end := range []string{"\n", "\r\n", "\r"} {
		c := Parse("f", strings.ReplaceAll(text, "\n", end))
		require.Empty(t, errorsOf(c), "%q", end)
		require.Equal(t, "7", c.Defaults["polling_interval"], "%q", end)
		require.Equal(t, "3", c.Defaults["failback"], "%q", end)
		require.Len(t, c.Warnings, 1)
		require.Equal(t, 5, c.Warnings[0].Line, "%q", end)
	}
}

// The sections of our own may be written on one line, and several settings too.
func TestOwnSectionsOnOneLine(t *testing.T) {
	c := Parse("f", `initiator { discover 192.0.2.1 failover_time 2s
 target { url iscsi://192.0.2.1/iqn.a:b chap_user joe chap_secret_file /etc/joe }
 target {
  url iscsi://192.0.2.2/iqn.a:c
  chap_user jim   chap_secret_file /etc/jim } # both
 target iscsi://192.0.2.3/iqn.a:d header_digest crc32c
}
nbd { listen unix:/run/mpathd/nbd.sock    attach auto }
defaults {
}
`)
	require.Empty(t, errorsOf(c))
	require.Empty(t, c.Warnings)
	require.Equal(t, []string{"192.0.2.1"}, c.Initiator.Discover)
	require.Equal(t, Section{"failover_time": "2s", "header_digest": "crc32c"}, c.Initiator.Settings)
	require.Equal(t, []Section{
		{"url": "iscsi://192.0.2.1/iqn.a:b", "chap_user": "joe", "chap_secret_file": "/etc/joe"},
		{"url": "iscsi://192.0.2.2/iqn.a:c", "chap_user": "jim", "chap_secret_file": "/etc/jim"},
		{"url": "iscsi://192.0.2.3/iqn.a:d"},
	}, c.Initiator.Target)
	require.Equal(t, Section{"listen": "unix:/run/mpathd/nbd.sock", "attach": "auto"}, c.NBD)
}

func TestUnknownWordsAreWarningsWithAHint(t *testing.T) {
	c := Parse("f", "defualts {\n x y\n}\ndefaults {\n poling_interval 5\n user_friendly_names maybe\n}\n")
	require.Empty(t, errorsOf(c))
	require.Len(t, c.Warnings, 3)
	require.Contains(t, c.Warnings[0].Text, `is "defaults" meant?`)
	require.Contains(t, c.Warnings[1].Text, `is "polling_interval" meant?`)
	require.Contains(t, c.Warnings[2].Text, "is ignored: want yes")
	require.Empty(t, c.Defaults)
}

// The later of two settings wins, with a warning where that can only be a mistake.
// A setting that does nothing for want of another says so.
func TestSettingsThatNeedEachOther(t *testing.T) {
	for conf, want := range map[string]string{
		"defaults {\n san_path_err_threshold 3\n san_path_err_forget_rate 9\n}\n":                                                 "f:2: san_path_err_threshold does nothing without san_path_err_recovery_time",
		"defaults {\n san_path_err_threshold 3\n san_path_err_forget_rate 9\n}\noverrides {\n san_path_err_recovery_time 60\n}\n": "",
		"defaults {\n san_path_err_threshold no\n}\n":                                                                             "",
		"defaults {\n san_path_err_threshold no\n delay_wait_checks 0\n}\noverrides {\n marginal_path_err_sample_time 120\n}\n":   "f:6: marginal_path_err_sample_time does nothing without marginal_path_double_failed_time and marginal_path_err_rate_threshold and marginal_path_err_recheck_gap_time",
		"multipaths {\n multipath {\n wwid a\n delay_wait_checks 4\n }\n}\n":                                                      "f:4: delay_wait_checks does nothing without delay_watch_checks",
	} {
		c := Parse("f", conf)
		require.NoError(t, c.Err())
		if want == "" {
			require.Empty(t, c.Warnings, conf)
			continue
		}
		require.Len(t, c.Warnings, 1, conf)
		require.Equal(t, want, c.Warnings[0].Error())
		require.Contains(t, c.Warnings[0].Detail(), "^")
	}
}

func TestSetTwice(t *testing.T) {
	c := Parse("f", "defaults {\n polling_interval 1\n polling_interval 2\n}\ndefaults {\n polling_interval 3\n}\ninitiator {\n failover_time 1s\n failover_time 2s\n}\nnbd {\n listen unix:/a\n listen unix:/b\n}\n")
	require.Empty(t, errorsOf(c))
	require.Len(t, c.Warnings, 2)
	require.Equal(t, "f:3: polling_interval is set twice in this section, in line 2 too: the later one wins", c.Warnings[0].Error())
	require.Equal(t, 10, c.Warnings[1].Line)
	require.Equal(t, "3", c.Defaults["polling_interval"])
	c = Parse("f", "multipaths {\n multipath {\n wwid a\n alias x\n }\n multipath {\n wwid b\n alias x\n }\n multipath {\n wwid a\n alias y\n }\n}\n")
	require.Empty(t, errorsOf(c), "the first is y in the end")
	require.Equal(t, "y", c.For(LU{WWID: "a"}).Alias)
}

// One setting under two of its names is one setting.
func TestSetTwiceUnderTwoNames(t *testing.T) {
	for range 20 { // maps have no order
		c := Parse("f", "defaults {\n path_checker directio\n checker readsector0\n}\ndefaults {\n default_selector \"round-robin 0\"\n}\ndefaults {\n path_selector \"queue-length 0\"\n}\n")
		require.Empty(t, errorsOf(c))
		require.Len(t, c.Warnings, 1)
		require.Contains(t, c.Warnings[0].Error(), "f:3: checker is set twice in this section, in line 2 too")
		s := c.For(LU{})
		require.Equal(t, "readsector0", s.Checker)
		require.Equal(t, "queue-length 0", s.Selector)
		require.Equal(t, Section{"checker": "readsector0", "path_selector": "queue-length 0"}, c.Defaults)
		c = Parse("f", "multipaths {\n multipath {\n wwid a\n path_checker directio\n }\n multipath {\n wwid a\n path_checker tur\n }\n}\n")
		require.Equal(t, "tur", c.For(LU{WWID: "a"}).Checker)
	}
}

// The programs that ranked paths until 2009 are prioritizers now.
func TestPrioCallouts(t *testing.T) {
	for callout, want := range map[string]string{
		`"/sbin/mpath_prio_alua /dev/%n"`: "alua", `"/sbin/mpath_prio_netapp /dev/%n"`: "ontap", `"/sbin/mpath_prio_hds_modular %d"`: "hds", "mpath_prio_rdac": "rdac",
	} {
		c := Parse("f", "devices {\n device {\n vendor v\n product p\n prio_callout "+callout+"\n }\n}\n")
		require.Empty(t, errorsOf(c))
		require.Empty(t, c.Warnings, callout)
		require.Equal(t, want, c.For(LU{Vendor: "v", Product: "p"}).Prio, callout)
	}
	for _, callout := range []string{"/bin/true", "/usr/local/bin/ours", "alua", `""`} {
		c := Parse("f", "defaults {\n default_prio_callout "+callout+"\n}\n")
		require.Len(t, c.Warnings, 1, callout)
		require.Empty(t, c.For(LU{}).Prio, callout)
	}
	c := Parse("f", "defaults {\n prio_callout mpath_prio_emc\n prio random\n}\n")
	require.Len(t, c.Warnings, 1)
	require.Equal(t, "random", c.For(LU{}).Prio)
}

// Where nothing of the value has a meaning here, nothing of it can be lost.
func TestSeveralWordsOfWhatDoesNothing(t *testing.T) {
	c := Parse("f", "defaults {\n default_getuid_callout /sbin/scsi_id -g -u -s /block/%n\n features 1 queue_if_no_path\n}\n")
	require.Empty(t, errorsOf(c))
	require.Len(t, c.Warnings, 2)
	require.NotEmpty(t, errorsOf(Parse("f", "defaults {\n features 2 queue_if_no_path\n}\n")), "a wrong count")
}

func TestPrecedence(t *testing.T) {
	c := Parse("f", `
defaults {
	path_checker tur
	no_path_retry fail
	failback manual
}
devices {
	device {
		vendor "^IET"
		product ".*"
		path_checker directio
		no_path_retry 3
		path_selector "queue-length 0"
	}
}
overrides {
	no_path_retry 5
}
multipaths {
	multipath {
		wwid 3600
		no_path_retry queue
	}
}
`)
	require.Empty(t, errorsOf(c))
	s := c.For(LU{WWID: "x", Vendor: "IET", Product: "VIRTUAL-DISK"})
	require.Equal(t, "directio", s.Checker)
	require.Equal(t, 5, s.NoPathRetry)
	require.Equal(t, "manual", s.Failback)
	require.Equal(t, "queue-length 0", s.Selector)
	require.False(t, s.Named)
	s = c.For(LU{WWID: "other", Synonyms: []string{"3600"}, Vendor: "IET", Product: "VIRTUAL-DISK"})
	require.Equal(t, -1, s.NoPathRetry)
	require.True(t, s.Named)
	require.Equal(t, "tur", c.For(LU{Vendor: "other"}).Checker)
}

func TestEachIntervalFollowsTheOther(t *testing.T) {
	for _, x := range []struct {
		conf              string
		shortest, longest time.Duration
	}{
		{"", 5, 20}, {" polling_interval 10\n", 10, 40}, {" max_polling_interval 40\n", 10, 40}, {" max_polling_interval 3\n", 1, 3},
		{" polling_interval 30\n max_polling_interval 12\n", 12, 12}, {" polling_interval 2\n max_polling_interval 3\n", 2, 3},
	} {
		c := Parse("f", "defaults {\n"+x.conf+"}\n")
		s := c.For(LU{})
		require.Equal(t, x.shortest*time.Second, s.PollingInterval, x.conf)
		require.Equal(t, x.longest*time.Second, s.MaxPollingInterval, x.conf)
		e := c.Effective()
		require.Equal(t, fmt.Sprint(int(x.shortest)), e["polling_interval"], x.conf)
		require.Equal(t, fmt.Sprint(int(x.longest)), e["max_polling_interval"], x.conf)
	}
}

func TestHardwareTableBeatsDefaultsAndLosesToDevices(t *testing.T) {
	text := "defaults {\n no_path_retry fail\n}\n"
	lu := LU{Vendor: "3PARdata", Product: "VV"}
	require.Equal(t, 18, Parse("f", text).For(lu).NoPathRetry)
	text += "devices {\n device {\n vendor 3PAR\n product VV\n no_path_retry 2\n }\n}\n"
	require.Equal(t, 2, Parse("f", text).For(lu).NoPathRetry)
	require.Greater(t, len(builtin()), 100)
	for _, d := range builtin() {
		for k, v := range d {
			o := find(k, "V")
			require.NotNil(t, o, k)
			require.NoError(t, o.check(v), "%s %s", k, v)
		}
	}
}

// A section that a later file goes on with counts as being there, after what
// stood between.
func TestSectionsOfOneTextAreThatOfTheLast(t *testing.T) {
	const device = " device {\n vendor %s\n product %s\n %s\n }\n"
	c := Parse("f", "devices {\n"+fmt.Sprintf(device, "IET", "VIRTUAL-DISK", "no_path_retry 1\n failback 9")+fmt.Sprintf(device, "IET", ".*", "no_path_retry 2")+"}\ndevices {\n"+
		fmt.Sprintf(device, "IET", "VIRTUAL-DISK", "no_path_retry 3")+"}\n")
	require.NoError(t, c.Err())
	require.Len(t, c.Devices, 2)
	s := c.For(LU{Vendor: "IET", Product: "VIRTUAL-DISK"})
	require.Equal(t, 3, s.NoPathRetry)
	require.Equal(t, 9*time.Second, s.FailbackAfter)
	c = Parse("f", "multipaths {\n multipath {\n wwid a\n alias x\n }\n multipath {\n wwid b\n alias y\n }\n multipath {\n wwid a\n alias z\n }\n}\n")
	require.NoError(t, c.Err())
	require.Equal(t, "z", c.For(LU{WWID: "b", Synonyms: []string{"a"}}).Alias)
}

func TestExceptionsProtectWithinTheirCriterion(t *testing.T) {
	c := Parse("f", "blacklist {\n wwid \".*\"\n device {\n vendor IET\n }\n}\nblacklist_exceptions {\n wwid \"^3600\"\n}\n")
	require.Empty(t, c.Blacklisted(LU{WWID: "3600"}))
	require.NotEmpty(t, c.Blacklisted(LU{WWID: "3700"}))
	require.NotEmpty(t, c.Blacklisted(LU{WWID: "3600", Vendor: "IET"}))
}

func TestConfDirectory(t *testing.T) {
	dir := t.TempDir()
	more := filepath.Join(dir, "multipath", "conf.d")
	require.NoError(t, os.MkdirAll(more, 0o700))
	for name, text := range map[string]string{
		filepath.Join(dir, "multipath.conf"): "defaults {\n polling_interval 1\n verbosity 3\n}\n",
		filepath.Join(more, "b.conf"):        "defaults {\n polling_interval 3\n}\n",
		filepath.Join(more, "a.conf"):        "defaults {\n polling_interval 2\n}\n",
		filepath.Join(more, "c.txt"):         "garbage {",
	} {
		require.NoError(t, os.WriteFile(name, []byte(text), 0o600))
	}
	c, err := Load(filepath.Join(dir, "multipath.conf"))
	require.NoError(t, err)
	require.Empty(t, errorsOf(c))
	require.Equal(t, "3", c.Defaults["polling_interval"])
	require.Equal(t, "3", c.Defaults["verbosity"])
}

func TestSecretsAreNotQuoted(t *testing.T) {
	c := Parse("f", "initiator {\n target iscsi://u%topsecretword@h/iqn.a:b/0 x\n target iscsi://u%topsecretword@/iqn\n}\n")
	require.NotEmpty(t, c.Errors)
	for _, e := range c.Errors {
		require.NotContains(t, e.Detail(), "topsecretword")
	}
}

func TestDetailPointsAtThePlace(t *testing.T) {
	c := Parse("f", "defaults {\n\tpolling_interval often\n}\n")
	require.Equal(t, "f:2: error: polling_interval: \"often\" is no number: want 1 to 86400\n    \tpolling_interval often\n    \t                 ^", c.Errors[0].Detail())
}

func FuzzParse(f *testing.F) {
	b, _ := os.ReadFile("../docs/examples/reference.conf")
	f.Add(string(b))
	f.Add("defaults{\nx\"y\n}}\n{\nblacklist {\ndevice {\nvendor \"[\"\n")
	f.Add("initiator {\n target {\n url iscsi://a/iqn.a:b\n }\n}\n")
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > 1<<16 {
			return
		}
		c := Parse("f", text)
		for _, d := range append(c.Errors, c.Warnings...) {
			_ = d.Detail()
		}
		c.For(xensan)
		c.Blacklisted(xensan)
	})
}

func TestInitiatorKeywordsOfLogin(t *testing.T) {
	c := Parse("f", "initiator {\n chap_user u\n chap_algs \"SHA256, md5\"\n chap_short_secrets yes\n header_digest \"crc32c,none\"\n data_digest none,crc32c\n redirect_allow \"10.0.0.0/8, 192.168.1.7\"\n}\n")
	require.NoError(t, c.Err())
	require.Equal(t, "crc32c,none", c.Initiator.Settings["header_digest"])
	for line, say := range map[string]string{"chap_algs rot13": "SHA3-256, SHA256, SHA1, MD5", "header_digest sometimes": "want none, crc32c", "redirect_allow home": "want networks", "chap_short_secrets maybe": "want yes, no"} {
		require.ErrorContains(t, Parse("f", "initiator {\n "+line+"\n}\n").Err(), say)
	}
}

func TestEachListenerHasItsOwnAccess(t *testing.T) {
	parse := func(text string) *Config { return Parse("f", text) }
	c := parse("nbd {\n listen \"unix:/run/a.sock mode=0660 group=kvm\"\n listen \"tcp::10809 tls=required allow=10.0.0.0/8\"\n}\n")
	require.Empty(t, c.Errors)
	require.Equal(t, "unix:/run/a.sock mode=0660 group=kvm, tcp::10809 tls=required allow=10.0.0.0/8", c.NBD["listen"])
	for text, want := range map[string]string{
		"listen \"unix:/run/a.sock mode=0999\"":   "permissions in octal",
		"listen \"tcp::10809 allow=10.0.0.0/99\"": "an address or a network",
		"listen \"tcp::10809 tls=perhaps\"":       "tls=required|optional|off",
		"allow \"10.0.0.0/8, nowhere\"":           "nowhere",
	} {
		c := parse("nbd {\n " + text + "\n}\n")
		require.Len(t, c.Errors, 1, text)
		require.Contains(t, c.Errors[0].Error(), want)
	}
}
