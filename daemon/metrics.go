package daemon

import (
	"net"
	"net/http"
	"time"

	"github.com/mpathd/mpathd/paths"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// collector reads the maps when Prometheus asks: nothing is counted twice and
// no I/O pays for it.
type collector struct{ d *Daemon }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("mpathd_"+name, help, labels, nil)
}

var (
	mapLabels  = []string{"map"}
	pathLabels = []string{"map", "path", "target"}

	descMapState    = desc("map_state", "State of the map: 1 for the one it is in.", "map", "state")
	descMapSize     = desc("map_size_bytes", "Capacity.", mapLabels...)
	descMapPaths    = desc("map_paths", "Paths: total, usable, active.", "map", "kind")
	descMapQueued   = desc("map_queued_requests", "Requests that wait for a path.", mapLabels...)
	descMapErrors   = desc("map_failed_requests_total", "Requests that were answered with an error.", mapLabels...)
	descMapSwitch   = desc("map_group_switches_total", "Changes of the path group in use.", mapLabels...)
	descMapRetried  = desc("map_failover_seconds", "Requests that needed another path, from submission to completion.", mapLabels...)
	descMapRequests = desc("map_requests_total", "Requests that ended, well or not, by operation.", "map", "op")
	descMapBytes    = desc("map_bytes_total", "Bytes of the requests that succeeded, by operation.", "map", "op")
	descMapFlight   = desc("map_inflight_requests", "Requests that the map has and has not answered yet.", mapLabels...)
	descMapTime     = desc("map_request_seconds", "Requests from submission to completion, with all retries and waits.", mapLabels...)
	descMapQueue    = desc("map_queue_seconds", "Requests that had to wait for a path, from submission until a path took them.", mapLabels...)
	descMapNoPath   = desc("map_no_path_seconds_total", "Time without a usable path.", mapLabels...)
	descMapTimeouts = desc("map_queue_timeouts_total", "Times that no_path_retry was used up and queued requests failed.", mapLabels...)
	descMapQueueing = desc("map_queueing", "Whether requests wait when no path is left.", mapLabels...)
	descMapConns    = desc("map_nbd_connections", "NBD connections.", mapLabels...)
	descHeld        = desc("map_held_requests", "Requests that wait for a fence.", mapLabels...)
	descHolds       = desc("map_holds_total", "Requests that had to wait for a fence.", mapLabels...)
	descHoldTime    = desc("map_hold_seconds_total", "Time that requests waited for a fence.", mapLabels...)
	descAmbiguous   = desc("map_ambiguous_writes_total", "Writes that were under way when their path died and may be executed late.", mapLabels...)
	descRiskWrites  = desc("map_unfenced_writes", "Writes that old sessions may still execute.", mapLabels...)
	descRiskBlocks  = desc("map_unfenced_blocks", "Blocks of those writes.", mapLabels...)
	descShadow      = desc("map_shadow_bytes", "Bytes kept in memory until a fence (ghost_protection shadow).", mapLabels...)
	descRepairs     = desc("map_repaired_blocks_total", "Blocks written again after a fence (ghost_protection shadow).", mapLabels...)
	descUnfenced    = desc("map_unfenced_sessions", "Old sessions that may still write.", mapLabels...)
	descFences      = desc("map_fences_total", "Old sessions fenced, by how.", "map", "how")
	descPathUp      = desc("path_up", "Whether the path is usable.", pathLabels...)
	descPathState   = desc("path_state", "State of the path: 1 for the one it is in.", "map", "path", "target", "state")
	descPathActive  = desc("path_serving", "Whether I/O is sent down this path.", pathLabels...)
	descPathPrio    = desc("path_priority", "Priority, -1 if unknown.", pathLabels...)
	descPathFlight  = desc("path_inflight_requests", "Commands in flight.", pathLabels...)
	descPathIOs     = desc("path_ios_total", "Commands that succeeded.", pathLabels...)
	descPathErrors  = desc("path_errors_total", "Commands that did not succeed, by what became of them: the session was lost, the path failed, they were retried elsewhere or here, the unit's own error was passed on, or the unit does not know them.", "map", "path", "target", "class")
	descPathChecks  = desc("path_checks_total", "Checks, by the checker's answer.", "map", "path", "target", "state")
	descPathLogins  = desc("path_logins_total", "Logins, by result: ok or failed.", "map", "path", "target", "result")
	descPathSuspect = desc("path_suspicions_total", "Silences that took the path out of new I/O before it was given up.", pathLabels...)
	descPathFails   = desc("path_failures_total", "Times that the path failed.", pathLabels...)
	descPathBytes   = desc("path_bytes_total", "Bytes moved.", "map", "path", "target", "direction")
	descPathTime    = desc("path_latency_seconds", "Time of successful commands.", pathLabels...)
	descPending     = desc("pending_targets", "Targets and portals that do not answer yet.")
	descInfo        = desc("info", "The daemon.", "initiator")
	descUptime      = desc("uptime_seconds", "Time since start.")
	descFencesLate  = desc("map_fences_late_total", "Old sessions that were not fenced within fence_wait.", mapLabels...)
)

