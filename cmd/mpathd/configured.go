package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/mpathd/mpathd/config"
	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/initiator"
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
		o.HeaderDigest = v == "crc32c"
	}
	if v := ini["data_digest"]; v != "" && !set("data-digest") {
		o.DataDigest = v == "crc32c"
	}
	own, err := credentials(ini)
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
		if u.User == "" {
			u.Credentials = own
		}
		c, err := credentials(t)
		if err != nil {
			return err
		}
		if c.User != "" {
			u.Credentials = c
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
	return nil
}

// resolve is the policy of one map.
func resolve(log *slog.Logger, c *config.Config, names *daemon.Bindings, flags paths.Config, set func(string) bool, info *initiator.LUInfo) (paths.Config, string, error) {
	lu := config.LU{WWID: info.WWID, Synonyms: info.Synonyms, Vendor: info.Vendor, Product: info.Product, Revision: info.Revision}
	if why := c.Blacklisted(lu); why != "" {
		return paths.Config{}, "", fmt.Errorf("%s is left alone: %s", info.WWID, why)
	}
	s := c.For(lu)
	for _, a := range s.Approximations {
		log.Warn("setting honoured only nearly", "wwid", info.WWID, "what", a)
	}
	p := paths.Config{Alias: s.Alias, Policy: s.Policy, Selector: s.Selector, Checker: s.Checker, AutoResize: s.AutoResize, Failback: s.Failback, FailbackAfter: s.FailbackAfter, Prio: s.Prio, PrioArgs: s.PrioArgs, MinIO: s.MinIO, WeightByPrio: s.WeightByPrio, NoPathRetry: s.NoPathRetry,
		PollingInterval: s.PollingInterval, MaxPollingInterval: s.MaxPollingInterval, CheckTimeout: s.CheckTimeout, Merge: s.Named,
		Protection: s.Protection, FenceWait: s.FenceWait, Quarantine: s.Quarantine, Replicated: s.Replicated, MultibusServers: s.MultibusServers}
	if s.FenceCommand != "" {
		p.FenceCommand = func(ctx context.Context, path string) error { return runFence(ctx, s.FenceCommand, path) }
	}
	for flag, over := range map[string]func(){
		"prio": func() { p.Prio = flags.Prio }, "prio-args": func() { p.PrioArgs = flags.PrioArgs },
		"alias": func() { p.Alias = flags.Alias }, "policy": func() { p.Policy = flags.Policy }, "selector": func() { p.Selector = flags.Selector },
		"checker": func() { p.Checker = flags.Checker }, "failback": func() { p.Failback, p.FailbackAfter = flags.Failback, flags.FailbackAfter },
		"no-path-retry":    func() { p.NoPathRetry = flags.NoPathRetry },
		"polling-interval": func() { p.PollingInterval = flags.PollingInterval }, "max-polling-interval": func() { p.MaxPollingInterval = flags.MaxPollingInterval },
		"ghost-protection": func() { p.Protection = flags.Protection }, "fence-wait": func() { p.FenceWait = flags.FenceWait },
		"quarantine": func() { p.Quarantine = flags.Quarantine }, "fence-command": func() { p.FenceCommand = flags.FenceCommand },
		"replicated": func() { p.Replicated = flags.Replicated }, "multibus-servers": func() { p.MultibusServers = flags.MultibusServers },
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

const maxSecret = 4096

// credentials are the CHAP settings of a section. mutual is what the target
// must prove; it needs credentials of our own.
func credentials(s config.Section) (c initiator.Credentials, err error) {
	if c.User, c.Secret, err = chap(s, ""); err != nil {
		return c, err
	}
	if c.MutualUser, c.MutualSecret, err = chap(s, "mutual_"); err != nil {
		return c, err
	}
	switch {
	case c.MutualSecret != "" && c.Secret == "":
		return c, errors.New("mutual_chap_secret_file needs chap_user and chap_secret_file too: a target proves itself only to whom it authenticates")
	case c.MutualSecret != "" && c.MutualSecret == c.Secret:
		return c, errors.New("chap_secret_file and mutual_chap_secret_file hold the same secret, which proves nothing: choose another one")
	}
	return c, nil
}

// chap reads the secret of chap_user or mutual_chap_user from a file that only
// its owner can read.
func chap(s config.Section, kind string) (user, secret string, err error) {
	user, file := s[kind+"chap_user"], s[kind+"chap_secret_file"]
	switch {
	case user == "" && file == "":
		return "", "", nil
	case file == "" || user == "" && kind == "":
		return "", "", fmt.Errorf("%schap_user and %schap_secret_file belong together: one is missing", kind, kind)
	}
	st, err := os.Stat(file)
	if err != nil {
		var pe *fs.PathError
		errors.As(err, &pe)
		return "", "", fmt.Errorf(kind+"chap_secret_file %s: %w", file, pe.Err)
	}
	if !st.Mode().IsRegular() || st.Size() > maxSecret {
		return "", "", fmt.Errorf(kind+"chap_secret_file %s: not a regular file of at most %d bytes", file, maxSecret)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return "", "", fmt.Errorf(kind+"chap_secret_file %s: mode %04o lets others read it: chmod 600 %s", file, st.Mode().Perm(), file)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", "", err
	}
	if secret = strings.TrimRight(string(b), "\r\n"); secret == "" {
		return "", "", fmt.Errorf(kind+"chap_secret_file %s is empty", file)
	}
	return user, secret, nil
}
