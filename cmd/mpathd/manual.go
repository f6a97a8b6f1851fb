package main

import (
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// manualCommand writes man pages of all commands, for packages.
func manualCommand() *cobra.Command {
	return &cobra.Command{Use: "manual DIR", Short: "write the man pages into a directory", Hidden: true, Args: args(cobra.ExactArgs(1)), RunE: func(cmd *cobra.Command, a []string) error {
		root := cmd.Root()
		root.DisableAutoGenTag = true
		return doc.GenManTree(root, &doc.GenManHeader{Title: "MPATHD", Section: "8", Source: "mpathd", Manual: "System Administration"}, a[0])
	}}
}
