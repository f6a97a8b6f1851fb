package config

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mpathd/mpathd/selector"
)

// option is one keyword: where it may stand, what its value must be, and, for
// one that does nothing here, why.
type option struct {
	name   string
	scopes string // of D defaults, V devices.device, M multipaths.multipath, O overrides, P overrides.protocol
	check  func(v string) error
	idle   string // the warning of an accepted word without effect
	std    string // default, for --effective
}

// warn is a value error that multipath-tools meets with a warning, keeping the
// former value; other errors refuse the file.
type warn struct{ error }

func number(lo, hi int64) func(string) error {
	return func(v string) error {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return fmt.Errorf("%q is no number: want %d to %d", v, lo, hi)
		}
		if n < lo || n > hi {
			return fmt.Errorf("%d is out of range: want %d to %d", n, lo, hi)
		}
		return nil
	}
}

func oneOf(words ...string) func(string) error {
	return func(v string) error {
		if slices.Contains(words, v) {
			return nil
		}
		return warn{fmt.Errorf("%q is ignored: want %s", v, strings.Join(words, ", "))}
	}
}

// numberOr is a number or one of some words.
func numberOr(lo, hi int64, words ...string) func(string) error {
	return func(v string) error {
		if slices.Contains(words, v) {
			return nil
		}
		if err := number(lo, hi)(v); err != nil {
			return fmt.Errorf("%w or %s", err, strings.Join(words, ", "))
		}
		return nil
	}
}

func text(v string) error { return nil }

// CheckAlias tells why a map cannot have this name, which is also that of its NBD
// export and of a link in /dev/mpath; nil: it can.
func CheckAlias(v string) error {
	if v == "" || strings.Contains(v, "/") || strings.ContainsAny(v, "\n\x00") || v == "." || v == ".." {
		return fmt.Errorf("%q: a name without slashes is wanted", v)
	}
	return nil
}

func counted(v string) error {
	f := strings.Fields(v)
	if len(f) == 0 {
		return fmt.Errorf("the value is empty")
	}
	if len(f) > 1 {
		n, err := strconv.Atoi(f[1])
		if err != nil || n != len(f)-2 {
			return fmt.Errorf("%q: the number after the name must be the count of the words that follow (%d)", v, len(f)-2)
		}
	}
	return nil
}

func pathSelector(v string) error {
	if err := counted(v); err != nil {
		return err
	}
	if _, err := selector.New(v, nil); err != nil {
		return warn{fmt.Errorf("ignored: %w", err)}
	}
	return nil
}

func features(v string) error {
	f := strings.Fields(v)
	if len(f) > 0 {
		if n, err := strconv.Atoi(f[0]); err != nil || n != len(f)-1 {
			return fmt.Errorf("%q: the first word must be the count of the words that follow (%d)", v, len(f)-1)
		}
	}
	return nil
}

func pattern(v string) error {
	_, err := compile(strings.TrimPrefix(v, "!"))
	if err != nil {
		return fmt.Errorf("regular expression %q: %w", v, err)
	}
	return nil
}

func duration(v string) error {
	d, err := time.ParseDuration(v)
	if err != nil {
		if _, e := strconv.Atoi(v); e == nil {
			return fmt.Errorf("%q has no unit: want a time like 1s or 500ms", v)
		}
		return fmt.Errorf("%q is no time: want one like 1s or 500ms", v)
	}
	if d < 100*time.Millisecond || d > time.Hour {
		return fmt.Errorf("%v is out of range: want 100ms to 1h", d)
	}
	return nil
}

func reservationKey(v string) error {
	if v == "file" {
		return nil
	}
	if _, err := strconv.ParseUint(strings.TrimPrefix(strings.TrimSuffix(v, ":aptpl"), "0x"), 16, 64); err != nil {
		return fmt.Errorf("%q: want up to 16 hex digits, `:aptpl` behind them if wanted, or file", v)
	}
	return nil
}

var yesNo = oneOf("yes", "no", "1", "0")

const (
	dm   = "there is no device-mapper map here"
	udev = "udev plays no part here"
	fc   = "it is for Fibre Channel and SAS"
	keys = "nothing can reserve through NBD; keys of its own are fence_by preempt's"
	old  = "it has had no meaning for years"
)

