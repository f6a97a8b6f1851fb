package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/realtarget"
	"github.com/stretchr/testify/require"
)

func get(t *testing.T, url string) []byte {
	t.Helper()
	rs, err := http.Get(url)
	require.NoError(t, err)
	defer rs.Body.Close()
	b, err := io.ReadAll(rs.Body)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, rs.StatusCode, "%s", b)
	return b
}

// TestAlertsAndDashboard checks dist/ with Prometheus of Debian: the rules, their
// tests, what a running daemon serves, and that an alert becomes true in a
// failover and false after it.
func TestAlertsAndDashboard(t *testing.T) {
	t.Parallel()
	promtool, prometheus := peer(t, "prometheus", "usr/bin/promtool"), peer(t, "prometheus", "usr/bin/prometheus")
	rules, err := filepath.Abs("../../dist/prometheus/mpathd.rules.yml")
	require.NoError(t, err)
	tool := func(stdin []byte, args ...string) {
		t.Helper()
		c := exec.Command(promtool, args...)
		c.Dir, c.Stdin = filepath.Dir(rules), bytes.NewReader(stdin)
		out, err := c.CombinedOutput()
		require.NoError(t, err, "promtool %v: %s", args, out)
		if args[1] == "metrics" {
			require.Empty(t, string(out), "it complains")
		}
	}
	tool(nil, "check", "rules", rules)
	tool(nil, "test", "rules", "mpathd.test.yml")

	dir := t.TempDir()
	ports := [2]int{realtarget.FreePort(t), realtarget.FreePort(t)}
	const iqn = "iqn.2026-01.io.mpathd:metrics"
	start := func(port int) *exec.Cmd {
		tg := exec.Command(binary, "target", "-size", "64M", "-target", iqn, "-portal", fmt.Sprintf("127.0.0.1:%d", port))
		require.NoError(t, tg.Start())
		t.Cleanup(func() { tg.Process.Kill(); tg.Wait() })
		return tg
	}
	first := start(ports[0])
	start(ports[1])
	metrics := fmt.Sprintf("127.0.0.1:%d", realtarget.FreePort(t))
	control := filepath.Join(dir, "c")
	d := exec.Command(binary, "run", "--attach", "none", "--nbd", "unix:"+dir+"/n", "--control", control, "--initiator", "iqn.2026-11.example:i", "--alias", "m", "--metrics", metrics,
		fmt.Sprintf("iscsi://127.0.0.1:%d/%s/0", ports[0], iqn), fmt.Sprintf("iscsi://127.0.0.1:%d/%s/0", ports[1], iqn))
	require.NoError(t, d.Start())
	t.Cleanup(func() { d.Process.Signal(syscall.SIGTERM); d.Wait() })
	s := &stack{t: t, control: control}
	s.await("both paths up", func(m daemon.Maps) bool { return len(m.Maps) == 1 && m.Maps[0].Paths.Usable == 2 })
	scrape := get(t, "http://"+metrics+"/metrics")
	// Go's own metrics break a rule that came after them.
	ours := regexp.MustCompile(`(?m)^(# (HELP|TYPE) )?(go|promhttp|process)_.*\n`).ReplaceAll(scrape, nil)
	tool(ours, "check", "metrics")
	for _, file := range []string{rules, "../../dist/grafana/mpathd.json"} {
		b, err := os.ReadFile(file)
		require.NoError(t, err)
		names := regexp.MustCompile(`\b(mpathd|process|go)_[a-z0-9_]+`).FindAllString(string(b), -1)
		require.NotEmpty(t, names)
		slices.Sort(names)
		for _, n := range slices.Compact(names) {
			require.Regexp(t, `(?m)^`+n+`[{ ]`, string(scrape), "%s names a metric that there is not", file)
		}
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	b, err := os.ReadFile("../../dist/grafana/mpathd.json")
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &dashboard))

	// A whole Prometheus, whose clock runs as fast as the alert's "for" allows.
	text, err := os.ReadFile(rules)
	require.NoError(t, err)
	quick := regexp.MustCompile(`(?m)^( +for:) .*`).ReplaceAll(text, []byte("$1 0s"))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "rules.yml"), quick, 0o600))
	conf := fmt.Sprintf("global: {scrape_interval: 200ms, evaluation_interval: 200ms}\nrule_files: [rules.yml]\nscrape_configs:\n- job_name: mpathd\n  static_configs: [{targets: ['%s']}]\n", metrics)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "p.yml"), []byte(conf), 0o600))
	web := fmt.Sprintf("127.0.0.1:%d", realtarget.FreePort(t))
	p := exec.Command(prometheus, "--config.file="+filepath.Join(dir, "p.yml"), "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+web)
	var said bytes.Buffer
	p.Stderr = &said
	require.NoError(t, p.Start())
	t.Cleanup(func() {
		p.Process.Signal(syscall.SIGTERM)
		p.Wait()
		if t.Failed() {
			t.Log(said.String())
		}
	})
	query := func(q string) (n int) {
		rs, err := http.Get("http://" + web + "/api/v1/query?query=" + url.QueryEscape(q))
		if err != nil {
			return -1
		}
		defer rs.Body.Close()
		var out struct {
			Status, Error string
			Data          struct{ Result []any }
		}
		if json.NewDecoder(rs.Body).Decode(&out) != nil || rs.StatusCode == http.StatusServiceUnavailable {
			return -1
		}
		require.Equal(t, "success", out.Status, "%s: %s", q, out.Error)
		return len(out.Data.Result)
	}
	until := func(q string, n int) {
		t.Helper()
		require.Eventually(t, func() bool { return query(q) == n }, 30*time.Second, 100*time.Millisecond, "%s: want %d results", q, n)
	}
	until(`mpathd_map_paths{kind="usable"} == 2`, 1)
	require.Zero(t, query(`ALERTS`))
	first.Process.Kill()
	until(`ALERTS{alertname="MpathdNoRedundancy",alertstate="firing",map="m"}`, 1)
	until(`ALERTS{alertname="MpathdPathDown",alertstate="firing"}`, 1)
	require.Zero(t, query(`ALERTS{severity="critical"}`))
	for _, panel := range dashboard.Panels { // as Grafana fills them in
		for _, x := range panel.Targets {
			q := strings.NewReplacer("$__rate_interval", "10s", "$instance", ".*", "$map", ".*").Replace(x.Expr)
			require.GreaterOrEqual(t, query(q), 0, panel.Title)
		}
	}
	first.Wait()
	start(ports[0])
	until(`ALERTS{alertname="MpathdNoRedundancy"}`, 0)
	until(`mpathd_map_paths{kind="usable"} == 2`, 1)
}
