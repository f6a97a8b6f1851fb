package daemon

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/paths"
)

// Why a path is kept back is one look away.
func TestPathsThatAreKeptBackSayWhy(t *testing.T) {
	m := &Maps{Maps: []paths.MapStatus{{Alias: "m", Groups: []paths.GroupStatus{{Paths: []paths.PathStatus{
		{Name: "a", State: "delayed", Gray: "its I/O fails"}, {Name: "b", State: "down", Gray: "failed too often", LastError: "connection refused"}}}}}}}
	var b strings.Builder
	require.NoError(t, Text{As: "paths"}.Write(&b, m))
	require.Contains(t, b.String(), "gray: its I/O fails\n")
	require.Contains(t, b.String(), "connection refused\n")
	require.NotContains(t, b.String(), "too often")
}
