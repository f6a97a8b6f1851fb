package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mpathd/mpathd/config"
)

type diagnosticJSON struct {
	File string `json:"file"`
	Line int    `json:"line"`
	Text string `json:"text"`
}

func criteriaJSON(c config.Criteria) map[string]any {
	list := func(l []string) []string { return append([]string{}, l...) }
	return map[string]any{"devnode": list(c.Devnode), "wwid": list(c.WWID), "property": list(c.Property), "protocol": list(c.Protocol),
		"device": append([]config.Section{}, c.Device...)}
}

func configJSON(c *config.Config, effective bool) map[string]any {
	defaults := c.Defaults
	if effective {
		defaults = c.Effective()
	}
	ini := map[string]any{}
	for k, v := range c.Initiator.Settings {
		ini[k] = v
	}
	if len(c.Initiator.Discover) > 0 {
		ini["discover"] = c.Initiator.Discover
	}
	var targets []any
	for _, t := range c.Initiator.Target {
		s := config.Section{}
		for k, v := range t {
			s[k] = config.Redact(v)
		}
		if len(s) == 1 {
			targets = append(targets, s["url"])
		} else {
			targets = append(targets, s)
		}
	}
	if len(targets) > 0 {
		ini["target"] = targets
	}
	return map[string]any{"defaults": defaults, "blacklist": criteriaJSON(c.Blacklist), "blacklist_exceptions": criteriaJSON(c.Exceptions),
		"devices": append([]config.Section{}, c.Devices...), "multipaths": append([]config.Section{}, c.Multipaths...), "overrides": c.Overrides,
		"initiator": ini, "nbd": c.NBD}
}

// printConfig writes a configuration, built-in values included, that reads back
// as what it means.
func printConfig(w io.Writer, c *config.Config) {
	quote := func(v string) string { return `"` + strings.ReplaceAll(v, `"`, `""`) + `"` }
	section := func(indent, name string, s config.Section) {
		fmt.Fprintf(w, "%s%s {\n", indent, name)
		keys := make([]string, 0, len(s))
		for k := range s {
			keys = append(keys, k)
		}
		sort.Strings(keys)
		for _, k := range keys {
			fmt.Fprintf(w, "%s\t%s %s\n", indent, k, quote(config.Redact(s[k])))
		}
		fmt.Fprintf(w, "%s}\n", indent)
	}
	fmt.Fprintln(w, "initiator {")
	for _, k := range []string{"name", "failover_time", "header_digest", "data_digest", "lenient", "redirect_allow", "chap_user", "chap_secret_file", "mutual_chap_user", "mutual_chap_secret_file", "chap_algs", "chap_short_secrets"} {
		if v, ok := c.Initiator.Settings[k]; ok {
			fmt.Fprintf(w, "\t%s %s\n", k, quote(v))
		}
	}
	for _, d := range c.Initiator.Discover {
		fmt.Fprintf(w, "\tdiscover %s\n", quote(d))
	}
	for _, t := range c.Initiator.Target {
		section("\t", "target", t)
	}
	fmt.Fprintln(w, "}")
	section("", "nbd", c.NBD)
	defaults := c.Effective()
	for _, k := range c.Detected() { // as a setting it would switch the detection off
		defaults["# "+k] = defaults[k]
		delete(defaults, k)
	}
	section("", "defaults", defaults)
	for _, b := range []struct {
		name string
		list config.Criteria
	}{{"blacklist", c.Blacklist}, {"blacklist_exceptions", c.Exceptions}} {
		l := b.list
		fmt.Fprintf(w, "%s {\n", b.name)
		for _, x := range []struct {
			key  string
			list []string
		}{{"devnode", l.Devnode}, {"wwid", l.WWID}, {"property", l.Property}, {"protocol", l.Protocol}} {
			for _, v := range x.list {
				fmt.Fprintf(w, "\t%s %s\n", x.key, quote(v))
			}
		}
		for _, d := range l.Device {
			section("\t", "device", d)
		}
		fmt.Fprintln(w, "}")
	}
	many := func(outer, inner string, list []config.Section) {
		fmt.Fprintf(w, "%s {\n", outer)
		for _, s := range list {
			section("\t", inner, s)
		}
		fmt.Fprintln(w, "}")
	}
	many("devices", "device", c.Devices)
	section("", "overrides", c.Overrides)
	many("multipaths", "multipath", c.Multipaths)
}

func checkCommand() *cobra.Command {
	var asJSON, effective bool
	c := &cobra.Command{Use: "check FILE", Short: "read a configuration and print what it means", Args: args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, a []string) error {
			c, err := config.Load(a[0])
			if err != nil {
				return err
			}
			if asJSON {
				list := func(ds []*config.Diagnostic) []diagnosticJSON {
					out := []diagnosticJSON{}
					for _, d := range ds {
						out = append(out, diagnosticJSON{d.File, d.Line, d.Text})
					}
					return out
				}
				if err := printJSON(map[string]any{"version": 1, "errors": list(c.Errors), "warnings": list(c.Warnings), "config": configJSON(c, effective)}); err != nil {
					return err
				}
			} else {
				report(c)
				if len(c.Errors) == 0 {
					printConfig(os.Stdout, c)
				}
			}
			if n := len(c.Errors); n > 0 {
				return fmt.Errorf("%s: %d errors", a[0], n)
			}
			return nil
		}}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.Flags().BoolVar(&effective, "effective", false, "fill in the values that hold where the file says nothing")
	return c
}

// report prints errors and warnings with their lines.
func report(c *config.Config) {
	for _, d := range append(append([]*config.Diagnostic{}, c.Warnings...), c.Errors...) {
		fmt.Fprintln(os.Stderr, d.Detail())
	}
}

var errConfig = errors.New("the configuration has errors: `mpathd check` shows them all")
