package paths

import (
	"fmt"
	"maps"
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/mpathd/mpathd/checker"
	"github.com/mpathd/mpathd/scsi"
)

// MapStatus is one map of `show maps --json`, whose fields are added to and never
// changed. Sizes are bytes, times what their names end with.
type MapStatus struct {
	Alias     string        `json:"alias"`
	WWID      string        `json:"wwid"`
	Vendor    string        `json:"vendor"`
	Product   string        `json:"product"`
	Revision  string        `json:"revision"`
	Size      int64         `json:"size"`
	BlockSize int           `json:"block_size"`
	ReadOnly  bool          `json:"read_only"`
	State     string        `json:"state"`         // ok, degraded (a path is out), no_path (requests wait) or failed (they fail)
	Queueing  bool          `json:"queueing"`      // whether requests wait when no path is left
	Queued    int64         `json:"queued"`        // requests that wait for a path now
	Failback  string        `json:"failback"`      // immediate, manual, followover or seconds
	Retry     string        `json:"no_path_retry"` // queue, fail or a number of checks
	GiveUpMS  int64         `json:"give_up_ms"`    // without a path: until queued I/O fails; 0: never, or it is not queued
	MaxIO     int64         `json:"max_io"`        // bytes of a command
	NBD       NBDStatus     `json:"nbd"`
	Paths     PathCounts    `json:"paths"`
	Groups    []GroupStatus `json:"groups"`
	Safety    Safety        `json:"write_safety"`
	Totals    Totals        `json:"totals"`
}

// Totals are counters of a map since start.
type Totals struct {
	Failed        int64               `json:"failed"` // requests answered with an error
	GroupSwitches int64               `json:"group_switches"`
	NoPathMS      int64               `json:"no_path_ms"`       // time without a usable path
	QueueTimeouts int64               `json:"queue_timeouts"`   // times that no_path_retry was used up
	Hedged        int64               `json:"hedged_reads"`     // issued on a second path too
	HedgesWon     int64               `json:"hedged_reads_won"` // of those, the second was first
	Requests      map[string]Requests `json:"requests"`         // by operation
	InFlight      int64               `json:"inflight"`
	Time          Timing              `json:"-"` // of requests
	Queue         Timing              `json:"-"` // of requests that waited, until a path took them
	Retried       Timing              `json:"-"` // requests that needed another path
}

// Timing is a histogram that goes on counting; reading it costs something, so
// that only those pay who want it.
type Timing struct{ h *histogram }

// Distribution is what was counted so far.
func (t Timing) Distribution() Distribution { return t.h.distribution() }

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
	Ambiguous     int64            `json:"ambiguous_writes"` // writes that were under way when their path died, since start
	Held          int              `json:"held"`             // requests that wait for a fence now
	Holds         int64            `json:"holds"`            // since start
	HoldMS        int64            `json:"hold_ms"`          // sum over those that waited, without those that wait now
	LongestHoldMS int64            `json:"longest_hold_ms"`
	ShadowBytes   int64            `json:"shadow_bytes"` // kept in memory now
	Repairs       int64            `json:"repairs"`      // blocks written again after a fence, since start
	Lost          bool             `json:"lost"`         // acknowledged writes are lost: flushes fail
	Fences        map[string]int64 `json:"fences"`       // proven, unproven, timed, command, declared
	FencesBy      map[string]int64 `json:"fences_by"`    // reset, login, preempt, quarantine, command, operator
	FencesLate    int64            `json:"fences_late"`  // not over after fence_wait, since start
}

// UnfencedStatus is one old session that may still write.
type UnfencedStatus struct {
	Path   string `json:"path"`
	ForMS  int64  `json:"for_ms"`       // since the session died
	Writes int    `json:"writes"`       // that it may still execute
	Blocks uint64 `json:"blocks"`       // logical blocks of those
	Whole  bool   `json:"whole_device"` // of an earlier run: it may have written anywhere
	// Hopeless: no_path_retry is used up, what overlaps fails.
	Hopeless bool `json:"hopeless"`
}

func (l *ledger) status(c *Config, blockSize int) Safety {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := Safety{Mode: c.Protection, Unfenced: []UnfencedStatus{}, Ambiguous: l.ambiguous, Held: len(l.held), Holds: l.holds, HoldMS: l.waited.Milliseconds(),
		LongestHoldMS: l.longest.Milliseconds(), ShadowBytes: l.shadow.used.Load() * int64(blockSize), Repairs: l.shadow.rewritten, Fences: maps.Clone(l.fences), FencesBy: maps.Clone(l.means), FencesLate: l.late.Load()}
	for _, e := range l.epochs {
		s.Unfenced = append(s.Unfenced, UnfencedStatus{e.name, time.Since(e.since).Milliseconds(), len(e.extents), e.blocksAtRisk(), e.whole, e.hopeless})
	}
	if s.Fences == nil {
		s.Fences, s.FencesBy = map[string]int64{}, map[string]int64{}
	}
	return s
}

// NBDStatus is how the map is exported; the daemon fills it in.
type NBDStatus struct {
	Export      string `json:"export"`
	Device      string `json:"device"`      // /dev/nbdX, or empty
	Connections int    `json:"connections"` // the kernel's included
}

// PathCounts tells all paths, those that could serve, and those that do.
type PathCounts struct {
	Total  int `json:"total"`
	Usable int `json:"usable"` // logged in and not failed by a check: suspect, ghost, delayed and shaky ones too
	Active int `json:"active"` // that I/O is sent down now
}

// GroupStatus is one path group.
type GroupStatus struct {
	Selector string       `json:"selector"`
	Prio     int          `json:"prio"`
	State    string       `json:"state"`
	Marginal bool         `json:"marginal"` // of gray paths: serves for want of another
	Paths    []PathStatus `json:"paths"`
}

