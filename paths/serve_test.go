package paths

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Sessions that the target ends soon after their login, again and again, mean
// that somebody else logs in as this path does; one that lives is the end of it.
func TestContestedPaths(t *testing.T) {
	var log bytes.Buffer
	g := &Group{log: slog.New(slog.NewTextHandler(&log, nil))}
	p, q := &Path{g: g, PathConfig: PathConfig{Name: "p"}}, &Path{g: g, PathConfig: PathConfig{Name: "q"}}
	g.paths = []*Path{p, q}
	says := func() int { return strings.Count(log.String(), "path is contested") }
	for range contestEnds - 1 {
		p.noteEnd(time.Second, true)
	}
	p.noteEnd(time.Second, false) // by us, or for silence
	require.False(t, p.contested())
	p.noteEnd(time.Second, true)
	require.True(t, p.contested())
	require.Equal(t, 1, says())
	for range contestEnds {
		p.noteEnd(time.Second, true)
		q.noteEnd(time.Second, true)
	}
	require.True(t, q.contested())
	require.Equal(t, 1, says(), "once for a map")
	p.up, p.opened = true, time.Now().Add(-shortLife)
	require.False(t, p.contested(), "it lives")
	p.up = false
	p.noteEnd(time.Hour, true)
	require.False(t, p.contested())
	q.noteEnd(time.Hour, true)
	for range contestEnds {
		p.noteEnd(time.Second, true)
	}
	require.Equal(t, 2, says(), "a new episode")
}
