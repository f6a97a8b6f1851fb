// Command mpathd makes one block device out of several iSCSI paths to the same
// disk. See README.md.
package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"
)

// usageError exits with 2 instead of 1.
type usageError struct{ error }

var logFormat string

func main() {
	debug.SetGCPercent(200)
	if f := personality(os.Args[0]); f != nil {
		os.Exit(f(os.Args[1:]))
	}
	err := rootCommand().Execute()
	if m := messages.Load(); m != nil {
		m.flush()
	}
	if err != nil {
		complain(err)
	}
	os.Exit(exitCode(err))
}

// exitCode is 0 for success, 1 for a failure, 2 for wrong usage.
func exitCode(err error) int {
	var u usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &u):
		return 2
	}
	return 1
}

// about begins the help and the manual page of mpathd itself.
const about = `mpathd logs in to iSCSI targets, recognises a disk behind them by its SCSI ID, sends
each request down a healthy path, and shows the disk as /dev/nbdX and as an NBD export.

"mpathd run" is the daemon; "show", "fail", "reinstate" and the like speak to it over its
control socket, which --control or MPATHD_CONTROL in the environment names. They exit with
0 for success, 1 for a failure, 2 for wrong usage. Messages go to stderr, data to stdout.

Files: /etc/mpathd.conf, else /etc/multipath.conf (configuration); /run/mpathd (sockets,
locks); /var/lib/mpathd (unfenced paths, names of maps, a generated initiator name);
/usr/share/doc/mpathd (documentation: begin with operations.md if something is wrong).`

func rootCommand() *cobra.Command {
	root := &cobra.Command{Use: "mpathd", Short: "one block device out of several iSCSI paths", Long: about, SilenceErrors: true, SilenceUsage: true, Args: cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, a []string) error { return group(c, a) },
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if logFormat != "text" && logFormat != "json" {
				return usageError{fmt.Errorf("--log-format %q: want text or json", logFormat)}
			}
			return nil
		}}
	root.PersistentFlags().StringVar(&logFormat, "log-format", "text", "text or json")
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usageError{fmt.Errorf("%s%w", prefix(c), err)} })
	root.AddCommand(runCommand(), showCommand(), checkCommand(), pathCommand("fail", "take a path out of service"),
		pathCommand("reinstate", "let a path serve again"), pathCommand("fence", "declare that the path's old session can write no more (its server is off)"), queueCommand(), switchCommand(), resizeCommand(), detachCommand(), reconfigureCommand(), eventsCommand(), manualCommand(), discoverCommand(), wwidCommand(), demoCommand(), drillCommand(), compatCommand(), targetCommand())
	return root
}

// prefix names a command in its messages; the program is named anyway.
func prefix(c *cobra.Command) string {
	if !c.HasParent() {
		return ""
	}
	return strings.TrimPrefix(c.CommandPath(), c.Root().Name()+" ") + ": "
}

// complain prints why a command failed.
func complain(err error) {
	if logFormat == "json" {
		slog.New(slog.NewJSONHandler(os.Stderr, nil)).Error(err.Error())
		return
	}
	fmt.Fprintln(os.Stderr, "mpathd:", err)
}

// group is what a command does that only has commands of its own.
func group(c *cobra.Command, a []string) error {
	var names []string
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() {
			names = append(names, sub.Name())
		}
	}
	want := strings.Join(names, ", ")
	if len(a) == 0 {
		return usageError{fmt.Errorf("%swant one of %s; see %s --help", prefix(c), want, c.CommandPath())}
	}
	return usageError{fmt.Errorf("%sunknown command %q: want one of %s", prefix(c), a[0], want)}
}

// messages go to stderr through it, if logger was called.
var messages atomic.Pointer[laterWriter]

func logger() *slog.Logger {
	if messages.Load() == nil {
		messages.CompareAndSwap(nil, newLaterWriter(os.Stderr))
	}
	var h slog.Handler = slog.NewTextHandler(messages.Load(), nil)
	if logFormat == "json" {
		h = slog.NewJSONHandler(messages.Load(), nil)
	}
	l := slog.New(h)
	slog.SetDefault(l)
	slog.SetLogLoggerLevel(slog.LevelDebug) // what libraries print for their own developers
	return l
}

// args makes a wrong number of arguments a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, a []string) error {
		if check(c, a) != nil {
			got := "nothing"
			if len(a) > 0 {
				got = strings.Join(a, " ")
			}
			return usageError{fmt.Errorf("%sgot %s: want %s", prefix(c), got, strings.TrimSuffix(c.UseLine(), " [flags]"))}
		}
		return nil
	}
}
