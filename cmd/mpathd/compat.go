package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mpathd/mpathd/compat"
	"github.com/mpathd/mpathd/config"
	"github.com/mpathd/mpathd/daemon"
)

// Whoever calls this binary multipath or multipathd, by a link or with `mpathd
// compat`, gets what those print.

func compatCommand() *cobra.Command {
	return &cobra.Command{Use: "compat multipath|multipathd [ARGUMENT ...]", Short: "what multipath and multipathd would say; links of those names to this program do the same",
		DisableFlagParsing: true, RunE: func(cmd *cobra.Command, a []string) error {
			if len(a) > 0 {
				if f := personality(a[0]); f != nil {
					os.Exit(f(a[1:]))
				}
				if a[0] == "-h" || a[0] == "--help" {
					return cmd.Help()
				}
			}
			return usageError{fmt.Errorf("compat: which one? multipath or multipathd")}
		}}
}

// personality is the program of that name, or nil.
func personality(argv0 string) func(args []string) int {
	switch filepath.Base(argv0) {
	case "multipath":
		return multipath
	case "multipathd", "multipathc":
		return multipathd
	}
	return nil
}

// say sends a command of multipathd and writes the answer.
func say(w io.Writer, text string) error {
	rs, err := ask("POST", "/compat", url.Values{"cmd": {text}}, callTime)
	if err != nil {
		return err
	}
	defer rs.Body.Close()
	_, err = io.Copy(w, rs.Body)
	return err
}

// command sends a command and prints the answer; it gives the exit code.
func command(text string) int {
	var answer bytes.Buffer
	if err := say(&answer, text); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	os.Stdout.Write(answer.Bytes())
	return code(!bytes.HasPrefix(answer.Bytes(), []byte("fail")))
}

// multipathd sends the words of the command line, or those of -k.
func multipathd(args []string) int {
	var words []string
	for i, a := range args {
		switch {
		case len(words) == 0 && strings.HasPrefix(a, "-k"):
			if text := strings.TrimPrefix(a, "-k"); text != "" {
				return command(text)
			}
			if rest := strings.Join(args[i+1:], " "); rest != "" {
				return command(rest)
			}
			return converse()
		case len(words) == 0 && strings.HasPrefix(a, "-"):
			fmt.Fprintf(os.Stderr, "multipathd %s: the daemon is started with `mpathd run`\n", a)
			return 1
		case strings.ContainsAny(a, " \t"):
			words = append(words, `"`+a+`"`)
		default:
			words = append(words, a)
		}
	}
	if len(words) == 0 {
		fmt.Fprintln(os.Stderr, "multipathd: the daemon is started with `mpathd run`; commands are words, or -k'WORDS'")
		return 1
	}
	return command(strings.Join(words, " "))
}

// converse reads commands from stdin until quit.
func converse() int {
	in := bufio.NewScanner(os.Stdin)
	for {
		fmt.Print("multipathd> ")
		if !in.Scan() {
			fmt.Println()
			return 0
		}
		switch text := strings.TrimSpace(in.Text()); text {
		case "":
		case "quit", "exit":
			return 0
		default:
			command(text)
		}
	}
}

const multipathUsage = `Usage:
  multipath [-v level] [-l|-ll] [device]   maps, groups and paths
  multipath [-v level] [-r]                reconfigure
  multipath -c|-C device                   exit 0 if the device is a path of a map; if it is a map with usable paths
  multipath -t|-T                          the configuration
What else multipath does (creating, flushing, the wwids file) follows the configuration here: see mpathd(8).
`

