package compat

import (
	"fmt"
	"path"
	"strings"

	"github.com/mpathd/mpathd/paths"
)

// View is the state that is shown.
type View struct {
	Maps    []paths.MapStatus
	Pending []Pending
}

// Pending is a PATH-URL that is in no map yet, or a portal in words.
type Pending struct{ URL, Cause string }

const undefined = "[undef]" // as the peer prints what it does not know

// row is one path with where it is.
type row struct {
	m      *paths.MapStatus
	p      *paths.PathStatus
	n      int    // counted over all maps
	portal int    // counted over the portals of all paths
	target int    // likewise
	orphan string // a pending URL instead
}

// rows are the paths of all maps, and the pending URLs as the peer's orphans.
func (v *View) rows() (out []row) {
	portals, targets := map[string]int{}, map[string]int{}
	number := func(seen map[string]int, name string) int {
		if _, ok := seen[name]; !ok {
			seen[name] = len(seen)
		}
		return seen[name]
	}
	for i := range v.Maps {
		m := &v.Maps[i]
		for j := range m.Groups {
			for k := range m.Groups[j].Paths {
				p := &m.Groups[j].Paths[k]
				out = append(out, row{m: m, p: p, n: len(out), portal: number(portals, p.Portal), target: number(targets, p.Target)})
			}
		}
	}
	for _, p := range v.Pending {
		if !strings.Contains(p.URL, "://") { // a portal that is asked for targets is no path
			continue
		}
		out = append(out, row{orphan: p.URL, n: len(out)})
	}
	return out
}

// hcil is the place of the kernel's device, or one made up of the numbers of
// portal, target and LUN in this answer: those who parse the peer's output look
// for four numbers.
func (r *row) hcil() string {
	switch {
	case r.orphan != "":
		return "#:#:#:#"
	case r.p.Place != "":
		return r.p.Place
	}
	return fmt.Sprintf("%d:0:%d:%d", r.portal, r.target, r.p.LUN)
}

// dev is what the path is called in commands.
func (r *row) dev() string {
	switch {
	case r.orphan != "":
		return r.orphan
	case strings.HasPrefix(r.p.Name, "/dev/"):
		return path.Base(r.p.Name)
	}
	return r.p.Name
}

// number is major:minor; without a device the major is 0, which no device has.
func (r *row) number() string {
	switch {
	case r.orphan != "":
		return "#:#"
	case r.p.Number != "":
		return r.p.Number
	}
	return fmt.Sprintf("0:%d", r.n)
}

func (r *row) dmState() string {
	switch {
	case r.orphan != "":
		return "undef"
	case r.p.State == "down" || r.p.State == "delayed":
		return "failed"
	}
	return "active"
}

func (r *row) deviceState() string {
	switch {
	case r.orphan != "":
		return "unknown"
	case r.p.State == "down" && r.p.CheckerState == "down":
		return "offline"
	}
	return "running"
}

// checkState translates the states of checkers, and what the map makes of them.
func (r *row) checkState() string {
	if r.orphan != "" {
		return "undef"
	}
	switch r.p.State {
	case "ghost", "shaky", "delayed":
		return r.p.State
	}
	switch r.p.CheckerState {
	case "up":
		return "ready"
	case "down":
		return "faulty"
	case "pending":
		return "i/o pending"
	case "timeout":
		return "i/o timeout"
	case "ghost", "shaky", "delayed", "disconnected":
		return r.p.CheckerState
	}
	return "undef"
}

func (r *row) nextCheck() string {
	switch {
	case r.orphan != "":
		return "orphan"
	case r.p.CheckEveryMS <= 0 || r.p.State == "down":
		return strings.Repeat(".", 10) + " 0/0"
	}
	every := r.p.CheckEveryMS
	passed := max(0, min(every, every-r.p.NextCheckMS))
	x := int(10 * passed / every)
	return fmt.Sprintf("%s%s %d/%d", strings.Repeat("X", x), strings.Repeat(".", 10-x), passed/1000, every/1000)
}

func (r *row) marginal() string {
	if r.p != nil && (r.p.State == "delayed" || r.p.State == "shaky") {
		return "marginal"
	}
	return "normal"
}

func (r *row) protocol() string {
	if r.p != nil && strings.HasPrefix(r.p.URL, "file:") {
		return "scsi:unspec"
	}
	return "scsi:iscsi"
}

