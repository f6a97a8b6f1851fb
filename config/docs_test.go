package config

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "write the table of docs/configuration.md")

const docs = "../docs/configuration.md"

// The table of options in the documentation is the parser's own.
func TestDocumentedOptionsAreTheParsers(t *testing.T) {
	var b strings.Builder
	b.WriteString("| option | where | default | effect here |\n|---|---|---|---|\n")
	for _, o := range options {
		effect := means[o.name]
		if o.idle != "" {
			effect = "accepted: " + o.idle
		}
		require.NotEmpty(t, effect, "%s: say what it does", o.name)
		std := o.std
		if std == "" {
			std = "-"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", o.name, strings.Join(strings.Split(o.scopes, ""), " "), std, effect)
	}
	text, err := os.ReadFile(docs)
	require.NoError(t, err)
	head, rest, ok := strings.Cut(string(text), "<!-- options -->\n")
	require.True(t, ok)
	have, tail, ok := strings.Cut(rest, "<!-- end -->")
	require.True(t, ok)
	if *update {
		require.NoError(t, os.WriteFile(docs, []byte(head+"<!-- options -->\n"+b.String()+"<!-- end -->"+tail), 0o644))
		return
	}
	require.Equal(t, b.String(), have, "run go test ./config -update")
}

// means is what each honoured option does.
var means = map[string]string{
	"polling_interval":                   "seconds between checks of a path that changed or is bad",
	"max_polling_interval":               "seconds between checks of a path that stays good; the interval doubles up to it. Only this given: polling_interval is a quarter of it; only polling_interval given: four times that",
	"path_grouping_policy":               "failover, multibus, group_by_serial, group_by_prio, group_by_node_name (target name) or group_by_tpg",
	"path_selector":                      "round-robin, queue-length, service-time or historical-service-time, with the number of its arguments; also failover: the first path",
	"path_checker":                       "how a path is asked whether it is usable: tur, readsector0, directio, none, rdac, emc_clariion, hp_sw",
	"checker_timeout":                    "seconds for a check, for identification and for prioritizers; 0 is 30",
	"ghost_delay":                        "seconds for which a map that comes up waits for a better path before it has an array move the unit to a passive one; no does not wait",
	"failback":                           "whether I/O returns to the best group: immediate, manual, followover, or after that many seconds. Unset: immediate, over several target names manual",
	"no_path_retry":                      "what I/O does when no path is left: fail, queue, or queue for that many polling intervals and then fail until a path is back",
	"user_friendly_names":                "names from the bindings file instead of the WWID",
	"alias_prefix":                       "what those names begin with",
	"wwid":                               "the unit that the section is about, in any spelling",
	"alias":                              "name of the map, of its NBD export and of /dev/mpath/ALIAS",
	"ghost_protection":                   "what is done about writes that may still execute behind a dead path ([write safety](write-safety.md))",
	"shadow_limit":                       "MiB of memory for ghost_protection shadow",
	"fence_by":                           "how an old session is ended for certain ([write safety](write-safety.md))",
	"fence_wait":                         "after which an unfenced session is complained about",
	"quarantine":                         "after which an unfenced session counts as dead without proof; unset: never",
	"fence_command":                      "command that fences a path outside iSCSI",
	"reinstatement_waits":                "the target lets a login wait for the commands of the session that it replaces",
	"replicated":                         "the servers replicate each write before they acknowledge it",
	"multibus_servers":                   "paths to different target names may share I/O",
	"nbd_device":                         "kernel device of the map",
	"vendor":                             "expression that INQUIRY's vendor must match",
	"product":                            "the same for the product",
	"revision":                           "the same for the revision",
	"product_blacklist":                  "products of this vendor to leave alone",
	"prio":                               "how paths are ranked: const, alua (sysfs), weightedpath, path_latency, random, iet, ontap, datacore. Unset: alua where the unit knows it, else const",
	"prio_args":                          "arguments of prio",
	"rr_weight":                          "priorities: round-robin gives a path rr_min_io_rq times its priority in a row",
	"rr_min_io_rq":                       "I/Os in a row that round-robin gives a path",
	"detect_prio":                        "no: prio of the built-in table holds against what the unit says of itself",
	"detect_checker":                     "no: the built-in table's checker holds for units with asymmetric access, else tur",
	"detect_pgpolicy":                    "units with asymmetric access are grouped by priority where the file says nothing",
	"detect_pgpolicy_use_tpg":            "by target port group instead",
	"san_path_err_threshold":             "failures after which a path is kept back ([gray paths](#gray-paths))",
	"san_path_err_forget_rate":           "good checks that forget one failure",
	"san_path_err_recovery_time":         "seconds for which it is kept back",
	"marginal_path_double_failed_time":   "seconds within which two failures bring a path under sampling",
	"marginal_path_err_sample_time":      "seconds of sampling",
	"marginal_path_err_rate_threshold":   "errors of 1000 reads that are too many",
	"marginal_path_err_recheck_gap_time": "seconds until the next sampling",
	"delay_watch_checks":                 "older word for san_path_err_forget_rate",
	"delay_wait_checks":                  "older word for san_path_err_recovery_time, in units of max_polling_interval",
	"marginal_pathgroups":                "on: such paths form a marginal group instead of being kept back; fpin is off",
	"hedge_reads":                        "percent of I/Os that may be reads issued again on another path; yes is 5 ([late reads](#late-reads))",
	"hedge_after":                        "when a read is late enough for that",
	"gray_paths":                         "what paths are compared with by latency and errors: no, group, map",
	"auto_resize":                        "whether the device follows the unit's size: never, grow_only, grow_shrink",
	"max_sectors_kb":                     "KiB per READ or WRITE, below what the unit allows",
	"type":                               "transport that an overrides protocol block is about",
}
