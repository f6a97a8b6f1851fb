package daemon

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

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

// Two daemons with one state file would write over what the other has noted there,
// and the next run would not fence it.
func TestAStateFileHasOneDaemon(t *testing.T) {
	_, a := disk(t, "one", 1)
	_, b := disk(t, "two", 1)
	dir := t.TempDir()
	state := filepath.Join(dir, "unfenced.json")
	d, _ := begin(t, Options{URLs: []string{a[0].URL(0)}, State: state})
	other := Options{URLs: []string{b[0].URL(0)}, State: state, NBD: "unix:" + filepath.Join(dir, "n"), Control: filepath.Join(dir, "c")}
	_, err := Start(other)
	require.ErrorContains(t, err, fmt.Sprintf("process %d has it", os.Getpid()))
	for _, p := range []string{"n", "c"} {
		_, err = os.Stat(filepath.Join(dir, p))
		require.ErrorIs(t, err, fs.ErrNotExist, "a failed start leaves its socket behind")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	require.NoError(t, d.Leave(ctx))
	next, err := Start(other)
	require.NoError(t, err)
	require.NoError(t, next.Leave(ctx))
}

func TestStateOfARunIsGoodForTheNextOneIfItIsSoon(t *testing.T) {
	name := filepath.Join(t.TempDir(), "unfenced.json")
	r, err := openRiskFile(name)
	require.NoError(t, err)
	found := map[string]map[string]paths.Tested{"36": {"a": {Target: "iqn.t", Nexus: "group 1", Trust: paths.Reinstates, Ends: map[string]bool{"b": true}}}}
	r.leave(found)
	require.NoError(t, r.flush())
	require.Nil(t, r.before)
	r, err = openRiskFile(name)
	require.NoError(t, err)
	require.Equal(t, found, r.before)
	require.NoError(t, r.set("36", "a", true, riskPath{URL: "u"}))
	r, err = openRiskFile(name) // after a crash of the next one
	require.NoError(t, err)
	require.Nil(t, r.before)
	for _, ago := range []time.Duration{leftFor + time.Second, -time.Hour} { // too long ago; a clock that was set
		r.leave(found)
		r.data.Left.At = time.Now().Add(-ago)
		require.NoError(t, r.flush())
		r, err = openRiskFile(name)
		require.NoError(t, err)
		require.Nil(t, r.before)
	}
}

func TestTheNextRunLogsInOnceOnAPathThatTheOneBeforeTested(t *testing.T) {
	srv, ps := disk(t, "a", 2)
	logins := func(state string, end func(*Daemon, context.Context) error) int {
		before := srv.Stats().Logins
		d, _ := begin(t, Options{URLs: []string{ps[0].URL(0), ps[1].URL(0)}, State: state})
		await(t, d, "up", func(m paths.MapStatus) bool { return m.Paths.Usable == 2 })
		n := int(srv.Stats().Logins - before)
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		require.NoError(t, end(d, ctx))
		return n
	}
	state := filepath.Join(t.TempDir(), "unfenced.json")
	first := logins(state, (*Daemon).Leave)
	require.Greater(t, first, 6)
	for _, end := range []func(*Daemon, context.Context) error{(*Daemon).Leave, (*Daemon).Stop} {
		require.Equal(t, 4, logins(state, end), "each path: to see which disk it leads to, and to serve")
	}
	require.NoError(t, os.Remove(state))
	require.Equal(t, first, logins(state, (*Daemon).Leave))
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