// column is one wildcard.
type column[T any] struct {
	letter byte
	header string
	value  func(T) string
}

func product(m *paths.MapStatus) string { return m.Vendor + "," + m.Product }

// ofPath runs f for paths that are in a map, else it gives instead.
func ofPath(instead string, f func(*row) string) func(*row) string {
	return func(r *row) string {
		if r.orphan != "" {
			return instead
		}
		return f(r)
	}
}

func fixed[T any](s string) func(T) string { return func(T) string { return s } }

var pathColumns = []column[*row]{
	{'w', "uuid", ofPath("", func(r *row) string { return r.m.WWID })},
	{'i', "hcil", (*row).hcil}, {'d', "dev", (*row).dev}, {'D', "dev_t", (*row).number},
	{'t', "dm_st", (*row).dmState}, {'o', "dev_st", (*row).deviceState}, {'T', "chk_st", (*row).checkState},
	{'s', "vend/prod/rev", ofPath("##,##", func(r *row) string { return product(r.m) })},
	{'c', "checker", ofPath("undef", func(r *row) string { return r.p.Checker })}, {'C', "next_check", (*row).nextCheck},
	{'p', "pri", ofPath("-1", func(r *row) string { return fmt.Sprint(r.p.Prio) })},
	{'S', "size", ofPath("0", func(r *row) string { return Size(r.m.Size) })},
	{'z', "serial", ofPath("", func(r *row) string { return r.p.Serial })}, {'M', "marginal_st", (*row).marginal},
	{'m', "multipath", ofPath("[orphan]", func(r *row) string { return r.m.Alias })},
	{'N', "host WWNN", fixed[*row](undefined)}, {'n', "target WWNN", ofPath(undefined, func(r *row) string { return r.p.Target })},
	{'R', "host WWPN", fixed[*row](undefined)}, {'r', "target WWPN", fixed[*row](undefined)}, {'a', "host adapter", fixed[*row](undefined)},
	{'G', "foreign", fixed[*row]("--")}, {'g', "vpd page data", fixed[*row](undefined)},
	{'0', "failures", ofPath("0", func(r *row) string { return fmt.Sprint(r.p.Failures) })}, {'P', "protocol", (*row).protocol},
	{'I', "init_st", ofPath("new", fixed[*row]("ok"))}, {'L', "LUN hex", ofPath("0x0000000000000000", func(r *row) string { return r.p.LUNHex })},
	{'A', "TPG", ofPath("-", func(r *row) string {
		if r.p.PortGroup < 0 {
			return "-"
		}
		return fmt.Sprint(r.p.PortGroup)
	})},
	{'k', "max_sectors_kb", ofPath("0", func(r *row) string { return fmt.Sprint(r.m.MaxIO >> 10) })},
}

// groupColumns are those of path groups; the peer has no command that takes them,
// and lists them all the same.
var groupColumns = []column[*paths.GroupStatus]{
	{'s', "selector", func(g *paths.GroupStatus) string { return g.Selector }}, {'p', "pri", func(g *paths.GroupStatus) string { return fmt.Sprint(g.Prio) }},
	{'t', "dm_st", func(g *paths.GroupStatus) string { return g.State }}, {'M', "marginal_st", groupMarginal},
}

func groupMarginal(g *paths.GroupStatus) string {
	if g.Marginal {
		return "marginal"
	}
	return "normal"
}

// sysfs is the name of the block device, or "-".
func sysfs(m *paths.MapStatus) string {
	if m.NBD.Device == "" {
		return "-"
	}
	return path.Base(m.NBD.Device)
}

func features(m *paths.MapStatus) string {
	if m.Queueing {
		return "1 queue_if_no_path"
	}
	return "0"
}

// handler names what the kernel's handler would do: we do it ourselves.
func handler(m *paths.MapStatus) string {
	for _, g := range m.Groups {
		for _, p := range g.Paths {
			if p.Access != "" {
				return "1 alua"
			}
		}
	}
	return "0"
}

func protection(m *paths.MapStatus) string {
	if m.ReadOnly {
		return "ro"
	}
	return "rw"
}

func failback(m *paths.MapStatus) string {
	if m.Failback == paths.Manual {
		return "-"
	}
	return m.Failback
}

