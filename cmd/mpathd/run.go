package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"

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
	var attachTo, failback, retry string
	c := &cobra.Command{Use: "run [flags] PATH-URL ...", Short: "log in, make maps, export them", Args: args(cobra.MinimumNArgs(1)),
		RunE: func(_ *cobra.Command, urls []string) error {
			for _, u := range urls {
				if _, err := initiator.ParseURL(u); err != nil {
					return usageError{err}
				}
			}
			switch failback {
			case "immediate", "manual":
				o.Policy.Manual = failback == "manual"
			default:
				return usageError{fmt.Errorf("--failback %q: want immediate or manual", failback)}
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
			att, err := attacher(attachTo)
			if err != nil {
				return err
			}
			o.URLs, o.Attach, o.Logger = urls, att, logger()
			if o.InitiatorName == "" {
				if o.InitiatorName, err = daemon.InitiatorName(o.Logger); err != nil {
					return err
				}
			}
			d, err := daemon.Start(o)
			if err != nil {
				return err
			}
			sig := make(chan os.Signal, 2)
			signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM)
			o.Logger.Info("stopping", "signal", (<-sig).String())
			ctx, cancel := context.WithTimeout(context.Background(), stopTime)
			defer cancel()
			return d.Stop(ctx)
		}}
	f := c.Flags()
	f.StringVar(&o.NBD, "nbd", defaultNBD, "where NBD clients connect: unix:PATH or tcp:HOST:PORT")
	f.StringVar(&o.Control, "control", defaultControl, "control socket")
	f.StringVar(&attachTo, "attach", "auto", "kernel device: auto, none or /dev/nbdX")
	f.StringVar(&o.InitiatorName, "initiator", "", "initiator name (default: /etc/iscsi/initiatorname.iscsi, else generated once)")
	f.StringSliceVar(&o.Merge, "merge", nil, "WWID whose paths are one disk although it is only a numbered default")
	f.DurationVar(&o.FailoverTime, "failover-time", time.Second, "silence after which a path is dead; all timers derive from it")
	f.IntVar(&o.QueueDepth, "queue-depth", 128, "requests in flight per path and per NBD connection")
	f.StringVar(&o.Policy.Alias, "alias", "", "name of the first map (default: its WWID)")
	f.StringVar(&o.Policy.Policy, "policy", "failover", "path_grouping_policy: failover or multibus")
	f.StringVar(&o.Policy.Selector, "selector", "service-time 0", "path_selector: round-robin, queue-length, service-time, failover")
	f.StringVar(&o.Policy.Checker, "checker", "tur", "path_checker: tur, readsector0, directio, none")
	f.StringVar(&failback, "failback", "immediate", "immediate or manual")
	f.StringVar(&retry, "no-path-retry", "queue", "without a path: queue, fail, or a number of checks to wait")
	f.DurationVar(&o.Policy.PollingInterval, "polling-interval", 5*time.Second, "shortest time between checks")
	f.DurationVar(&o.Policy.MaxPollingInterval, "max-polling-interval", 0, "longest time between checks (default 4 x polling-interval)")
	return c
}
