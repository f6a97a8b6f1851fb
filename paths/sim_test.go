package paths

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
)

// The simulation keeps the whole history of each block, overlapping requests
// included, and lets porcupine decide whether any order explains it.

const simBlocks = 3

// event is one request on one block.
type event struct {
	write bool
	maybe bool // a write that may have had no effect
	v     byte // written
}

// register is a block: a read sees the last write. A write that is sent again
// may take effect more than once, but only while it is not acknowledged.
var register = (&porcupine.NondeterministicModel{
	Init: func() []any { return []any{byte(0)} },
	Step: func(state, in, out any) []any {
		switch e := in.(event); {
		case e.maybe:
			return []any{state, e.v}
		case e.write:
			return []any{e.v}
		case state == out:
			return []any{state}
		}
		return nil
	},
}).ToModel()

// simRequest is a request that is used again when it is done, as the slots of a
// connection are.
type simRequest struct {
	block.Request
	call   int64
	busy   bool
	value  byte
	before []byte // what a read saw
}

type sim struct {
	mu      sync.Mutex // of all below: requests complete on many goroutines
	g       *Group
	doors   []*door
	clock   int64
	all     []*simRequest
	history [simBlocks][]porcupine.Operation
	values  byte
	faults  map[*block.Request]bool
	dense   bool // one block, no errors but dying sessions
	// away are the doors whose path is failed by hand: closed, or it would end its
	// old session; and whether they stay so when it is reinstated.
	away map[*door]bool
	err  error
}

func (s *sim) tick() int64 { s.clock++; return s.clock }

// Complete books a request (block.Completer).
func (s *sim) Complete(r *block.Request, _ *block.Plug) {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.all[r.Tag]
	if !q.busy {
		s.err = fmt.Errorf("%v at %d completed twice", r.Op, r.Off)
		return
	}
	q.busy = false
	end := s.tick()
	if r.Err != nil {
		if !s.faults[r] {
			s.err = fmt.Errorf("%v at %d: %w, without a cause", r.Op, r.Off, r.Err)
		}
		if r.Op == block.Read || r.Op == block.Flush {
			return
		}
		end = math.MaxInt64 // it may have happened, or happen later
	}
	delete(s.faults, r)
	if r.Op == block.Flush {
		return
	}
	for i := r.Off / fakeBlock; i < (r.Off+r.Len)/fakeBlock; i++ {
		op := porcupine.Operation{ClientId: int(r.Tag), Call: q.call, Return: end}
		if r.Op == block.Read {
			op.Input, op.Output = event{}, r.Data[i*fakeBlock-r.Off]
		} else {
			op.Input = event{write: true, v: q.value}
			if r.Route.Tries > 0 {
				for range min(r.Route.Tries, 2) {
					again := op
					again.Input = event{maybe: true, v: q.value}
					s.history[i] = append(s.history[i], again)
				}
			}
		}
		s.history[i] = append(s.history[i], op)
	}
}

// submit sends a request of one or two blocks.
func (s *sim) submit(op block.Op, at, n int) {
	n = min(n, simBlocks-at)
	s.mu.Lock()
	i := slices.IndexFunc(s.all, func(q *simRequest) bool { return !q.busy })
	if i < 0 {
		if len(s.all) == 4 || s.dense && len(s.all) == 2 {
			s.mu.Unlock()
			return
		}
		i = len(s.all)
		s.all = append(s.all, &simRequest{})
	}
	q := s.all[i]
	q.busy, q.call, q.value = true, s.tick(), 0
	q.Request = block.Request{Op: op, Off: int64(at * fakeBlock), Len: int64(n * fakeBlock), Owner: s, Tag: uint64(i)}
	switch op {
	case block.Write:
		s.values++
		q.value = s.values
		q.Data = make([]byte, q.Len)
		for i := range q.Data {
			q.Data[i] = q.value
		}
	case block.Read:
		q.Data = make([]byte, q.Len)
	case block.Flush:
		q.Off, q.Len = 0, 0
	}
	s.mu.Unlock()
	submit(s.g, &q.Request)
}

