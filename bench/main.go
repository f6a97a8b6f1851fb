// Command bench loads mpathd and qemu-nbd (with its libiscsi driver) in turns,
// on the same target in one run, with fio's nbd engine, and prints a table of
// ratios. Compare figures inside one run only.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
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
}

type server struct {
	name, uri string
	cmd       *exec.Cmd
	results   map[string][]result
}

func main() {
	binary := flag.String("mpathd", "./mpathd", "the binary under test")
	seconds := flag.Int("seconds", 3, "of each run")
	rounds := flag.Int("rounds", 2, "runs of each row and server")
	flag.Parse()
	host, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	fmt.Printf("%s, %d cores, Linux %s, %s; %d runs of %d s per cell, in turns, means\n", time.Now().Format("2006-01-02"),
		runtime.NumCPU(), strings.TrimSpace(string(host)), runtime.Version(), *rounds, *seconds)
	for _, kind := range []string{"tgtd", "built-in target"} {
		if err := compare(kind, *binary, *seconds, *rounds); err != nil {
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
		for _, a := range []string{"--op new --mode target --tid 1 -T " + iqn, "--op new --mode logicalunit --tid 1 --lun 1 -b " + image, "--op bind --mode target --tid 1 -I ALL"} {
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

func compare(kind, binary string, seconds, rounds int) error {
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
	ours, theirs := filepath.Join(dir, "m.sock"), filepath.Join(dir, "q.sock")
	servers := []*server{
		{name: "mpathd", uri: "nbd+unix:///bench?socket=" + ours, results: map[string][]result{},
			cmd: exec.Command(binary, "run", "--attach", "none", "--alias", "bench", "--control", filepath.Join(dir, "c.sock"), "--nbd", "unix:"+ours, "--initiator", "iqn.2026-11.example:m", url)},
		{name: "qemu-nbd", uri: "nbd+unix:///bench?socket=" + theirs, results: map[string][]result{},
			cmd: exec.Command("qemu-nbd", "-f", "raw", "-k", theirs, "-x", "bench", "-t", "-e", "8", "--cache=none", url)},
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
		for range rounds {
			for _, s := range servers {
				res, err := load(s, r, seconds)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", s.name, r.name, err)
				}
				s.results[r.name] = append(s.results[r.name], res)
			}
		}
	}
	fmt.Printf("\n### On one path to %s\n\n| load | mpathd IOPS | qemu-nbd IOPS | ratio | MiB/s | ratio | p50 us | ratio | p99 us, both | p99.9 us, both | CPU us per I/O | ratio |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n", kind)
	for _, r := range rows {
		a, b := mean(servers[0].results[r.name]), mean(servers[1].results[r.name])
		fmt.Printf("| %s | %.0f | %.0f | %.2f | %.0f | %.2f | %.0f | %.2f | %.0f, %.0f | %.0f, %.0f | %.1f | %.2f |\n", r.name, a.iops, b.iops, a.iops/b.iops,
			a.mib, a.mib/b.mib, a.p50, a.p50/b.p50, a.p99, b.p99, a.p999, b.p999, a.cpu, a.cpu/b.cpu)
	}
	for _, s := range servers {
		fmt.Printf("\nPeak memory of %s: %d MiB.", s.name, peak(s.cmd.Process.Pid)>>10)
	}
	fmt.Println()
	return nil
}

// mean is the mean of the runs.
func mean(rs []result) result {
	if len(rs) == 1 {
		return rs[0]
	}
	var m result
	for _, r := range rs {
		n := float64(len(rs))
		m.iops, m.mib, m.cpu, m.p50, m.p99, m.p999 = m.iops+r.iops/n, m.mib+r.mib/n, m.cpu+r.cpu/n, m.p50+r.p50/n, m.p99+r.p99/n, m.p999+r.p999/n
	}
	return m
}

func load(s *server, r row, seconds int) (result, error) {
	before := cpu(s.cmd.Process.Pid)
	out, err := exec.Command("fio", "--name=b", "--ioengine=nbd", "--uri="+s.uri, "--rw="+r.rw, "--bs="+r.bs, fmt.Sprint("--iodepth=", r.depth),
		"--size=512m", "--time_based", fmt.Sprint("--runtime=", seconds), "--randrepeat=0", "--norandommap", "--output-format=json").Output()
	if err != nil {
		return result{}, fmt.Errorf("fio: %w: %s", err, out)
	}
	used := cpu(s.cmd.Process.Pid) - before
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

// cpu is the time a process used, seconds.
func cpu(pid int) float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 13 {
		return 0
	}
	u, _ := strconv.ParseFloat(f[11], 64)
	k, _ := strconv.ParseFloat(f[12], 64)
	return (u + k) / 100
}

// peak is a process's peak memory, KiB.
func peak(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, _ := strconv.Atoi(strings.Fields(v)[0])
			return n
		}
	}
	return 0
}
