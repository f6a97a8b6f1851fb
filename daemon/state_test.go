package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/paths"
)

func TestStateOutlivesTheRun(t *testing.T) {
	name := filepath.Join(t.TempDir(), "state", "unfenced.json")
	r, err := openRiskFile(name)
	require.NoError(t, err)
	require.NoError(t, r.set("36", "a", true, riskPath{URL: "iscsi://a/iqn.t/0", Portals: []string{"b"}}))
	require.NoError(t, r.setClass("iqn.t", paths.Reinstates))
	require.NoError(t, r.setClass("iqn.u", paths.Untrusted))
	r, err = openRiskFile(name)
	require.NoError(t, err)
	require.Equal(t, map[string]paths.Trust{"iqn.t": paths.Reinstates, "iqn.u": paths.Untrusted}, r.classes())
	require.Equal(t, map[string]riskPath{"a": {"iscsi://a/iqn.t/0", []string{"b"}}}, r.of("36"))
	require.False(t, r.lost("36"))
	require.NoError(t, r.setLost("36", true))
	require.NoError(t, r.set("36", "a", false, riskPath{}))
	r, err = openRiskFile(name)
	require.NoError(t, err)
	require.Empty(t, r.of("36"))
	require.True(t, r.lost("36"), "writes that are lost are forgotten over a crash")
	require.NoError(t, r.setLost("36", false))
	r, err = openRiskFile(name)
	require.NoError(t, err)
	require.False(t, r.lost("36"))
	require.Len(t, r.classes(), 2)
}

func TestStateOfManyPathsTakesFewWrites(t *testing.T) {
	t.Parallel()
	name := filepath.Join(t.TempDir(), "unfenced.json")
	r, err := openRiskFile(name)
	require.NoError(t, err)
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			path := fmt.Sprint("p", i)
			assert.NoError(t, r.set("36", path, true, riskPath{URL: "iscsi://a/iqn.t/0"}))
			now, err := openRiskFile(name) // durable when set returns, whoever wrote it
			assert.NoError(t, err)
			assert.Contains(t, now.of("36"), path)
		})
	}
	wg.Wait()
	before, err := os.Stat(name)
	require.NoError(t, err)
	require.NoError(t, r.set("36", "p7", true, riskPath{URL: "iscsi://a/iqn.t/0"}))
	after, err := os.Stat(name)
	require.NoError(t, err)
	require.True(t, os.SameFile(before, after), "nothing changed, nothing written")
}

func TestStateThatCannotBeWrittenIsTriedAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dir")
	require.NoError(t, os.WriteFile(dir, nil, 0o600))
	r := &riskFile{path: filepath.Join(dir, "unfenced.json"), data: riskData{Version: 1, Maps: map[string]map[string]riskPath{}}}
	require.Error(t, r.set("36", "a", true, riskPath{URL: "u"}))
	require.NoError(t, os.Remove(dir))
	require.NoError(t, r.set("36", "a", true, riskPath{URL: "u"}), "the same again must be written now")
	now, err := openRiskFile(r.path)
	require.NoError(t, err)
	require.Len(t, now.of("36"), 1)
}
