// Command scale brings many maps up on one host and measures what they cost:
// time, memory, an idle core, and the time of an answer. It exits with 1 when a
// limit is missed.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/mpathd/mpathd/bench/proc"
	"github.com/mpathd/mpathd/internal/target"
)

// What one host must carry: see docs/performance.md.
const (
	scaleMaps    = 256
	scalePortals = 4
	scaleName    = "iqn.2026-11.example:scale"

	limitUp   = 10 * time.Second
	limitRSS  = 256 << 10 // KiB
	limitIdle = 0.03      // of a core
	limitShow = 100 * time.Millisecond
)

func main() {
	binary := flag.String("mpathd", "./mpathd", "the binary under test")
	idle := flag.Duration("idle", 20*time.Second, "how long to watch an idle daemon")
	serve := flag.Bool("target", false, "be the target")
	flag.Parse()
	err := error(nil)
	if *serve {
		err = serveScale()
	} else {
		host, _ := os.ReadFile("/proc/sys/kernel/osrelease")
		fmt.Printf("%s, %d cores, Linux %s, %s\n", time.Now().Format("2006-01-02"), runtime.NumCPU(), strings.TrimSpace(string(host)), runtime.Version())
		err = scale(*binary, *idle)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
}

// serveScale is the target's process: it prints the address of each portal, then
// hangs (0 to 3) or resumes (all) portals as lines on stdin say.
func serveScale() error {
	var lus []*target.LU
	for i := range scaleMaps {
		lu, err := target.NewLU(64<<20, 512, target.DefaultIdentity(fmt.Sprint("scale-", i)))
		if err != nil {
			return err
		}
		lus = append(lus, lu)
	}
	srv, err := target.New(target.Config{Targets: []*target.Target{{Name: scaleName, LUs: lus}}})
	if err != nil {
		return err
	}
	defer srv.Kill()
	var portals []*target.Portal
	for i := range scalePortals {
		p, err := srv.Listen(fmt.Sprintf("127.0.0.%d:0", 11+i))
		if err != nil {
			return err
		}
		portals = append(portals, p)
		fmt.Println(p.Addr())
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		if in.Text() == "resume" {
			srv.Resume()
		} else {
			portals[in.Text()[0]-'0'].Hang()
		}
	}
	return nil
}

// scaleRun holds the processes of one run.
type scaleRun struct {
	binary, dir string
	daemon      *exec.Cmd
	failed      []string
}

func (r *scaleRun) judge(what string, ok bool, format string, a ...any) {
	verdict := "ok"
	if !ok {
		verdict = "MISSED"
		r.failed = append(r.failed, what)
	}
	fmt.Printf("| %s | %s | %s |\n", what, fmt.Sprintf(format, a...), verdict)
}

// counts asks the daemon how many maps and paths are up.
func (r *scaleRun) counts() (maps, usable int) {
	out, _ := exec.Command(r.binary, "show", "maps", "--json", "--control", r.control()).Output()
	var s struct {
		Maps []struct{ Paths struct{ Usable int } }
	}
	json.Unmarshal(out, &s)
	for _, m := range s.Maps {
		usable += m.Paths.Usable
	}
	return len(s.Maps), usable
}

func (r *scaleRun) control() string { return filepath.Join(r.dir, "control.sock") }

// show times `mpathd show` in processes of its own: the median and the worst of
// rounds.
func (r *scaleRun) show(rounds int, args ...string) (median, worst time.Duration, err error) {
	var took []time.Duration
	for range rounds {
		began := time.Now()
		if out, err := exec.Command(r.binary, append(args, "--control", r.control())...).CombinedOutput(); err != nil {
			return 0, 0, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
		took = append(took, time.Since(began))
		time.Sleep(100 * time.Millisecond)
	}
	slices.Sort(took)
	return took[len(took)/2], took[len(took)-1], nil
}

// scale brings scaleMaps maps of scalePortals paths up and prints what they cost.
func scale(binary string, idle time.Duration) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	r := &scaleRun{binary: binary}
	if r.dir, err = os.MkdirTemp("", "scale-"); err != nil {
		return err
	}
	defer os.RemoveAll(r.dir)
	tgt := exec.Command(self, "-target")
	tgt.Stderr = os.Stderr
	orders, err := tgt.StdinPipe()
	if err != nil {
		return err
	}
	said, err := tgt.StdoutPipe()
	if err != nil {
		return err
	}
	if err := tgt.Start(); err != nil {
		return err
	}
	defer func() { tgt.Process.Kill(); tgt.Wait() }()
	var urls []string
	for in := bufio.NewScanner(said); len(urls) < scalePortals && in.Scan(); {
		urls = append(urls, "iscsi://"+in.Text()+"/"+scaleName)
	}
	r.daemon = exec.Command(binary, append([]string{"run", "--attach", "none", "--control", r.control(), "--nbd", "unix:" + filepath.Join(r.dir, "nbd.sock"),
		"--initiator", "iqn.2026-11.example:host", "--metrics", "127.0.0.1:0"}, urls...)...)
	log, err := os.Create(filepath.Join(r.dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	r.daemon.Stdout, r.daemon.Stderr = log, log
	began := time.Now()
	if err := r.daemon.Start(); err != nil {
		return err
	}
	pid := r.daemon.Process.Pid
	defer func() { r.daemon.Process.Signal(os.Interrupt); r.daemon.Wait() }()
	for {
		maps, usable := r.counts()
		if maps == scaleMaps && usable == scaleMaps*scalePortals {
			break
		}
		if time.Since(began) > time.Minute {
			b, _ := os.ReadFile(log.Name())
			return fmt.Errorf("after a minute %d maps with %d usable paths are up; the log ends with: %s", maps, usable, b[max(0, len(b)-2000):])
		}
		time.Sleep(100 * time.Millisecond)
	}
	up := time.Since(began)
	fmt.Printf("\n%d maps of %d paths, %d sessions, target in another process\n\n| what | measured | limit |\n|---|---|---|\n", scaleMaps, scalePortals, scaleMaps*scalePortals)
	r.judge("all up", up < limitUp, "%.1f s, %.1f s of CPU", up.Seconds(), proc.CPU(pid))
	time.Sleep(3 * time.Second) // checks and self-tests end
	before := proc.CPU(pid)
	time.Sleep(idle)
	used := (proc.CPU(pid) - before) / idle.Seconds()
	r.judge("idle", used < limitIdle, "%.1f %% of a core over %v", 100*used, idle)
	r.judge("memory idle", proc.Resident(pid) < limitRSS, "%d MiB, peak %d MiB", proc.Resident(pid)>>10, proc.Peak(pid)>>10)
	r.judge("descriptors and threads", true, "%d, %d", entries(pid, "fd"), entries(pid, "task"))
	for _, what := range []string{"topology", "maps", "paths"} {
		mid, worst, err := r.show(9, "show", what)
		if err != nil {
			return err
		}
		r.judge("show "+what, worst < limitShow, "median %d ms, worst %d ms", mid.Milliseconds(), worst.Milliseconds())
	}
	io.WriteString(orders, "0\n")
	hung := time.Now()
	time.Sleep(100 * time.Millisecond) // nothing noticed yet
	for _, when := range []string{"portal 1 blackholed, at once", "portal 1 blackholed, later"} {
		before, from := proc.CPU(pid), time.Now()
		mid, worst, err := r.show(15, "show", "topology")
		if err != nil {
			return err
		}
		r.judge("show topology, "+when, worst < limitShow, "median %d ms, worst %d ms; the daemon used %.1f %% of a core", mid.Milliseconds(), worst.Milliseconds(), 100*(proc.CPU(pid)-before)/time.Since(from).Seconds())
		time.Sleep(10 * time.Second)
	}
	time.Sleep(time.Until(hung.Add(75 * time.Second))) // dead paths have become patient
	before = proc.CPU(pid)
	time.Sleep(idle)
	r.judge("idle, portal 1 blackholed", true, "%.1f %% of a core over %v", 100*(proc.CPU(pid)-before)/idle.Seconds(), idle)
	if _, usable := r.counts(); usable != scaleMaps*(scalePortals-1) {
		r.judge("paths down", false, "%d usable", usable)
	}
	io.WriteString(orders, "resume\n")
	began = time.Now()
	for {
		if _, usable := r.counts(); usable == scaleMaps*scalePortals {
			break
		}
		if time.Since(began) > 2*time.Minute {
			return errors.New("the paths of the portal that came back do not come up")
		}
		time.Sleep(100 * time.Millisecond)
	}
	r.judge("all up again", time.Since(began) < limitUp, "%.1f s", time.Since(began).Seconds())
	r.judge("memory at the end", proc.Peak(pid) < limitRSS, "%d MiB, peak %d MiB", proc.Resident(pid)>>10, proc.Peak(pid)>>10)
	b, _ := os.ReadFile(log.Name())
	r.judge("log", true, "%d lines, %d KiB", bytes.Count(b, []byte("\n")), len(b)>>10)
	if len(r.failed) > 0 {
		return fmt.Errorf("missed: %s", strings.Join(r.failed, ", "))
	}
	return nil
}

// entries counts what a process has in a directory of /proc.
func entries(pid int, dir string) int {
	list, _ := os.ReadDir(fmt.Sprintf("/proc/%d/%s", pid, dir))
	return len(list)
}
