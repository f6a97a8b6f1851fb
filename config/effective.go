package config

import (
	"cmp"
	_ "embed"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mpathd/mpathd/checker"
	"github.com/mpathd/mpathd/selector"
	"github.com/mpathd/mpathd/selector/prio"
)

//go:embed hwtable.tsv
var hwtable string

// builtin is the hardware table, in order: a later matching entry wins, option
// by option.
var builtin = sync.OnceValue(func() (out []Section) {
	rows := strings.Split(strings.TrimSpace(hwtable), "\n")
	head := strings.Split(rows[0], "\t")
	for _, row := range rows[1:] {
		d := Section{}
		for i, v := range strings.Split(row, "\t") {
			if v != "-" && v != "" && i < 8 {
				d[strings.TrimSuffix(head[i], "_re")] = v
			}
			if v != "-" && head[i] == "other" {
				for pair := range strings.SplitSeq(v, "; ") {
					if k, x, ok := strings.Cut(pair, "="); ok && find(k, "V") != nil {
						d[k] = strings.TrimSpace(x)
					}
				}
			}
		}
		out = append(out, d)
	}
	return out
})

// LU is what a configuration may look at.
type LU struct {
	WWID                      string   // as scsi_id prints it
	Synonyms                  []string // its other spellings, which match as well
	Vendor, Product, Revision string   // of INQUIRY, blanks trimmed
	ALUA                      bool     // it has asymmetric access states
	Transport                 string   // as `protocol` patterns spell it; empty: not known
	Device                    string   // name of the block device of a local path, without /dev/; empty: none
}

// Settings are those of one map, each the value of the option of its name (see
// docs/configuration.md), checked by the parser.
type Settings struct {
	Alias              string // empty: by user_friendly_names or WWID
	Named              bool   // a multipath section names the WWID
	UserFriendlyNames  bool
	AliasPrefix        string
	Policy             string
	Prio, PrioArgs     string // empty: as detected
	MinIO              int
	WeightByPrio       bool
	Selector           string
	Checker            string
	Failback           string // immediate, manual or followover; empty: as the number of servers asks for
	FailbackAfter      time.Duration
	NoPathRetry        int // -1 queue, 0 fail, N polling intervals
	PollingInterval    time.Duration
	MaxPollingInterval time.Duration
	CheckTimeout       time.Duration
	Protection         string
	ShadowLimit        int64 // bytes
	FenceBy            string
	FenceWait          time.Duration
	GhostDelay         time.Duration // negative: none
	Quarantine         time.Duration
	FenceCommand       string
	Waits              bool
	Replicated         bool
	MultibusServers    bool
	NBDDevice          string
	MaxIO              int64 // bytes per command, 0: as the unit says
	AutoResize         string
	PathErrors         PathErrors
	Sampling           Sampling
	MarginalGroups     bool
	GrayPaths          string        // no, group or map
	HedgeReads         int           // percent, 0 none
	HedgeAfter         time.Duration // 0: learnt
	Approximations     []string      // settings that are honoured only nearly
}

// PathErrors is san_path_err_*: a path that came back more than Threshold times
// is kept back for Recovery; ForgetRate good checks forget one.
type PathErrors struct {
	Threshold, ForgetRate int // returns, good checks
	Recovery              time.Duration
}

// Sampling is marginal_path_*: see paths.Sampling.
type Sampling struct {
	DoubleFailed, Sample, Recheck time.Duration // whole seconds
	Rate                          int           // errors of 1000 reads
}

// BuiltIn is the hardware table as sections `device`, in order.
func BuiltIn() (out []Section) {
	for _, d := range builtin() {
		known := Section{}
		for k, v := range d {
			if find(k, "V") != nil {
				known[k] = v
			}
		}
		out = append(out, known)
	}
	return out
}

func matches(d Section, lu LU) bool {
	for _, f := range []struct{ re, is string }{{d["vendor"], lu.Vendor}, {d["product"], lu.Product}, {d["revision"], lu.Revision}} {
		if f.re == "" {
			continue
		}
		re, err := compile(f.re)
		if err != nil || !re.MatchString(f.is) {
			return false
		}
	}
	return d["vendor"] != "" || d["product"] != ""
}

func canonical(s Section) Section {
	out := Section{}
	for k, v := range s {
		k, v = meaning(k, v)
		out[k] = v
	}
	return out
}

