package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/mpathd/mpathd/compat"
	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/nbd/attach"
	"github.com/mpathd/mpathd/paths"
)

// control is --control; MPATHD_CONTROL in the environment is its default.
var control = cmp.Or(os.Getenv("MPATHD_CONTROL"), defaultControl)

const callTime = 60 * time.Second // a resize asks all paths

func controlFlag(c *cobra.Command) *cobra.Command {
	c.PersistentFlags().StringVar(&control, "control", control, "control socket of the daemon")
	return c
}

// ask sends a request to the daemon; the answer is a good one. The caller
// closes its body. A limit of 0 waits for ever.
func ask(method, path string, form url.Values, limit time.Duration) (*http.Response, error) {
	client := http.Client{Timeout: limit, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", control)
	}}}
	rq, err := http.NewRequest(method, "http://mpathd"+path, strings.NewReader(form.Encode()))
	if err != nil {
		return nil, err
	}
	rq.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	rs, err := client.Do(rq)
	if errors.Is(err, os.ErrPermission) {
		return nil, fmt.Errorf("control socket %s: permission denied: it is the daemon's user's alone: run this as that user, usually root", control)
	}
	if err != nil {
		return nil, fmt.Errorf("control socket %s: no daemon answers: is `mpathd run` up, and is this its --control? (%w)", control, errors.Unwrap(err))
	}
	if rs.StatusCode != http.StatusOK {
		defer rs.Body.Close()
		b, _ := io.ReadAll(io.LimitReader(rs.Body, 4096))
		return nil, errors.New(strings.TrimSpace(string(b)))
	}
	return rs, nil
}

// call asks the daemon; out is filled from its JSON answer.
func call(method, path string, form url.Values, out any) error {
	rs, err := ask(method, path, form, callTime)
	if err != nil {
		return err
	}
	defer rs.Body.Close()
	if out == nil {
		return nil
	}
	return json.NewDecoder(rs.Body).Decode(out)
}

func printJSON(v any) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func showCommand() *cobra.Command {
	c := controlFlag(&cobra.Command{Use: "show maps|topology|paths|config|status", Short: "what the daemon has", Args: cobra.ArbitraryArgs, RunE: group})
	var asJSON, watch bool
	c.PersistentFlags().BoolVar(&asJSON, "json", false, "print JSON")
	c.PersistentFlags().BoolVar(&watch, "watch", false, "print again every second, until interrupted")
	sub := func(use, short, path string, text func(w io.Writer) error) {
		c.AddCommand(&cobra.Command{Use: use, Short: short, Args: args(cobra.NoArgs), RunE: func(*cobra.Command, []string) error {
			for {
				var b bytes.Buffer // what a terminal shows changes at once
				if watch && !asJSON {
					b.WriteString("\x1b[H\x1b[2J") // home and clear
				}
				err := error(nil)
				if asJSON {
					err = indented(&b, path)
				} else {
					err = text(&b)
				}
				if err != nil {
					return err
				}
				if _, err := b.WriteTo(os.Stdout); err != nil {
					return err
				}
				if !watch {
					return nil
				}
				time.Sleep(time.Second)
			}
		}})
	}
	drawn := func(as string) func(w io.Writer) error {
		return func(w io.Writer) error {
			tty := terminal()
			return draw(w, daemon.Text{As: as, Style: compat.TopologyStyle{Bold: tty, Colours: tty}})
		}
	}
	sub("maps", "one line per map", "/maps", drawn("maps"))
	sub("paths", "one line per path", "/maps", drawn("paths"))
	sub("topology", "maps, groups and paths as multipath -ll draws them", "/maps", drawn("topology"))
	sub("config", "the configuration in force", "/config", func(w io.Writer) error { return say(w, "show config local") })
	sub("status", "the daemon itself", "/status", func(w io.Writer) error {
		s := &daemon.Status{}
		if err := call("GET", "/status", nil, s); err != nil {
			return err
		}
		fmt.Fprintf(w, "pid %d, up %v, initiator %s, NBD %s, %d maps, %d paths pending\n", s.PID, time.Duration(s.UptimeSeconds)*time.Second, s.Initiator, s.NBD, s.Maps, s.Pending)
		for _, alias := range slices.Sorted(maps.Keys(s.Safety)) {
			x := s.Safety[alias]
			fmt.Fprintf(w, "%s: %s\n", alias, safetyText(&x))
			daemon.WriteUnfenced(w, alias, &x)
		}
		return nil
	})
	return c
}

