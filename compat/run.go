package compat

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/mpathd/mpathd/paths"
)

// Daemon is what commands act on.
type Daemon interface {
	View() View
	Config(local bool) string // multipath.conf's grammar
	Blacklist() string        // as `show blacklist`
	FailPath(name string) error
	ReinstatePath(name string) error
	SwitchGroup(mapName string, group int) error
	StopQueueing(mapName string) error
	RestoreQueueing(mapName string) error // to what the configuration says
	Resize(mapName string) error
	Reconfigure() error
	Shutdown() error
}

const (
	defaultPaths  = "%i %d %D %p %t %T %o %C"
	defaultMaps   = "%n %d %w"
	defaultStatus = "%n %F %Q %N %t %r"
	defaultStats  = "%n %0 %1 %2 %3 %4"
)

// Version is what clients see of us: of their own kind, and honest.
const Version = "mpathd, speaking multipath-tools v0.9.4"

// Denied is the answer to a command that only root may give.
const Denied = "permission deny: need to be root\n"

// Run executes a command of multipathd and gives its answer. One that begins
// with "fail" tells that it did not work, the lines after that why.
func Run(d Daemon, text string) string {
	c, ok := parse(text)
	if !ok || c.name == "help" {
		return help(text, c.name != "help")
	}
	if answer, ok := show(d, &c); ok {
		return answer
	}
	err := act(d, &c)
	switch {
	case errors.Is(err, errUnknown):
		return help(text, true)
	case err != nil:
		return "fail\n" + strings.TrimSpace(err.Error()) + "\n"
	}
	return "ok\n"
}

func reject(why string) string { return "fail\n" + why + "\n" }

// show answers the commands that look.
func show(d Daemon, c *command) (answer string, ok bool) {
	words := strings.Fields(c.name)
	if !slices.Contains(words, "list") {
		return "", false
	}
	v := d.View()
	format := c.params["format"]
	var one *paths.MapStatus
	if name := c.params["map"]; name != "" {
		if one = v.find(name); one == nil {
			return reject("no map " + name), true
		}
	}
	full := style{header: true, pad: true}
	switch c.name {
	case "list paths":
		return table(pathColumns, defaultPaths, refs(v.rows()), full), true
	case "format list paths":
		return table(pathColumns, format, refs(v.rows()), full), true
	case "format list paths raw":
		return table(pathColumns, format, refs(v.rows()), style{}), true
	case "list path":
		rows := v.rows()
		for i := range rows {
			if rows[i].is(c.params["path"]) {
				return rows[i].deviceState() + "\n", true
			}
		}
		return reject("no path " + c.params["path"]), true
	case "list maps":
		return table(mapColumns, defaultMaps, v.refs(), full), true
	case "list maps status":
		return table(mapColumns, defaultStatus, v.refs(), full), true
	case "list maps stats":
		return table(mapColumns, defaultStats, v.refs(), full), true
	case "format list maps":
		return table(mapColumns, format, v.refs(), full), true
	case "format list maps raw":
		return table(mapColumns, format, v.refs(), style{}), true
	case "format list map", "format list map raw":
		return table(mapColumns, format, []mapStatus{one}, style{pad: true}), true
	case "list maps topology", "list topology":
		return Topology(&v, "", TopologyStyle{}), true
	case "list map topology":
		return Topology(&v, one.WWID, TopologyStyle{}), true
	case "json list maps":
		return jsonMaps(&v), true
	case "json list map":
		return jsonOne(&v, one), true
	case "list status":
		return status(&v), true
	case "daemon list":
		return fmt.Sprintf("pid %d idle\n", os.Getpid()), true
	case "list wildcards":
		return wildcards(), true
	case "config list", "config list local":
		return d.Config(strings.HasSuffix(c.name, "local")), true
	case "blacklist list":
		return d.Blacklist(), true
	case "devices list":
		rows := v.rows()
		var b strings.Builder
		b.WriteString("available block devices:\n")
		for i := range rows {
			fmt.Fprintf(&b, "    %s devnode whitelisted, monitored\n", rows[i].dev())
		}
		return b.String(), true
	}
	return "", false
}

func refs(rows []row) (out []*row) {
	for i := range rows {
		out = append(out, &rows[i])
	}
	return out
}

func (v *View) refs() (out []mapStatus) {
	for i := range v.Maps {
		out = append(out, &v.Maps[i])
	}
	return out
}

// status counts paths by what their checker says, as the peer does.
func status(v *View) string {
	rows := v.rows()
	counts := map[string]int{}
	for i := range rows {
		switch s := rows[i].checkState(); s {
		case "ready":
			counts["up"]++
		case "faulty":
			counts["down"]++
		default:
			counts[s]++
		}
	}
	var b strings.Builder
	b.WriteString("path checker states:\n")
	for _, s := range []string{"undef", "down", "up", "shaky", "ghost", "i/o pending", "i/o timeout", "delayed", "disconnected"} {
		if counts[s] > 0 {
			fmt.Fprintf(&b, "%-20s%d\n", s, counts[s])
		}
	}
	fmt.Fprintf(&b, "\npaths: %d\nbusy: False\n", len(rows))
	return b.String()
}

