package config

import (
	_ "embed"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

//go:embed hwtable.tsv
var hwtable string

// builtin is the hardware table, in order: a later matching entry wins, option
// by option.
func builtin() (out []Section) {
	rows := strings.Split(strings.TrimSpace(hwtable), "\n")
	head := strings.Split(rows[0], "\t")
	for _, row := range rows[1:] {
		d := Section{}
		for i, v := range strings.Split(row, "\t") {
			if v != "-" && v != "" && i < 8 {
				d[strings.TrimSuffix(head[i], "_re")] = v
			}
		}
		out = append(out, d)
	}
	return out
}

// prios are the prioritizers that selector/prio has.
var prios = []string{"const", "alua", "sysfs", "weightedpath", "path_latency", "random", "iet", "ontap", "netapp", "datacore"}

// LU is what a configuration may look at.
type LU struct {
	WWID                      string
	Synonyms                  []string
	Vendor, Product, Revision string
}

// Settings are those of one map.
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
	Failback           string // immediate, manual or followover
	FailbackAfter      time.Duration
	NoPathRetry        int // -1 queue, 0 fail, N checks
	PollingInterval    time.Duration
	MaxPollingInterval time.Duration
	CheckTimeout       time.Duration
	Protection         string
	FenceWait          time.Duration
	Quarantine         time.Duration
	FenceCommand       string
	Replicated         bool
	MultibusServers    bool
	NBDDevice          string
	AutoResize         string
	Approximations     []string // settings that are honoured only nearly
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
		if c, ok := synonyms[k]; ok {
			k = c
		}
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
			s.Named, s.Alias = true, m["alias"]
		}
	}
	seconds := func(k string) time.Duration {
		n, _ := strconv.Atoi(v[k])
		return time.Duration(n) * time.Second
	}
	yes := func(k string) bool { return v[k] == "yes" || v[k] == "1" }
	nearly := func(k, as string) {
		s.Approximations = append(s.Approximations, fmt.Sprintf("%s %s is not built yet: %s instead", k, v[k], as))
	}
	s.UserFriendlyNames, s.AliasPrefix = yes("user_friendly_names"), v["alias_prefix"]
	for _, p := range policies { // as multipath-tools compares
		if strings.HasPrefix(v["path_grouping_policy"], p) {
			s.Policy = p
		}
	}
	s.Selector = v["path_selector"]
	switch name, _, _ := strings.Cut(s.Selector, " "); name {
	case "round-robin", "queue-length", "service-time", "historical-service-time", "failover":
	default:
		s.Selector = "service-time 0"
		nearly("path_selector", s.Selector)
	}
	s.Checker = v["path_checker"]
	if !slices.Contains([]string{"tur", "readsector0", "directio", "none"}, s.Checker) {
		s.Checker = "tur"
		nearly("path_checker", "tur")
	}
	switch f := v["failback"]; f {
	case "immediate", "manual", "followover":
		s.Failback = f
	default:
		s.Failback, s.FailbackAfter = "immediate", seconds("failback")
		if s.FailbackAfter == 0 { // as multipath-tools reads it
			s.Failback = "immediate"
		}
	}
	s.Prio, s.PrioArgs = v["prio"], v["prio_args"]
	if s.Prio != "" && !slices.Contains(prios, s.Prio) {
		nearly("prio", "what the unit supports")
		s.Prio = ""
	}
	if s.Prio != "" && !explicit["prio"] && s.Prio != "weightedpath" && v["detect_prio"] != "no" && v["detect_prio"] != "0" {
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
	if strings.Contains(v["features"], "queue_if_no_path") {
		s.NoPathRetry = -1
	}
	s.PollingInterval, s.MaxPollingInterval, s.CheckTimeout = seconds("polling_interval"), seconds("max_polling_interval"), seconds("checker_timeout")
	_, poll := c.Defaults["polling_interval"]
	_, most := c.Defaults["max_polling_interval"]
	switch {
	case poll && !most:
		s.MaxPollingInterval = 4 * s.PollingInterval
	case most && !poll:
		s.PollingInterval = max(s.MaxPollingInterval/4, time.Second)
	case s.PollingInterval > s.MaxPollingInterval:
		s.PollingInterval = s.MaxPollingInterval
	}
	s.Protection, s.FenceCommand, s.NBDDevice = v["ghost_protection"], v["fence_command"], v["nbd_device"]
	s.AutoResize = v["auto_resize"]
	s.FenceWait, _ = time.ParseDuration(v["fence_wait"])
	s.Quarantine, _ = time.ParseDuration(v["quarantine"])
	s.Replicated, s.MultibusServers = yes("replicated"), yes("multibus_servers")
	return s
}

// Blacklisted tells why a unit must be left alone, or "". Of the criteria only
// those that a logical unit behind an iSCSI session has are looked at: device,
// protocol and WWID; an exception protects within its own criterion.
func (c *Config) Blacklisted(lu LU) string {
	any := func(list []string, values ...string) string {
		for _, p := range list {
			for _, v := range values {
				if hits(p, v) {
					return p
				}
			}
		}
		return ""
	}
	for _, d := range c.Blacklist.Device {
		if matches(d, lu) && !slices.ContainsFunc(c.Exceptions.Device, func(x Section) bool { return matches(x, lu) }) {
			return fmt.Sprintf("blacklist device %q %q", d["vendor"], d["product"])
		}
	}
	for _, d := range c.Devices {
		if x := d["product_blacklist"]; x != "" && matches(Section{"vendor": d["vendor"], "product": x}, lu) {
			return fmt.Sprintf("product_blacklist %q", x)
		}
	}
	if p := any(c.Blacklist.Protocol, "scsi:iscsi"); p != "" && any(c.Exceptions.Protocol, "scsi:iscsi") == "" {
		return fmt.Sprintf("blacklist protocol %q", p)
	}
	ids := append([]string{lu.WWID}, lu.Synonyms...)
	if p := any(c.Blacklist.WWID, ids...); p != "" && any(c.Exceptions.WWID, ids...) == "" {
		return fmt.Sprintf("blacklist wwid %q", p)
	}
	return ""
}

// hits matches a blacklist pattern; a leading ! negates.
func hits(p, v string) bool {
	p, negated := strings.CutPrefix(p, "!")
	p = strings.TrimPrefix(p, `\`+"!")
	re, err := compile(p)
	if err != nil {
		return false
	}
	return re.MatchString(v) != negated
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
	return out
}
