package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/mpathd/mpathd/bench/proc"
	"github.com/mpathd/mpathd/initiator"
)

// idle opens n sessions to the built-in target in another process, has each ask
// its unit who it is, and measures what this process costs while none of them
// has anything to do.
func idle(binary string, n, seconds int) error {
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	url, tgt, err := startTarget("built-in target", binary, dir)
	if err != nil {
		return err
	}
	defer func() { tgt.Process.Kill(); tgt.Wait() }()
	u, err := initiator.ParseURL(url)
	if err != nil {
		return err
	}
	sessions := make([]*initiator.Session, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	turn := make(chan struct{}, 8)
	for i := range sessions {
		wg.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			sessions[i], errs[i] = initiator.Open(context.Background(), initiator.Config{Address: u.Address, TargetName: u.Target, InitiatorName: "iqn.2026-11.example:idle",
				ISID: [6]byte{0x80, 0, 0, 0, byte(i >> 8), byte(i)}, FailoverTime: time.Second, LoginTimeout: 30 * time.Second})
			if errs[i] == nil {
				_, errs[i] = initiator.Identify(context.Background(), sessions[i], [8]byte{})
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	time.Sleep(5 * time.Second) // what the last commands left is acknowledged
	runtime.GC()
	debug.FreeOSMemory()
	before, began := processCPU(), time.Now()
	time.Sleep(time.Duration(seconds) * time.Second)
	cpu := (processCPU() - before) / time.Since(began).Seconds() * 100
	for i, s := range sessions {
		if s.Err() != nil || s.State() != initiator.Up {
			return fmt.Errorf("session %d: %v, %w", i, s.State(), s.Err())
		}
	}
	fmt.Printf("%d idle sessions for %d s: %.1f MiB resident, %.2f %% of a core\n", n, seconds, float64(proc.Resident(os.Getpid()))/1024, cpu)
	for _, s := range sessions {
		s.Abort(errors.New("end"))
		<-s.Done()
	}
	return nil
}
