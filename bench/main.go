// Command bench loads mpathd and a peer in turns, on the same target in one run,
// with fio's nbd engine, and prints a table of ratios. The peer is qemu-nbd (with
// its libiscsi driver) or another build of mpathd. Compare figures inside one run
// only.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mpathd/mpathd/bench/proc"
)

type row struct {
	name, rw, bs string
	depth        int
}

var rows = []row{
	{"4 KiB read, depth 1", "randread", "4k", 1}, {"4 KiB read, depth 8", "randread", "4k", 8}, {"4 KiB read, depth 32", "randread", "4k", 32},
	{"4 KiB write, depth 1", "randwrite", "4k", 1}, {"4 KiB write, depth 8", "randwrite", "4k", 8}, {"4 KiB write, depth 32", "randwrite", "4k", 32},
	{"64 KiB mixed, depth 8", "randrw", "64k", 8}, {"1 MiB read, depth 4", "read", "1m", 4}, {"1 MiB write, depth 4", "write", "1m", 4},
}

// result of one fio run against one server.
type result struct {
	iops, mib, cpu float64 // cpu: microseconds of the server process per I/O
	p50, p99, p999 float64 // microseconds
	target         float64 // microseconds of the target's process per I/O
}

type server struct {
	name, uri string
	cmd       *exec.Cmd
	results   map[string][]result
}

