package simulate

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/paths"
)

// setup is what a run is made of besides its script.
type setup struct {
	Target        string // of behaviours
	Servers       int    // that share the disk and its SCSI ID
	Portals       int    // of each server
	Replicated    bool
	Policy        string
	Protection    string
	Checker       string
	LeaveOut      paths.Rule `json:",omitempty"`
	Blocks        int
	MaxTransfer   int // blocks per command
	Depth         int // requests of the guest at once
	Window        int // commands
	Burst         int // bytes
	InitialR2T    bool
	Immediate     bool
	FUA           bool // the unit knows DPO and FUA
	WriteCache    bool // volatile
	LoginUA       bool // a new session meets a unit attention
	LoginPower    bool `json:",omitempty"` // it is 29/01 every time
	TellsPower    bool // after a power cut each nexus meets unit attention 29/01
	SilentAborts  bool // TAS=0: what another session's reset aborted is never answered
	CommitsBursts bool // each burst of a write is executed when it is there
	OtherHost     bool `json:",omitempty"` // another host writes blocks of which no write is unanswered
	Busy          int  // one of so many commands is answered BUSY; 0: none
	Jitter        time.Duration
	Loss          int    // one of so many packets is sent again
	HedgeReads    int    `json:",omitempty"` // percent, after 1 ms
	GrayPaths     string `json:",omitempty"` // paths.GrayGroup if empty
	Sampling      bool   `json:",omitempty"` // of paths that fail twice within a minute
	PathErrors    bool   `json:",omitempty"` // a path that failed again and again is kept back
	Marginal      bool   `json:",omitempty"` // a path kept back by these two serves when no other does
	log           *slog.Logger
}

// Options narrow down what is drawn; zero values leave it to the seed.
type Options struct {
	Target     string
	Policy     string
	Protection string
	LeaveOut   paths.Rule
	Servers    int // 2: two of them
	OtherHost  bool
}

// step is one line of a script. A, B and C are taken modulo what there is, so
// that any subset of a script is a script. An even A is the link that last
// brought a mutation, or its server.
type step struct {
	Do   string
	A    int           `json:",omitempty"`
	B    int           `json:",omitempty"`
	C    int           `json:",omitempty"`
	Wait time.Duration `json:",omitempty"` // afterwards
}

func (s step) String() string {
	return fmt.Sprintf("%s %d %d %d, wait %v", s.Do, s.A, s.B, s.C, s.Wait)
}

// Script is a whole run; two runs of a script are the same as far as the
// scheduler lets them.
type Script struct {
	Seed  uint64
	Setup setup
	Steps []step
}

// String is the script for a human, JSON for a file.
func (s Script) String() string {
	var b strings.Builder
	setup, _ := json.Marshal(s.Setup)
	fmt.Fprintf(&b, "seed %d, %s\n", s.Seed, setup)
	for _, st := range s.Steps {
		fmt.Fprintf(&b, "  %v\n", st)
	}
	return b.String()
}

func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

// weights are how often each kind of step is drawn.
var weights = []struct {
	do string
	n  int
}{
	{"write", 34}, {"read", 14}, {"flush", 4}, {"zeroes", 5}, {"trim", 4},
	{"network", 10}, {"heal", 8}, {"reset", 5}, {"close", 2}, {"hang", 2}, {"stall", 3}, {"kill", 1}, {"cut", 1}, {"start", 4},
	{"crash", 1}, {"crash at", 1}, {"reconnect", 2}, {"fail", 1}, {"reinstate", 2}, {"destage", 3},
}

// episodes are stories that random steps tell too rarely: each makes a write
// late in its own way. A line is what to do, on what (b the block of the
// story, l the link in use, - anything), and how long to wait: up to so many
// packet times (p), or milliseconds from-to.
var episodes = []string{
	"write b p; network l 0-1; more b p; wait - 1050-2500; over b 1-30; over b 1-30; heal l 5-200; read b 0-5",
	"write b p; network l 0-0; wait - 1050-1400; over b 1-10; read b 0-5; heal l 1-50; read b 1-20; read b 100-200",
	"write b p; write b p; network l 0-1; wait - 1050-1500; over b 1-10; read b 1-10; over b 1-10; heal l 1-50; read b 20-50",
	"stall l 0-0; write b 1-5; reset l 1-40; over b 1-20; over b 1-20; read b 1-20; wait - 100-4000; stall l 0-0; read b 1-5",
	"stall l 0-0; write b 1-5; network l 1-5; wait - 1050-1500; over b 1-20; read b 1-20; heal l 5-50; wait - 100-3000; stall l 0-0; read b 1-5",
	"slow - 0-0; write b 1-5; write b 1-5; reset l 1-40; wait - 300-1500; read b 1-500; wait - 300-2500; fast - 0-0; read b 1-20; wait - 500-3000; read b 1-5",
	"write b p; hang l 0-0; more b p; wait - 1050-3000; over b 1-30; over b 1-30; hang l 5-100; read b 0-5",
	"write b p; network l 0-1; crash - 10-900; over b 1-20; over b 1-600; read b 1-20; heal l 1-100; read b 1-20",
	"stall l 0-0; write b 1-5; crash - 10-900; over b 1-600; read b 1-20; wait - 10-3000; stall l 0-0; read b 1-5",
	"write b p; reconnect - 0-5; over b 1-5; read b 1-5; network l 0-1; reconnect - 1-100; over b 1-1500; read b 1-20; heal l 1-100; read b 1-20",
	"write b p; flush - p; cut l 1-1500; over b 1-20; start l 10-500; read b 1-20",
	"write b p; kill l 1-500; over b 1-20; start l 10-500; read b 1-20",
}