func queueing(m *paths.MapStatus) string {
	switch {
	case !m.Queueing:
		return "off"
	case m.GiveUpMS > 0:
		return fmt.Sprintf("%d sec", (m.GiveUpMS+999)/1000)
	case m.Retry == "queue" || m.Retry == "fail": // the operator's word, if fail
		return "on"
	}
	return m.Retry + " chk"
}

func faults(m *paths.MapStatus) (n int64) {
	for _, g := range m.Groups {
		for _, p := range g.Paths {
			n += p.Failures
		}
	}
	return n
}

type mapStatus = *paths.MapStatus

var mapColumns = []column[mapStatus]{
	{'n', "name", func(m mapStatus) string { return m.Alias }}, {'w', "uuid", func(m mapStatus) string { return m.WWID }}, {'d', "sysfs", sysfs},
	{'F', "failback", failback}, {'Q', "queueing", queueing}, {'N', "paths", func(m mapStatus) string { return fmt.Sprint(m.Paths.Usable) }},
	{'r', "write_prot", protection}, {'t', "dm-st", fixed[mapStatus]("active")}, {'S', "size", func(m mapStatus) string { return Size(m.Size) }},
	{'f', "features", features}, {'x', "failures", func(m mapStatus) string { return fmt.Sprint(m.Totals.QueueTimeouts) }}, {'h', "hwhandler", handler},
	{'A', "action", fixed[mapStatus]("")}, {'0', "path_faults", func(m mapStatus) string { return fmt.Sprint(faults(m)) }},
	{'1', "switch_grp", func(m mapStatus) string { return fmt.Sprint(m.Totals.GroupSwitches) }}, {'2', "map_loads", fixed[mapStatus]("1")},
	{'3', "total_q_time", func(m mapStatus) string { return fmt.Sprint(m.Totals.NoPathMS / 1000) }},
	{'4', "q_timeouts", func(m mapStatus) string { return fmt.Sprint(m.Totals.QueueTimeouts) }},
	{'s', "vend/prod/rev", product}, {'v', "vend", func(m mapStatus) string { return m.Vendor }}, {'p', "prod", func(m mapStatus) string { return m.Product }},
	{'e', "rev", func(m mapStatus) string { return m.Revision }}, {'G', "foreign", fixed[mapStatus]("--")}, {'g', "vpd page data", fixed[mapStatus](undefined)},
	{'k', "max_sectors_kb", func(m mapStatus) string { return fmt.Sprint(m.MaxIO >> 10) }},
}

// Style is how rows are printed.
type style struct{ header, pad bool }

// table prints rows by a format: a header, then each value padded to the widest
// of its column. Unknown wildcards are dropped.
func table[T any](columns []column[T], format string, rows []T, s style) string {
	type part struct {
		literal string
		c       *column[T]
		width   int
		cells   []string
	}
	var parts []part
	for len(format) > 0 {
		i := strings.IndexByte(format, '%')
		if i < 0 || i == len(format)-1 {
			parts = append(parts, part{literal: format})
			break
		}
		p := part{literal: format[:i]}
		for k := range columns {
			if columns[k].letter == format[i+1] {
				p.c = &columns[k]
			}
		}
		parts = append(parts, p)
		format = format[i+2:]
	}
	for i := range parts {
		p := &parts[i]
		if p.c == nil {
			continue
		}
		if s.pad {
			p.width = len(p.c.header)
		}
		for _, r := range rows {
			v := p.c.value(r)
			p.cells = append(p.cells, v)
			if s.pad {
				p.width = max(p.width, len(v))
			}
		}
	}
	var b strings.Builder
	line := func(cell func(*part) string) {
		for i := range parts {
			p := &parts[i]
			b.WriteString(p.literal)
			if p.c != nil {
				v := cell(p)
				b.WriteString(v)
				for range p.width - len(v) {
					b.WriteByte(' ')
				}
			}
		}
		b.WriteByte('\n')
	}
	if s.header {
		line(func(p *part) string { return p.c.header })
	}
	for i := range rows {
		line(func(p *part) string { return p.cells[i] })
	}
	return b.String()
}

// Size prints bytes as the peer does: one decimal below 10, else none.
func Size(n int64) string {
	v, unit := float64(n)/1024, 0
	for v >= 1024 && unit < 4 {
		v /= 1024
		unit++
	}
	if v < 10 {
		return fmt.Sprintf("%.1f%c", v, "KMGTP"[unit])
	}
	return fmt.Sprintf("%.0f%c", v, "KMGTP"[unit])
}