// protocols are the transports of multipath-tools, as `overrides` and the
// blacklists spell them.
var protocols = []string{"scsi:fcp", "scsi:spi", "scsi:ssa", "scsi:sbp", "scsi:srp", "scsi:iscsi", "scsi:sas", "scsi:adt", "scsi:ata", "scsi:unspec",
	"nvme:pcie", "nvme:rdma", "nvme:fc", "nvme:tcp", "nvme:loop", "nvme:apple-nvme", "nvme:unspec", "ccw", "cciss", "undef"}

var policies = []string{"failover", "multibus", "group_by_serial", "group_by_prio", "group_by_node_name", "group_by_tpg"}

// options is the table of all keywords, shared by the parser, `mpathd check`
// and docs/configuration.md.
var options = []option{
	{"verbosity", "D", number(0, 6), "what happens is always told, once", ""},
	{"polling_interval", "D", number(1, 86400), "", "5"},
	{"max_polling_interval", "D", number(1, 86400), "", "20"},
	{"path_grouping_policy", "DVMO", func(v string) error {
		for _, p := range policies {
			if strings.HasPrefix(v, p) {
				return nil
			}
		}
		return warn{fmt.Errorf("%q is ignored: want %s", v, strings.Join(policies, ", "))}
	}, "", "failover"},
	{"path_selector", "DVMO", pathSelector, "", "service-time 0"},
	{"path_checker", "DVMO", oneOf("tur", "readsector0", "directio", "none", "emc_clariion", "hp_sw", "rdac", "cciss_tur"), "", "tur"},
	{"checker_timeout", "D", number(0, 3600), "", "30"},
	{"failback", "DVMO", numberOr(0, 86400, "immediate", "manual", "followover"), "", ""}, // paths.Config.Failback
	{"no_path_retry", "DVMO", numberOr(0, 1<<20, "fail", "queue"), "", "queue"},
	{"user_friendly_names", "DVMO", yesNo, "", "no"},
	{"alias_prefix", "DVO", CheckAlias, "", "mpath"},
	{"wwid", "M", text, "", ""},
	{"alias", "M", CheckAlias, "", ""},
	{"ghost_protection", "DVMO", func(v string) error { return strictly(v, "hold", "strict", "shadow", "off") }, "", "hold"},
	{"shadow_limit", "DVMO", number(1, 1<<20), "", "64"}, // MiB
	{"fence_by", "DVMO", func(v string) error { return strictly(v, "reset", "preempt") }, "", "reset"},
	{"fence_wait", "DVMO", duration, "", "30s"},
	{"quarantine", "DVMO", duration, "", ""},
	{"fence_command", "DVMO", text, "", ""},
	{"reinstatement_waits", "DVMO", yesNo, "", "no"},
	{"replicated", "DVMO", yesNo, "", "no"},
	{"multibus_servers", "DVMO", yesNo, "", "no"},
	{"nbd_device", "M", func(v string) error {
		if !strings.HasPrefix(v, "/dev/nbd") || number(0, 1<<16)(strings.TrimPrefix(v, "/dev/nbd")) != nil {
			return fmt.Errorf("%q: want /dev/nbdN", v)
		}
		return nil
	}, "", ""},
	{"vendor", "V", pattern, "", ""},
	{"product", "V", pattern, "", ""},
	{"revision", "V", pattern, "", ""},
	{"product_blacklist", "V", pattern, "", ""},
	{"features", "DVMO", features, "no_path_retry decides about queueing, and nothing else of it has a meaning", ""},
	{"prio", "DVMO", text, "", ""},
	{"prio_args", "DVMO", text, "", ""},
	{"rr_weight", "DVMO", oneOf("uniform", "priorities"), "", "uniform"},
	{"rr_min_io", "DVMO", number(1, 1<<31), old, ""},
	{"rr_min_io_rq", "DVMO", number(1, 1<<31), "", "1"},
	{"detect_prio", "DVO", yesNo, "", "yes"},
	{"detect_checker", "DVO", yesNo, "", "yes"},
	{"detect_pgpolicy", "DVO", yesNo, "", "yes"},
	{"detect_pgpolicy_use_tpg", "DVO", yesNo, "", "no"},
	{"strict_timing", "D", yesNo, "checks keep their own time", ""},
	{"force_sync", "D", yesNo, "checks never wait for each other", ""},
	{"log_checker_err", "D", oneOf("once", "always"), "a checker's verdict is logged when it changes", ""},
	{"queue_without_daemon", "D", yesNo, "the device belongs to the daemon", ""},
	{"find_multipaths", "D", oneOf("off", "on", "strict", "greedy", "smart", "yes", "no", "1", "0"), "only the configured targets are looked at", ""},
	{"find_multipaths_timeout", "D", number(-3600, 3600), "only the configured targets are looked at", ""},
	{"uid_attribute", "DVO", text, "IDs are read from page 0x83", ""},
	{"uid_attrs", "D", text, udev, ""},
	{"recheck_wwid", "DVO", yesNo, "the ID is verified at every login, always", ""},
	{"san_path_err_threshold", "DVMO", numberOr(0, 1<<31, "no"), "", "no"},
	{"san_path_err_forget_rate", "DVMO", numberOr(0, 1<<31, "no"), "", "no"},
	{"san_path_err_recovery_time", "DVMO", numberOr(0, 1<<31, "no"), "", "no"},
	{"marginal_path_double_failed_time", "DVMO", numberOr(0, 1<<31, "no"), "", "no"},
	{"marginal_path_err_sample_time", "DVMO", numberOr(0, 1<<31, "no"), "", "no"},
	{"marginal_path_err_rate_threshold", "DVMO", numberOr(0, 1<<31, "no"), "", "no"},
	{"marginal_path_err_recheck_gap_time", "DVMO", numberOr(0, 1<<31, "no"), "", "no"},
	{"delay_watch_checks", "DVMO", numberOr(0, 1<<31, "no"), "", "no"},
	{"delay_wait_checks", "DVMO", numberOr(0, 1<<31, "no"), "", "no"},
	{"marginal_pathgroups", "D", oneOf("off", "on", "fpin", "yes", "no", "0", "1"), "", "off"},
	{"hedge_reads", "DVMO", numberOr(1, 20, "no", "yes"), "", "no"},
	{"hedge_after", "DVMO", func(v string) error {
		if d, err := time.ParseDuration(v); v != "auto" && (err != nil || d < time.Millisecond || d > 10*time.Second) {
			return fmt.Errorf("%q: want auto or a time from 1ms to 10s", v)
		}
		return nil
	}, "", "auto"},
	{"gray_paths", "DVMO", func(v string) error { return strictly(v, "no", "group", "map") }, "", "group"},
	{"flush_on_last_del", "DVMO", oneOf("always", "unused", "never", "yes", "no", "1", "0"), dm, ""},
	{"deferred_remove", "DVMO", yesNo, dm, ""},
	{"auto_resize", "D", oneOf("never", "grow_only", "grow_shrink"), "", "grow_only"},
	{"purge_disconnected", "DVMO", yesNo, "a unit that is gone takes its path down, always", ""},
	{"ghost_delay", "DVMO", numberOr(0, 3600, "no"), "", "3"},
	{"max_sectors_kb", "DVMO", number(4, 1<<20), "", ""},
	{"fast_io_fail_tmo", "DVOP", numberOr(0, 1<<31, "off"), "failover_time of the initiator section decides", ""},
	{"dev_loss_tmo", "DVOP", numberOr(0, 1<<32-1, "infinity"), fc, ""},
	{"eh_deadline", "DVOP", numberOr(0, 1<<31, "off"), "the kernel's SCSI layer plays no part", ""},
	{"max_retries", "D", numberOr(0, 5, "off"), "the kernel's SCSI layer plays no part", ""},
	{"type", "P", func(v string) error { return strictly(v, protocols...) }, "", ""},
	{"reservation_key", "DM", reservationKey, keys, ""},
	{"all_tg_pt", "DVO", yesNo, keys, ""},
	{"hardware_handler", "V", text, "the kernel's SCSI layer plays no part", ""},
	{"retain_attached_hw_handler", "DVO", yesNo, "the kernel's SCSI layer plays no part", ""},
	{"vpd_vendor", "V", text, "it is a column of multipathd's own", ""},
	{"mode", "DM", text, udev, ""}, {"uid", "DM", text, udev, ""}, {"gid", "DM", text, udev, ""},
	{"allow_usb_devices", "D", yesNo, "only the configured paths are looked at", ""},
	{"skip_kpartx", "DVMO", yesNo, "the kernel reads partitions of the device itself", ""},
	{"partition_delimiter", "D", text, "the kernel names partitions itself", ""},
	{"reassign_maps", "D", yesNo, dm, ""}, {"retrigger_tries", "D", text, udev, ""}, {"retrigger_delay", "D", text, udev, ""},
	{"missing_uev_wait_timeout", "D", text, udev, ""}, {"remove_retries", "D", text, dm, ""}, {"enable_foreign", "DO", text, "only the configured paths are looked at", ""},
	{"max_fds", "D", text, "the limit is raised as needed", ""}, {"uxsock_timeout", "D", text, "commands wait 10 s", ""},
	{"bindings_file", "D", text, "bindings are kept in /var/lib/mpathd", ""}, {"wwids_file", "D", text, old, ""}, {"prkeys_file", "D", text, keys, ""},
	{"config_dir", "D", text, old, ""}, {"multipath_dir", "D", text, old, ""}, {"getuid_callout", "DV", text, "IDs are read from page 0x83, as scsi_id prints them", ""},
	{"pg_timeout", "DVMO", text, old, ""}, {"disable_changed_wwids", "D", yesNo, old, ""},
	{"udev_dir", "D", text, udev, ""}, {"prio_callout", "DV", text, "prio names a built-in prioritizer now; one of mpath_prio_alua, emc, hds_modular, hp_sw, netapp, random, rdac and tpc is taken for it", ""},
	{"default_getuid_callout", "D", text, "IDs are read from page 0x83, as scsi_id prints them", ""},
	{"default_prio_callout", "D", text, "prio names a built-in prioritizer now; one of mpath_prio_alua, emc, hds_modular, hp_sw, netapp, random, rdac and tpc is taken for it", ""},
}