// PathStatus is one path.
type PathStatus struct {
	Name         string  `json:"name"`
	URL          string  `json:"url"`
	Trust        Trust   `json:"fence_test"` // reinstates, waits, drops, untrusted, or empty when never tested
	Portal       string  `json:"portal"`
	Target       string  `json:"target"`
	LUN          uint64  `json:"lun"`
	LUNHex       string  `json:"lun_hex"` // as on the wire, SAM-5 4.7
	Serial       string  `json:"serial,omitempty"`
	PortGroup    int     `json:"port_group"`       // -1 if unknown
	Place        string  `json:"hcil,omitempty"`   // host:channel:target:LUN of the kernel's device
	Number       string  `json:"number,omitempty"` // major:minor of it
	CheckEveryMS int64   `json:"check_every_ms"`
	NextCheckMS  int64   `json:"next_check_ms"`
	Device       string  `json:"device,omitempty"` // block device of the kernel that serves
	State        string  `json:"state"`
	Gray         string  `json:"gray,omitempty"` // why it is delayed or shaky
	Serving      bool    `json:"serving"`
	Foreign      bool    `json:"foreign"`   // out until reinstated by hand: it leads to another disk
	Contested    bool    `json:"contested"` // another initiator with the same name seems to end its sessions
	Checker      string  `json:"checker"`
	CheckerState string  `json:"checker_state"`
	Access       string  `json:"access,omitempty"` // asymmetric access state
	Prio         int     `json:"prio"`
	InFlight     int64   `json:"inflight"`
	QueueDepth   int     `json:"queue_depth"` // commands that it takes at once
	IOs          int64   `json:"ios"`
	Errors       int64   `json:"errors"`
	Failures     int64   `json:"failures"`
	ReadBytes    int64   `json:"read_bytes"`
	WrittenBytes int64   `json:"written_bytes"`
	Times        Timing  `json:"-"`
	Latency      Latency `json:"latency_us"`
	Events       Counter `json:"-"`
	LastError    string  `json:"last_error"`
}

// Latency are percentiles of successful commands since start, in microseconds: the
// upper edge of a bucket that is a quarter of a power of two wide.
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
	m.Safety = g.ledger.status(&g.cfg().Config, g.lu().BlockSize)
	m.Safety.WriteThrough = g.through.Load()
	m.Safety.Lost = g.loss.is.Load()
	m.Totals = Totals{Failed: g.failedUp.Load(), GroupSwitches: g.groupSwitches, Hedged: g.hedges.Load(), HedgesWon: g.hedgesWon.Load(), Retried: Timing{&g.retried}, Time: Timing{&g.requests.time}, Queue: Timing{&g.requests.queue}}
	m.Totals.Requests, m.Totals.InFlight = g.requests.status()
	m.Revision, m.Retry, m.MaxIO = g.lu().Revision, g.retryText(), g.maxIO.Load()
	m.Failback = g.failbackMode()
	if g.cfg().FailbackAfter > 0 {
		m.Failback = fmt.Sprint(int(g.cfg().FailbackAfter.Seconds()))
	}
	if g.giveUp != nil {
		m.GiveUpMS = max(time.Until(g.giveUpAt).Milliseconds(), 1)
	}
	m.Totals.QueueTimeouts, m.Totals.NoPathMS = g.queueTimeouts, g.noPath.Milliseconds()
	if !g.noPathSince.IsZero() {
		m.Totals.NoPathMS += time.Since(g.noPathSince).Milliseconds()
	}
	m.Paths.Total, m.Paths.Active = len(g.paths), len(t.paths)
	for _, pg := range g.grouping((*Path).usable) {
		gs := GroupStatus{Selector: g.cfg().selector.Name(), Prio: pg.prio, State: "disabled", Marginal: pg.marginal}
		for _, p := range pg.paths {
			st := PathStatus{Name: p.Name, URL: p.URL, Portal: p.Portal, Target: p.Target, LUN: p.LUNNumber, State: "down", Serving: serving[p],
				Checker: g.cfg().checker.Name(), CheckerState: string(p.checkState), Prio: p.prio, InFlight: p.load.InFlight.Load(), QueueDepth: p.queueDepth(), IOs: p.ios.Load(),
				Errors: p.errors.Load(), Failures: p.failures.Load(), LastError: p.lastError, Trust: p.classLocked(),
				ReadBytes: p.read.Load(), WrittenBytes: p.written.Load(), Times: Timing{&p.latency}}
			st.Foreign = p.wrongLU && !p.shrunk
			st.Contested = p.contested()
			st.Events = Counter{&p.events}
			st.LUNHex, st.Serial, st.PortGroup = fmt.Sprintf("0x%x", p.PathConfig.LUN), p.serial, p.portGroup
			st.CheckEveryMS = p.checkEvery.Load() / 1e6
			st.NextCheckMS = max((p.checkDue.Load()-now())/1e6, 0)
			st.Latency.P50, st.Latency.P99 = p.latency.percentile(50), p.latency.percentile(99)
			if d, ok := p.session.(interface{ Device() string }); ok && p.up {
				st.Device = d.Device()
			}
			st.Gray = p.held.String()
			if p.access != accessUnknown {
				st.Access = scsi.AccessStateText(uint8(p.access))
			}
			if p.usable() {
				m.Paths.Usable++
				switch {
				case p.suspect:
					st.State = "suspect"
				case p.delayed():
					st.State = "delayed"
				case p.marginal():
					st.State = "shaky"
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
	case m.Paths.Usable == 0, m.Size == 0: // in standby alone
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
