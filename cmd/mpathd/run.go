package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/mpathd/mpathd/config"
	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/paths"
)

const (
	defaultControl = "/run/mpathd/control.sock"
	defaultNBD     = "unix:/run/mpathd/nbd.sock"
	stopTime       = 10 * time.Second
)

func runCommand() *cobra.Command {
	o := daemon.Options{}
	var nbdTLS tlsFiles
	var attachTo, failback, retry, fence, file string
	var effective atomic.Pointer[config.Config]
	c := &cobra.Command{Use: "run [flags] [PATH-URL ...]", Short: "log in, make maps, export them", Args: args(cobra.ArbitraryArgs),
		RunE: func(cmd *cobra.Command, urls []string) error {
			for _, u := range urls {
				if _, err := initiator.ParseURL(u); err != nil {
					return usageError{err}
				}
			}
			switch failback {
			case paths.Immediate, paths.Manual, paths.Followover:
				o.Policy.Failback = failback
			default:
				n, err := strconv.Atoi(failback)
				if err != nil || n < 0 {
					return usageError{fmt.Errorf("--failback %q: want immediate, manual, followover or seconds", failback)}
				}
				o.Policy.Failback, o.Policy.FailbackAfter = paths.Immediate, time.Duration(n)*time.Second
			}
			switch retry {
			case "queue":
				o.Policy.NoPathRetry = paths.Queue
			case "fail":
				o.Policy.NoPathRetry = paths.Fail
			default:
				n, err := strconv.Atoi(retry)
				if err != nil || n < 0 {
					return usageError{fmt.Errorf("--no-path-retry %q: want queue, fail or a number of checks", retry)}
				}
				o.Policy.NoPathRetry = n
			}
			if o.Policy.Protection != paths.Hold && o.Policy.Protection != paths.Strict && o.Policy.Protection != paths.Off {
				return usageError{fmt.Errorf("--ghost-protection %q: want hold, strict or off", o.Policy.Protection)}
			}
			if fence != "" {
				o.Policy.FenceCommand = func(ctx context.Context, path string) error { return runFence(ctx, fence, path) }
			}
			o.Logger = logger()
			if o.State == "" {
				o.State = "/var/lib/mpathd/unfenced.json"
				if o.Control != defaultControl {
					o.State = filepath.Join(filepath.Dir(o.Control), "unfenced.json")
				}
			}
			if file == "" && len(urls) == 0 { // URLs alone are the whole job
				file = findConfig()
			}
			if file != "" {
				given := o // what the flags said
				load := func(o *daemon.Options, attach *string) error {
					c, err := config.Load(file)
					if err != nil {
						return err
					}
					for _, w := range c.Warnings {
						o.Logger.Warn("configuration", "at", w.Pos.String(), "text", w.Text)
					}
					if len(c.Errors) > 0 {
						report(c)
						return fmt.Errorf("%w: %s", errConfig, c.Errors[0])
					}
					nbdTLS.configured(c.NBD, cmd.Flags().Changed)
					if err := configure(o, c, cmd.Flags().Changed, attach); err != nil {
						return fmt.Errorf("configuration %s: %w", file, err)
					}
					effective.Store(c)
					return nil
				}
				if err := load(&o, &attachTo); err != nil {
					return err
				}
				o.Reload = func() (daemon.Reloaded, error) {
					again, ignored := given, ""
					if err := load(&again, &ignored); err != nil {
						return daemon.Reloaded{}, err
					}
					return daemon.Reloaded{Targets: again.Targets, Discover: again.Discover, Resolve: again.Resolve}, nil
				}
			}
			if err := nbdTLS.apply(&o); err != nil {
				return err
			}
			if len(urls) == 0 && len(o.Targets) == 0 && len(o.Discover) == 0 {
				return usageError{errors.New("nothing to do: give PATH-URLs, or a configuration whose initiator section names targets or portals to discover")}
			}
			att, err := attacher(attachTo)
			if err != nil {
				return err
			}
			o.URLs, o.Attach = urls, att
			if o.InitiatorName == "" {
				if o.InitiatorName, err = daemon.InitiatorName(o.Logger); err != nil {
					return err
				}
			}
			o.ShowConfig = func() any {
				c := effective.Load()
				if c == nil {
					return map[string]any{}
				}
				return configJSON(c, true)
			}
			d, err := daemon.Start(o)
			if err != nil {
				return err
			}
			sig := make(chan os.Signal, 2)
			signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR2)
			stop := d.Stop
			for s := range sig {
				if s == syscall.SIGUSR2 { // an upgrade: the next run takes the devices over
					o.Logger.Info("leaving the kernel devices to the next run")
					stop = d.Leave
					break
				}
				if s != syscall.SIGHUP {
					o.Logger.Info("stopping", "signal", s.String())
					break
				}
				if err := d.Reconfigure(); err != nil {
					o.Logger.Error("reconfigure", "cause", err)
				}
			}
			ctx, cancel := context.WithTimeout(context.Background(), stopTime)
			defer cancel()
			return stop(ctx)
		}}
	f := c.Flags()
	f.StringVar(&file, "config", "", "configuration (default, without PATH-URLs: /etc/mpathd.conf, else /etc/multipath.conf)")
	f.StringVar(&o.NBD, "nbd", defaultNBD, "where NBD clients connect: unix:PATH or tcp:HOST:PORT, several with commas")
	f.StringVar(&nbdTLS.Cert, "nbd-tls-cert", "", "certificate of the NBD server, PEM")
	f.StringVar(&nbdTLS.Key, "nbd-tls-key", "", "its key, PEM, readable by its owner alone")
	f.StringVar(&nbdTLS.CA, "nbd-tls-ca", "", "NBD clients must show a certificate of this CA, PEM")
	f.BoolVar(&nbdTLS.Optional, "nbd-tls-optional", false, "let TCP clients go on without TLS")
	f.StringSliceVar(&nbdTLS.Allow, "nbd-allow", nil, "networks from which NBD clients may come over TCP, like 10.0.0.0/8")
	f.StringVar(&o.Control, "control", defaultControl, "control socket")
	f.StringVar(&attachTo, "attach", "auto", "kernel device: auto, none or /dev/nbdX")
	f.StringVar(&o.InitiatorName, "initiator", "", "initiator name (default: /etc/iscsi/initiatorname.iscsi, else generated once)")
	f.StringSliceVar(&o.Merge, "merge", nil, "WWID whose paths are one disk although it is only a numbered default")
	f.DurationVar(&o.FailoverTime, "failover-time", time.Second, "silence after which a path is dead; all timers derive from it")
	f.Var(digestFlag{&o.HeaderDigest}, "header-digest", "none or crc32c")
	f.Var(digestFlag{&o.DataDigest}, "data-digest", "none or crc32c")
	f.IntVar(&o.QueueDepth, "queue-depth", 128, "requests in flight per path and per NBD connection")
	f.StringVar(&o.Policy.Alias, "alias", "", "name of the first map (default: its WWID)")
	f.StringVar(&o.Policy.Policy, "policy", "failover", "path_grouping_policy: failover, multibus, group_by_prio, group_by_serial, group_by_node_name, group_by_tpg")
	f.StringVar(&o.Policy.Prio, "prio", "", "prio: const, alua, weightedpath, path_latency, random, iet, ontap, datacore (default: alua where the unit has it)")
	f.StringVar(&o.Policy.PrioArgs, "prio-args", "", "prio_args")
	f.StringVar(&o.Metrics, "metrics", "", "serve Prometheus at HOST:PORT")
	f.StringVar(&o.Policy.Selector, "selector", "service-time 0", "path_selector: service-time, round-robin, queue-length, historical-service-time, failover")
	f.StringVar(&o.Policy.Checker, "checker", "tur", "path_checker: tur, readsector0, directio, none")
	f.StringVar(&failback, "failback", "immediate", "immediate, manual, followover or seconds")
	f.StringVar(&retry, "no-path-retry", "queue", "without a path: queue, fail, or a number of checks to wait")
	f.DurationVar(&o.Policy.PollingInterval, "polling-interval", 5*time.Second, "shortest time between checks")
	f.DurationVar(&o.Policy.MaxPollingInterval, "max-polling-interval", 0, "longest time between checks (default 4 x polling-interval)")
	f.StringVar(&o.Policy.Protection, "ghost-protection", paths.Hold, "late writes of dead paths: hold overlapping writes until fenced, strict, or off")
	f.DurationVar(&o.Policy.FenceWait, "fence-wait", 30*time.Second, "complain about an old session that is not fenced by then")
	f.DurationVar(&o.Policy.Quarantine, "quarantine", 0, "treat an old session as dead after this time without proof (0: never)")
	f.StringVar(&fence, "fence-command", "", "shell command that fences the path $MPATHD_PATH at the storage, for when iSCSI cannot")
	f.BoolVar(&o.Policy.Replicated, "replicated", false, "the servers replicate every write before they acknowledge it: flush one of them, no FUA")
	f.BoolVar(&o.Policy.MultibusServers, "multibus-servers", false, "allow --policy multibus over different targets")
	f.StringVar(&o.State, "state", "", "file that remembers unfenced paths across a crash (default: /var/lib/mpathd/unfenced.json, or beside a --control elsewhere)")
	return c
}

// digestFlag is none or crc32c.
type digestFlag struct{ on *bool }

func (d digestFlag) String() string {
	if d.on != nil && *d.on {
		return "crc32c"
	}
	return "none"
}
func (digestFlag) Type() string { return "digest" }
func (d digestFlag) Set(v string) error {
	if v != "none" && v != "crc32c" {
		return fmt.Errorf("%q: want none or crc32c", v)
	}
	*d.on = v == "crc32c"
	return nil
}

// runFence runs the operator's command; it succeeds if the command does.
func runFence(ctx context.Context, command, path string) error {
	c := exec.CommandContext(ctx, "/bin/sh", "-c", command)
	c.Env = append(os.Environ(), "MPATHD_PATH="+path)
	c.WaitDelay = time.Second
	out, err := c.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %.200q", err, out)
	}
	return nil
}
