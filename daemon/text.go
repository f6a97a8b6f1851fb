package daemon

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"text/tabwriter"
	"time"

	"github.com/mpathd/mpathd/compat"
	"github.com/mpathd/mpathd/paths"
)

// Text is a way to print Maps for people: the daemon does it where it can, which
// spares the reader of hundreds of maps their JSON.
type Text struct {
	// As is maps, paths or topology (of `mpathd show`), or multipath: what
	// `multipath -ll` prints.
	As    string
	Only  string // of multipath: the map, or those with the path, of that name
	Style compat.TopologyStyle
}

// Write prints m.
func (t Text) Write(w io.Writer, m *Maps) error {
	return t.write(w, m, &compat.View{Maps: m.Maps})
}

func (t Text) write(w io.Writer, m *Maps, v *compat.View) error {
	out := bufio.NewWriterSize(w, 64<<10)
	switch t.As {
	case "maps":
		writeMaps(out, m)
	case "paths":
		writePaths(out, m)
	case "topology":
		io.WriteString(out, compat.Topology(v, "", t.Style))
		writeContested(out, m)
		writePending(out, m)
	case "multipath":
		io.WriteString(out, compat.Topology(v, t.Only, t.Style))
	default:
		return fmt.Errorf("text %q: want maps, paths, topology or multipath", t.As)
	}
	return out.Flush()
}

// Query is t as the parameters of GET /maps.
func (t Text) Query() url.Values {
	v := url.Values{"as": {t.As}, "only": {t.Only}}
	for name, on := range map[string]bool{"bold": t.Style.Bold, "brief": t.Style.Brief, "colours": t.Style.Colours} {
		if on {
			v.Set(name, "yes")
		}
	}
	return v
}

// serveMaps answers GET /maps: JSON, or text if it is asked for.
func (d *Daemon) serveMaps(w http.ResponseWriter, r *http.Request) {
	yes := func(name string) bool { return r.FormValue(name) == "yes" }
	t := Text{As: r.FormValue("as"), Only: r.FormValue("only"), Style: compat.TopologyStyle{Bold: yes("bold"), Brief: yes("brief"), Colours: yes("colours")}}
	if t.As == "" {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(d.Snapshot())
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	m := d.Snapshot()
	v := legacy{d}.viewOf(&m)
	if err := t.write(w, &m, &v); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
}

func columns(w io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(w, 0, 8, 2, ' ', 0) }

func writeMaps(out io.Writer, m *Maps) {
	w := columns(out)
	fmt.Fprintln(w, "NAME\tSTATE\tSIZE\tPATHS\tACTIVE\tQUEUED\tDEVICE\tWWID")
	for _, x := range m.Maps {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d/%d\t%d\t%d\t%s\t%s\n", x.Alias, x.State, compat.Size(x.Size), x.Paths.Usable, x.Paths.Total, x.Paths.Active, x.Queued, orDash(x.NBD.Device), x.WWID)
	}
	w.Flush()
	writeNotes(out, m)
}

func writePaths(out io.Writer, m *Maps) {
	w := columns(out)
	fmt.Fprintln(w, "PATH\tMAP\tSTATE\tSERVING\tCHECKER\tIOS\tERRORS\tFAILURES\tP50\tP99\tFENCE\tLAST ERROR")
	for _, x := range m.Maps {
		for _, g := range x.Groups {
			for _, p := range g.Paths {
				fmt.Fprintf(w, "%s\t%s\t%s\t%v\t%s\t%d\t%d\t%d\t%dus\t%dus\t%s\t%s\n", p.Name, x.Alias, p.State, p.Serving, p.CheckerState, p.IOs, p.Errors, p.Failures, p.Latency.P50, p.Latency.P99, orDash(string(p.Trust)), trouble(p))
			}
		}
	}
	w.Flush()
	writeNotes(out, m)
}

// trouble is what keeps a path down, or back, in words.
func trouble(p paths.PathStatus) string {
	if p.LastError == "" && p.Gray != "" {
		return "gray: " + p.Gray
	}
	return p.LastError
}

// writeNotes tells what needs attention.
func writeNotes(w io.Writer, m *Maps) {
	for _, x := range m.Maps {
		WriteUnfenced(w, x.Alias, &x.Safety)
	}
	writeContested(w, m)
	writePending(w, m)
}

func writePending(w io.Writer, m *Maps) {
	for _, p := range m.Pending {
		fmt.Fprintf(w, "pending: %s: %s\n", p.URL, p.Cause)
	}
}

// WriteUnfenced is silent while nothing is at risk.
func WriteUnfenced(w io.Writer, alias string, s *paths.Safety) {
	for _, u := range s.Unfenced {
		risk := fmt.Sprintf("%d writes (%d blocks)", u.Writes, u.Blocks)
		if u.Whole {
			risk = "any write of the run before"
		}
		waits := fmt.Sprintf("%d requests wait for its fence", s.Held)
		if u.Hopeless {
			waits = "what overlaps that fails"
		}
		fmt.Fprintf(w, "%s: the old session of path %s may still execute %s, for %v; %s\n", alias, u.Path, risk, time.Duration(u.ForMS)*time.Millisecond, waits)
	}
}

// writeContested is silent while no other initiator seems to end our sessions.
func writeContested(w io.Writer, m *Maps) {
	for _, x := range m.Maps {
		for _, g := range x.Groups {
			for _, p := range g.Paths {
				if p.Contested {
					fmt.Fprintf(w, "%s: path %s is contested: the target ends its sessions soon after each login: does another host or daemon use the same initiator name (see show status)?\n", x.Alias, p.Name)
				}
			}
		}
	}
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
