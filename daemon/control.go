package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/mpathd/mpathd/paths"
)

// Maps is the answer to GET /maps.
type Maps struct {
	Version int               `json:"version"`
	Maps    []paths.MapStatus `json:"maps"`
	Pending []Pending         `json:"pending"`
}

// Pending is a URL whose unit could not be identified yet.
type Pending struct {
	URL   string `json:"url"`
	Cause string `json:"cause"`
}

// Status is the answer to GET /status.
type Status struct {
	Version       int    `json:"version"`
	PID           int    `json:"pid"`
	Initiator     string `json:"initiator"`
	NBD           string `json:"nbd"`
	UptimeSeconds int64  `json:"uptime_seconds"`
	Maps          int    `json:"maps"`
	Pending       int    `json:"pending"`

	Safety map[string]paths.Safety `json:"write_safety"` // by map
}

// Snapshot is the state of all maps.
func (d *Daemon) Snapshot() Maps {
	d.mu.Lock()
	maps := append([]*mapEntry(nil), d.maps...)
	out := Maps{Version: 1, Maps: []paths.MapStatus{}, Pending: []Pending{}}
	for u, why := range d.pending {
		out.Pending = append(out.Pending, Pending{u, why})
	}
	devices := map[*mapEntry]string{}
	for _, m := range maps {
		devices[m] = m.kernel.Path
	}
	d.mu.Unlock()
	sort.Slice(out.Pending, func(i, j int) bool { return out.Pending[i].URL < out.Pending[j].URL })
	for _, m := range maps {
		st := m.group.Snapshot()
		st.NBD = paths.NBDStatus{Export: m.alias, Device: devices[m], Connections: d.server.Connections(m.alias)}
		out.Maps = append(out.Maps, st)
	}
	return out
}

// Hangs tells of which maps requests are held up by the daemon itself, not by
// their paths; see nbd.Server.Hangs. It takes the locks of all maps and their
// paths, too: a deadlock holds it up for ever.
func (d *Daemon) Hangs() []string {
	d.Snapshot()
	return d.server.Hangs()
}

func (d *Daemon) handler() http.Handler {
	mux := http.NewServeMux()
	show := func(f func() any) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			json.NewEncoder(w).Encode(f())
		}
	}
	act := func(f func(r *http.Request) error) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if err := f(r); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
			}
		}
	}
	mux.HandleFunc("GET /maps", d.serveMaps)
	mux.HandleFunc("GET /status", show(func() any {
		s := d.Snapshot()
		safety := map[string]paths.Safety{}
		for _, m := range s.Maps {
			safety[m.Alias] = m.Safety
		}
		return Status{1, os.Getpid(), d.o.InitiatorName, d.o.NBD, int64(time.Since(d.begun).Seconds()), len(s.Maps), len(s.Pending), safety}
	}))
	mux.HandleFunc("GET /config", show(func() any {
		if d.o.ShowConfig == nil {
			return map[string]any{}
		}
		return d.o.ShowConfig()
	}))
	mux.HandleFunc("POST /compat", d.serveCompat)
	mux.HandleFunc("POST /fail", act(func(r *http.Request) error { return d.FailPath(r.FormValue("path")) }))
	mux.HandleFunc("POST /reinstate", act(func(r *http.Request) error { return d.ReinstatePath(r.FormValue("path")) }))
	mux.HandleFunc("POST /fence", act(func(r *http.Request) error {
		d.mu.Lock()
		maps := append([]*mapEntry(nil), d.maps...)
		d.mu.Unlock()
		name := r.FormValue("path")
		for _, m := range maps {
			for _, u := range m.group.Snapshot().Safety.Unfenced {
				if u.Path == name {
					return m.group.DeclareFenced(name)
				}
			}
		}
		return fmt.Errorf("no unfenced session of path %q: `mpathd show maps` lists them", name)
	}))
	mux.HandleFunc("POST /switch", act(func(r *http.Request) error {
		n, err := strconv.Atoi(r.FormValue("group"))
		if err != nil {
			return fmt.Errorf("group %q: want its number in `mpathd show topology`, counted from 1, or 0 for the policy's choice", r.FormValue("group"))
		}
		m, err := d.find(r.FormValue("map"))
		if err != nil {
			return err
		}
		return m.group.Switch(n)
	}))
	mux.HandleFunc("POST /resize", func(w http.ResponseWriter, r *http.Request) {
		err := d.Resize(r.FormValue("map"), r.FormValue("force") == "yes")
		switch {
		case errors.Is(err, paths.ErrSameSize): // it grew by itself, perhaps: no failure
			fmt.Fprintln(w, err)
		case err != nil:
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
	})
	mux.HandleFunc("POST /reconfigure", act(func(*http.Request) error { return d.Reconfigure() }))
	mux.HandleFunc("POST /detach", act(func(r *http.Request) error {
		return d.Detach(r.FormValue("map"), r.FormValue("force") == "yes")
	}))
	mux.HandleFunc("POST /handover", act(d.serveHandover))
	mux.HandleFunc("GET /events", d.events.serve)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index) // of runtime/pprof: heap, goroutine, ...
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("POST /queue", act(func(r *http.Request) error {
		m, err := d.find(r.FormValue("map"))
		if err != nil {
			return err
		}
		m.group.SetQueueing(r.FormValue("on") == "on")
		return nil
	}))
	return mux
}

// find is a map by alias, WWID or device.
func (d *Daemon) find(name string) (*mapEntry, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.maps {
		info := m.group.Info()
		if name != "" && (m.alias == name || info.WWID == name || m.kernel.Path == name || slices.Contains(info.Synonyms, name)) {
			return m, nil
		}
	}
	return nil, fmt.Errorf("no map %q: `mpathd show maps` lists them", name)
}

// FailPath takes the path of that name or URL out of service, ReinstatePath
// lets it serve again.
func (d *Daemon) FailPath(name string) error { return d.onPath(name, (*paths.Group).FailPath) }
func (d *Daemon) ReinstatePath(name string) error {
	return d.onPath(name, (*paths.Group).ReinstatePath)
}

// onPath finds a path by name or URL in any map.
func (d *Daemon) onPath(name string, f func(*paths.Group, string) error) error {
	if name == "" {
		return errors.New("which path? name one as `mpathd show paths` prints it")
	}
	d.mu.Lock()
	maps := append([]*mapEntry(nil), d.maps...)
	d.mu.Unlock()
	for _, m := range maps {
		for _, g := range m.group.Snapshot().Groups {
			for _, p := range g.Paths {
				if p.Name == name || p.URL == name {
					return f(m.group, p.Name)
				}
			}
		}
	}
	return fmt.Errorf("no path %q: `mpathd show paths` lists them", strings.TrimSpace(name))
}