// For gives the settings of a unit: built-in values, defaults, hardware table,
// devices, overrides, multipaths, each winning over those before it.
func (c *Config) For(lu LU) Settings {
	v := Section{}
	for _, o := range options {
		if o.std != "" && strings.Contains(o.scopes, "D") {
			v[o.name] = o.std
		}
	}
	explicit := map[string]bool{} // said by the file, not by the hardware table
	take := func(s Section) {
		for k, x := range canonical(s) {
			v[k] = x
			explicit[k] = true
		}
	}
	take(c.Defaults)
	for _, d := range builtin() {
		if matches(d, lu) {
			for k, x := range canonical(d) {
				v[k] = x
				explicit[k] = false
			}
		}
	}
	for _, d := range c.Devices {
		if matches(d, lu) {
			take(d)
		}
	}
	take(c.Overrides)
	var s Settings
	for _, m := range c.Multipaths {
		if m["wwid"] == lu.WWID || slices.Contains(lu.Synonyms, m["wwid"]) {
			take(m)
			s.Named, s.Alias = true, cmp.Or(m["alias"], s.Alias)
		}
	}
	seconds := func(k string) time.Duration {
		n, _ := strconv.Atoi(v[k])
		return time.Duration(n) * time.Second
	}
	count := func(k string) int { n, _ := strconv.Atoi(v[k]); return n } // 0 for "no"
	yes := func(k string) bool { return v[k] == "yes" || v[k] == "1" }
	nearly := func(k, as string) {
		s.Approximations = append(s.Approximations, fmt.Sprintf("%s %s is not known here: %s instead", k, v[k], as))
	}
	s.UserFriendlyNames, s.AliasPrefix = yes("user_friendly_names"), v["alias_prefix"]
	for _, p := range policies { // as multipath-tools compares
		if strings.HasPrefix(v["path_grouping_policy"], p) {
			s.Policy = p
		}
	}
	if s.Policy == "multibus" && !explicit["path_grouping_policy"] && !yes("multibus_servers") {
		// The table knows nothing of late writes: as far as paths may share I/O
		// unasked, they do, and the others are no less used.
		s.Policy = "group_by_node_name"
	}
	s.Selector = v["path_selector"]
	if _, err := selector.New(s.Selector, nil); err != nil {
		s.Selector = "service-time 0"
		nearly("path_selector", s.Selector)
	}
	detects := func(k string) bool { return v[k] != "no" && v[k] != "0" }
	if lu.ALUA && !explicit["path_grouping_policy"] && (v["prio"] == "" || v["prio"] == "alua" || v["prio"] == "sysfs" || !explicit["prio"]) {
		switch { // as multipath-tools groups such units unasked
		case yes("detect_pgpolicy_use_tpg"):
			s.Policy = "group_by_tpg"
		case detects("detect_pgpolicy"):
			s.Policy = "group_by_prio"
		}
	}
	s.Checker = v["path_checker"]
	if lu.ALUA && !explicit["path_checker"] && detects("detect_checker") {
		s.Checker = "tur"
	}
	if !slices.Contains(checker.Names, s.Checker) {
		s.Checker = "tur"
		nearly("path_checker", "tur")
	}
	switch f := v["failback"]; f {
	case "", "immediate", "manual", "followover":
		s.Failback = f
	default:
		s.Failback, s.FailbackAfter = "immediate", seconds("failback")
		if s.FailbackAfter == 0 { // as multipath-tools reads it
			s.Failback = "immediate"
		}
	}
	s.Prio, s.PrioArgs = v["prio"], v["prio_args"]
	if _, err := prio.New(s.Prio, s.PrioArgs); err != nil {
		s.Approximations = append(s.Approximations, fmt.Sprintf("%v: what the unit supports instead", err))
		s.Prio, s.PrioArgs = "", ""
	}
	if asymmetric := s.Prio == "alua" || s.Prio == "sysfs"; !explicit["prio"] && detects("detect_prio") && (lu.ALUA || asymmetric) {
		s.Prio = "" // the hardware table's word yields to what the unit says of itself
	}
	s.MinIO, _ = strconv.Atoi(v["rr_min_io_rq"])
	s.WeightByPrio = v["rr_weight"] == "priorities"
	switch r := v["no_path_retry"]; r {
	case "queue":
		s.NoPathRetry = -1
	case "fail":
	default:
		s.NoPathRetry, _ = strconv.Atoi(r)
	}
	if s.CheckTimeout = seconds("checker_timeout"); s.CheckTimeout == 0 {
		s.CheckTimeout = 30 * time.Second
	}
	shortest, longest := intervals(v, c.Defaults)
	s.PollingInterval, s.MaxPollingInterval = time.Duration(shortest)*time.Second, time.Duration(longest)*time.Second
	s.Protection, s.FenceCommand, s.NBDDevice = v["ghost_protection"], v["fence_command"], v["nbd_device"]
	s.MaxIO = int64(count("max_sectors_kb")) << 10
	s.AutoResize, s.GrayPaths, s.FenceBy = v["auto_resize"], v["gray_paths"], v["fence_by"]
	if s.HedgeReads = count("hedge_reads"); v["hedge_reads"] == "yes" {
		s.HedgeReads = 5
	}
	s.HedgeAfter, _ = time.ParseDuration(v["hedge_after"])
	s.PathErrors = PathErrors{count("san_path_err_threshold"), count("san_path_err_forget_rate"), seconds("san_path_err_recovery_time")}
	if s.PathErrors == (PathErrors{}) { // as multipath-tools maps the older words
		if n := count("delay_watch_checks"); n > 0 {
			s.PathErrors.Threshold, s.PathErrors.ForgetRate = 1, n
		}
		if n := count("delay_wait_checks"); n > 0 {
			s.PathErrors.Threshold, s.PathErrors.Recovery = 1, time.Duration(n)*s.MaxPollingInterval
		}
	}
	s.Sampling = Sampling{seconds("marginal_path_double_failed_time"), seconds("marginal_path_err_sample_time"), seconds("marginal_path_err_recheck_gap_time"), count("marginal_path_err_rate_threshold")}
	s.MarginalGroups = v["marginal_pathgroups"] == "on" || yes("marginal_pathgroups")
	if v["marginal_pathgroups"] == "fpin" {
		s.Approximations = append(s.Approximations, "marginal_pathgroups fpin is for Fibre Channel: off instead")
	}
	mib, _ := strconv.ParseInt(v["shadow_limit"], 10, 64)
	s.ShadowLimit = mib << 20
	s.FenceWait, _ = time.ParseDuration(v["fence_wait"])
	if s.GhostDelay = seconds("ghost_delay"); s.GhostDelay == 0 {
		s.GhostDelay = -1
	}
	s.Quarantine, _ = time.ParseDuration(v["quarantine"])
	s.Waits = yes("reinstatement_waits")
	s.Replicated, s.MultibusServers = yes("replicated"), yes("multibus_servers")
	return s
}

