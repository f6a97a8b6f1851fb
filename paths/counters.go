package paths

import (
	"sync/atomic"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/checker"
)

// What is counted on the way of a request costs an atomic each; who wants to
// know reads it (Snapshot).

// requests counts what a map was asked for.
type requests struct {
	taken, done [block.WriteZeroes + 1]atomic.Int64 // by operation
	bytes       [block.WriteZeroes + 1]atomic.Int64
	time        histogram // from submission to completion
	queue       histogram // from submission until a path took it, of those that waited
}

func (q *requests) finish(r *block.Request, err error, at int64) {
	q.done[r.Op].Add(1)
	if err == nil {
		q.bytes[r.Op].Add(r.Len)
	}
	q.time.add(at - r.Route.Start)
}

// Requests are counts since start of one kind of request.
type Requests struct {
	Done  int64 `json:"done"`
	Bytes int64 `json:"bytes"` // of those that succeeded
}

func (q *requests) status() (by map[string]Requests, inFlight int64) {
	by = map[string]Requests{}
	for op := range q.done {
		n := q.done[op].Load()
		by[block.Op(op).String()] = Requests{n, q.bytes[op].Load()}
		inFlight += q.taken[op].Load() - n
	}
	return by, max(inFlight, 0)
}

// errorClasses names the verdicts on commands that did not succeed, and the end
// of the session under them.
var errorClasses = [...]string{Done: "", RetryElsewhere: "retry_elsewhere", RetryHere: "retry_here", FailPath: "path_failed", FailUp: "unit_error", Unsupported: "unsupported", Unsupported + 1: "session_lost"}

const classLost = Unsupported + 1

// checkResults are the answers of checkers that are counted.
var checkResults = [...]checker.State{checker.Up, checker.Down, checker.Ghost, checker.Pending, checker.Timeout, "other"}

// pathEvents counts what happens to a path beside its I/O.
type pathEvents struct {
	errors  [len(errorClasses)]atomic.Int64
	checks  [len(checkResults)]atomic.Int64
	logins  atomic.Int64 // sessions that came to be
	refused atomic.Int64 // logins that failed
	suspect atomic.Int64 // silences that made it suspect
}

func (e *pathEvents) checked(s checker.State) {
	for i, x := range checkResults {
		if x == s || i == len(checkResults)-1 {
			e.checks[i].Add(1)
			return
		}
	}
}

// Counter is what goes on counting a path's events.
type Counter struct{ e *pathEvents }

// Events are the counts so far.
func (c Counter) Events() Events { return c.e.status() }

// Events are counts of a path since start.
type Events struct {
	Errors  map[string]int64 // by class: commands that did not succeed
	Checks  map[string]int64 // by the checker's answer
	Logins  int64
	Refused int64 // logins
	Suspect int64
}

func (e *pathEvents) status() Events {
	out := Events{Errors: map[string]int64{}, Checks: map[string]int64{}, Logins: e.logins.Load(), Refused: e.refused.Load(), Suspect: e.suspect.Load()}
	for i, name := range errorClasses[1:] {
		out.Errors[name] = e.errors[i+1].Load()
	}
	for i, name := range checkResults {
		out.Checks[string(name)] = e.checks[i].Load()
	}
	return out
}
