// Package realtarget runs iSCSI targets that others wrote, for tests: tgtd,
// istgt and gotgt as processes of their own, and LIO where the kernel has it.
// Each serves one disk as one logical unit of one target behind one or more
// portals of one portal group.
package realtarget

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Options say how a target is set up; what a target cannot do it ignores,
// unless Supports says otherwise.
type Options struct {
	Portals int               // default 1
	Size    int64             // bytes of the disk, default 64 MiB
	CHAP    bool              // demand CHAP of User, with Secret
	Mutual  bool              // prove itself as MutualUser, with MutualSecret
	Params  map[string]string // operational keys of RFC 7143 as the target's own configuration sets them
	Thin    bool              // UNMAP, where the target has it
	Slow    bool              // make Slow work
	Timeout int               // seconds that istgt waits for the data of a write, default 30
	Image   string            // the disk's file, default one that is gone with the test
	Name    string            // iSCSI name, default one in lower case
}

// Credentials of targets with Options.CHAP.
const (
	User         = "hannibal"
	Secret       = "over-the-alps"
	MutualUser   = "storage"
	MutualSecret = "built-in-a-day"
)

// Target is a target that runs, or did until Kill.
type Target interface {
	Kind() string
	Version() string
	Name() string      // the target's iSCSI name
	Portals() []string // host:port
	LUN() uint64
	Params() bool  // whether Options.Params can be set at all
	Start()        // again, after Kill
	Kill()         // without a goodbye to anybody
	Sessions() int // how many sessions the target says it has, -1 where it does not say
	Slow()         // the next write takes the backend two seconds, while others overtake it if the target lets them
	Process() *os.Process
}

// Kinds are those of Start. LIO is the kernel's: it needs root and its modules.
var Kinds = []string{"tgtd", "istgt", "gotgt", "LIO"}

// Start runs a target until the test ends. The test is skipped where the target
// is not installed, or fails if CI=true says that it must be.
func Start(t testing.TB, kind string, o Options) Target {
	t.Helper()
	if o.Portals == 0 {
		o.Portals = 1
	}
	if o.Size == 0 {
		o.Size = 64 << 20
	}
	if o.Timeout == 0 {
		o.Timeout = 30
	}
	b := base{t: t, o: o, name: "iqn.2009-01.nl.pref:storage." + strings.ToLower(kind), image: o.Image}
	if o.Name != "" {
		b.name = o.Name
	}
	if b.image == "" {
		b.image = filepath.Join(t.TempDir(), "image")
		f, err := os.OpenFile(b.image, os.O_CREATE|os.O_RDWR, 0o600)
		if err == nil {
			err = f.Truncate(o.Size)
			f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var g Target
	switch kind {
	case "tgtd":
		g = newTgtd(b)
	case "istgt":
		g = newIstgt(b)
	case "gotgt":
		g = newGotgt(b)
	case "LIO":
		g = newLIO(b)
	default:
		t.Fatalf("no target %q", kind)
	}
	g.Start()
	t.Cleanup(g.Kill)
	return g
}

// URL is the path to the target's unit through a portal, or a proxy for one.
func URL(g Target, portal string) string {
	return fmt.Sprintf("iscsi://%s/%s/%d", portal, g.Name(), g.LUN())
}

// base is what targets have in common.
type base struct {
	t       testing.TB
	o       Options
	name    string
	image   string
	portals []string
	cmd     *exec.Cmd
	slow    string // flag file of slowWrites
	env     []string
}

func (b *base) Name() string      { return b.name }
func (b *base) Portals() []string { return b.portals }

// Process is that of a target that is one.
func (b *base) Process() *os.Process { return b.cmd.Process }

func (b *base) ports(host string) {
	for range b.o.Portals {
		b.portals = append(b.portals, fmt.Sprintf("%s:%d", host, FreePort(b.t)))
	}
}

// run starts the target's process and waits until all its portals listen.
func (b *base) run(program string, args ...string) {
	b.t.Helper()
	log, err := os.OpenFile(filepath.Join(b.t.TempDir(), filepath.Base(program)+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		b.t.Fatal(err)
	}
	defer log.Close()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		b.cmd = exec.Command(program, args...)
		b.cmd.Env = append(os.Environ(), b.env...)
		b.cmd.Stdout, b.cmd.Stderr = log, log
		b.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := b.cmd.Start(); err != nil {
			b.t.Fatal(err)
		}
		gone := make(chan struct{})
		go func() { b.cmd.Wait(); close(gone) }()
		if b.listens(gone, end) {
			return
		}
		b.cmd.Process.Kill()
		<-gone
		if time.Now().After(end) {
			said, _ := os.ReadFile(log.Name())
			b.t.Fatalf("%s does not come up:\n%s", program, said)
		}
	}
}

// listens waits for the portals; false when the process ended before, as it
// does while an old socket still has its port.
func (b *base) listens(gone <-chan struct{}, end time.Time) bool {
	for _, p := range b.portals {
		for {
			c, err := net.Dial("tcp", p)
			if err == nil {
				c.Close()
				break
			}
			select {
			case <-gone:
				return false
			case <-time.After(20 * time.Millisecond):
			}
			if time.Now().After(end) {
				return false
			}
		}
	}
	return true
}

// Kill ends the process at once, stopped or not.
func (b *base) Kill() {
	if b.cmd != nil && b.cmd.Process != nil {
		b.cmd.Process.Kill()
		for b.cmd.Process.Signal(syscall.Signal(0)) == nil {
			time.Sleep(time.Millisecond)
		}
	}
}

// Need skips the test, or fails it if CI=true, where a tool is missing.
func Need(t testing.TB, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is missing: run `make deps`", tool)
			}
			t.Skipf("%s is missing: run `make deps`", tool)
		}
	}
}

// given are the ports that FreePort gave out: many targets start at once, and
// a port stays free until its target listens.
var given sync.Map

// FreePort is a port of 127.0.0.1 that nobody listens on, and another one each
// time in this process. It is none of those that the kernel gives to outgoing
// connections, from 32768 on: one of these might take it before its target does.
func FreePort(t testing.TB) int {
	t.Helper()
	for range 1000 {
		port := 12000 + rand.IntN(20000)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		l.Close()
		if _, taken := given.LoadOrStore(port, true); !taken {
			return port
		}
	}
	t.Fatal("no free port")
	return 0
}

func command(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}
