package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/mpathd/mpathd/compat"
	"github.com/mpathd/mpathd/config"
	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/nbd"
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
	var chap chapFlags
	var takeOver bool
	var attachTo, failback, retry, fence, file string
	var connections int
	var without []string
	var shadow int64
	var effective atomic.Pointer[config.Config]
	c := &cobra.Command{Use: "run [flags] [PATH-URL ...]", Short: "log in, make maps, export them", Args: args(cobra.ArbitraryArgs),
		RunE: func(cmd *cobra.Command, urls []string) error {
			var err error
			if o.Targets, err = chap.parseURLs(urls); err != nil {
				return err
			}
			if o.Policy.Failback = failback; failback != "" && !slices.Contains(paths.Failbacks, failback) {
				n, err := strconv.Atoi(failback)
				if err != nil || n < 0 {
					return usageError{fmt.Errorf("--failback %q: want %s or seconds", failback, strings.Join(paths.Failbacks, ", "))}
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
			if !slices.Contains(paths.Protections, o.Policy.Protection) {
				return usageError{fmt.Errorf("--ghost-protection %q: want one of %s", o.Policy.Protection, strings.Join(paths.Protections, ", "))}
			}
			if shadow < 1 || shadow > 1<<20 {
				return usageError{fmt.Errorf("--shadow-limit %d: want 1 to %d (MiB)", shadow, 1<<20)}
			}
			o.Policy.ShadowLimit = shadow << 20
			if err := checkFlags(cmd.Flags(), &o, file != "" || len(urls) == 0); err != nil {
				return usageError{fmt.Errorf("run: %w", err)}
			}
			o.Logger = logger()
			if fence != "" {
				o.Policy.FenceCommand = daemon.FenceCommand(o.Logger, fence)
			}
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
				o.Targets = slices.Clip(o.Targets)
				given := o // what the flags said
				load := func(o *daemon.Options, attach *string) error {
					c, err := config.Load(file)
					if err != nil {
						return err
					}
					if len(c.Errors) > 0 {
						report(c)
						return fmt.Errorf("%w: %s", errConfig, c.Errors[0])
					}
					for _, w := range c.Warnings {
						o.Logger.Warn("configuration", "at", w.Pos.String(), "text", w.Text)
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
				if v := effective.Load().NBD["attach_connections"]; v != "" && !cmd.Flags().Changed("attach-connections") {
					connections, _ = strconv.Atoi(v)
				}
				o.Reload = func() (daemon.Reloaded, error) {
					again, ignored, before := given, "", effective.Load()
					if err := load(&again, &ignored); err != nil {
						return daemon.Reloaded{}, err
					}
					for _, what := range postponed(before, effective.Load()) {
						o.Logger.Warn("a changed setting takes effect with the next start", "setting", what)
					}
					return daemon.Reloaded{Targets: again.Targets, Discover: again.Discover, Resolve: again.Resolve, Refuse: again.Refuse}, nil
				}
			}
			if o.Without, err = nbd.ParseWithout(without); err != nil {
				return usageError{fmt.Errorf("--nbd-without: %w", err)}
			}
			if err := nbdTLS.apply(&o); err != nil {
				return err
			}
			if len(o.Targets) == 0 && len(o.Discover) == 0 {
				if file != "" {
					return fmt.Errorf("configuration %s names no target: give its section `initiator` a `target` or a portal to `discover`, or give PATH-URLs", file)
				}
				return usageError{errors.New("nothing to do: give PATH-URLs, or a configuration whose initiator section names targets or portals to discover")}
			}
			att, err := attacher(attachTo, connections, func() []string { return pinned(effective.Load()) })
			if err != nil {
				return err
			}
			if o.Attach = att; att != nil {
				o.Resident, o.Attached = true, attached
				reside(o.Logger)
			}
			if o.InitiatorName == "" {
				if o.InitiatorName, err = daemon.InitiatorName(o.Logger); err != nil {
					return err
				}
			}
			if file == "" {
				effective.Store(flagConfig(cmd.Flags(), &o, attachTo, connections))
			}
			o.ShowConfig = func() any { return configJSON(effective.Load(), true) }
			o.ConfigText = func(local bool) string { // no hardware table counts without a file
				return configText(effective.Load(), local || file == "")
			}
			o.BlacklistText = func() string {
				if file == "" {
					return compat.NoBlacklist
				}
				return blacklistText(effective.Load())
			}
			o.Inherited = inheritedFromStore()
			if takeOver {
				o.Surveyed = daemon.Survey(cmd.Context(), o)
				in, err := daemon.TakeOver(cmd.Context(), o.Control)
				if err != nil {
					return err
				}
				o.Inherited = append(o.Inherited, in...)
			}
			d, err := daemon.Start(o)
			if err != nil {
				return err
			}
			go notifyReady(d)
			go tellUnserved(d.Done(), o.Logger)
			go feedWatchdog(d.Done(), d.Hangs, o.Logger)
			sig := make(chan os.Signal, 2)
			signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR2)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			for {
				select {
				case <-d.Leaving():
				case s := <-sig:
					if s == syscall.SIGHUP {
						if err := d.Reconfigure(); err != nil {
							o.Logger.Error("reconfigure", "cause", err)
						}
						continue
					}
					o.Logger.Info("stopping", "signal", s.String())
					if s != syscall.SIGUSR2 { // which leaves all devices to the next run
						d.DetachIdle()
					}
					storeDevices(ctx, d, o.Logger)
				}
				break
			}
			sd.SdNotify(false, sd.SdNotifyStopping)
			ctx, cancel = context.WithTimeout(ctx, stopTime)
			defer cancel()
			return d.Leave(ctx)
		}}
	f := c.Flags()
	f.StringVar(&file, "config", "", "configuration (default, without PATH-URLs: /etc/mpathd.conf, else /etc/multipath.conf)")
	f.StringVar(&o.NBD, "nbd", defaultNBD, "where NBD clients connect: unix:PATH or tcp:HOST:PORT, several with commas; behind each, words like mode=0660 group=kvm, tls=required, allow=10.0.0.0/8")
	f.StringVar(&nbdTLS.Cert, "nbd-tls-cert", "", "certificate of the NBD server, PEM")
	f.StringVar(&nbdTLS.Key, "nbd-tls-key", "", "its key, PEM, readable by its owner alone")
	f.StringVar(&nbdTLS.CA, "nbd-tls-ca", "", "NBD clients must show a certificate of this CA, PEM")
	f.BoolVar(&nbdTLS.Optional, "nbd-tls-optional", false, "let TCP clients go on without TLS")
	f.StringSliceVar(&nbdTLS.Allow, "nbd-allow", nil, "networks from which NBD clients may come over TCP, like 10.0.0.0/8")
	f.StringSliceVar(&without, "nbd-without", nil, "for tests of clients: hide parts of the protocol (structured, extended, meta, no-zeroes, go)")
	f.StringVar(&o.Control, "control", defaultControl, "control socket")
	f.BoolVar(&takeOver, "takeover", false, "take the kernel devices over from the daemon that runs behind the control socket, and go on at once (an upgrade)")
	f.StringVar(&attachTo, "attach", "auto", "kernel device: auto, none or /dev/nbdX")
	f.IntVar(&connections, "attach-connections", 1, "connections of a new kernel device; with more than one the kernel cuts those whose requests take 30 s")
	f.StringVar(&o.InitiatorName, "initiator", "", "initiator name (default: /etc/iscsi/initiatorname.iscsi, else generated once)")
	f.StringSliceVar(&o.Merge, "merge", nil, "WWID whose paths are one disk although it is only a numbered default")
	f.DurationVar(&o.FailoverTime, "failover-time", time.Second, "silence after which a path is dead; all timers derive from it")
	chap.register(f)
	f.Var(&o.HeaderDigest, "header-digest", "none, crc32c (required), crc32c,none (preferred) or none,crc32c (accepted)")
	f.Var(&o.DataDigest, "data-digest", "the same for data")
	f.BoolVar(&o.Lenient, "lenient", false, "take targets that name no session and misnumber their answers, as gotgt does")
	f.IntVar(&o.QueueDepth, "queue-depth", 128, "requests in flight per path and per NBD connection")
	f.StringVar(&o.Policy.Alias, "alias", "", "name of the first map (default: its WWID)")
	f.StringVar(&o.Policy.Policy, "policy", "failover", "path_grouping_policy: failover, multibus, group_by_prio, group_by_serial, group_by_node_name, group_by_tpg")
	f.StringVar(&o.Policy.Prio, "prio", "", "prio: const, alua, weightedpath, path_latency, random, iet, ontap, datacore (default: alua where the unit has it)")
	f.StringVar(&o.Policy.PrioArgs, "prio-args", "", "prio_args")
	f.StringVar(&o.Metrics, "metrics", "", "serve Prometheus at HOST:PORT")
	f.DurationVar(&o.RescanInterval, "rescan-interval", time.Minute, "how often targets named without a LUN are asked for new units, and portals for new targets; 0: only when they tell of a change")
	f.StringVar(&o.CompatSocket, "multipathd-socket", "", "serve multipathd's clients at PATH or, in the abstract namespace, @NAME (theirs is "+compat.AbstractName+")")
	f.StringVar(&o.Policy.Selector, "selector", "service-time 0", "path_selector: service-time, round-robin, queue-length, historical-service-time, failover")
	f.StringVar(&o.Policy.Checker, "checker", "tur", "path_checker: tur, readsector0, directio, none")
	f.StringVar(&failback, "failback", "", "immediate, manual, followover or seconds (default: immediate, over several target names manual)")
	f.StringVar(&retry, "no-path-retry", "queue", "without a path: queue, fail, or a number of checks to wait")
	f.DurationVar(&o.Policy.PollingInterval, "polling-interval", 5*time.Second, "shortest time between checks")
	f.DurationVar(&o.Policy.MaxPollingInterval, "max-polling-interval", 0, "longest time between checks (default 4 x polling-interval)")
	f.StringVar(&o.Policy.Protection, "ghost-protection", paths.Hold, "late writes of dead paths: hold overlapping writes until fenced, strict, shadow, or off")
	f.Int64Var(&shadow, "shadow-limit", 64, "memory for --ghost-protection shadow, MiB")
	f.StringVar(&o.Policy.FenceBy, "fence-by", paths.ByReset, "how an old session is ended: reset, or preempt, with a reservation key for each path, on disks that no other host writes")
	f.DurationVar(&o.Policy.FenceWait, "fence-wait", 30*time.Second, "complain about an old session that is not fenced by then")
	f.DurationVar(&o.Policy.Quarantine, "quarantine", 0, "treat an old session as dead after this time without proof (0: never)")
	f.StringVar(&fence, "fence-command", "", "shell command that fences the path $MPATHD_PATH at the storage, for when iSCSI cannot; exit status 0 means done")
	f.BoolVar(&o.Policy.Waits, "reinstatement-waits", false, "the target's login waits for the commands of the session it replaces: a fence needs no LOGICAL UNIT RESET")
	f.BoolVar(&o.Policy.Replicated, "replicated", false, "the servers replicate every write before they acknowledge it: flush one of them, no FUA")
	f.BoolVar(&o.Policy.MultibusServers, "multibus-servers", false, "allow --policy multibus over different targets")
	f.StringVar(&o.State, "state", "", "file that remembers unfenced paths across a crash (default: /var/lib/mpathd/unfenced.json, or beside a --control elsewhere)")
	return c
}
