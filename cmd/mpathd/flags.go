package main

import (
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/pflag"

	"github.com/mpathd/mpathd/config"
	"github.com/mpathd/mpathd/daemon"
)

// checkFlags refuses values of `run` with which no path could ever serve, or
// which a configuration could not have: better now than after the first login.
// With a file, prio_args may be in it.
func checkFlags(f *pflag.FlagSet, o *daemon.Options, file bool) error {
	p := o.Policy
	if file && !f.Changed("prio-args") {
		p.Prio = ""
	}
	if err := p.Check(); err != nil {
		return err
	}
	if f.Changed("alias") {
		if err := config.CheckAlias(o.Policy.Alias); err != nil {
			return fmt.Errorf("--alias %w", err)
		}
	}
	if f.Changed("initiator") {
		if err := config.CheckInitiatorName(o.InitiatorName); err != nil {
			return fmt.Errorf("--initiator %w", err)
		}
	}
	for _, x := range []struct {
		flag  string
		value time.Duration
		least time.Duration
	}{
		{"failover-time", o.FailoverTime, 100 * time.Millisecond}, {"polling-interval", o.Policy.PollingInterval, time.Millisecond},
		{"max-polling-interval", o.Policy.MaxPollingInterval, 0}, {"fence-wait", o.Policy.FenceWait, time.Millisecond},
		{"quarantine", o.Policy.Quarantine, 0}, {"rescan-interval", o.RescanInterval, 0},
	} {
		if x.value < x.least {
			return fmt.Errorf("--%s %v: want %v or more", x.flag, x.value, x.least)
		}
	}
	if o.QueueDepth < 1 {
		return fmt.Errorf("--queue-depth %d: want 1 or more", o.QueueDepth)
	}
	return nil
}

// flagConfig is what a run from PATH-URLs alone uses, as a configuration, for
// `show config`: it reads back, and does the same but for the name of the map.
func flagConfig(f *pflag.FlagSet, o *daemon.Options, attach string, connections int) *config.Config {
	c := &config.Config{Defaults: config.Section{}, Overrides: config.Section{}, NBD: config.Section{"listen": o.NBD, "attach": attach, "attach_connections": strconv.Itoa(connections)},
		Initiator: config.Initiator{Settings: config.Section{"name": o.InitiatorName, "failover_time": o.FailoverTime.String(), "header_digest": o.HeaderDigest.String(), "data_digest": o.DataDigest.String()}}}
	for flag, keyword := range map[string]string{"policy": "path_grouping_policy", "selector": "path_selector", "checker": "path_checker", "prio": "prio", "prio-args": "prio_args",
		"failback": "failback", "no-path-retry": "no_path_retry", "ghost-protection": "ghost_protection", "shadow-limit": "shadow_limit", "fence-by": "fence_by", "fence-wait": "fence_wait", "fence-command": "fence_command"} {
		if v := f.Lookup(flag).Value.String(); v != "" {
			c.Defaults[keyword] = v
		}
	}
	for flag, keyword := range map[string]string{"reinstatement-waits": "reinstatement_waits", "replicated": "replicated", "multibus-servers": "multibus_servers"} {
		if on, _ := f.GetBool(flag); on {
			c.Defaults[keyword] = "yes"
		}
	}
	seconds := func(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', -1, 64) }
	c.Defaults["polling_interval"] = seconds(o.Policy.PollingInterval)
	longest := o.Policy.MaxPollingInterval
	if longest < o.Policy.PollingInterval {
		longest = 4 * o.Policy.PollingInterval
	}
	c.Defaults["max_polling_interval"] = seconds(longest)
	if o.Policy.Quarantine > 0 {
		c.Defaults["quarantine"] = o.Policy.Quarantine.String()
	}
	if o.Lenient {
		c.Initiator.Settings["lenient"] = "yes"
	}
	for _, t := range o.Targets {
		c.Initiator.Target = append(c.Initiator.Target, config.Section{"url": t.String()})
	}
	return c
}
