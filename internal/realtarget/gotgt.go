package realtarget

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
)

// gotgt is github.com/gostor/gotgt, built from the module in gotgt/. It listens
// on all addresses, whatever its portals are.
type gotgt struct {
	base
	api int
}

// buildGotgt builds the daemon once per test binary. It has no name in the file
// system, so that nothing stays behind however the tests end.
var buildGotgt = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "gotgt-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	_, here, _, _ := runtime.Caller(0)
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "gotgt"), "github.com/gostor/gotgt")
	build.Dir = filepath.Join(filepath.Dir(here), "gotgt")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // else it wants Ceph's headers
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building gotgt: %w: %s", err, out)
	}
	f, err := os.Open(filepath.Join(dir, "gotgt"))
	if err != nil {
		return "", err
	}
	gotgtFile = f
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()), nil
})

var gotgtFile *os.File // stays open

func newGotgt(b base) *gotgt {
	g := &gotgt{base: b}
	g.ports("127.0.0.1")
	g.portals = g.portals[:1]
	g.api = FreePort(b.t)
	var c struct {
		Storages []map[string]any          `json:"storages"`
		Portals  []map[string]any          `json:"iscsiportals"`
		Targets  map[string]map[string]any `json:"iscsitargets"`
	}
	c.Storages = []map[string]any{{"deviceID": 1000, "path": "file:" + g.image, "online": true, "thinProvisioning": b.o.Thin, "blockShift": 9}}
	c.Portals = []map[string]any{{"id": 0, "portal": g.portals[0]}}
	c.Targets = map[string]map[string]any{g.name: {"tpgts": map[string][]int{"1": {0}}, "luns": map[string]int{"0": 1000}}}
	text, err := json.Marshal(c)
	if err != nil {
		b.t.Fatal(err)
	}
	dir := b.t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), text, 0o600); err != nil {
		b.t.Fatal(err)
	}
	g.env = []string{"GOSTOR_CONFIG=" + dir}
	return g
}

func (g *gotgt) Kind() string  { return "gotgt" }
func (g *gotgt) LUN() uint64   { return 0 }
func (g *gotgt) Params() bool  { return false }
func (g *gotgt) Sessions() int { return -1 }

func (g *gotgt) Version() string {
	bin, err := buildGotgt()
	if err != nil {
		g.t.Fatal(err)
	}
	for line := range strings.Lines(command(g.t, "go", "version", "-m", bin)) {
		if f := strings.Fields(line); len(f) >= 3 && f[1] == "github.com/gostor/gotgt" {
			return "gotgt " + f[2]
		}
	}
	return "gotgt"
}

func (g *gotgt) Start() {
	g.t.Helper()
	bin, err := buildGotgt()
	if err != nil {
		g.t.Fatal(err)
	}
	_, port, _ := strings.Cut(g.portals[0], ":")
	g.run(bin, "daemon", "--port", port, "--host", fmt.Sprintf("tcp://127.0.0.1:%d", g.api))
}