// simulate plays a random script of requests, faults and late deliveries, and
// tells what went wrong.
func simulate(t *testing.T, seed uint64, policy, protection string, omit Rule) (err error, failovers int64) {
	r := rand.New(rand.NewPCG(seed, 1))
	synctest.Test(t, func(t *testing.T) {
		g, doors, d := newGroup(t, Config{NoPathRetry: Queue, Policy: policy, Protection: protection, Selector: "round-robin 0", LeaveOut: omit}, 2, 4)
		defer closeGroup(g)
		s := &sim{g: g, doors: doors, faults: map[*block.Request]bool{}, away: map[*door]bool{}, dense: seed%2 == 1}
		synctest.Wait()
		for range 120 {
			s.step(r)
			synctest.Wait()
		}
		for i, d := range doors {
			d.set(false)
			g.ReinstatePath(string(rune('A' + i)))
		}
		for range 100 {
			for _, d := range doors {
				if f := d.session(); f != nil {
					f.onState(initiator.Up, nil)
					for len(f.pending()) > 0 {
						f.end(0, "good")
					}
				}
			}
			time.Sleep(100 * time.Millisecond)
			synctest.Wait()
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, q := range s.all {
			if q.busy {
				err = fmt.Errorf("%v at %d never completed", q.Op, q.Off)
			}
		}
		if err == nil {
			err = s.err
		}
		for i := range s.history {
			end := s.tick()
			h := append(s.history[i], porcupine.Operation{ClientId: 99, Input: event{}, Output: d.data[i*fakeBlock], Call: end, Return: end + 1})
			if err == nil && porcupine.CheckOperationsTimeout(register, h, time.Second) == porcupine.Illegal {
				err = fmt.Errorf("block %d: no order of %d requests explains what it holds: %d", i, len(h), d.data[i*fakeBlock])
			}
		}
		for _, p := range g.paths {
			failovers += p.failures.Load()
		}
	})
	return err, failovers
}

func (s *sim) step(r *rand.Rand) {
	i := r.IntN(len(s.doors))
	d := s.doors[i]
	f := d.session()
	switch r.IntN(16) {
	case 0, 1, 2, 3, 4:
		op := []block.Op{block.Write, block.Write, block.Write, block.WriteZeroes, block.Read, block.Flush}[r.IntN(6)]
		if s.dense {
			s.submit(op, 0, 1)
		} else {
			s.submit(op, r.IntN(simBlocks), 1+r.IntN(2))
		}
	case 5, 6, 7, 8, 9:
		if f == nil || len(f.pending()) == 0 {
			return
		}
		k, o := r.IntN(len(f.pending())), outcomes[r.IntN(len(outcomes))]
		if s.dense {
			o = "good"
		}
		if o == "medium" {
			s.mu.Lock()
			s.faults[f.pending()[k].Owner.(*attempt).req] = true
			s.mu.Unlock()
		}
		f.end(k, o)
	case 10:
		if f != nil {
			f.Abort(errDoor)
		}
	case 11:
		closed := r.IntN(2) == 0
		if _, away := s.away[d]; away {
			s.away[d] = closed
			return
		}
		d.set(closed)
	case 12:
		closed, away := s.away[d]
		if r.IntN(3) == 0 {
			if !away {
				s.away[d] = d.set(true)
			}
			s.g.FailPath(string(rune('A' + i)))
		} else {
			if away {
				d.set(closed)
				delete(s.away, d)
			}
			s.g.ReinstatePath(string(rune('A' + i)))
		}
	case 13, 14:
		d.haunt(r.IntN(8))
	case 15:
		time.Sleep(time.Duration(r.IntN(200)) * time.Millisecond)
	}
}

// No order of faults and late deliveries makes a block hold what it should not.
func TestSimulationFindsNothing(t *testing.T) {
	var failovers int64
	for seed := range *scripts {
		for _, policy := range []string{"failover", "multibus"} {
			for _, protection := range []string{Hold, Strict, Shadow} {
				err, n := simulate(t, seed, policy, protection, 0)
				require.NoError(t, err, "seed %d, %s, %s", seed, policy, protection)
				failovers += n
			}
		}
	}
	t.Logf("%d runs, %d failovers, no reverted or lost write", 6**scripts, failovers)
}

// It must find late writes when nothing is protected, and when the ledger
// leaves out any one of its rules: else it proves nothing.
func TestSimulationFindsEveryRuleLeftOut(t *testing.T) {
	const seeds = 3000
	for _, c := range []struct {
		name       string
		policy     string
		protection string
		omit       Rule
	}{
		{"protection off", "failover", Off, 0}, {"classify", "failover", Hold, RuleClassify}, {"overlap", "failover", Hold, RuleOverlap},
		{"in flight", "multibus", Hold, RuleInFlight}, {"forget", "failover", Hold, RuleForget}, {"fence", "failover", Hold, RuleFence},
		{"rewrite", "failover", Shadow, RuleRewrite}, {"shadow read", "failover", Shadow, RuleShadowRead},
	} {
		t.Run(c.name, func(t *testing.T) {
			for seed := range uint64(seeds) {
				if err, _ := simulate(t, seed, c.policy, c.protection, c.omit); err != nil {
					t.Logf("seed %d: %v", seed, err)
					return
				}
			}
			t.Errorf("not noticed in %d runs", seeds)
		})
	}
}
