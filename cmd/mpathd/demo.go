package main

import (
	"context"
	"os"

	"github.com/spf13/cobra"

	"github.com/mpathd/mpathd/drill"
)

func demoCommand() *cobra.Command {
	return &cobra.Command{Use: "demo", Short: "targets, device, load and three failovers in one process", Args: args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error { return drill.Demo(context.Background(), os.Stdout) }}
}
