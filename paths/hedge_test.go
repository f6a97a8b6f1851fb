package paths

import (
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/block"
)

// reader owns reads whose buffers come from an arena: it looks at each answer,
// spoils the buffer, and looks again before it gives it back, as a connection
// sends the reply from it: whoever writes into it meanwhile is found.
type reader struct {
	t     testing.TB
	arena *block.Arena
	mu    sync.Mutex
	began map[*block.Request]time.Time
	took  []time.Duration
	good  int
	bad   int

	sending [][]byte
}

func (o *reader) submit(g *Group, lba int) {
	r := &block.Request{Op: block.Read, Off: int64(lba) * fakeBlock, Len: fakeBlock, Data: o.arena.Get(fakeBlock), Arena: o.arena, Owner: o}
	o.mu.Lock()
	o.began[r] = time.Now()
	o.mu.Unlock()
	submit(g, r)
}

func (o *reader) Complete(r *block.Request, _ *block.Plug) {
	o.mu.Lock()
	defer o.mu.Unlock()
	began, ok := o.began[r]
	if !ok {
		o.t.Error("a request came back twice")
		return
	}
	delete(o.began, r)
	o.took = append(o.took, time.Since(began))
	if r.Err != nil {
		o.bad++
	} else {
		o.good++
		for at := 0; at < len(r.Data); at += 8 {
			if got := binary.BigEndian.Uint64(r.Data[at:]); got != uint64(r.Off)+1 {
				o.t.Errorf("block %d holds %#x at %d", r.Off/fakeBlock, got, at)
				break
			}
		}
	}
	for i := range r.Data {
		r.Data[i] = 0xee
	}
	o.sending = append(o.sending, r.Data)
	r.Data = nil
	o.sent(8)
}

// sent gives buffers back but for the last keep ones.
func (o *reader) sent(keep int) {
	for ; len(o.sending) > keep; o.sending = o.sending[1:] {
		for _, b := range o.sending[0] {
			if b != 0xee {
				o.t.Error("somebody wrote into the buffer of a read that was answered")
				break
			}
		}
		o.arena.Put(o.sending[0])
	}
}

func (o *reader) flying() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.began) == 0 {
		o.sent(0)
	}
	return len(o.began)
}

func hedgeGroup(t testing.TB, c Config, n int) (*Group, []*door, *reader) {
	g, doors, d := newGroup(t, c, n, 16)
	for lba := range fakeBlocks {
		for at := 0; at < fakeBlock; at += 8 {
			binary.BigEndian.PutUint64(d.data[lba*fakeBlock+at:], uint64(lba*fakeBlock)+1)
		}
	}
	synctest.Wait()
	return g, doors, &reader{t: t, arena: block.NewArena(1 << 20), began: map[*block.Request]time.Time{}}
}

// ends answers with the outcome that a draw gives: late answers, refusals and
// paths that die, in any order.
func playHedges(t *testing.T, script []byte) (hedges, won int64) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, o := hedgeGroup(t, Config{NoPathRetry: Queue, Policy: "multibus", Selector: "round-robin 0", HedgeReads: 100, HedgeAfter: 20 * time.Millisecond}, 3)
		defer closeGroup(g)
		g.noteIOs(1000)
		for i, b := range script {
			d := doors[int(b>>3)%len(doors)]
			switch b & 7 {
			case 0, 1:
				if o.flying() < 32 {
					o.submit(g, int(b>>3)+i%7)
				}
			case 2:
				time.Sleep(30 * time.Millisecond)
			case 7:
				if s := d.session(); s != nil && b&0x80 != 0 {
					s.Abort(errDoor)
					synctest.Wait()
				}
			default:
				s := d.session()
				if s == nil {
					break
				}
				if n := len(s.pending()); n > 0 {
					s.end(i%n, []string{"good", "busy", "fail", "medium"}[map[byte]int{3: 0, 4: 0, 5: 1, 6: 2 + i%2}[b&7]])
					synctest.Wait()
				}
			}
		}
		for end := time.Now().Add(5 * time.Minute); (o.flying() > 0 || o.arena.Out() > 0) && time.Now().Before(end); {
			steer(doors, nil, time.Second)
		}
		if n := o.flying(); n > 0 {
			t.Errorf("%d requests never came back", n)
		}
		if n := o.arena.Out(); n > 0 {
			t.Errorf("%d bytes of buffers never came back", n)
		}
		for _, p := range g.paths {
			if n := p.load.InFlight.Load(); n != 0 {
				t.Errorf("path %s counts %d in flight", p.Name, n)
			}
		}
		m := g.Snapshot().Totals
		hedges, won = m.Hedged, m.HedgesWon
	})
	return hedges, won
}

// noteIOs makes the hedger believe in I/Os of the past, for its budget.
func (g *Group) noteIOs(n int64) { g.paths[0].ios.Add(n) }

