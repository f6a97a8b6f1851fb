package compat

import (
	"fmt"
	"slices"
	"strings"

	"github.com/mpathd/mpathd/paths"
)

// TopologyStyle is how Topology draws.
type TopologyStyle struct {
	Bold  bool // the first line of each map, for terminals
	Brief bool // as `multipath -l`: without asking checkers and priorities
	// Colours marks states, for terminals.
	Colours bool
}

func paint(on bool, code, s string) string {
	if !on {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

// Topology draws maps, groups and paths as `multipath -ll` does; only shows the
// map or the maps of the path of that name, if it is not empty.
func Topology(v *View, only string, style TopologyStyle) string {
	rows := v.rows()
	var b strings.Builder
	next := 0
	shown := v.Named(only)
	cells := make([][]string, 0, len(rows))
	var width [4]int
	for i := range rows {
		r := &rows[i]
		if r.orphan != "" {
			break
		}
		c := []string{r.hcil(), r.dev(), r.number(), r.dmState(), r.checkState(), r.deviceState()}
		if style.Brief {
			c[4] = "undef"
		}
		cells = append(cells, c)
		for k := range 3 {
			width[k] = max(width[k], len(c[k]))
		}
		width[3] = max(width[3], len(c[4]))
	}
	for i := range v.Maps {
		m := &v.Maps[i]
		first := next
		for j := range m.Groups {
			next += len(m.Groups[j].Paths)
		}
		if !slices.Contains(shown, m) {
			continue
		}
		name := m.Alias
		if m.Alias != m.WWID {
			name += " (" + m.WWID + ")"
		}
		b.WriteString(paint(style.Bold, "1", fmt.Sprintf("%s %s %s", name, sysfs(m), product(m))) + "\n")
		fmt.Fprintf(&b, "size=%s features='%s' hwhandler='%s' wp=%s\n", Size(m.Size), features(m), handler(m), protection(m))
		at := first
		for j := range m.Groups {
			g := &m.Groups[j]
			lead, bar := "|-+- ", "| "
			if j == len(m.Groups)-1 {
				lead, bar = "`-+- ", "  "
			}
			prio := g.Prio
			if style.Brief {
				prio = 0
			}
			fmt.Fprintf(&b, "%spolicy='%s' prio=%d status=%s\n", lead, g.Selector, prio, paint(style.Colours && g.State == "active", "32", g.State))
			for k := range g.Paths {
				glyph := "|- "
				if k == len(g.Paths)-1 {
					glyph = "`- "
				}
				c := cells[at]
				colour := "32"
				switch {
				case c[3] != "active":
					colour = "31"
				case c[4] != "ready" || g.Paths[k].State != "up":
					colour = "33"
				}
				fmt.Fprintf(&b, "%s%s%-*s %-*s %-*s %s %s\n", bar, glyph, width[0], c[0], width[1], c[1], width[2], c[2],
					paint(style.Colours && !style.Brief, colour, fmt.Sprintf("%-6s %-*s", c[3], width[3], c[4])), c[5])
				at++
			}
		}
	}
	return b.String()
}

// names tells whether a word means the map: its alias, WWID or device, or the
// alias where we and the peer have a link of that name.
func names(m *paths.MapStatus, word string) bool {
	for _, dir := range []string{"/dev/mpath/", "/dev/mapper/"} {
		word = strings.TrimPrefix(word, dir)
	}
	return word == m.Alias || word == m.WWID || m.NBD.Device != "" && (word == m.NBD.Device || "/dev/"+word == m.NBD.Device)
}

// is tells whether a word means the path.
func (r *row) is(word string) bool {
	return r.orphan == "" && (word == r.p.Name || word == r.p.URL || strings.TrimPrefix(word, "/dev/") == r.dev() || word == r.number())
}

// Named are the maps that a word means, also by one of their paths; all if it is
// empty.
func (v *View) Named(word string) (out []*paths.MapStatus) {
	rows := v.rows()
	for i := range v.Maps {
		m := &v.Maps[i]
		n := count(m)
		if word == "" || names(m, word) || slices.ContainsFunc(rows[:n], func(r row) bool { return r.is(word) }) {
			out = append(out, m)
		}
		rows = rows[n:]
	}
	return out
}

// find is a map by name.
func (v *View) find(word string) *paths.MapStatus {
	for i := range v.Maps {
		if names(&v.Maps[i], word) {
			return &v.Maps[i]
		}
	}
	return nil
}

// Match is the path that a word means, by name, URL or device.
func (v *View) Match(word string) (name string, ok bool) {
	rows := v.rows()
	for i := range rows {
		if rows[i].is(word) {
			return rows[i].p.Name, true
		}
	}
	return "", false
}

// PathOfMap tells whether a word means a path of a map.
func (v *View) PathOfMap(word string) bool {
	_, ok := v.Match(word)
	return ok
}

// Usable tells whether a word means a map with a usable path.
func (v *View) Usable(word string) bool {
	m := v.find(word)
	return m != nil && m.Paths.Usable > 0
}