// tell appends the steps of an episode.
func episode(r *rand.Rand, steps []step, packet time.Duration) []step {
	at := r.IntN(64)
	for line := range strings.SplitSeq(pick(r, episodes...), ";") {
		f := strings.Fields(line)
		st := step{Do: f[0], A: r.IntN(64), B: r.IntN(64), C: r.IntN(64)}
		switch f[1] {
		case "b":
			st.A = at
		case "l":
			st.A = 0
		}
		switch st.Do {
		case "more":
			st.Do = pick(r, "write", "read", "flush", "zeroes")
		case "crash":
			st.Do = pick(r, "crash", "crash at")
		case "over":
			st.Do = pick(r, "write", "write", "write", "zeroes", "trim")
		case "network":
			if r.IntN(3) > 0 {
				st.B = r.IntN(4) // those that hold what is sent
			}
		}
		var from, to int
		if n, _ := fmt.Sscanf(f[len(f)-1], "%d-%d", &from, &to); n == 2 {
			st.Wait = time.Duration(from)*time.Millisecond + time.Duration(r.Int64N(int64(to-from+1)*int64(time.Millisecond)))
		} else {
			st.Wait = time.Duration(r.Int64N(int64(4 * packet)))
		}
		steps = append(steps, st)
	}
	return steps
}

const scriptLength = 150

// policies are what a map may be told to do beyond what Draw draws. They have a
// generator of their own, so that what is known of a seed stays true.
func (s *setup) policies(seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	s.HedgeReads = pick(r, 0, 0, 100)
	s.GrayPaths = pick(r, paths.GrayGroup, paths.GrayMap, paths.GrayOff)
	s.Sampling = r.IntN(3) == 0
	s.Marginal = s.Sampling && r.IntN(2) == 0
	if r.IntN(4) == 0 {
		s.Protection = paths.Shadow
	}
	if s.PathErrors = !s.Sampling && r.IntN(2) == 0; s.PathErrors {
		s.Marginal = r.IntN(2) == 0
	}
	s.OtherHost = s.Protection == paths.Strict && r.IntN(2) == 0
}

// others lets another host write where a late write may still be on its way,
// before it is delivered. Steps of the guest stay what they are.
func others(seed uint64, steps []step) (out []step) {
	r := rand.New(rand.NewPCG(seed, 2))
	at := 0
	for _, st := range steps {
		switch st.Do {
		case "write", "zeroes", "trim":
			at = st.A
		case "heal", "stall", "fast", "hang", "start":
			if r.IntN(2) == 0 {
				out = append(out, step{Do: "other", A: at, Wait: time.Duration(r.IntN(30)) * time.Millisecond})
			}
		}
		out = append(out, st)
	}
	return out
}

