package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/drill"
	"github.com/mpathd/mpathd/nbd"
	"github.com/mpathd/mpathd/nbd/client"
)

// running is the daemon behind the control socket.
type running struct{}

func (running) Maps() (m *daemon.Maps, err error) {
	m = &daemon.Maps{}
	return m, call("GET", "/maps", nil, m)
}

func (running) FailPath(name string) error {
	return call("POST", "/fail", url.Values{"path": {name}}, nil)
}

func (running) ReinstatePath(name string) error {
	return call("POST", "/reinstate", url.Values{"path": {name}}, nil)
}

func drillCommand() *cobra.Command {
	var hold time.Duration
	var asJSON bool
	c := controlFlag(&cobra.Command{Use: "drill MAP [PATH ...]", Short: "rehearse a failover on a live map: each path that serves is out for a while; reads are timed, nothing is written",
		Args: args(cobra.MinimumNArgs(1)), RunE: func(_ *cobra.Command, a []string) error {
			if hold < 100*time.Millisecond || hold > 10*time.Minute {
				return usageError{fmt.Errorf("drill: --for %v: want 100ms to 10m", hold)}
			}
			disk, err := exportOf(a[0])
			if err != nil {
				return err
			}
			defer disk.Close()
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			steps, err := drill.Live(ctx, running{}, disk, disk.Size(), a[0], a[1:], hold)
			if asJSON {
				if steps == nil {
					steps = []drill.Step{}
				}
				err = errors.Join(err, printJSON(map[string]any{"version": 1, "map": a[0], "steps": steps}))
			} else {
				printSteps(steps)
			}
			return errors.Join(err, verdict(steps))
		}})
	c.Flags().DurationVar(&hold, "for", 5*time.Second, "how long each path is out")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// exportOf connects to the NBD export of a map, as any client would.
func exportOf(name string) (*client.Client, error) {
	m, err := drill.Map(running{}, name)
	if err != nil {
		return nil, err
	}
	var s daemon.Status
	if err := call("GET", "/status", nil, &s); err != nil {
		return nil, err
	}
	at, err := nbd.ParseListeners(s.NBD, nbd.Access{})
	if err != nil {
		return nil, fmt.Errorf("drill: the daemon's NBD sockets: %w", err)
	}
	var failed error
	for _, l := range at {
		c, err := client.Dial(l.Network, l.Address, m.NBD.Export)
		if err == nil {
			return c, nil
		}
		failed = errors.Join(failed, fmt.Errorf("drill: reads go through the NBD socket %s:%s, without TLS: %w", l.Network, l.Address, err))
	}
	return nil, failed
}

func printSteps(steps []drill.Step) {
	if len(steps) == 0 {
		return
	}
	w, flush := table()
	fmt.Fprintln(w, "PATH\tREADS\tERRORS\tLONGEST READ\tBACK AFTER\tSERVES AGAIN")
	for _, s := range steps {
		back := "not back"
		if s.BackMS >= 0 {
			back = (time.Duration(s.BackMS) * time.Millisecond).String()
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%v\t%s\t%v\n", s.Path, s.Reads, s.Errors, time.Duration(s.LongestUS)*time.Microsecond, back, s.Serves)
	}
	flush()
}

// verdict is an error if reads failed or a path did not come back.
func verdict(steps []drill.Step) (err error) {
	for _, s := range steps {
		if s.Errors > 0 {
			err = errors.Join(err, fmt.Errorf("drill: %d of %d reads failed while path %s was out: %s", s.Errors, s.Reads, s.Path, s.Cause))
		}
		if s.BackMS < 0 {
			err = errors.Join(err, fmt.Errorf("drill: path %s did not come up again: `mpathd show paths` says why", s.Path))
		}
	}
	return err
}