// synonyms are spellings of 2005 to 2010 and short ones: they mean what they meant.
var synonyms = map[string]string{
	"checker": "path_checker", "selector": "path_selector", "default_selector": "path_selector",
	"default_path_grouping_policy": "path_grouping_policy", "default_features": "features", "default_path_checker": "path_checker",
}

// callouts are the prioritizers that the programs of prio_callout became (0.4.9).
var callouts = map[string]string{"alua": "alua", "emc": "emc", "hds_modular": "hds", "hp_sw": "hp_sw", "netapp": "ontap", "random": "random", "rdac": "rdac", "tpc": "rdac"}

// meaning is a setting in today's words.
func meaning(keyword, value string) (string, string) {
	if c, ok := synonyms[keyword]; ok {
		return c, value
	}
	if keyword == "prio_callout" || keyword == "default_prio_callout" {
		program, _, _ := strings.Cut(strings.TrimSpace(value), " ")
		if p, ok := callouts[strings.TrimPrefix(path.Base(program), "mpath_prio_")]; ok && strings.HasPrefix(path.Base(program), "mpath_prio_") {
			return "prio", p
		}
	}
	return keyword, value
}

// put sets a keyword, and takes away what the same setting was called before.
func (s Section) put(keyword, value string) {
	k, _ := meaning(keyword, value)
	maps.DeleteFunc(s, func(other, x string) bool {
		o, _ := meaning(other, x)
		return o == k
	})
	s[keyword] = value
}

func strictly(v string, words ...string) error {
	if !slices.Contains(words, v) {
		return fmt.Errorf("%q: want %s", v, strings.Join(words, ", "))
	}
	return nil
}

func find(name, scope string) *option {
	for i := range options {
		if options[i].name == name && strings.Contains(options[i].scopes, scope) {
			return &options[i]
		}
	}
	return nil
}

func names(scope string) (out []string) {
	for _, o := range options {
		if strings.Contains(o.scopes, scope) {
			out = append(out, o.name)
		}
	}
	return out
}