// Draw makes a script from a seed.
func Draw(seed uint64, o Options) Script {
	r := rand.New(rand.NewPCG(seed, 0))
	yes := func(n int) bool { return r.IntN(n) == 0 }
	s := setup{
		Target: pick(r, "tgt", "tgt", "LIO", "LIO", "istgt"), Servers: 1, Portals: 2 + r.IntN(4)/3, Policy: pick(r, "failover", "failover", "multibus"),
		Protection: pick(r, paths.Hold, paths.Hold, paths.Strict), Checker: pick(r, "tur", "readsector0"),
		Blocks: 1 + r.IntN(3), MaxTransfer: 1 + r.IntN(3), Depth: 2 + r.IntN(4), Window: 2 + r.IntN(8), Burst: pick(r, 512, 1024, 4096),
		InitialR2T: yes(3), Immediate: !yes(3), FUA: !yes(3), WriteCache: !yes(4), LoginUA: yes(3), SilentAborts: yes(8), CommitsBursts: yes(8), TellsPower: yes(2),
		Jitter: pick(r, 100*time.Microsecond, time.Millisecond, 30*time.Millisecond), Loss: pick(r, 1000, 100),
	}
	if yes(3) || o.Servers == 2 {
		s.Servers, s.Portals, s.Replicated = 2, 1+r.IntN(2), yes(2)
	}
	if yes(4) {
		s.Busy = 10
	}
	for _, x := range []struct{ to, from *string }{{&s.Target, &o.Target}, {&s.Policy, &o.Policy}, {&s.Protection, &o.Protection}} {
		if *x.from != "" {
			*x.to = *x.from
		}
	}
	s.LeaveOut, s.OtherHost = o.LeaveOut, o.OtherHost
	if o == (Options{}) {
		s.policies(seed)
	}
	total := 0
	for _, w := range weights {
		total += w.n
	}
	var steps []step
	for len(steps) < scriptLength {
		if yes(8) {
			steps = episode(r, steps, s.Jitter)
			continue
		}
		n, k := r.IntN(total), 0
		for n >= weights[k].n {
			n -= weights[k].n
			k++
		}
		st := step{Do: weights[k].do, A: r.IntN(64), B: r.IntN(64), C: r.IntN(64)}
		switch {
		case yes(12):
			st.Wait = time.Duration(r.IntN(1500)) * time.Millisecond
		case yes(3):
			st.Wait = time.Duration(r.IntN(150)) * time.Millisecond
		case yes(2):
			st.Wait = time.Duration(r.Int64N(int64(4 * s.Jitter)))
		}
		steps = append(steps, st)
	}
	if s.OtherHost {
		steps = others(seed, steps)
	}
	if s.Protection == paths.Shadow { // what it keeps in memory dies with the process
		steps = slices.DeleteFunc(steps, func(st step) bool { return strings.HasPrefix(st.Do, "crash") })
	}
	return Script{seed, s, steps}
}

// play does one step.
func (w *world) play(st step) {
	l := w.net.links[st.A%len(w.net.links)]
	if st.A%2 == 0 && w.net.used != nil {
		l = w.net.used
	}
	s := l.srv
	n := w.set.Blocks
	rq := &request{at: st.A % n, n: 1 + st.B%2, fua: st.C%4 == 0}
	rq.n = min(rq.n, n-rq.at)
	ops := map[string]block.Op{"read": block.Read, "write": block.Write, "zeroes": block.WriteZeroes, "trim": block.Trim, "flush": block.Flush}
	if op, ok := ops[st.Do]; ok {
		if op == block.Trim && w.set.Servers > 1 && !w.set.Replicated {
			return // such a trim need not last
		}
		rq.op = op
		rq.fua = rq.fua && op == block.Write
		w.guest.submit(rq)
		return
	}
	switch st.Do {
	case "network":
		ms := []struct{ up, down mode }{{hold, hold}, {hold, hold}, {hold, drop}, {hold, pass}, {pass, drop}, {pass, hold}, {drop, pass}, {drop, drop}, {drop, hold}}[st.B%9]
		w.net.setModes(l, ms.up, ms.down)
	case "heal":
		w.net.setModes(l, pass, pass)
	case "reset":
		w.net.reset(l)
	case "close":
		for _, tc := range slices.Clone(s.conns) {
			tc.kill()
		}
	case "hang":
		if s.hung {
			s.resume()
		} else if s.running {
			s.hung = true
		}
	case "stall":
		s.stalled = !s.stalled
	case "slow", "fast":
		for _, s := range w.srv {
			s.stalled = st.Do == "slow"
		}
	case "kill":
		if s.running {
			s.stop(false)
		}
	case "cut":
		if s.power {
			s.stop(true)
			w.guest.power(len(w.srv) > 1, w.set.TellsPower)
			w.tally.Cuts++
		}
	case "start":
		if s.hung {
			s.resume()
		}
		if !s.running {
			s.start()
		}
	case "crash", "crash at":
		if w.proc.dead.Load() {
			return
		}
		w.proc.back = time.Duration(st.C*10) * time.Millisecond
		if st.Do == "crash" {
			w.proc.crash()
		} else {
			w.proc.fuse.Store(int64(1 + st.B%16))
		}
	case "other":
		w.guest.other(st.A % n)
	case "reconnect":
		w.guest.drop()
	case "fail", "reinstate":
		if g := w.proc.theGroup(); g != nil && !w.proc.dead.Load() {
			if st.Do == "fail" {
				g.FailPath(l.address + "/0")
			} else {
				g.ReinstatePath(l.address + "/0")
			}
		}
	case "wait":
	case "destage":
		if i := st.B % n; w.disk.dirty[i] != nil {
			w.disk.destage(i)
		}
	}
}
