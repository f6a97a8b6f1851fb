package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
)

// outputOf is what mpathd prints for these arguments.
func outputOf(t *testing.T, args ...string) string {
	t.Helper()
	root := rootCommand()
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(new(bytes.Buffer))
	root.SetArgs(args)
	require.NoError(t, root.Execute(), strings.Join(args, " "))
	return out.String()
}

// users are the commands that users may type, with what each of them takes.
func users(t *testing.T) (commands []*cobra.Command) {
	root := rootCommand()
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Hidden || c.Name() == "help" {
			return
		}
		commands = append(commands, c)
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
	require.Greater(t, len(commands), 20)
	for _, c := range commands { // one that parses its flags itself has to tell of them all the same
		require.True(t, !c.DisableFlagParsing || c.Name() == "compat" || len(flagsOf(c)) > 1, "%s tells of no flag", c.CommandPath())
	}
	return commands
}

func flagsOf(c *cobra.Command) (names []string) {
	c.InitDefaultHelpFlag()
	visit := func(f *pflag.Flag) {
		if !f.Hidden && f.Name != "help" {
			names = append(names, f.Name)
		}
	}
	c.NonInheritedFlags().VisitAll(visit)
	c.InheritedFlags().VisitAll(visit)
	return names
}

// Each command has a page that names all of its flags with a word about each, and
// its subcommands; no page is about something else.
func TestManualPagesAreComplete(t *testing.T) {
	dir := t.TempDir()
	outputOf(t, "manual", dir)
	have := map[string]bool{}
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, f := range files {
		have[f.Name()] = true
	}
	for _, c := range users(t) {
		page := strings.ReplaceAll(c.CommandPath(), " ", "-")
		b, err := os.ReadFile(filepath.Join(dir, page+".8"))
		require.NoError(t, err)
		delete(have, page+".8")
		text := strings.ReplaceAll(string(b), `\-`, "-")
		require.NotEmpty(t, c.Short, page)
		require.Contains(t, text, c.Short, page)
		for _, f := range flagsOf(c) {
			require.Contains(t, text, "--"+f+`\fP`, "%s does not name --%s", page, f)
			require.NotEmpty(t, c.Flag(f).Usage, "%s --%s has no word of explanation", page, f)
		}
		for _, sub := range c.Commands() {
			if !sub.Hidden && sub.Name() != "help" {
				require.Contains(t, text, page+"-"+sub.Name()+"(8)", "%s does not lead to %s", page, sub.Name())
			}
		}
	}
	require.Empty(t, have, "pages of commands that there are not")
}

// The shells ask mpathd itself: each command and flag is offered.
func TestCompletionIsComplete(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		require.Contains(t, outputOf(t, "completion", shell), "__complete", shell)
	}
	for _, c := range users(t) {
		words := strings.Fields(c.CommandPath())[1:]
		offered := func(typed string) map[string]bool {
			names := map[string]bool{}
			for line := range strings.Lines(outputOf(t, append(append([]string{"__complete"}, words...), typed)...)) {
				name, _, _ := strings.Cut(strings.TrimSpace(line), "\t")
				names[strings.TrimSuffix(name, "=")] = true
			}
			return names
		}
		flags := offered("--")
		for _, f := range flagsOf(c) {
			require.True(t, flags["--"+f], "%s: --%s is not offered, only %v", c.CommandPath(), f, flags)
		}
		commands := offered("")
		for _, sub := range c.Commands() {
			if !sub.Hidden {
				require.True(t, commands[sub.Name()], "%s: %s is not offered", c.CommandPath(), sub.Name())
			}
		}
	}
}
