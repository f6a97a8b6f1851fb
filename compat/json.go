package compat

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/mpathd/mpathd/paths"
)

// The peer's JSON, in its order and with its blanks: some read it with grep.

func quote(s string) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.Encode(s)
	return strings.TrimSuffix(b.String(), "\n")
}

const jsonHead = "{\n   \"major_version\": 0,\n   \"minor_version\": 1,\n"

func jsonMaps(v *View) string {
	rows := v.rows()
	var list []string
	for i := range v.Maps {
		n := count(&v.Maps[i])
		list = append(list, jsonMap(&v.Maps[i], rows[:n]))
		rows = rows[n:]
	}
	return jsonHead + "   \"maps\": [" + strings.Join(list, ",") + "]\n}\n"
}

func jsonOne(v *View, m *paths.MapStatus) string {
	rows := v.rows()
	for i := range v.Maps {
		n := count(&v.Maps[i])
		if &v.Maps[i] == m {
			return jsonHead + "   \"map\":" + jsonMap(m, rows[:n]) + "\n}\n"
		}
		rows = rows[n:]
	}
	return ""
}

// count is the number of paths of a map.
func count(m *paths.MapStatus) (n int) {
	for _, g := range m.Groups {
		n += len(g.Paths)
	}
	return n
}

func jsonMap(m *paths.MapStatus, rows []row) string {
	var b strings.Builder
	b.WriteString("{\n")
	text := func(indent, name, v string) { fmt.Fprintf(&b, "%s%s : %s,\n", indent, quote(name), quote(v)) }
	number := func(indent, name string, v any) { fmt.Fprintf(&b, "%s%s : %v,\n", indent, quote(name), v) }
	in := "      "
	text(in, "name", m.Alias)
	text(in, "uuid", m.WWID)
	text(in, "sysfs", sysfs(m))
	text(in, "failback", failback(m))
	text(in, "queueing", queueing(m))
	number(in, "paths", m.Paths.Usable)
	text(in, "write_prot", protection(m))
	text(in, "dm_st", "active")
	text(in, "features", features(m))
	text(in, "hwhandler", handler(m))
	text(in, "action", "")
	number(in, "path_faults", faults(m))
	text(in, "vend", m.Vendor)
	text(in, "prod", m.Product)
	text(in, "rev", m.Revision)
	number(in, "switch_grp", m.Totals.GroupSwitches)
	number(in, "map_loads", 1)
	number(in, "total_q_time", m.Totals.NoPathMS/1000)
	number(in, "q_timeouts", m.Totals.QueueTimeouts)
	b.WriteString(in + `"path_groups": [`)
	at := 0
	for i, g := range m.Groups {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString("{\n")
		in := "         "
		text(in, "selector", g.Selector)
		number(in, "pri", g.Prio)
		text(in, "dm_st", g.State)
		text(in, "marginal_st", groupMarginal(&g))
		number(in, "group", i+1)
		b.WriteString(in + `"paths": [`)
		for k := range g.Paths {
			if k > 0 {
				b.WriteByte(',')
			}
			b.WriteString("{\n")
			in, r := "            ", &rows[at]
			at++
			text(in, "dev", r.dev())
			text(in, "dev_t", r.number())
			text(in, "dm_st", r.dmState())
			text(in, "dev_st", r.deviceState())
			text(in, "chk_st", r.checkState())
			text(in, "checker", r.p.Checker)
			number(in, "pri", r.p.Prio)
			text(in, "host_wwnn", undefined)
			text(in, "target_wwnn", r.p.Target)
			text(in, "host_wwpn", undefined)
			text(in, "target_wwpn", undefined)
			text(in, "host_adapter", undefined)
			text(in, "lun_hex", r.p.LUNHex)
			fmt.Fprintf(&b, "%s\"marginal_st\" : %s\n         }", in, quote(r.marginal()))
		}
		b.WriteString("]\n      }")
	}
	b.WriteString("]\n   }")
	return b.String()
}
