package simulate

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/paths"
)

// Tally counts what runs did.
type Tally struct {
	Runs, Requests, Failovers, Crashes, Cuts, Holds int64
	FailedFlushes                                   int64
	Unsure                                          int64 // blocks whose history was not decided in time
	Fences                                          map[string]int64
	Fake                                            time.Duration // simulated
}

// Add sums up.
func (t *Tally) Add(o Tally) {
	t.Runs += o.Runs
	t.Requests += o.Requests
	t.Failovers += o.Failovers
	t.Crashes += o.Crashes
	t.Cuts += o.Cuts
	t.Holds += o.Holds
	t.FailedFlushes += o.FailedFlushes
	t.Unsure += o.Unsure
	t.Fake += o.Fake
	for how, n := range o.Fences {
		if t.Fences == nil {
			t.Fences = map[string]int64{}
		}
		t.Fences[how] += n
	}
}

const (
	healTime  = 3 * time.Minute  // in which all must work again once all faults are gone
	quietTime = 12 * time.Second // in which everything late has happened
	checkTime = 2 * time.Second  // real, for the history of one block
)

// Run plays a script and returns what went wrong.
func Run(t *testing.T, s Script) (Tally, error) {
	var w *world
	var err error
	synctest.Test(t, func(*testing.T) {
		w = newWorld(s)
		begun := time.Now()
		err = w.live(s.Steps)
		w.tally.Fake = time.Since(begun)
	})
	w.tally.Runs = 1
	w.tally.Requests, w.tally.FailedFlushes = w.guest.tick/2, int64(w.guest.h.failed)
	if err == nil {
		err = w.guest.err
	}
	if err == nil && s.Setup.Target != "liar" { // nothing can be promised of a liar
		var unsure int
		err, unsure = w.guest.h.check(w.disk, checkTime)
		w.tally.Unsure = int64(unsure)
	}
	return w.tally, err
}

func newWorld(s Script) *world {
	w := &world{seed: s.Seed, set: s.Setup, wake: make(chan struct{}, 1), tally: Tally{Fences: map[string]int64{}}}
	w.state.risk = map[string][]string{}
	w.disk = newDisk(w, s.Setup.Blocks)
	w.net = &network{w: w}
	for i := range s.Setup.Servers {
		srv := &server{behaviour: behaviours[s.Setup.Target], w: w, iqn: fmt.Sprint("iqn.2026-11.sim:server", i), r: w.rand(2, uint64(i)), power: true, running: true, told: map[[6]byte]int{}}
		w.srv = append(w.srv, srv)
		for j := range s.Setup.Portals {
			w.net.links = append(w.net.links, &link{address: fmt.Sprintf("10.0.%d.%d:3260", i, j), srv: srv, index: len(w.net.links)})
		}
	}
	w.guest = newGuest(w)
	return w
}

// live is a whole run: everything comes up, the script, everything works again.
func (w *world) live(steps []step) (err error) {
	w.launch()
	w.guest.wg.Add(1)
	go w.guest.routineConnect()
	defer func() {
		w.guest.leave(context.Background())
		last := w.proc
		if !last.dead.Load() {
			last.book()
			last.bury()
		}
		for _, p := range w.procs {
			<-p.buried
		}
		w.guest.wg.Wait()
	}()
	up := func() bool { return w.proc.healed() == nil }
	if !w.run(time.Minute, up) {
		return fmt.Errorf("does not come up: %w", w.proc.healed())
	}
	for _, st := range steps {
		w.play(st)
		w.run(st.Wait, nil)
	}
	w.heal()
	if !w.run(healTime, func() bool { return w.guest.idle() && up() }) {
		return fmt.Errorf("not well %v after the last fault: %w", healTime, errors.Join(w.proc.healed(), w.guest.waiting()))
	}
	w.run(quietTime, nil)
	w.run(healTime, up)
	if err := w.trust(); err != nil {
		return err
	}
	for range 4 { // a loss is told for a while
		told := w.guest.h.failed
		w.guest.submit(&request{op: block.Flush})
		w.run(time.Minute, w.guest.idle)
		if w.guest.h.failed == told {
			break
		}
		w.run(40*time.Second, nil)
	}
	w.guest.submit(&request{op: block.Read, n: w.set.Blocks})
	if !w.run(time.Minute, w.guest.idle) {
		return errors.New("the last requests do not end")
	}
	w.guest.power(false, false) // what was flushed is there
	w.guest.read(w.disk.stable)
	return nil
}

// heal ends all faults.
func (w *world) heal() {
	for _, s := range w.srv {
		s.stalled = false
		if s.hung {
			s.resume()
		}
		if !s.running {
			s.start()
		}
	}
	for _, l := range w.net.links {
		w.net.setModes(l, pass, pass)
	}
	w.proc.fuse.Store(0)
	w.run(2*time.Second, nil) // a crashed process is started again
	if g := w.proc.theGroup(); g != nil {
		for _, l := range w.net.links {
			g.ReinstatePath(l.address + "/0")
		}
	}
}

// trust checks what the self-test made of the target.
func (w *world) trust() error {
	for _, pg := range w.proc.theGroup().Snapshot().Groups {
		for _, p := range pg.Paths {
			if keeps := behaviours[w.set.Target].keeps; keeps && p.Trust == paths.Reinstates {
				return fmt.Errorf("path %s: a target that ends no old session is trusted", p.Name)
			}
		}
	}
	return nil
}

// Shrink removes from a failing script what it fails without, for at most d.
func Shrink(t *testing.T, s Script, d time.Duration) (Script, error) {
	end := time.Now().Add(d)
	fails := func(c Script) error {
		for range 2 { // scheduling may hide it
			if _, err := Run(t, c); err != nil {
				return err
			}
		}
		return nil
	}
	last := fails(s)
	for n := len(s.Steps) / 2; n > 0 && last != nil; n /= 2 {
		for at := 0; at < len(s.Steps) && time.Now().Before(end); {
			c := s
			c.Steps = slices.Concat(s.Steps[:at], s.Steps[min(at+n, len(s.Steps)):])
			if err := fails(c); err != nil {
				s, last = c, err
			} else {
				at += n
			}
		}
	}
	return s, last
}

// String is one line for each kind of count.
func (t Tally) String() string {
	s := fmt.Sprintf("%d runs, %d failovers, %d crashes of mpathd, %d power cuts, %d flushes that told a loss, %d requests, %d held, %v simulated; fences:", t.Runs, t.Failovers, t.Crashes, t.Cuts, t.FailedFlushes, t.Requests, t.Holds, t.Fake.Round(time.Minute))
	for _, how := range slices.Sorted(maps.Keys(t.Fences)) {
		s += fmt.Sprintf(" %d %s", t.Fences[how], how)
	}
	return s + fmt.Sprintf("; %d histories not decided", t.Unsure)
}
