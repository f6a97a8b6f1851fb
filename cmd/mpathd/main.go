// Command mpathd makes one block device out of several iSCSI paths to the same
// disk. See README.md.
package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// usageError exits with 2 instead of 1.
type usageError struct{ error }

var logFormat string

func main() {
	debug.SetGCPercent(200)
	root := &cobra.Command{Use: "mpathd", Short: "one block device out of several iSCSI paths", SilenceErrors: true, SilenceUsage: true}
	root.PersistentFlags().StringVar(&logFormat, "log-format", "text", "text or json")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(runCommand(), showCommand(), checkCommand(), pathCommand("fail", "take a path out of service"),
		pathCommand("reinstate", "let a path serve again"), pathCommand("fence", "declare that the path's old session can write no more (its server is off)"), queueCommand(), switchCommand(), resizeCommand(), reconfigureCommand(), eventsCommand(), discoverCommand(), wwidCommand(), demoCommand(), targetCommand())
	if err := root.Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "mpathd:", err)
		var u usageError
		if errors.As(err, &u) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

func logger() *slog.Logger {
	if logFormat == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, nil))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, nil))
}

// args makes a wrong number of arguments a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, a []string) error {
		if err := check(c, a); err != nil {
			return usageError{err}
		}
		return nil
	}
}
