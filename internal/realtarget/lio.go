package realtarget

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
)

const (
	targetFS = "/sys/kernel/config/target"
	loginOf  = "/iscsi"
)

// lio is the kernel's own target, set up through configfs: a file, or with
// Options.Slow a block device of ours, behind one portal group.
type lio struct {
	base
	core string // the backstore's directory
	tpg  string
	disk *slowDisk
}

var lios atomic.Int64

func newLIO(b base) *lio {
	if _, err := os.Stat(targetFS + loginOf); err != nil {
		b.t.Skip("LIO runs in the lab's emulated machine: its kernel modules are not here")
	}
	g := &lio{base: b}
	g.ports("127.0.0.1")
	disk := fmt.Sprint("disk", lios.Add(1)) // there is one kernel for all
	if b.o.Name == "" {
		g.name += "." + disk
	}
	g.tpg = targetFS + loginOf + "/" + g.name + "/tpgt_1"
	g.core = targetFS + "/core/fileio_0/" + disk
	if g.o.Slow {
		g.core = targetFS + "/core/iblock_0/" + disk
		g.disk = newSlowDisk(b.t, b.o.Size)
	}
	return g
}

func (g *lio) Kind() string         { return "LIO" }
func (g *lio) LUN() uint64          { return 0 }
func (g *lio) Params() bool         { return true }
func (g *lio) Process() *os.Process { return nil }

func (g *lio) Version() string {
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return "Linux " + strings.TrimSpace(string(release))
}

func (g *lio) set(path, value string) {
	g.t.Helper()
	if err := os.WriteFile(path, []byte(value), 0o600); err != nil {
		g.t.Fatalf("%s to %s: %v", value, path, err)
	}
}

func (g *lio) mkdir(path string) {
	g.t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		g.t.Fatal(err)
	}
}

func (g *lio) Start() {
	g.t.Helper()
	g.mkdir(g.core)
	if g.disk == nil {
		g.set(g.core+"/control", fmt.Sprintf("fd_dev_name=%s,fd_dev_size=%d", g.image, g.o.Size))
	} else {
		g.set(g.core+"/control", "udev_path="+g.disk.path)
	}
	g.set(g.core+"/wwn/vpd_unit_serial", "0123456789abcdef")
	g.set(g.core+"/enable", "1")
	if g.o.Thin {
		g.set(g.core+"/attrib/emulate_tpu", "1")
	}
	g.mkdir(g.tpg + "/lun/lun_0")
	if err := os.Symlink(g.core, g.tpg+"/lun/lun_0/link"); err != nil {
		g.t.Fatal(err)
	}
	for k, v := range map[string]string{"demo_mode_write_protect": "0", "generate_node_acls": "1", "cache_dynamic_acls": "1", "authentication": "0"} {
		if k == "authentication" && g.o.CHAP {
			v = "1"
		}
		g.set(g.tpg+"/attrib/"+k, v)
	}
	for k, v := range g.o.Params {
		if strings.HasSuffix(k, "Digest") {
			v += ",None"
		}
		g.set(g.tpg+"/param/"+k, v)
	}
	if g.o.CHAP {
		g.set(g.tpg+"/param/AuthMethod", "CHAP")
		g.set(g.tpg+"/auth/userid", User)
		g.set(g.tpg+"/auth/password", Secret)
	}
	if g.o.Mutual {
		g.set(g.tpg+"/auth/userid_mutual", MutualUser)
		g.set(g.tpg+"/auth/password_mutual", MutualSecret)
	}
	for _, p := range g.portals {
		g.mkdir(g.tpg + "/np/" + p)
	}
	g.set(g.tpg+"/enable", "1")
}

// Kill takes all of it away; the kernel resets the connections.
func (g *lio) Kill() {
	if _, err := os.Stat(g.tpg); err != nil {
		return
	}
	g.set(g.tpg+"/enable", "0")
	remove := func(paths ...string) {
		for _, p := range paths {
			if err := os.Remove(p); err != nil {
				g.t.Errorf("taking LIO away: %v", err)
			}
		}
	}
	for _, p := range g.portals {
		remove(g.tpg + "/np/" + p)
	}
	remove(g.tpg+"/lun/lun_0/link", g.tpg+"/lun/lun_0", g.tpg, filepath.Dir(g.tpg), g.core)
}

func (g *lio) Sessions() int {
	names, err := os.ReadFile(g.tpg + "/dynamic_sessions")
	if err != nil {
		g.t.Fatal(err)
	}
	return len(slices.DeleteFunc(strings.FieldsFunc(string(names), func(r rune) bool { return r == '\n' || r == 0 }), func(s string) bool { return s == "" }))
}

// Slow makes the next write to the disk take two seconds.
func (g *lio) Slow() { g.disk.slow.Store(true) }

// InLab tells whether LIO is here.
func InLab() bool {
	_, err := os.Stat(targetFS + loginOf)
	return err == nil
}
