package main

import (
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/mpathd/mpathd/config"
	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/kernel"
	"github.com/mpathd/mpathd/paths"
)

// findConfig is the file to use when --config does not say: none is fine.
func findConfig() string {
	for _, f := range []string{"/etc/mpathd.conf", "/etc/multipath.conf"} {
		if _, err := os.Stat(f); err == nil {
			return f
		}
	}
	return ""
}

// configure fills o from a configuration; what flags say wins, as set tells.
func configure(o *daemon.Options, c *config.Config, set func(flag string) bool, attach *string) error {
	if v := c.NBD["listen"]; v != "" && !set("nbd") {
		o.NBD = v
	}
	if v := c.NBD["attach"]; v != "" && !set("attach") {
		*attach = v
	}
	ini := c.Initiator.Settings
	if v := ini["name"]; v != "" && !set("initiator") {
		o.InitiatorName = v
	}
	if v := ini["failover_time"]; v != "" && !set("failover-time") {
		o.FailoverTime, _ = time.ParseDuration(v)
	}
	if v := ini["header_digest"]; v != "" && !set("header-digest") {
		o.HeaderDigest.Set(v)
	}
	if v := ini["data_digest"]; v != "" && !set("data-digest") {
		o.DataDigest.Set(v)
	}
	if v := ini["lenient"]; v != "" && !set("lenient") {
		o.Lenient = v == "yes"
	}
	if v := ini["redirect_allow"]; v != "" {
		o.RedirectTo, _ = initiator.ParseNetworks(v)
	}
	own, err := withCredentials(ini, initiator.Credentials{})
	if err != nil {
		return err
	}
	for _, d := range c.Initiator.Discover {
		address, err := initiator.WithPort(d)
		if err != nil {
			return err
		}
		o.Discover = append(o.Discover, daemon.Discovery{Address: address, Credentials: own})
	}
	for _, t := range c.Initiator.Target {
		u, err := initiator.ParseURL(t["url"])
		if err != nil {
			return err
		}
		if u.Credentials, err = withCredentials(ofTarget(ini, t), u.Credentials); err != nil {
			return fmt.Errorf("target %s: %w", u, err)
		}
		o.Targets = append(o.Targets, u)
	}
	names := &daemon.Bindings{File: "/var/lib/mpathd/bindings", Inherited: "/etc/multipath/bindings"}
	if filepath.Dir(o.State) != "." {
		names.File = filepath.Join(filepath.Dir(o.State), "bindings")
	}
	flags, log := o.Policy, o.Logger
	o.Resolve = func(info *initiator.LUInfo) (paths.Config, string, error) {
		return resolve(log, c, names, flags, set, info)
	}
	o.Refuse = func(u initiator.URL, info *initiator.LUInfo) string {
		lu := unitOf(info)
		if lu.Transport = "scsi:iscsi"; u.Transport != initiator.Local {
			return c.Blacklisted(lu)
		}
		lu.Device = filepath.Base(u.Device)
		if real, err := filepath.EvalSymlinks(u.Device); err == nil {
			lu.Device = filepath.Base(real)
		}
		if kernel.PlaceOf(u.Device).Target == "" {
			lu.Transport = "scsi:unspec"
		}
		return c.Blacklisted(lu)
	}
	return nil
}

// postponed names the settings that differ and that are read at the start alone.
func postponed(before, after *config.Config) (out []string) {
	differ := func(section string, a, b config.Section) {
		both := maps.Clone(a)
		maps.Copy(both, b)
		for _, k := range slices.Sorted(maps.Keys(both)) {
			if a[k] != b[k] && !strings.Contains(k, "chap_") { // these hold from the next login on
				out = append(out, section+" "+k)
			}
		}
	}
	differ("initiator", before.Initiator.Settings, after.Initiator.Settings)
	differ("nbd", before.NBD, after.NBD)
	return out
}

// pinned are the kernel devices that the configuration gives to maps; nil: there is none.
func pinned(c *config.Config) (devices []string) {
	if c == nil {
		return nil
	}
	for _, m := range c.Multipaths {
		if at := m["nbd_device"]; at != "" {
			devices = append(devices, at)
		}
	}
	return devices
}