func wildcards() string {
	var b strings.Builder
	list := func(what string, letters []byte, headers []string) {
		fmt.Fprintf(&b, "%s format wildcards:\n", what)
		for i, l := range letters {
			fmt.Fprintf(&b, "%%%c  %s\n", l, headers[i])
		}
	}
	list("multipath", letters(mapColumns), headers(mapColumns))
	b.WriteByte('\n')
	list("path", letters(pathColumns), headers(pathColumns))
	b.WriteByte('\n')
	list("pathgroup", letters(groupColumns), headers(groupColumns))
	return b.String()
}

func letters[T any](cs []column[T]) (out []byte) {
	for _, c := range cs {
		out = append(out, c.letter)
	}
	return out
}

func headers[T any](cs []column[T]) (out []string) {
	for _, c := range cs {
		out = append(out, c.header)
	}
	return out
}

var errUnknown = errors.New("unknown command")

// act does what changes something.
func act(d Daemon, c *command) error {
	v := d.View()
	aMap := func(f func(name string) error) error {
		m := v.find(c.params["map"])
		if m == nil {
			return fmt.Errorf("no map %s", c.params["map"])
		}
		return f(m.WWID)
	}
	aPath := func(f func(name string) error) error {
		name, ok := v.Match(c.params["path"])
		if !ok {
			return fmt.Errorf("no path %s", c.params["path"])
		}
		return f(name)
	}
	allMaps := func(f func(name string) error) error {
		var all []error
		for i := range v.Maps {
			all = append(all, f(v.Maps[i].WWID))
		}
		return errors.Join(all...)
	}
	switch c.name {
	case "fail path":
		return aPath(d.FailPath)
	case "path reinstate":
		return aPath(d.ReinstatePath)
	case "group map switch":
		n, err := strconv.Atoi(c.params["group"])
		if err != nil || n < 1 {
			return fmt.Errorf("group %q: want its number, counted from 1", c.params["group"])
		}
		return aMap(func(name string) error { return d.SwitchGroup(name, n) })
	case "disablequeueing map":
		return aMap(d.StopQueueing)
	case "disablequeueing maps":
		return allMaps(d.StopQueueing)
	case "map restorequeueing":
		return aMap(d.RestoreQueueing)
	case "maps restorequeueing":
		return allMaps(d.RestoreQueueing)
	case "map resize":
		return aMap(d.Resize)
	case "reconfigure", "all reconfigure":
		return d.Reconfigure()
	case "map reload":
		return aMap(func(string) error { return nil }) // there is no table in the kernel to load again
	case "quit":
		return nil
	case "shutdown":
		return d.Shutdown()
	case "add path", "path remove", "add map", "map remove", "maps remove":
		return errors.New("paths and maps follow the configuration: change it and reconfigure")
	case "map suspend", "map resume", "map reset":
		return errors.New("there is no device-mapper table to suspend")
	case "map reset stats", "maps reset stats":
		return errors.New("counters run since the start, for those who take differences")
	case "daemon forcequeueing", "daemon restorequeueing":
		return errors.New("use disablequeueing and restorequeueing of maps")
	case "path setmarginal", "path unsetmarginal", "map unsetmarginal":
		return errors.New("marginal paths are found by measurement: see the configuration")
	case "getprstatus map", "map setprstatus", "map unsetprstatus", "getprkey map", "key map setprkey", "map unsetprkey", "getprhold map", "map setprhold", "map unsetprhold":
		return errors.New("persistent reservations are not handled")
	}
	return errUnknown
}

const usage = `CLI commands reference:
 list|show paths
 list|show paths format $format
 list|show paths raw format $format
 list|show path $path
 list|show maps|multipaths
 list|show status
 list|show daemon
 list|show maps|multipaths status
 list|show maps|multipaths stats
 list|show maps|multipaths format $format
 list|show maps|multipaths raw format $format
 list|show maps|multipaths topology
 list|show topology
 list|show maps|multipaths json
 list|show map|multipath $map topology
 list|show map|multipath $map format $format
 list|show map|multipath $map raw format $format
 list|show map|multipath $map json
 list|show config local
 list|show config
 list|show blacklist
 list|show devices
 list|show wildcards
 switch|switchgroup map|multipath $map group $group
 reconfigure
 reconfigure all
 resize map|multipath $map
 reinstate path $path
 fail path $path
 disablequeueing map|multipath $map
 restorequeueing map|multipath $map
 disablequeueing maps|multipaths
 restorequeueing maps|multipaths
 quit|exit
 shutdown
`

func help(text string, unknown bool) string {
	s := Version + "\n" + usage
	if unknown && strings.TrimSpace(text) != "" {
		if len(text) > 256 {
			text = text[:256]
		}
		s = strings.TrimRight(text, "\r\n") + "\n: not found\n" + s
	}
	return s
}

// NoBlacklist is `show blacklist` without a configuration.
const NoBlacklist = "device node rules:\n- blacklist:\n        <empty>\n- exceptions:\n        <empty>\n" +
	"udev property rules:\n- blacklist:\n        <empty>\n- exceptions:\n        <empty>\n" +
	"protocol rules:\n- blacklist:\n        <empty>\n- exceptions:\n        <empty>\n" +
	"wwid rules:\n- blacklist:\n        <empty>\n- exceptions:\n        <empty>\n" +
	"device rules:\n- blacklist:\n        <empty>\n- exceptions:\n        <empty>\n"