func (c collector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

var (
	mapStates  = []string{"ok", "degraded", "no_path", "failed"}
	pathStates = []string{"up", "suspect", "down", "ghost", "shaky", "delayed"}
)

func (c collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, l ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, l...)
	}
	count := func(d *prometheus.Desc, v int64, l ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), l...)
	}
	histogram := func(d *prometheus.Desc, x paths.Distribution, l ...string) {
		ch <- prometheus.MustNewConstHistogram(d, x.Count, x.Sum, x.Buckets, l...)
	}
	yes := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	gauge(descInfo, 1, c.d.o.InitiatorName)
	gauge(descUptime, time.Since(c.d.begun).Seconds())
	s := c.d.Snapshot()
	gauge(descPending, float64(len(s.Pending)))
	for _, m := range s.Maps {
		for _, st := range mapStates {
			gauge(descMapState, yes(st == m.State), m.Alias, st)
		}
		gauge(descMapSize, float64(m.Size), m.Alias)
		gauge(descMapPaths, float64(m.Paths.Total), m.Alias, "total")
		gauge(descMapPaths, float64(m.Paths.Usable), m.Alias, "usable")
		gauge(descMapPaths, float64(m.Paths.Active), m.Alias, "active")
		gauge(descMapQueued, float64(m.Queued), m.Alias)
		gauge(descMapConns, float64(m.NBD.Connections), m.Alias)
		gauge(descHeld, float64(m.Safety.Held), m.Alias)
		gauge(descUnfenced, float64(len(m.Safety.Unfenced)), m.Alias)
		count(descHolds, m.Safety.Holds, m.Alias)
		ch <- prometheus.MustNewConstMetric(descHoldTime, prometheus.CounterValue, float64(m.Safety.HoldMS)/1000, m.Alias)
		count(descAmbiguous, m.Safety.Ambiguous, m.Alias)
		writes, blocks := 0, uint64(0)
		for _, u := range m.Safety.Unfenced {
			writes += u.Writes
			blocks += u.Blocks
		}
		gauge(descRiskWrites, float64(writes), m.Alias)
		gauge(descRiskBlocks, float64(blocks), m.Alias)
		gauge(descShadow, float64(m.Safety.ShadowBytes), m.Alias)
		count(descRepairs, m.Safety.Repairs, m.Alias)
		for _, how := range paths.FenceKinds { // all, so that a rate begins at zero
			count(descFences, m.Safety.Fences[how], m.Alias, how)
		}
		count(descFencesLate, m.Safety.FencesLate, m.Alias)
		for op, n := range m.Totals.Requests {
			count(descMapRequests, n.Done, m.Alias, op)
			count(descMapBytes, n.Bytes, m.Alias, op)
		}
		gauge(descMapFlight, float64(m.Totals.InFlight), m.Alias)
		gauge(descMapQueueing, yes(m.Queueing), m.Alias)
		histogram(descMapTime, m.Totals.Time.Distribution(), m.Alias)
		histogram(descMapQueue, m.Totals.Queue.Distribution(), m.Alias)
		ch <- prometheus.MustNewConstMetric(descMapNoPath, prometheus.CounterValue, float64(m.Totals.NoPathMS)/1000, m.Alias)
		count(descMapTimeouts, m.Totals.QueueTimeouts, m.Alias)
		count(descMapErrors, m.Totals.Failed, m.Alias)
		count(descMapSwitch, m.Totals.GroupSwitches, m.Alias)
		histogram(descMapRetried, m.Totals.Retried.Distribution(), m.Alias)
		for _, g := range m.Groups {
			for _, p := range g.Paths {
				l := []string{m.Alias, p.Name, p.Target}
				for _, st := range pathStates {
					gauge(descPathState, yes(st == p.State), m.Alias, p.Name, p.Target, st)
				}
				gauge(descPathUp, yes(p.State != "down"), l...)
				gauge(descPathActive, yes(p.Serving), l...)
				gauge(descPathPrio, float64(p.Prio), l...)
				gauge(descPathFlight, float64(p.InFlight), l...)
				count(descPathIOs, p.IOs, l...)
				e := p.Events.Events()
				for class, n := range e.Errors {
					count(descPathErrors, n, m.Alias, p.Name, p.Target, class)
				}
				for state, n := range e.Checks {
					count(descPathChecks, n, m.Alias, p.Name, p.Target, state)
				}
				count(descPathLogins, e.Logins, m.Alias, p.Name, p.Target, "ok")
				count(descPathLogins, e.Refused, m.Alias, p.Name, p.Target, "failed")
				count(descPathSuspect, e.Suspect, l...)
				count(descPathFails, p.Failures, l...)
				count(descPathBytes, p.ReadBytes, m.Alias, p.Name, p.Target, "read")
				count(descPathBytes, p.WrittenBytes, m.Alias, p.Name, p.Target, "written")
				histogram(descPathTime, p.Times.Distribution(), l...)
			}
		}
	}
}

// serveMetrics listens for Prometheus.
func (d *Daemon) serveMetrics(addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	r := prometheus.NewRegistry()
	r.MustRegister(collector{d}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	d.metrics = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
	d.wg.Go(func() { d.metrics.Serve(ln) })
	d.log.Info("metrics", "listen", ln.Addr().String())
	return nil
}
