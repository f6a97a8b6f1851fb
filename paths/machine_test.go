package paths

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
)

// step is one thing that happens to a group.
type step struct{ kind, a, b uint8 }

var (
	kinds    = []string{"submit", "submit", "submit", "end", "end", "end", "end", "kill", "door", "suspect", "hand", "sleep", "haunt"}
	outcomes = []string{"good", "good", "good", "good", "busy", "ua", "retry", "fail", "medium"}
)

// What a script of faults may do, whatever it is: requests complete exactly
// once, none waits for ever once paths are back, an error needs a cause, and a
// block holds what was last acknowledged.
func TestAnyScriptOfFaults(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		if err := playDrawn(t, rt, Hold); err != nil {
			rt.Fatal(err)
		}
	})
}

// search plays random scripts on few blocks until one fails.
func search(t *testing.T, seeds uint64, policy, protection string) (uint64, error) {
	for seed := range seeds {
		r := rand.New(rand.NewPCG(seed, 0))
		steps := make([]step, 150)
		for i := range steps {
			steps[i] = step{uint8(r.IntN(len(kinds))), uint8(r.Uint32()), uint8(r.Uint32())}
			if kinds[steps[i].kind] == "submit" {
				steps[i].b %= 3
			}
		}
		var err error
		synctest.Test(t, func(t *testing.T) { err = play(t, steps, 2, policy, protection) })
		if err != nil {
			return seed, err
		}
	}
	return 0, nil
}

var scripts = flag.Uint64("scripts", 300, "random scripts per policy and protection")

func TestLateWritesRevertNothing(t *testing.T) {
	for _, policy := range []string{"failover", "multibus"} {
		for _, protection := range []string{Hold, Strict, Shadow} {
			seed, err := search(t, *scripts, policy, protection)
			require.NoError(t, err, "%s, %s, seed %d", policy, protection, seed)
		}
	}
}

// The same machine must see late writes revert data when nothing is protected:
// else it proves nothing.
func TestScriptsFindLateWritesWithoutProtection(t *testing.T) {
	seed, err := search(t, 2000, "failover", Off)
	require.ErrorContains(t, err, "holds")
	t.Logf("seed %d: %v", seed, err)
}

func playDrawn(t *testing.T, rt *rapid.T, protection string) error {
	gen := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) step {
		return step{uint8(rapid.IntRange(0, len(kinds)-1).Draw(t, "kind")), rapid.Uint8().Draw(t, "a"), rapid.Uint8().Draw(t, "b")}
	}), 1, 120)
	steps := gen.Draw(rt, "steps")
	n := rapid.IntRange(1, 4).Draw(rt, "paths")
	policy := rapid.SampledFrom([]string{"failover", "multibus"}).Draw(rt, "policy")
	var err error
	synctest.Test(t, func(t *testing.T) { err = play(t, steps, n, policy, protection) })
	return err
}

type machine struct {
	g     *Group
	doors []*door
	dn    *done
	rs    []*block.Request
	block [fakeBlocks]*block.Request // the last request on each block
	want  [fakeBlocks][]byte         // what it may hold: fills
	bad   map[*block.Request]bool    // an outcome that goes up was injected
}

func play(t *testing.T, steps []step, n int, policy, protection string) error {
	g, doors, d := newGroup(t, Config{NoPathRetry: Queue, Policy: policy, Protection: protection, Selector: "round-robin 0"}, n, 3)
	m := &machine{g: g, doors: doors, dn: newDone(), bad: map[*block.Request]bool{}}
	for i := range m.want {
		m.want[i] = []byte{0}
	}
	defer closeGroup(g)
	synctest.Wait()
	for i, s := range steps {
		m.step(s, byte(i+1))
		synctest.Wait()
	}
	for _, d := range doors {
		d.set(false)
	}
	for i := range doors {
		g.ReinstatePath(string(rune('A' + i)))
	}
	for range 600 { // a minute in which everything works
		for _, d := range doors {
			if s := d.session(); s != nil {
				s.onState(initiator.Up, nil)
				for len(s.pending()) > 0 {
					s.end(0, "good")
				}
			}
		}
		time.Sleep(100 * time.Millisecond)
		synctest.Wait()
	}
	for _, r := range m.rs {
		switch k := m.dn.count(r); {
		case k != 1:
			return fmt.Errorf("%v at %d completed %d times", r.Op, r.Off, k)
		case r.Err != nil && !m.bad[r]:
			return fmt.Errorf("%v at %d: %w, without a cause", r.Op, r.Off, r.Err)
		}
	}
	if w := g.waiting.Load(); w != 0 {
		return fmt.Errorf("%d requests counted as waiting, none is there", w)
	}
	m.settle()
	for i, fills := range m.want {
		b := d.data[i*fakeBlock : (i+1)*fakeBlock]
		if bytes.IndexByte(fills, b[0]) < 0 {
			return fmt.Errorf("block %d holds %d, want one of %v", i, b[0], fills)
		}
	}
	return nil
}

// settle books the blocks whose request has ended.
func (m *machine) settle() {
	for i, r := range m.block {
		if r == nil || m.dn.count(r) == 0 {
			continue
		}
		m.block[i] = nil
		switch {
		case r.Op == block.Write && r.Err == nil:
			m.want[i] = []byte{r.Data[0]}
		case r.Op == block.Write:
			m.want[i] = append(m.want[i], r.Data[0])
		}
	}
}

func (m *machine) step(s step, fill byte) {
	d := m.doors[int(s.a)%len(m.doors)]
	name := string(rune('A' + int(s.a)%len(m.doors)))
	switch kinds[s.kind] {
	case "submit":
		m.settle()
		i := int(s.b) % fakeBlocks
		if m.block[i] != nil {
			return
		}
		r := writeOf(m.dn, i, fill)
		switch s.a % 5 {
		case 0:
			r.Op = block.Read
		case 1:
			r = &block.Request{Op: block.Flush, Owner: m.dn}
		}
		m.rs = append(m.rs, r)
		if r.Op != block.Flush {
			m.block[i] = r
		}
		submit(m.g, r)
	case "end":
		f := d.session()
		if f == nil || len(f.pending()) == 0 {
			return
		}
		i, o := int(s.b)%len(f.pending()), outcomes[int(s.b)/8%len(outcomes)]
		if o == "medium" {
			m.bad[f.pending()[i].Owner.(*attempt).req] = true
		}
		f.end(i, o)
	case "kill":
		if f := d.session(); f != nil {
			f.Abort(errDoor)
		}
	case "door":
		d.set(s.b&1 == 0)
	case "suspect":
		if f := d.session(); f != nil {
			f.onState([]initiator.State{initiator.Suspect, initiator.Up}[s.b&1], errDoor)
		}
	case "hand":
		if s.b%3 == 0 {
			m.g.FailPath(name)
		} else {
			m.g.ReinstatePath(name)
		}
	case "haunt":
		d.haunt(int(s.b))
	case "sleep":
		time.Sleep(time.Duration(s.b) * 10 * time.Millisecond)
	}
}
