package paths

import (
	"maps"
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/checker"
	"github.com/mpathd/mpathd/scsi"
)

// MapStatus is one map of `show maps --json`.
type MapStatus struct {
	Alias     string        `json:"alias"`
	WWID      string        `json:"wwid"`
	Vendor    string        `json:"vendor"`
	Product   string        `json:"product"`
	Size      int64         `json:"size"`
	BlockSize int           `json:"block_size"`
	ReadOnly  bool          `json:"read_only"`
	State     string        `json:"state"`
	Queueing  bool          `json:"queueing"`
	Queued    int64         `json:"queued"`
	NBD       NBDStatus     `json:"nbd"`
	Paths     PathCounts    `json:"paths"`
	Groups    []GroupStatus `json:"groups"`
	Safety    Safety        `json:"write_safety"`
	Totals    Totals        `json:"totals"`
}

// Totals are counters of a map since start.
type Totals struct {
	Failed        int64        `json:"failed"` // requests answered with an error
	GroupSwitches int64        `json:"group_switches"`
	Retried       Distribution `json:"-"` // requests that needed another path
}

// Distribution is a histogram in seconds: Buckets are cumulative counts by
// upper edge.
type Distribution struct {
	Count   uint64
	Sum     float64
	Buckets map[float64]uint64
}

// Safety is what the map does about writes that may still execute behind dead
// paths; docs/write-safety.md explains it.
type Safety struct {
	Mode          string           `json:"ghost_protection"`
	WriteThrough  bool             `json:"write_through"`
	Unfenced      []UnfencedStatus `json:"unfenced"`
	Held          int              `json:"held"`  // requests that wait for a fence now
	Holds         int64            `json:"holds"` // since start
	LongestHoldMS int64            `json:"longest_hold_ms"`
	Fences        map[string]int64 `json:"fences"` // proven, unproven, timed, command
}

// UnfencedStatus is one old session that may still write.
type UnfencedStatus struct {
	Path   string `json:"path"`
	ForMS  int64  `json:"for_ms"`
	Writes int    `json:"writes"`
	Blocks uint64 `json:"blocks"`
	Whole  bool   `json:"whole_device"`
}

func (l *ledger) status(c *Config) Safety {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := Safety{Mode: c.Protection, Unfenced: []UnfencedStatus{}, Held: len(l.held), Holds: l.holds, LongestHoldMS: l.longest.Milliseconds(), Fences: maps.Clone(l.fences)}
	for _, e := range l.epochs {
		s.Unfenced = append(s.Unfenced, UnfencedStatus{e.name, time.Since(e.since).Milliseconds(), len(e.extents), e.blocksAtRisk(), e.whole})
	}
	if s.Fences == nil {
		s.Fences = map[string]int64{}
	}
	return s
}

// NBDStatus is how the map is exported; the daemon fills it in.
type NBDStatus struct {
	Export      string `json:"export"`
	Device      string `json:"device"`
	Connections int    `json:"connections"`
}

// PathCounts tells all paths, those that could serve, and those that do.
type PathCounts struct {
	Total  int `json:"total"`
	Usable int `json:"usable"`
	Active int `json:"active"`
}

// GroupStatus is one path group.
type GroupStatus struct {
	Selector string       `json:"selector"`
	Prio     int          `json:"prio"`
	State    string       `json:"state"`
	Paths    []PathStatus `json:"paths"`
}

// PathStatus is one path.
type PathStatus struct {
	Name         string       `json:"name"`
	URL          string       `json:"url"`
	Trust        Trust        `json:"fence_test"` // reinstates, untrusted, or empty when not tested
	Portal       string       `json:"portal"`
	Target       string       `json:"target"`
	LUN          uint64       `json:"lun"`
	State        string       `json:"state"`
	Serving      bool         `json:"serving"`
	Checker      string       `json:"checker"`
	CheckerState string       `json:"checker_state"`
	Access       string       `json:"access,omitempty"` // asymmetric access state
	Prio         int          `json:"prio"`
	InFlight     int64        `json:"inflight"`
	IOs          int64        `json:"ios"`
	Errors       int64        `json:"errors"`
	Failures     int64        `json:"failures"`
	ReadBytes    int64        `json:"read_bytes"`
	WrittenBytes int64        `json:"written_bytes"`
	Times        Distribution `json:"-"`
	Latency      Latency      `json:"latency_us"`
	LastError    string       `json:"last_error"`
}