func main() {
	binary := flag.String("mpathd", "./mpathd", "the binary under test")
	peer := flag.String("peer", "qemu-nbd", "what to compare with: qemu-nbd, or the path of another mpathd")
	peerFlags := flag.String("peer-flags", "", "flags of `mpathd run` that only the other mpathd gets, such as \"--data-digest crc32c\"")
	seconds := flag.Float64("seconds", 1.5, "of each run")
	rounds := flag.Int("rounds", 5, "runs of each row and server")
	only := flag.String("rows", "", "regular expression of the rows to run")
	alone := flag.Bool("sessions", false, "sessions alone, with digests and without, instead of the whole stack")
	idlers := flag.Int("idle", 0, "that many idle sessions: memory and CPU of the initiator alone, instead of load")
	idleFor := flag.Int("idle-seconds", 30, "how long to look at idle sessions")
	kinds := flag.String("targets", "tgtd,built-in target", "targets to run on")
	flag.Parse()
	wanted, err := regexp.Compile(*only)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	unwanted := func(r row) bool { return !wanted.MatchString(r.name) }
	rows, sessionRows = slices.DeleteFunc(rows, unwanted), slices.DeleteFunc(sessionRows, unwanted)
	if *idlers > 0 {
		if err := idle(*binary, *idlers, *idleFor); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	host, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	fmt.Printf("%s, %d cores, Linux %s, %s; %d runs of %g s per cell and server, in turns: medians, and the ratios' median (lowest to highest) turn by turn\n", time.Now().Format("2006-01-02"),
		runtime.NumCPU(), strings.TrimSpace(string(host)), runtime.Version(), *rounds, *seconds)
	for _, kind := range strings.Split(*kinds, ",") {
		run := func() error { return compare(kind, *binary, *peer, strings.Fields(*peerFlags), *seconds, *rounds) }
		if *alone {
			run = func() error { return sessions(kind, *binary, *seconds, *rounds) }
		}
		if err := run(); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
	}
}

func freePort() int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// startTarget starts the target and returns its URL and process.
func startTarget(kind, binary, dir string) (string, *exec.Cmd, error) {
	port := freePort()
	const iqn = "iqn.2026-11.example:bench"
	if kind == "tgtd" {
		image := filepath.Join(dir, "image")
		if err := os.WriteFile(image, make([]byte, 512<<20), 0o600); err != nil {
			return "", nil, err
		}
		ctl := strconv.Itoa(2000 + port%20000)
		cmd := exec.Command("tgtd", "-f", "-C", ctl, "--iscsi", fmt.Sprint("portal=127.0.0.1:", port))
		if err := cmd.Start(); err != nil {
			return "", nil, err
		}
		time.Sleep(time.Second)
		for _, a := range []string{"--op new --mode target --tid 1 -T " + iqn, "--op new --mode logicalunit --tid 1 --lun 1 -b " + image,
			"--op update --mode target --tid 1 -n HeaderDigest -v CRC32C,None", "--op update --mode target --tid 1 -n DataDigest -v CRC32C,None", "--op bind --mode target --tid 1 -I ALL"} {
			if out, err := exec.Command("tgtadm", append([]string{"-C", ctl, "--lld", "iscsi"}, strings.Fields(a)...)...).CombinedOutput(); err != nil {
				return "", cmd, fmt.Errorf("tgtadm: %w: %s", err, out)
			}
		}
		return fmt.Sprintf("iscsi://127.0.0.1:%d/%s/1", port, iqn), cmd, nil
	}
	cmd := exec.Command(binary, "target", "--size", "512M", "--portal", fmt.Sprint("127.0.0.1:", port), "--target", iqn)
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	time.Sleep(time.Second)
	return fmt.Sprintf("iscsi://127.0.0.1:%d/%s/0", port, iqn), cmd, nil
}

func compare(kind, binary, peer string, peerFlags []string, seconds float64, rounds int) error {
	dir, err := os.MkdirTemp("/dev/shm", "bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	url, tgt, err := startTarget(kind, binary, dir)
	if tgt != nil {
		defer func() { tgt.Process.Kill(); tgt.Wait() }()
	}
	if err != nil {
		return err
	}
	servers := []*server{mpathd(binary, "mpathd", dir, url, nil)}
	if peer == "qemu-nbd" {
		sock := filepath.Join(dir, "q.sock")
		servers = append(servers, &server{name: peer, uri: "nbd+unix:///bench?socket=" + sock, results: map[string][]result{},
			cmd: exec.Command("qemu-nbd", "-f", "raw", "-k", sock, "-x", "bench", "-t", "-e", "8", "--cache=none", url)})
	} else {
		servers = append(servers, mpathd(peer, "peer", dir, url, peerFlags))
	}
	for _, s := range servers {
		if err := s.cmd.Start(); err != nil {
			return err
		}
		defer func() { s.cmd.Process.Kill(); s.cmd.Wait() }()
	}
	time.Sleep(2 * time.Second)
	if _, err := load(servers[0], row{"fill", "write", "1m", 4}, 2); err != nil {
		return err
	}
	for _, r := range rows {
		for i := range rounds {
			for j := range servers {
				s := servers[(i+j)%2] // neither always has the same neighbour
				res, err := load(s, r, seconds)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", s.name, r.name, err)
				}
				s.results[r.name] = append(s.results[r.name], res)
			}
		}
	}
	fmt.Printf("\n### On one path to %s, against %s\n\n| load | IOPS, both | ratio | MiB/s, both | p50 us, both | ratio | p99 us, both | p99.9 us, both | CPU us per I/O, both | ratio |\n|---|---|---|---|---|---|---|---|---|---|\n", kind, servers[1].name)
	for _, r := range rows {
		a, b := servers[0].results[r.name], servers[1].results[r.name]
		both := func(f func(result) float64, digits int) string {
			return fmt.Sprintf("%.*f, %.*f", digits, median(a, f), digits, median(b, f))
		}
		iops, p50, cpu := func(r result) float64 { return r.iops }, func(r result) float64 { return r.p50 }, func(r result) float64 { return r.cpu }
		fmt.Printf("| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |\n", r.name, both(iops, 0), ratio(a, b, iops), both(func(r result) float64 { return r.mib }, 0), both(p50, 0), ratio(a, b, p50),
			both(func(r result) float64 { return r.p99 }, 0), both(func(r result) float64 { return r.p999 }, 0), both(cpu, 1), ratio(a, b, cpu))
	}
	for _, s := range servers {
		fmt.Printf("\nPeak memory of %s: %d MiB.", s.name, proc.Peak(s.cmd.Process.Pid)>>10)
	}
	fmt.Println()
	return nil
}

// mpathd is a build of mpathd, with one path.
func mpathd(binary, name, dir, url string, flags []string) *server {
	sock := filepath.Join(dir, name+".sock")
	return &server{name: name, uri: "nbd+unix:///bench?socket=" + sock, results: map[string][]result{},
		cmd: exec.Command(binary, append([]string{"run", "--attach", "none", "--alias", "bench", "--control", filepath.Join(dir, name+".ctl"), "--nbd", "unix:" + sock, "--initiator", "iqn.2026-11.example:" + name, url}, flags...)...)}
}

func median(rs []result, f func(result) float64) float64 {
	v := make([]float64, 0, len(rs))
	for _, r := range rs {
		v = append(v, f(r))
	}
	slices.Sort(v)
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// ratio compares turn by turn, so that what slows the machine down for a while
// slows both down.
func ratio(a, b []result, f func(result) float64) string {
	v := make([]float64, 0, len(a))
	for i := range a {
		v = append(v, f(a[i])/f(b[i]))
	}
	slices.Sort(v)
	return fmt.Sprintf("%.2f (%.2f to %.2f)", (v[(len(v)-1)/2]+v[len(v)/2])/2, v[0], v[len(v)-1])
}

func load(s *server, r row, seconds float64) (result, error) {
	before := proc.CPU(s.cmd.Process.Pid)
	out, err := exec.Command("fio", "--name=b", "--ioengine=nbd", "--uri="+s.uri, "--rw="+r.rw, "--bs="+r.bs, fmt.Sprint("--iodepth=", r.depth),
		"--size=512m", "--time_based", fmt.Sprintf("--runtime=%.0fms", seconds*1000), "--randrepeat=0", "--norandommap", "--output-format=json").Output()
	if err != nil {
		return result{}, fmt.Errorf("fio: %w: %s", err, out)
	}
	used := proc.CPU(s.cmd.Process.Pid) - before
	type dir struct {
		IOPS   float64 `json:"iops"`
		Bytes  float64 `json:"bw_bytes"`
		Total  float64 `json:"total_ios"`
		ClatNs struct {
			Percentile map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var f struct {
		Jobs []struct{ Read, Write dir }
	}
	i := strings.IndexByte(string(out), '{')
	if err := json.Unmarshal(out[max(i, 0):], &f); err != nil || len(f.Jobs) == 0 {
		return result{}, fmt.Errorf("fio's report: %w", err)
	}
	j := f.Jobs[0]
	main := j.Read
	if j.Read.Total == 0 {
		main = j.Write
	}
	p := main.ClatNs.Percentile
	return result{iops: j.Read.IOPS + j.Write.IOPS, mib: (j.Read.Bytes + j.Write.Bytes) / (1 << 20), cpu: used * 1e6 / (j.Read.Total + j.Write.Total),
		p50: p["50.000000"] / 1e3, p99: p["99.000000"] / 1e3, p999: p["99.900000"] / 1e3}, nil
}
