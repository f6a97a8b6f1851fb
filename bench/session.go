package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/mpathd/mpathd/bench/proc"
	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// variant is one way to set up a session; the first is what others are compared with.
type variant struct {
	name  string
	setUp func(c *initiator.Config)
	s     *initiator.Session
}

var sessionRows = []row{
	{"1 MiB read, depth 1", "read", "1m", 1}, {"1 MiB read, depth 4", "read", "1m", 4}, {"1 MiB write, depth 1", "write", "1m", 1}, {"1 MiB write, depth 4", "write", "1m", 4},
	{"4 KiB read, depth 32", "read", "4k", 32}, {"4 KiB write, depth 32", "write", "4k", 32},
}

func variants() []*variant {
	return []*variant{
		{name: "no digests", setUp: func(*initiator.Config) {}},
		{name: "header digest", setUp: func(c *initiator.Config) { c.HeaderDigest = initiator.DigestRequired }},
		{name: "both digests", setUp: func(c *initiator.Config) {
			c.HeaderDigest, c.DataDigest = initiator.DigestRequired, initiator.DigestRequired
		}},
		{name: "unsent data without limit", setUp: func(c *initiator.Config) { c.Dial = dialUnlimited }},
	}
}

// dialUnlimited connects without TCP_NOTSENT_LOWAT.
func dialUnlimited(ctx context.Context, network, address string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, network, address) // TCP_NODELAY is Go's default
}

// sessions loads sessions of the package initiator in turns, on one target in
// one run, without paths and NBD above them.
func sessions(kind, binary string, seconds float64, rounds int) error {
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
	u, err := initiator.ParseURL(url)
	if err != nil {
		return err
	}
	all := variants()
	lun := u.LUN
	for i, v := range all {
		c := initiator.Config{Address: u.Address, TargetName: u.Target, InitiatorName: "iqn.2026-11.example:session", ISID: [6]byte{0x80, byte(i)}, FailoverTime: 10 * time.Second}
		v.setUp(&c)
		if v.s, err = initiator.Open(context.Background(), c); err != nil {
			return err
		}
		defer func() { v.s.Abort(errors.New("end")); <-v.s.Done() }()
		if _, err := initiator.Identify(context.Background(), v.s, lun); err != nil {
			return err
		}
	}
	fmt.Printf("\n### Sessions on %s, in one process\n\n| load | variant | MiB/s | ratio | CPU us per I/O | ratio | CPU us of the target | ratio |\n|---|---|---|---|---|---|---|---|\n", kind)
	for _, r := range sessionRows {
		got := make([][]result, len(all))
		for i := range rounds {
			for j := range all {
				k := (i + j) % len(all)
				before := proc.CPU(tgt.Process.Pid)
				res, err := drive(all[k].s, lun, r, time.Duration(seconds*float64(time.Second)))
				if err != nil {
					return fmt.Errorf("%s, %s: %w", all[k].name, r.name, err)
				}
				res.target = (proc.CPU(tgt.Process.Pid) - before) * 1e6 / (res.iops * seconds)
				got[k] = append(got[k], res)
			}
		}
		mib, cpu, target := func(r result) float64 { return r.mib }, func(r result) float64 { return r.cpu }, func(r result) float64 { return r.target }
		for k, v := range all {
			fmt.Printf("| %s | %s | %.0f | %s | %.1f | %s | %.1f | %s |\n", r.name, v.name, median(got[k], mib), ratio(got[k], got[0], mib), median(got[k], cpu), ratio(got[k], got[0], cpu), median(got[k], target), ratio(got[k], got[0], target))
		}
	}
	return nil
}

// loader keeps one command in flight until the time is over.
type loader struct {
	s    *initiator.Session
	end  time.Time
	done int
	err  error
	wg   *sync.WaitGroup
}

func (l *loader) Done(c *initiator.Command, p *block.Plug) {
	if c.Result.Err != nil || c.Result.Status != scsi.StatusGood {
		l.err = fmt.Errorf("%v, status %#x", c.Result.Err, c.Result.Status)
		l.wg.Done()
		return
	}
	if l.done++; !time.Now().Before(l.end) {
		l.wg.Done()
		return
	}
	if !l.s.Submit(c, p) {
		l.err = errors.New("the window is full")
		l.wg.Done()
	}
}

func drive(s *initiator.Session, lun [8]byte, r row, d time.Duration) (result, error) {
	size := 4 << 10
	if r.bs == "1m" {
		size = 1 << 20
	}
	before, began := processCPU(), time.Now()
	var wg sync.WaitGroup
	loaders := make([]loader, r.depth)
	var p block.Plug
	for i := range loaders {
		loaders[i] = loader{s: s, end: began.Add(d), wg: &wg}
		c := &initiator.Command{LUN: lun, Data: make([]byte, size), Owner: &loaders[i]}
		lba, blocks := uint64(i*size/512), uint32(size/512)
		if r.rw == "read" {
			c.Dir = initiator.DataIn
			scsi.Read(&c.CDB, lba, blocks, true)
		} else {
			c.Dir = initiator.DataOut
			scsi.Write(&c.CDB, lba, blocks, false, true)
		}
		wg.Add(1)
		if !s.Submit(c, &p) {
			return result{}, errors.New("the window is full")
		}
	}
	p.Flush()
	wg.Wait()
	took := time.Since(began).Seconds()
	n := 0
	for i := range loaders {
		if loaders[i].err != nil {
			return result{}, loaders[i].err
		}
		n += loaders[i].done
	}
	return result{iops: float64(n) / took, mib: float64(n) * float64(size) / (1 << 20) / took, cpu: (processCPU() - before) * 1e6 / float64(n)}, nil
}

// processCPU is the time this process used, seconds.
func processCPU() float64 {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}