// intervals are the shortest and the longest time between checks in seconds, of
// all settings and those that the file says: what it does not say follows what it
// does.
func intervals(v, said Section) (shortest, longest int) {
	shortest, _ = strconv.Atoi(v["polling_interval"])
	longest, _ = strconv.Atoi(v["max_polling_interval"])
	switch {
	case said["polling_interval"] != "" && said["max_polling_interval"] == "":
		longest = 4 * shortest
	case said["polling_interval"] == "" && said["max_polling_interval"] != "":
		shortest = max(longest/4, 1)
	}
	return min(shortest, longest), longest
}

// Blacklisted tells why a unit must be left alone, or "". An exception protects
// within its own criterion. Properties are udev's, and udev plays no part here.
func (c *Config) Blacklisted(lu LU) string {
	any := func(list []string, values ...string) string {
		for _, p := range list {
			if hits(p, values...) {
				return p
			}
		}
		return ""
	}
	excepted := func(lu LU) bool {
		return slices.ContainsFunc(c.Exceptions.Device, func(x Section) bool { return listed(x, lu) })
	}
	if lu.Device != "" && any(c.Exceptions.Devnode, lu.Device) == "" {
		for _, p := range append([]string{builtinDevnode}, c.Blacklist.Devnode...) {
			if hits(p, lu.Device) {
				return fmt.Sprintf("blacklist devnode %q", p)
			}
		}
	}
	for _, d := range c.Blacklist.Device {
		if listed(d, lu) && !excepted(lu) {
			return fmt.Sprintf("blacklist device %q %q", d["vendor"], d["product"])
		}
	}
	for _, d := range slices.Concat(builtin(), c.Devices) {
		if x := d["product_blacklist"]; x != "" && listed(Section{"vendor": d["vendor"], "product": x}, lu) && !excepted(lu) {
			return fmt.Sprintf("product_blacklist %q", x)
		}
	}
	if how := lu.Transport; how == "" {
	} else if p := any(c.Blacklist.Protocol, how); p != "" && any(c.Exceptions.Protocol, how) == "" {
		return fmt.Sprintf("blacklist protocol %q", p)
	}
	ids := append([]string{lu.WWID}, lu.Synonyms...)
	if p := any(c.Blacklist.WWID, ids...); p != "" && any(c.Exceptions.WWID, ids...) == "" {
		return fmt.Sprintf("blacklist wwid %q", p)
	}
	return ""
}

// builtinDevnode leaves everything alone but disks: above all the device that
// mpathd makes itself.
const builtinDevnode = "!^(sd[a-z]|dasd[a-z]|nvme[0-9])"

// listed tells whether a device block of a blacklist is about the unit.
func listed(d Section, lu LU) bool {
	in := func(p, v string) bool { return p == "" || hits(p, v) }
	return (d["vendor"] != "" || d["product"] != "") && in(d["vendor"], lu.Vendor) && in(d["product"], lu.Product)
}

// hits matches a blacklist pattern with what are spellings of one thing; a
// leading ! negates: then none of them may match. (`\!` is a plain !.)
func hits(p string, spellings ...string) bool {
	p, negated := strings.CutPrefix(p, "!")
	re, err := compile(p)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(spellings, re.MatchString) != negated
}

// Effective is the defaults section with built-in values filled in.
func (c *Config) Effective() Section {
	out := Section{}
	for _, o := range options {
		if o.std != "" && strings.Contains(o.scopes, "D") {
			out[o.name] = o.std
		}
	}
	for k, v := range canonical(c.Defaults) {
		out[k] = v
	}
	shortest, longest := intervals(out, c.Defaults)
	out["polling_interval"], out["max_polling_interval"] = strconv.Itoa(shortest), strconv.Itoa(longest)
	return out
}

// Detected are the keywords whose built-in value holds, and yields to what a unit
// says of itself: what a file says does not.
func (c *Config) Detected() (out []string) {
	said := canonical(c.Defaults)
	for _, k := range []string{"path_checker", "path_grouping_policy"} {
		if said[k] == "" {
			out = append(out, k)
		}
	}
	return out
}
