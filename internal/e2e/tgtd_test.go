package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/faultnet"
	"github.com/mpathd/mpathd/internal/realtarget"
)

// tgtd is one target daemon that exports an image with a fixed identity.
type tgtd struct {
	t       *testing.T
	control int
	port    int
	image   string
	iqn     string
	cmd     *exec.Cmd
	env     []string
	params  string
	block   int // logical block in bytes; 0: tgtd's default
}

func (d *tgtd) adm(args ...string) {
	d.t.Helper()
	out, err := exec.Command("tgtadm", append([]string{"-C", fmt.Sprint(d.control), "--lld", "iscsi"}, args...)...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("tgtadm %v: %v: %s", args, err, out)
	}
}

func (d *tgtd) start() {
	d.t.Helper()
	log, err := os.CreateTemp(d.t.TempDir(), "tgtd")
	if err != nil {
		d.t.Fatal(err)
	}
	defer log.Close()
	d.t.Cleanup(func() {
		if said, _ := os.ReadFile(log.Name()); d.t.Failed() {
			d.t.Logf("tgtd at port %d says:\n%s", d.port, said)
		}
	})
	d.cmd = exec.Command("tgtd", "-f", "-C", fmt.Sprint(d.control), "--iscsi", fmt.Sprintf("portal=127.0.0.1:%d", d.port))
	d.cmd.Env = append(os.Environ(), d.env...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // tgtd does not hear SIGTERM
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if exec.Command("tgtadm", "-C", fmt.Sprint(d.control), "--lld", "iscsi", "--op", "show", "--mode", "sys").Run() == nil {
			break
		}
		if time.Now().After(end) {
			d.t.Fatal("tgtd does not come up")
		}
	}
	c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", d.port))
	if err != nil {
		d.t.Fatalf("tgtd does not listen: %v", err)
	}
	c.Close()
	d.adm("--op", "new", "--mode", "target", "--tid", "1", "-T", d.iqn)
	lu := []string{"--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", d.image}
	if d.block != 0 {
		lu = append(lu, "--blocksize", fmt.Sprint(d.block))
	}
	d.adm(lu...)
	d.adm("--op", "update", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "--params",
		"scsi_id=149455403f160c00,scsi_sn=149455403f160c00,vendor_id=IET,product_id=VIRTUAL-DISK"+d.params)
	d.adm("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")
}

func (d *tgtd) kill() {
	d.cmd.Process.Signal(syscall.SIGCONT)
	d.cmd.Process.Kill()
	d.cmd.Wait()
}

func (d *tgtd) url(address string) string { return "iscsi://" + address + "/" + d.iqn + "/1" }

var binary string

func TestMain(m *testing.M) {
	if binary = os.Getenv("MPATHD"); binary != "" { // in the lab's machine, where there is no compiler
		os.Exit(m.Run())
	}
	dir, err := os.MkdirTemp("", "mpathd-e2e-")
	if err != nil {
		panic(err)
	}
	binary = filepath.Join(dir, "mpathd")
	if out, err := exec.Command("go", "build", "-o", binary, "../../cmd/mpathd").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building mpathd: %v: %s\n", err, out)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// stack is two tgtd on one image behind fault proxies, and mpathd over both.
type stack struct {
	t       *testing.T
	targets [2]*tgtd
	proxies [2]*faultnet.Proxy
	control string
	sock    string // of NBD
	uri     string
	cmd     *exec.Cmd
	log     bytes.Buffer
}

func newStack(t *testing.T) *stack {
	t.Helper()
	return newStackWith(t, "")
}

// newStackWith is newStack with more parameters of tgtd's unit, and more
// arguments of mpathd.
func newStackWith(t *testing.T, params string, more ...string) *stack {
	t.Helper()
	realtarget.Need(t, "tgtd", "tgtadm")
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(256 << 20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	sock := filepath.Join(dir, "nbd.sock")
	s := &stack{t: t, control: filepath.Join(dir, "control.sock"), sock: sock}
	s.uri = "nbd+unix:///xensan?socket=" + sock
	args := []string{"run", "--attach", "none", "--control", s.control, "--nbd", "unix:" + sock, "--alias", "xensan",
		"--initiator", "iqn.2006-07.com.example.intra:hannibal", "--polling-interval", "1s", "--failback", "immediate"}
	args = append(args, more...)
	for i := range s.targets {
		port := realtarget.FreePort(t)
		d := &tgtd{t: t, control: port, port: port, image: image, iqn: fmt.Sprintf("iqn.2009-01.nl.pref:storage.xensan%d", i+1), params: params}
		d.start()
		t.Cleanup(d.kill)
		p, err := faultnet.New("127.0.0.1:0", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		s.targets[i], s.proxies[i] = d, p
		args = append(args, d.url(p.Addr()))
	}
	s.cmd = exec.Command(binary, args...)
	s.cmd.Stderr = &s.log
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.cmd.Process.Signal(syscall.SIGTERM)
		if err := s.cmd.Wait(); err != nil {
			t.Errorf("mpathd after SIGTERM: %v", err)
		}
		if t.Failed() {
			t.Logf("mpathd says:\n%s", s.log.String())
		}
	})
	s.await("both paths up", func(m daemon.Maps) bool { return len(m.Maps) == 1 && m.Maps[0].Paths.Usable == 2 })
	return s
}

// maps is what `show maps --json` shows; a process for each look would cost more
// than what the tests wait for.
func (s *stack) maps() (m daemon.Maps) {
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", s.control)
	}}}
	rs, err := client.Get("http://mpathd/maps")
	if err != nil {
		return daemon.Maps{}
	}
	defer rs.Body.Close()
	if json.NewDecoder(rs.Body).Decode(&m) != nil {
		return daemon.Maps{}
	}
	return m
}