func unitOf(info *initiator.LUInfo) config.LU {
	return config.LU{WWID: info.WWID, Synonyms: info.Synonyms, Vendor: info.Vendor, Product: info.Product, Revision: info.Revision, ALUA: info.TPGS != 0}
}

// resolve is the policy of one map.
func resolve(log *slog.Logger, c *config.Config, names *daemon.Bindings, flags paths.Config, set func(string) bool, info *initiator.LUInfo) (paths.Config, string, error) {
	lu := unitOf(info)
	if why := c.Blacklisted(lu); why != "" {
		return paths.Config{}, "", fmt.Errorf("%s is left alone: %s", info.WWID, why)
	}
	s := c.For(lu)
	for _, a := range s.Approximations {
		log.Warn("setting honoured only nearly", "wwid", info.WWID, "what", a)
	}
	p := paths.Config{Alias: s.Alias, Policy: s.Policy, Selector: s.Selector, Checker: s.Checker, AutoResize: s.AutoResize, Failback: s.Failback, FailbackAfter: s.FailbackAfter, Prio: s.Prio, PrioArgs: s.PrioArgs, MinIO: s.MinIO, WeightByPrio: s.WeightByPrio, NoPathRetry: s.NoPathRetry,
		PollingInterval: s.PollingInterval, MaxPollingInterval: s.MaxPollingInterval, CheckTimeout: s.CheckTimeout, Merge: s.Named,
		PathErrors: paths.PathErrors(s.PathErrors), Sampling: paths.Sampling(s.Sampling), MarginalGroups: s.MarginalGroups, MaxIO: s.MaxIO, GrayPaths: s.GrayPaths, HedgeReads: s.HedgeReads, HedgeAfter: s.HedgeAfter,
		Protection: s.Protection, ShadowLimit: s.ShadowLimit, FenceBy: s.FenceBy, FenceWait: s.FenceWait, GhostDelay: s.GhostDelay, Quarantine: s.Quarantine, Waits: s.Waits, Replicated: s.Replicated, MultibusServers: s.MultibusServers}
	if s.FenceCommand != "" {
		p.FenceCommand = daemon.FenceCommand(log, s.FenceCommand)
	}
	for flag, over := range map[string]func(){
		"prio": func() { p.Prio = flags.Prio }, "prio-args": func() { p.PrioArgs = flags.PrioArgs },
		"alias": func() { p.Alias = flags.Alias }, "policy": func() { p.Policy = flags.Policy }, "selector": func() { p.Selector = flags.Selector },
		"checker": func() { p.Checker = flags.Checker }, "failback": func() { p.Failback, p.FailbackAfter = flags.Failback, flags.FailbackAfter },
		"no-path-retry":    func() { p.NoPathRetry = flags.NoPathRetry },
		"polling-interval": func() { p.PollingInterval = flags.PollingInterval }, "max-polling-interval": func() { p.MaxPollingInterval = flags.MaxPollingInterval },
		"ghost-protection": func() { p.Protection = flags.Protection }, "shadow-limit": func() { p.ShadowLimit = flags.ShadowLimit }, "fence-by": func() { p.FenceBy = flags.FenceBy }, "fence-wait": func() { p.FenceWait = flags.FenceWait },
		"quarantine": func() { p.Quarantine = flags.Quarantine }, "fence-command": func() { p.FenceCommand = flags.FenceCommand },
		"reinstatement-waits": func() { p.Waits = flags.Waits }, "replicated": func() { p.Replicated = flags.Replicated }, "multibus-servers": func() { p.MultibusServers = flags.MultibusServers },
	} {
		if set(flag) {
			over()
		}
	}
	if p.Alias == "" && s.UserFriendlyNames {
		var reserved []string
		for _, m := range c.Multipaths {
			if a := m["alias"]; a != "" {
				reserved = append(reserved, a)
			}
		}
		alias, err := names.Alias(s.AliasPrefix, slices.Concat([]string{info.WWID}, info.Synonyms), reserved)
		if err != nil {
			log.Error("no user-friendly name, the WWID is used", "wwid", info.WWID, "cause", err)
		} else {
			p.Alias = alias
		}
	}
	return p, s.NBDDevice, nil
}