// multipath shows; maps are made and ended by the daemon alone.
func multipath(args []string) int {
	var show, mode, verbosity, device = 0, byte(0), "2", ""
	for i := 0; i < len(args); i++ {
		a := args[i]
		if !strings.HasPrefix(a, "-") || a == "-" {
			device = a
			continue
		}
		for j := 1; j < len(a); j++ {
			value := func() string {
				if j+1 < len(a) {
					v := a[j+1:]
					j = len(a)
					return v
				}
				if i++; i < len(args) {
					return args[i]
				}
				return ""
			}
			switch c := a[j]; c {
			case 'l':
				show++
			case 'v':
				verbosity = value()
			case 'p', 'R', 'b':
				value()
			case 'q', 'd', 'i', 'B', 'e':
			case 'c', 'C', 'u', 'U', 'f', 'F', 'r', 'a', 'w', 'W', 't', 'T', 'h':
				mode = c
			default:
				fmt.Fprintf(os.Stderr, "multipath: unknown option -%c\n%s", c, multipathUsage)
				return 1
			}
		}
	}
	switch {
	case mode == 'h':
		fmt.Print(multipathUsage)
		return 0
	case mode == 't':
		return command("show config")
	case mode == 'T':
		return command("show config local")
	case mode == 'r':
		return command("reconfigure")
	case mode == 'a' || mode == 'w' || mode == 'W':
		fmt.Fprintln(os.Stderr, "multipath: there is no wwids file: the configuration says which targets are used")
		return 0
	case mode == 'f' || mode == 'F':
		fmt.Fprintln(os.Stderr, "multipath: maps follow the configuration: take the target out of it and reconfigure, or `mpathd detach MAP`")
		return 1
	case mode == 0 && show == 0: // would make maps; they are there
		return 0
	}
	if mode == 0 && verbosity != "0" && verbosity != "1" {
		var b bytes.Buffer
		if err := draw(&b, daemon.Text{As: "multipath", Only: device, Style: compat.TopologyStyle{Bold: terminal(), Brief: show == 1}}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		os.Stdout.Write(b.Bytes())
		return code(device == "" || b.Len() > 0)
	}
	var m daemon.Maps
	if err := call("GET", "/maps", nil, &m); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	v := viewOf(&m)
	switch {
	case mode == 'c' || mode == 'u':
		ours := device != "" && v.PathOfMap(device)
		fmt.Printf("DM_MULTIPATH_DEVICE_PATH=\"%d\"\n", 1-code(ours)) // for udev rules
		return code(ours)
	case mode == 'C' || mode == 'U':
		return code(device != "" && v.Usable(device))
	case device != "" && len(v.Named(device)) == 0:
		return 1
	case verbosity == "1":
		for _, x := range v.Named(device) {
			fmt.Println(x.Alias)
		}
	}
	return 0
}

func code(ok bool) int {
	if ok {
		return 0
	}
	return 1
}

func viewOf(m *daemon.Maps) *compat.View {
	v := &compat.View{Maps: m.Maps}
	for _, p := range m.Pending {
		v.Pending = append(v.Pending, compat.Pending{URL: p.URL, Cause: p.Cause})
	}
	return v
}

// terminal tells whether stdout is one.
func terminal() bool {
	st, err := os.Stdout.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0 && st.Mode()&os.ModeDevice != 0 && os.Getenv("TERM") != "dumb" && os.Getenv("NO_COLOR") == ""
}

// configText is the configuration in multipath.conf's grammar; local leaves out
// the built-in hardware table.
func configText(c *config.Config, local bool) string {
	var b bytes.Buffer
	if !local {
		with := *c
		with.Devices = slices.Concat(config.BuiltIn(), c.Devices)
		c = &with
	}
	printConfig(&b, c)
	return b.String()
}

// blacklistText lists the rules as multipathd does.
func blacklistText(c *config.Config) string {
	var b strings.Builder
	rules := func(what string, of func(*config.Criteria) []string) {
		fmt.Fprintf(&b, "%s rules:\n", what)
		for _, half := range []struct {
			name string
			list *config.Criteria
		}{{"blacklist", &c.Blacklist}, {"exceptions", &c.Exceptions}} {
			fmt.Fprintf(&b, "- %s:\n", half.name)
			list := of(half.list)
			for _, r := range list {
				fmt.Fprintf(&b, "        (config file rule) %s\n", r)
			}
			if len(list) == 0 {
				b.WriteString("        <empty>\n")
			}
		}
	}
	rules("device node", func(c *config.Criteria) []string { return c.Devnode })
	rules("udev property", func(c *config.Criteria) []string { return c.Property })
	rules("protocol", func(c *config.Criteria) []string { return c.Protocol })
	rules("wwid", func(c *config.Criteria) []string { return c.WWID })
	rules("device", func(c *config.Criteria) (out []string) {
		for _, d := range c.Device {
			out = append(out, d["vendor"]+":"+d["product"])
		}
		return out
	})
	return b.String()
}