// Latency are percentiles in microseconds since start.
type Latency struct {
	P50 int64 `json:"p50"`
	P99 int64 `json:"p99"`
}

// Snapshot is the map as it stands.
func (g *Group) Snapshot() MapStatus {
	g.mu.Lock()
	defer g.mu.Unlock()
	t := g.table.Load()
	serving := map[*Path]bool{}
	for _, p := range t.paths {
		serving[p] = true
	}
	m := MapStatus{Alias: g.cfg().Alias, WWID: g.lu().WWID, Vendor: g.lu().Vendor, Product: g.lu().Product, Size: g.Geometry().Size,
		BlockSize: g.Geometry().BlockSize, ReadOnly: g.Geometry().ReadOnly, Queueing: g.queueing(), Queued: g.waiting.Load(), Groups: []GroupStatus{}}
	m.Safety = g.ledger.status(&g.cfg().Config)
	m.Safety.WriteThrough = g.through.Load()
	m.Totals = Totals{g.failedUp.Load(), g.groupSwitches, g.retried.distribution()}
	m.Paths.Total, m.Paths.Active = len(g.paths), len(t.paths)
	for _, pg := range g.grouping((*Path).usable) {
		gs := GroupStatus{Selector: g.cfg().selector.Name(), Prio: pg.prio, State: "disabled"}
		for _, p := range pg.paths {
			st := PathStatus{Name: p.Name, URL: p.URL, Portal: p.Portal, Target: p.Target, LUN: p.LUNNumber, State: "down", Serving: serving[p],
				Checker: g.cfg().checker.Name(), CheckerState: string(p.checkState), Prio: p.prio, InFlight: p.load.InFlight.Load(), IOs: p.ios.Load(),
				Errors: p.errors.Load(), Failures: p.failures.Load(), LastError: p.lastError, Trust: p.trust,
				ReadBytes: p.read.Load(), WrittenBytes: p.written.Load(), Times: p.latency.distribution()}
			st.Latency.P50, st.Latency.P99 = p.latency.percentile(50), p.latency.percentile(99)
			if p.access != accessUnknown {
				st.Access = scsi.AccessStateText(uint8(p.access))
			}
			if p.usable() {
				m.Paths.Usable++
				switch {
				case p.suspect:
					st.State = "suspect"
				case p.delayed:
					st.State = "delayed"
				case p.checkState == checker.Ghost:
					st.State = "ghost"
				default:
					st.State = "up"
				}
			}
			gs.Paths = append(gs.Paths, st)
			if st.Serving {
				gs.State = "active"
			} else if p.usable() && gs.State == "disabled" {
				gs.State = "enabled"
			}
		}
		m.Groups = append(m.Groups, gs)
	}
	switch {
	case m.Paths.Usable == 0 && !m.Queueing:
		m.State = "failed"
	case m.Paths.Usable == 0:
		m.State = "no_path"
	case m.Paths.Usable < m.Paths.Total:
		m.State = "degraded"
	default:
		m.State = "ok"
	}
	return m
}

// histogram counts latencies in buckets of a quarter of a power of two.
type histogram struct {
	n   [160]atomic.Uint32
	sum atomic.Int64 // ns
}

// distribution gives one bucket per power of four from 16 us to 67 s.
func (h *histogram) distribution() Distribution {
	d := Distribution{Buckets: map[float64]uint64{}}
	edge := 4 // exponent of two, in us
	for i := range h.n {
		if i/4 == edge && edge <= 26 {
			d.Buckets[float64(uint64(1)<<edge)/1e6] = d.Count
			edge += 2
		}
		d.Count += uint64(h.n[i].Load())
	}
	d.Sum = float64(h.sum.Load()) / 1e9
	return d
}

func (h *histogram) add(ns int64) {
	us := uint64(max(ns/1000, 1))
	e := bits.Len64(us) - 1
	i := 4 * e
	if e >= 2 {
		i += int(us >> (e - 2) & 3)
	}
	h.n[min(i, len(h.n)-1)].Add(1)
	h.sum.Add(ns)
}

// percentile is the upper edge of the bucket that holds it, microseconds.
func (h *histogram) percentile(p uint64) int64 {
	var sum, at uint64
	for i := range h.n {
		sum += uint64(h.n[i].Load())
	}
	if sum == 0 {
		return 0
	}
	for i := range h.n {
		if at += uint64(h.n[i].Load()); at*100 >= sum*p {
			return int64(1) << (i / 4) * int64(5+i%4) / 4
		}
	}
	return 0
}