// draw has the daemon print its maps. One of an earlier version answers with JSON.
func draw(w io.Writer, t daemon.Text) error {
	rs, err := ask("GET", "/maps?"+t.Query().Encode(), nil, callTime)
	if err != nil {
		return err
	}
	defer rs.Body.Close()
	if rs.Header.Get("Content-Type") == "application/json" {
		m := &daemon.Maps{}
		if err := json.NewDecoder(rs.Body).Decode(m); err != nil {
			return err
		}
		return t.Write(w, m)
	}
	_, err = io.Copy(w, rs.Body)
	return err
}

// indented gets JSON from the daemon.
func indented(w *bytes.Buffer, path string) error {
	rs, err := ask("GET", path, nil, callTime)
	if err != nil {
		return err
	}
	defer rs.Body.Close()
	b, err := io.ReadAll(rs.Body)
	if err != nil {
		return err
	}
	return json.Indent(w, b, "", "  ")
}

// table lays out columns on stdout; nothing is printed before flush. The cells
// of a tabwriter would each be a system call.
func table() (w io.Writer, flush func()) {
	out := bufio.NewWriterSize(os.Stdout, 64<<10)
	t := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	return t, func() {
		t.Flush()
		out.Flush()
	}
}

// safetyText sums up what happened to late writes since start.
func safetyText(s *paths.Safety) string {
	t := "ghost_protection " + s.Mode
	if s.WriteThrough {
		t += ", writes with FUA"
	}
	t += fmt.Sprintf(", %d writes were ambiguous, %d requests waited for %v (longest %v), %d wait now", s.Ambiguous, s.Holds-int64(s.Held),
		time.Duration(s.HoldMS)*time.Millisecond, time.Duration(s.LongestHoldMS)*time.Millisecond, s.Held)
	if s.Lost {
		t += ", ACKNOWLEDGED WRITES LOST: flushes fail"
	}
	if s.ShadowBytes > 0 || s.Repairs > 0 {
		t += fmt.Sprintf(", %s in memory, %d blocks repaired", compat.Size(s.ShadowBytes), s.Repairs)
	}
	fences := "none"
	if len(s.Fences) > 0 {
		fences = ""
		for _, how := range paths.FenceKinds {
			if n := s.Fences[how]; n > 0 {
				fences += fmt.Sprintf(" %d %s", n, how)
			}
		}
	}
	t += "; fences: " + strings.TrimSpace(fences)
	if len(s.FencesBy) > 0 {
		means := []string{}
		for _, by := range slices.Sorted(maps.Keys(s.FencesBy)) {
			means = append(means, fmt.Sprintf("%d %s", s.FencesBy[by], by))
		}
		t += ", by " + strings.Join(means, ", ")
	}
	if s.FencesLate > 0 {
		t += fmt.Sprintf("; %d took longer than fence_wait", s.FencesLate)
	}
	return t
}

func pathCommand(verb, short string) *cobra.Command {
	return controlFlag(&cobra.Command{Use: verb + " PATH", Short: short, Args: args(cobra.ExactArgs(1)), RunE: func(_ *cobra.Command, a []string) error {
		return call("POST", "/"+verb, url.Values{"path": a}, nil)
	}})
}

func switchCommand() *cobra.Command {
	return controlFlag(&cobra.Command{Use: "switch MAP GROUP", Short: "use a path group (1 is the first of show topology) until it fails; 0 follows the policy again",
		Args: args(cobra.ExactArgs(2)), RunE: func(_ *cobra.Command, a []string) error {
			if n, err := strconv.Atoi(a[1]); err != nil || n < 0 {
				return usageError{fmt.Errorf("switch: group %q: want its number in `mpathd show topology`, counted from 1, or 0 for the policy's choice", a[1])}
			}
			return call("POST", "/switch", url.Values{"map": a[:1], "group": a[1:]}, nil)
		}})
}

func resizeCommand() *cobra.Command {
	var force string
	c := controlFlag(&cobra.Command{Use: "resize MAP", Short: "take over the capacity that all paths report", Args: args(cobra.ExactArgs(1)), RunE: func(cmd *cobra.Command, a []string) error {
		if ok, _ := cmd.Flags().GetBool("force"); ok {
			force = "yes"
		}
		rs, err := ask("POST", "/resize", url.Values{"map": a, "force": {force}}, callTime)
		if err != nil {
			return err
		}
		defer rs.Body.Close()
		_, err = io.Copy(os.Stderr, rs.Body)
		return err
	}})
	c.Flags().Bool("force", false, "also a smaller one: what is beyond the new end is lost")
	return c
}

