package daemon

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"
)

// eventLog keeps what the daemon logged about maps and paths and streams it:
// the log and the events are one thing and cannot disagree.
type eventLog struct {
	mu     sync.Mutex
	recent []Event // the last keptEvents
	subs   map[chan Event]bool
	closed bool
}

// Event is one line of `mpathd events --json`. Name is the event in words with
// dashes (path-failed, path-is-up, path-group-switched, ...), Fields the rest.
type Event struct {
	Time   time.Time         `json:"time"`
	Level  string            `json:"level"`
	Name   string            `json:"event"`
	Map    string            `json:"map,omitempty"`
	Path   string            `json:"path,omitempty"`
	Cause  string            `json:"cause,omitempty"`
	Fields map[string]string `json:"fields,omitempty"`
}

const (
	keptEvents = 1000
	eventRoom  = 256 // of a slow reader, before it misses some
)

func (l *eventLog) add(e Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.recent) == keptEvents {
		l.recent = append(l.recent[:0], l.recent[1:]...)
	}
	l.recent = append(l.recent, e)
	for c := range l.subs {
		select {
		case c <- e:
		default: // never let a reader slow a path down
		}
	}
}

func (l *eventLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for c := range l.subs {
		close(c)
	}
	l.subs = nil
}

// serve streams events, one JSON object per line; ?past=yes begins with those
// that are kept.
func (l *eventLog) serve(w http.ResponseWriter, r *http.Request) {
	c := make(chan Event, eventRoom)
	l.mu.Lock()
	var past []Event
	if r.FormValue("past") == "yes" {
		past = append(past, l.recent...)
	}
	if l.closed {
		close(c)
	} else {
		if l.subs == nil {
			l.subs = map[chan Event]bool{}
		}
		l.subs[c] = true
	}
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		delete(l.subs, c)
		l.mu.Unlock()
	}()
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := json.NewEncoder(w)
	flush := http.NewResponseController(w)
	for _, e := range past {
		if out.Encode(e) != nil {
			return
		}
	}
	flush.Flush()
	for {
		select {
		case e, ok := <-c:
			if !ok || out.Encode(e) != nil {
				return
			}
			flush.Flush()
		case <-r.Context().Done():
			return
		}
	}
}

// tee passes records on and keeps those of Info and above.
func (l *eventLog) tee(h slog.Handler) slog.Handler { return teeHandler{h, l, nil} }

type teeHandler struct {
	slog.Handler
	log   *eventLog
	attrs []slog.Attr
}

func (t teeHandler) Enabled(ctx context.Context, lv slog.Level) bool {
	return lv >= slog.LevelInfo || t.Handler.Enabled(ctx, lv)
}

func (t teeHandler) WithAttrs(as []slog.Attr) slog.Handler {
	return teeHandler{t.Handler.WithAttrs(as), t.log, append(t.attrs[:len(t.attrs):len(t.attrs)], as...)}
}

func (t teeHandler) WithGroup(name string) slog.Handler {
	return teeHandler{t.Handler.WithGroup(name), t.log, t.attrs}
}

func (t teeHandler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelInfo {
		e := Event{Time: r.Time, Level: r.Level.String(), Name: strings.ReplaceAll(strings.Split(r.Message, ":")[0], " ", "-")}
		put := func(a slog.Attr) bool {
			v := a.Value.Resolve().String()
			switch a.Key {
			case "map":
				e.Map = v
			case "path":
				e.Path = v
			case "cause":
				e.Cause = v
			default:
				if e.Fields == nil {
					e.Fields = map[string]string{}
				}
				e.Fields[a.Key] = v
			}
			return true
		}
		for _, a := range t.attrs {
			put(a)
		}
		r.Attrs(put)
		t.log.add(e)
	}
	if !t.Handler.Enabled(ctx, r.Level) {
		return nil
	}
	return t.Handler.Handle(ctx, r)
}