func TestHedgesLoseNothing(t *testing.T) {
	var hedges, won int64
	for seed := range 300 {
		rng := rand.New(rand.NewPCG(uint64(seed), 5))
		script := make([]byte, 200)
		for i := range script {
			script[i] = byte(rng.Uint32())
		}
		h, w := playHedges(t, script)
		hedges, won = hedges+h, won+w
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	t.Logf("300 scripts: %d hedges, %d of them won", hedges, won)
	require.Greater(t, hedges, int64(1000))
	require.Greater(t, won, hedges/10)
}

func FuzzHedges(f *testing.F) {
	f.Add([]byte{0, 8, 2, 3, 11, 19, 2, 0x87, 4})
	f.Fuzz(func(t *testing.T, script []byte) { playHedges(t, script[:min(len(script), 300)]) })
}

// Reads that one path answers late now and then are answered by the other, and
// no more of them than the budget allows.
func TestHedgesCutTheTail(t *testing.T) {
	run := func(percent int, lateEvery uint32) (p50, p99 time.Duration, hedged, reads int64) {
		synctest.Test(t, func(t *testing.T) {
			g, doors, o := hedgeGroup(t, Config{NoPathRetry: Queue, Policy: "multibus", Selector: "round-robin 0", GrayPaths: GrayOff, HedgeReads: percent}, 2)
			defer closeGroup(g)
			due := map[any]time.Time{}
			n, first := uint32(0), uint32(0)
			for end := time.Now().Add(30 * time.Second); time.Now().Before(end) || o.flying() > 0 || o.arena.Out() > 0; time.Sleep(time.Millisecond) {
				for time.Now().Before(end) && o.flying() < 4 {
					o.submit(g, int(n)%fakeBlocks)
				}
				for i, d := range doors {
					s := d.session()
					for at := 0; at < len(s.pending()); {
						c := s.pending()[at]
						if _, ok := due[c]; !ok {
							due[c] = time.Now().Add(2 * time.Millisecond)
							n++
							if i == 0 { // its own count: one of both paths could fall in step with round-robin
								if first++; first%lateEvery == 0 {
									due[c] = time.Now().Add(300 * time.Millisecond)
								}
							}
						}
						if time.Now().Before(due[c]) {
							at++
							continue
						}
						delete(due, c)
						s.end(at, "good")
					}
				}
			}
			m := g.Snapshot()
			hedged = m.Totals.Hedged
			reads = int64(o.good)
			require.Zero(t, o.bad)
			p50, p99 = percentile(o.took, 50), percentile(o.took, 99)
		})
		return
	}
	_, without, none, _ := run(0, 41)
	require.Zero(t, none)
	_, with, hedged, reads := run(5, 41)
	t.Logf("p99 %v without, %v with hedges: %d of %d reads issued twice", without, with, hedged, reads)
	require.GreaterOrEqual(t, without, 300*time.Millisecond)
	require.LessOrEqual(t, with, 20*time.Millisecond)
	require.LessOrEqual(t, hedged, reads*5/100+hedgeBurst)
	_, _, hedged, reads = run(2, 2) // half of what one path carries is late
	t.Logf("with a quarter of all reads late: %d of %d reads issued twice", hedged, reads)
	require.LessOrEqual(t, hedged, (reads+hedged)*2/100+hedgeBurst)
	require.Greater(t, hedged, reads/100)
}

// A read is issued twice at most, and not where it could move the unit or find
// another disk.
func TestHedgesKnowTheirPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, doors, o := hedgeGroup(t, Config{NoPathRetry: Queue, Policy: "multibus", HedgeReads: 100, HedgeAfter: 20 * time.Millisecond}, 3)
		defer closeGroup(g)
		g.noteIOs(1000)
		time.Sleep(100 * time.Millisecond)
		o.submit(g, 3)
		r := &block.Request{Op: block.Read, Off: 0, Len: fakeBlock, Data: make([]byte, fakeBlock), Owner: o} // no arena: stays
		o.began[r] = time.Now()
		submit(g, r)
		time.Sleep(time.Second)
		issued := 0
		for _, d := range doors {
			issued += len(d.session().pending())
		}
		require.Equal(t, 3, issued, "two attempts of the first read, one of the other")
		require.EqualValues(t, 1, g.hedges.Load())
		o.arena.Put(o.arena.Get(fakeBlock))
		for _, d := range doors {
			for s := d.session(); len(s.pending()) > 0; {
				if c := s.pending()[0]; c.CDB[9] == 0 {
					c.Data = make([]byte, fakeBlock)
					r.Data = o.arena.Get(fakeBlock)
					copy(r.Data, doors[0].d.data[:fakeBlock])
				}
				s.end(0, "good")
			}
		}
		require.Equal(t, 2, o.good)
	})
	synctest.Test(t, func(t *testing.T) {
		for _, replicated := range []bool{false, true} {
			g, doors, o := hedgeGroup(t, Config{NoPathRetry: Queue, HedgeReads: 100, HedgeAfter: 20 * time.Millisecond, Replicated: replicated}, 2)
			g.mu.Lock()
			g.paths[1].Target = "iqn.other"
			g.mu.Unlock()
			g.noteIOs(1000)
			time.Sleep(100 * time.Millisecond)
			o.submit(g, 3)
			time.Sleep(time.Second)
			require.Equal(t, replicated, g.hedges.Load() == 1, "another server is asked only if it holds the same")
			steer(doors, nil, time.Second)
			require.Equal(t, 1, o.good)
			closeGroup(g)
		}
	})
}

// With hedges off nothing is looked for; on and off again while running.
func TestHedgesComeAndGoWithThePolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := Config{NoPathRetry: Queue, Policy: "multibus"}
		g, doors, o := hedgeGroup(t, c, 2)
		defer closeGroup(g)
		g.noteIOs(1000)
		for _, percent := range []int{0, 100, 0, 100, 100} {
			c.HedgeReads, c.HedgeAfter, c.Checker = percent, 20*time.Millisecond, "none"
			require.NoError(t, g.Reconfigure(c))
			time.Sleep(time.Second)
			g.noteIOs(1000)
			time.Sleep(time.Second)
			before := g.hedges.Load()
			o.submit(g, 1)
			time.Sleep(time.Second)
			require.Equal(t, percent > 0, g.hedges.Load() > before)
			steer(doors, nil, 100*time.Millisecond)
			require.Zero(t, o.flying())
		}
	})
}