// patience is how long a test waits for what should come: in the emulated machine
// all goes slowly at times.
const patience = 2 * time.Minute

func (s *stack) await(what string, ok func(daemon.Maps) bool) time.Duration {
	s.t.Helper()
	began := time.Now()
	for time.Since(began) < patience {
		if ok(s.maps()) {
			return time.Since(began)
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.t.Fatalf("%s: not within %v: %+v", what, patience, s.maps())
	return 0
}

// tgtd makes an NAA designator of the scsi_id parameter; it outranks the T10 one.
const wantWWID = "36000000000000000149455403f160c00"

// TestVerifiedWritesSurvive cuts the serving path in every way while fio
// writes and verifies: no error, no mismatch, and the path serves again.
func TestVerifiedWritesSurvive(t *testing.T) {
	realtarget.Need(t, "fio")
	for _, c := range []struct {
		name      string
		cut, mend func(s *stack)
	}{
		{"killed", func(s *stack) { s.targets[0].kill() }, func(s *stack) { s.targets[0].start() }},
		{"stopped", func(s *stack) { s.targets[0].cmd.Process.Signal(syscall.SIGSTOP) }, func(s *stack) { s.targets[0].cmd.Process.Signal(syscall.SIGCONT) }},
		{"reset", func(s *stack) { s.proxies[0].Reset() }, func(s *stack) { s.proxies[0].Heal() }},
		{"blackholed", func(s *stack) { s.proxies[0].Blackhole() }, func(s *stack) { s.proxies[0].Heal() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newStack(t)
			// Each block is written once, so that a late copy of a write changes nothing.
			fio := exec.Command("fio", "--name=v", "--ioengine=nbd", "--uri="+s.uri, "--rw=randwrite", "--bs=4k-64k", "--iodepth=32", "--size=200m",
				"--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--rate=24m", "--output-format=json")
			fio.Dir = t.TempDir()
			var out, errOut bytes.Buffer
			fio.Stdout, fio.Stderr = &out, &errOut
			if err := fio.Start(); err != nil {
				t.Fatal(err)
			}
			s.await("I/O on the first path", func(m daemon.Maps) bool {
				p := m.Maps[0].Groups[0].Paths[0]
				return p.Serving && p.IOs > 0
			})
			time.Sleep(time.Second)
			c.cut(s)
			if c.name != "reset" {
				s.await("the second path serving while the first is cut", func(m daemon.Maps) bool { return m.Maps[0].Groups[1].Paths[0].Serving })
			}
			time.Sleep(2 * time.Second)
			c.mend(s)
			if err := fio.Wait(); err != nil {
				t.Fatalf("fio: %v\n%s%s", err, out.String(), errOut.String())
			}
			var r struct {
				Jobs []struct {
					Error int
					Write struct {
						LatNs struct{ Max float64 } `json:"lat_ns"`
					}
				}
			}
			if err := json.Unmarshal(out.Bytes()[bytes.IndexByte(out.Bytes(), '{'):], &r); err != nil || len(r.Jobs) != 1 || r.Jobs[0].Error != 0 {
				t.Fatalf("fio's report: %v %s", err, out.String())
			}
			back := s.await("first path serving again", func(m daemon.Maps) bool {
				p := m.Maps[0].Groups[0].Paths[0]
				return p.State == "up" && p.Serving
			})
			longest := time.Duration(r.Jobs[0].Write.LatNs.Max)
			t.Logf("%s: longest write %v, path back %v after the load ended", c.name, longest.Round(time.Millisecond), back.Round(time.Millisecond))
			if longest > 10*time.Second {
				t.Errorf("longest write %v: far beyond the failover time", longest)
			}
			if m := s.maps(); m.Maps[0].WWID != wantWWID {
				t.Errorf("WWID %s, scsi_id prints %s", m.Maps[0].WWID, wantWWID)
			}
		})
	}
}

// TestClients runs clients nobody here wrote against the export.
func TestClients(t *testing.T) {
	t.Parallel()
	realtarget.Need(t, "nbdinfo", "nbdcopy", "qemu-io", "qemu-img")
	s := newStack(t)
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	info := run("nbdinfo", s.uri)
	for _, want := range []string{"export-size: 268435456", "can_flush: true", "can_fua: true", "can_zero: true", "can_multi_conn: true", "block_size_minimum: 512"} {
		if !strings.Contains(info, want) {
			t.Errorf("nbdinfo misses %q:\n%s", want, info)
		}
	}
	if l := run("nbdinfo", "--list", strings.Replace(s.uri, "/xensan", "", 1)); !strings.Contains(l, "xensan") {
		t.Errorf("nbdinfo --list: %s", l)
	}
	io := run("qemu-io", "-f", "raw", "-c", "write -P 7 -f 0 64k", "-c", "read -P 7 0 64k", "-c", "write -z 16k 16k", "-c", "read -P 0 16k 16k",
		"-c", "discard 1M 1M", "-c", "aio_write -P 9 3M 8M", "-c", "aio_flush", "-c", "read -P 9 3M 8M", "-c", "flush", s.uri)
	if strings.Contains(io, "failed") || strings.Contains(io, "error") {
		t.Errorf("qemu-io: %s", io)
	}
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	data := make([]byte, 256<<20)
	for i := range data {
		data[i] = byte(i>>12) ^ byte(i*7)
	}
	if err := os.WriteFile(src, data, 0o600); err != nil {
		t.Fatal(err)
	}
	run("nbdcopy", "--connections=4", "--requests=64", "--flush", src, s.uri)
	run("nbdcopy", "--connections=4", s.uri, dst)
	run("cmp", src, dst)
	if shown := run(binary, "show", "maps", "--json", "--control", s.control); !strings.Contains(shown, wantWWID) {
		t.Errorf("show maps --json: %s", shown)
	}
	if top := run(binary, "show", "topology", "--control", s.control); !strings.Contains(top, "xensan ("+wantWWID+")") || !strings.Contains(top, "status=active") {
		t.Errorf("show topology:\n%s", top)
	}
	disc := run(binary, "discover", s.proxies[0].Addr())
	if !strings.Contains(disc, wantWWID) {
		t.Errorf("discover: %s", disc)
	}
	path := s.maps().Maps[0].Groups[0].Paths[0].Name
	run(binary, "fail", path, "--control", s.control)
	s.await("path failed by hand", func(m daemon.Maps) bool {
		return m.Maps[0].Groups[0].Paths[0].State == "down" && m.Maps[0].Groups[1].State == "active"
	})
	run(binary, "reinstate", path, "--control", s.control)
	s.await("path reinstated", func(m daemon.Maps) bool { return m.Maps[0].Groups[0].Paths[0].Serving })
}

// TestRefusals: what is wrong gets one line and the right exit code.
func TestRefusals(t *testing.T) {
	run := func(args ...string) (string, int) {
		cmd := exec.Command(binary, args...)
		out, _ := cmd.CombinedOutput()
		return string(out), cmd.ProcessState.ExitCode()
	}
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"run", "http://x"}, 2, "want iscsi://"},
		{[]string{"run", "--config", "/dev/null/x"}, 1, "configuration /dev/null/x"},
		{[]string{"run", "--no-path-retry", "x", "iscsi://127.0.0.1/iqn.a:b/0"}, 2, "want queue, fail or a number"},
		{[]string{"show", "maps", "--control", "/nonexistent/c.sock"}, 1, "is `mpathd run` up"},
		{[]string{"wwid", fmt.Sprintf("iscsi://127.0.0.1:%d/iqn.a:b/0", realtarget.FreePort(t))}, 1, "connection refused"},
	} {
		out, code := run(c.args...)
		if code != c.code || !strings.Contains(out, c.want) || strings.Count(out, "\n") > 2 {
			t.Errorf("mpathd %v: exit %d, want %d with %q:\n%s", c.args, code, c.code, c.want, out)
		}
	}
}