func detachCommand() *cobra.Command {
	c := controlFlag(&cobra.Command{Use: "detach MAP|/dev/nbdX", Short: "take a map's kernel device away, also one that a dead daemon left", Args: args(cobra.ExactArgs(1)), RunE: func(cmd *cobra.Command, a []string) error {
		force, _ := cmd.Flags().GetBool("force")
		v := url.Values{"map": a}
		if force {
			v.Set("force", "yes")
		}
		err := call("POST", "/detach", v, nil)
		if err == nil || !strings.HasPrefix(a[0], "/dev/nbd") {
			return err
		}
		dev, whose := attach.Open(a[0])
		if whose != nil {
			return whose
		}
		if c, e := net.Dial("unix", control); e == nil { // a daemon runs, and it has said no
			c.Close()
			var m daemon.Maps
			if e := call("GET", "/maps", nil, &m); e != nil {
				return e
			}
			if why := refused(a[0], dev.WWID(), &m); why == nil {
				return err
			} else if !force {
				return why
			}
		}
		if who := dev.Server(); who != "" && !force {
			return fmt.Errorf("%s: process %s serves it: name its control socket with --control", a[0], who)
		}
		if who := dev.InUse(); who != "" && !force {
			return fmt.Errorf("%s: %s: end that first, or use --force, which gives it I/O errors", a[0], who)
		}
		return dev.Disconnect()
	}})
	c.Flags().Bool("force", false, "also a device in use: its users get I/O errors")
	return c
}

// refused tells why the daemon with the maps m does not detach a device of
// mpathd's that was attached for a unit; nil: it is the device of one of them.
func refused(device, wwid string, m *daemon.Maps) error {
	for _, x := range m.Maps {
		if x.NBD.Device == device {
			return nil
		}
	}
	for _, x := range m.Maps {
		if x.WWID == wwid {
			has := "which has none now"
			if x.NBD.Device != "" {
				has = "which has " + x.NBD.Device + " now"
			}
			return fmt.Errorf("%s was attached for map %s, %s: if it is left over, take it away with --force", device, x.Alias, has)
		}
	}
	return fmt.Errorf("%s was attached by mpathd for unit %s, of which the daemon at %s has no map: if another daemon has it, name that with --control; if it is left over, take it away with --force", device, wwid, control)
}

func reconfigureCommand() *cobra.Command {
	return controlFlag(&cobra.Command{Use: "reconfigure", Short: "read the configuration again and apply what changed", Args: args(cobra.NoArgs), RunE: func(*cobra.Command, []string) error {
		return call("POST", "/reconfigure", nil, nil)
	}})
}

func eventsCommand() *cobra.Command {
	var asJSON, past bool
	c := controlFlag(&cobra.Command{Use: "events", Short: "what happens to maps and paths, as it happens", Args: args(cobra.NoArgs), RunE: func(*cobra.Command, []string) error {
		path := "/events"
		if past {
			path += "?past=yes"
		}
		rs, err := ask("GET", path, nil, 0)
		if err != nil {
			return err
		}
		defer rs.Body.Close()
		for in := json.NewDecoder(rs.Body); ; {
			var e daemon.Event
			if err := in.Decode(&e); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return errors.New("events: the daemon stopped")
			} else if err != nil {
				return fmt.Errorf("events: %w", err)
			}
			if asJSON {
				json.NewEncoder(os.Stdout).Encode(e)
				continue
			}
			line := e.Time.Format("2006-01-02 15:04:05.000") + " " + e.Name
			for _, f := range [][2]string{{"map", e.Map}, {"path", e.Path}} {
				if f[1] != "" {
					line += " " + f[0] + "=" + f[1]
				}
			}
			for _, k := range slices.Sorted(maps.Keys(e.Fields)) {
				line += " " + k + "=" + e.Fields[k]
			}
			if e.Cause != "" {
				line += ": " + e.Cause
			}
			fmt.Println(line)
		}
	}})
	c.Flags().BoolVar(&asJSON, "json", false, "one JSON object per line")
	c.Flags().BoolVar(&past, "past", false, "begin with the last 1000 events")
	return c
}

func queueCommand() *cobra.Command {
	return controlFlag(&cobra.Command{Use: "queue MAP on|off", Short: "queue or fail I/O while no path is left", Args: args(cobra.ExactArgs(2)), RunE: func(_ *cobra.Command, a []string) error {
		if a[1] != "on" && a[1] != "off" {
			return usageError{fmt.Errorf("queue: %q: want on or off", a[1])}
		}
		return call("POST", "/queue", url.Values{"map": a[:1], "on": a[1:]}, nil)
	}})
}
