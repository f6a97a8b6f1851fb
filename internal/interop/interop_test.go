package interop

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/realtarget"
	"github.com/mpathd/mpathd/scsi"
)

var (
	complete = flag.Bool("complete", false, "all sizes and all combinations on both ends, instead of a part that is done in seconds")
	quick    = flag.Bool("quick", false, "a part that is done in seconds")
	table    = flag.String("table", "", "file whose table gets the row of each target")
)

// patience replaces the failover time, which is not what is tested here.
const patience = 10 * time.Second

// knows is what a target is known to do; the suite requires it, no more and no less.
type knows struct {
	lenient      bool
	chap, mutual bool
	digests      bool
	r2t          []string // values of InitialR2T that its configuration takes
	combinations int      // of InitialR2T and ImmediateData that it can be brought to
	largest      int      // bytes of one command
	sessions     bool     // it tells its sessions
	limits       burst    // what of an offer it sticks to
}

// burst tells which offers a target takes.
type burst struct {
	noImmediate bool // ImmediateData=No is taken
	small       bool // bursts smaller than its own are taken
}

var known = map[string]knows{
	"tgtd":  {r2t: []string{"Yes", "No"}, chap: true, mutual: true, digests: true, combinations: 4, largest: 16 << 20, sessions: true, limits: burst{true, true}},
	"istgt": {r2t: []string{"Yes"}, chap: true, mutual: true, digests: true, combinations: 2, largest: 16 << 20, sessions: true, limits: burst{true, true}},
	"gotgt": {lenient: true, combinations: 1, largest: 16 << 20},
	"LIO":   {r2t: []string{"Yes", "No"}, chap: true, mutual: true, digests: true, combinations: 4, largest: 16 << 20, sessions: true, limits: burst{true, true}},
}

func TestInteropTgtd(t *testing.T)  { suite(t, "tgtd") }
func TestInteropIstgt(t *testing.T) { suite(t, "istgt") }
func TestInteropGotgt(t *testing.T) { suite(t, "gotgt") }
func TestInteropLIO(t *testing.T)   { suite(t, "LIO") }

// peer is one kind of target and what was seen of it.
type peer struct {
	kind  string
	k     knows
	row   map[string]string
	combo map[string]bool
}

var columns = []string{"discovery", "CHAP", "mutual CHAP", "digests", "InitialR2T/ImmediateData", "largest command", "16 MiB on the map", "logout seen", "restart"}

func suite(t *testing.T, kind string) {
	if !*complete && !*quick {
		t.Skip("minutes with other people's targets: run `make interop`")
	}
	t.Parallel() // most of the time is the targets' own
	p := &peer{kind: kind, k: known[kind], row: map[string]string{}, combo: map[string]bool{}}
	version, missing := "", false
	ok := t.Run("plain", func(t *testing.T) {
		defer func() { missing = t.Skipped() }()
		g := realtarget.Start(t, kind, realtarget.Options{})
		version = g.Version()
		t.Run("discovery", func(t *testing.T) { p.discovers(t, g) })
		t.Run("commands", func(t *testing.T) { p.commands(t, g) })
		t.Run("parallel", func(t *testing.T) { p.parallel(t, g) })
		t.Run("logout", func(t *testing.T) { p.logsOut(t, g) })
		t.Run("offers", func(t *testing.T) { p.offers(t, g) })
	})
	if missing {
		t.Skip("no such target here")
	}
	ok = t.Run("names", p.names) && ok
	ok = t.Run("CHAP", p.chap) && ok
	ok = t.Run("digests", p.digests) && ok
	ok = t.Run("settings", p.settings) && ok
	ok = t.Run("restart", p.restarts) && ok
	combos := []string{}
	for c := range p.combo {
		combos = append(combos, c)
	}
	slices.Sort(combos)
	p.row["InitialR2T/ImmediateData"] = strings.Join(combos, ", ")
	if *complete && ok && version != "" {
		require.Len(t, combos, p.k.combinations, "combinations in force: %v", combos)
	}
	row := fmt.Sprintf("| %s | %s |", kind, version)
	for _, c := range columns {
		row += " " + p.row[c] + " |"
	}
	t.Log(realtarget.RowPrefix + row)
	if *table != "" && ok && version != "" {
		require.NoError(t, realtarget.PutRow(*table, "targets", row, 1))
	}
}

func (p *peer) config(g realtarget.Target) initiator.Config {
	return initiator.Config{Address: g.Portals()[0], TargetName: g.Name(), InitiatorName: "iqn.2006-07.com.example.intra:hannibal", ISID: [6]byte{0x80, 1}, Lenient: p.k.lenient,
		FailoverTime: patience, LoginTimeout: 2 * patience} // a busy emulated machine is no subject here
}

func open(t *testing.T, c initiator.Config) *initiator.Session {
	t.Helper()
	s, err := initiator.Open(context.Background(), c)
	require.NoError(t, err)
	t.Cleanup(func() { s.Abort(errors.New("end of test")); <-s.Done() })
	return s
}

func login(c initiator.Config) error {
	s, err := initiator.Open(context.Background(), c)
	if err != nil {
		return err
	}
	return s.Close(context.Background())
}

func (p *peer) discovers(t *testing.T, g realtarget.Target) {
	c := p.config(g)
	c.TargetName = ""
	ts, err := initiator.Discover(context.Background(), c)
	require.NoError(t, err)
	require.Empty(t, ts.Skipped)
	require.Len(t, ts.Targets, 1)
	require.Equal(t, g.Name(), ts.Targets[0].Name)
	require.Equal(t, []initiator.Portal{{Address: g.Portals()[0], Group: 1}}, ts.Targets[0].Portals)
	c.TargetName = "iqn.2009-01.nl.pref:storage.nobody"
	err = login(c)
	require.Error(t, err)
	t.Logf("login to a target that is not there: %v", err)
	p.row["discovery"] = "yes"
}

// names looks how the target compares a name that is not in lower case, as RFC
// 3722 would have it: our own URLs have to keep the spelling for such targets.
func (p *peer) names(t *testing.T) {
	g := realtarget.Start(t, p.kind, realtarget.Options{Name: "iqn.2009-01.nl.pref:Storage.XenSan"})
	c := p.config(g)
	c.TargetName = ""
	ts, err := initiator.Discover(context.Background(), c)
	require.NoError(t, err)
	require.Len(t, ts.Targets, 1)
	told := ts.Targets[0].Name
	u, err := initiator.ParseURL(initiator.TargetURL(initiator.Portal{Address: g.Portals()[0], Group: -1}, told).String())
	require.NoError(t, err)
	c.TargetName = u.TargetName()
	require.NoError(t, login(c), "with the name as discovery told it, %s", told)
	u, err = initiator.ParseURL(realtarget.URL(g, g.Portals()[0]))
	require.NoError(t, err)
	c.TargetName = u.TargetName()
	require.NoError(t, login(c), "with the name as its configuration spells it")
	c.TargetName = strings.ToLower(g.Name())
	t.Logf("discovery tells %s; in lower case: %v", told, login(c))
}

func sizes(largest int) []int {
	all := []int{512, 1536, 4096, 8192, 65536, 66048, 256 << 10, 1 << 20, 4<<20 + 512, 16 << 20}
	if !*complete {
		all = []int{512, 8192, 66048, 1 << 20}
	}
	return slices.DeleteFunc(all, func(n int) bool { return n > largest })
}

// moves writes each size with one command, and reads it back over a new session.
func (p *peer) moves(t *testing.T, g realtarget.Target, c initiator.Config, largest int) initiator.Params {
	t.Helper()
	lun := scsi.LUNFromNumber(g.LUN())
	s := open(t, c)
	params := s.Negotiated()
	info, err := initiator.Identify(context.Background(), s, lun)
	require.NoError(t, err)
	require.Equal(t, 512, info.BlockSize)
	if info.MaxTransfer > 0 {
		largest = min(largest, int(info.MaxTransfer)*info.BlockSize)
	}
	want := map[int][]byte{}
	lba := uint64(8)
	at := map[int]uint64{}
	rng := rand.NewChaCha8([32]byte{byte(largest), byte(time.Now().UnixNano())})
	for _, n := range sizes(largest) {
		data := make([]byte, n)
		rng.Read(data)
		w := &initiator.Command{LUN: lun, Dir: initiator.DataOut, Data: slices.Clone(data)}
		scsi.Write(&w.CDB, lba, uint32(n/512), false, info.Use16)
		require.NoError(t, s.Do(context.Background(), w), "write of %d bytes, %+v", n, params)
		require.Equal(t, scsi.StatusGood, w.Result.Status, "write of %d bytes: %v", n, scsi.ParseSense(w.Result.SenseData()))
		want[n], at[n] = data, lba
		lba += uint64(n/512) + 8
	}
	require.NoError(t, s.Close(context.Background()))
	s = open(t, c)
	_, err = initiator.Identify(context.Background(), s, lun)
	require.NoError(t, err)
	for n, data := range want {
		r := &initiator.Command{LUN: lun, Dir: initiator.DataIn, Data: make([]byte, n)}
		scsi.Read(&r.CDB, at[n], uint32(n/512), info.Use16)
		require.NoError(t, s.Do(context.Background(), r), "read of %d bytes, %+v", n, params)
		require.Equal(t, scsi.StatusGood, r.Result.Status, "read of %d bytes: %v", n, scsi.ParseSense(r.Result.SenseData()))
		require.True(t, bytes.Equal(data, r.Data), "%d bytes came back otherwise, %+v", n, params)
	}
	require.NoError(t, s.Close(context.Background()))
	return params
}

func combination(r2t, immediate bool) string {
	yes := map[bool]string{true: "Yes", false: "No"}
	return yes[r2t] + "/" + yes[immediate]
}

func (p *peer) note(params initiator.Params) {
	p.combo[combination(params.InitialR2T, params.ImmediateData)] = true
}

func (p *peer) commands(t *testing.T, g realtarget.Target) {
	params := p.moves(t, g, p.config(g), p.k.largest)
	t.Logf("in force: %+v", params)
	p.note(params)
	p.row["largest command"] = fmt.Sprintf("%d MiB", sizes(p.k.largest)[len(sizes(p.k.largest))-1]>>20)
}

// parallel keeps 32 commands in flight, and pings between them.
func (p *peer) parallel(t *testing.T, g realtarget.Target) {
	c := p.config(g)
	s := open(t, c)
	lun := scsi.LUNFromNumber(g.LUN())
	info, err := initiator.Identify(context.Background(), s, lun)
	require.NoError(t, err)
	rounds := 4
	if *complete {
		rounds = 20
	}
	var all sync.WaitGroup
	for w := range 32 {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			for i := range rounds {
				n := 512 * (1 + rng.IntN(256))
				lba := uint64(w * 2048)
				data := bytes.Repeat([]byte{byte(w), byte(i), byte(n >> 9), 7}, n/4)
				c := &initiator.Command{LUN: lun, Dir: initiator.DataOut, Data: data}
				scsi.Write(&c.CDB, lba, uint32(n/512), false, info.Use16)
				if err := s.Do(context.Background(), c); err != nil || c.Result.Status != scsi.StatusGood {
					t.Errorf("write of %d bytes: %v, status %#x", n, err, c.Result.Status)
					return
				}
				c = &initiator.Command{LUN: lun, Dir: initiator.DataIn, Data: make([]byte, n)}
				scsi.Read(&c.CDB, lba, uint32(n/512), info.Use16)
				if err := s.Do(context.Background(), c); err != nil || c.Result.Status != scsi.StatusGood || !bytes.Equal(c.Data, data) {
					t.Errorf("read of %d bytes: %v, status %#x", n, err, c.Result.Status)
					return
				}
			}
		})
	}
	all.Wait()
	require.NoError(t, s.Err())
	time.Sleep(1200 * time.Millisecond) // a ping when idle
	require.NoError(t, s.Err())
	require.NoError(t, s.Close(context.Background()))
}

func (p *peer) logsOut(t *testing.T, g realtarget.Target) {
	p.row["logout seen"] = "it does not tell"
	s := open(t, p.config(g))
	if p.k.sessions {
		require.Eventually(t, func() bool { return g.Sessions() == 1 }, 10*time.Second, 50*time.Millisecond, "the target knows of one session")
	}
	began := time.Now()
	require.NoError(t, s.Close(context.Background()))
	require.Less(t, time.Since(began), 2*time.Second, "the target answered the logout")
	if p.k.sessions {
		require.Eventually(t, func() bool { return g.Sessions() == 0 }, 10*time.Second, 50*time.Millisecond, "the target forgot the session")
		p.row["logout seen"] = "yes"
	}
}

// offers lets the initiator impose combinations and bursts.
func (p *peer) offers(t *testing.T, g realtarget.Target) {
	offers := []initiator.Offer{{InitialR2T: true, NoImmediateData: true}, {FirstBurst: 512, MaxBurst: 512}}
	if *complete {
		offers = append(offers, initiator.Offer{InitialR2T: true}, initiator.Offer{NoImmediateData: true},
			initiator.Offer{FirstBurst: 4096, MaxBurst: 16384, MaxData: 4096, MaxR2T: 1}, initiator.Offer{InitialR2T: true, NoImmediateData: true, MaxBurst: 65536, MaxR2T: 2})
	}
	for _, o := range offers {
		c := p.config(g)
		c.Offer = o
		name := fmt.Sprintf("%+v", o)
		t.Run(name, func(t *testing.T) {
			small := o.MaxBurst > 0
			if o.NoImmediateData && !p.k.limits.noImmediate || small && !p.k.limits.small {
				err := login(c)
				require.Error(t, err)
				t.Logf("refused, as it must be: %v", err)
				return
			}
			largest := p.k.largest
			if small {
				largest = min(largest, max(66048, 128*o.MaxBurst)) // each burst is a round trip
			}
			params := p.moves(t, g, c, largest)
			p.note(params)
			require.True(t, params.InitialR2T || !o.InitialR2T)
			require.False(t, params.ImmediateData && o.NoImmediateData)
			if o.MaxBurst > 0 {
				require.LessOrEqual(t, params.MaxBurst, o.MaxBurst)
			}
		})
	}
}

// settings lets the target's own configuration impose them.
func (p *peer) settings(t *testing.T) {
	if p.kind == "gotgt" {
		t.Skip("its settings are fixed")
	}
	bursts := []string{"65536"}
	if *complete {
		bursts = []string{"4096", "65536", "262144"}
	}
	for _, r2t := range p.k.r2t {
		for _, immediate := range []string{"Yes", "No"} {
			for _, first := range bursts {
				t.Run(r2t+"-"+immediate+"-"+first, func(t *testing.T) {
					g := realtarget.Start(t, p.kind, realtarget.Options{Params: map[string]string{"InitialR2T": r2t, "ImmediateData": immediate, "FirstBurstLength": first, "MaxBurstLength": "262144"}})
					params := p.moves(t, g, p.config(g), p.k.largest)
					t.Logf("in force: %+v", params)
					p.note(params)
				})
			}
		}
	}
}

func (p *peer) chap(t *testing.T) {
	if !p.k.chap {
		p.row["CHAP"], p.row["mutual CHAP"] = "no", "no"
		g := realtarget.Start(t, p.kind, realtarget.Options{})
		c := p.config(g)
		c.User, c.Secret = realtarget.User, realtarget.Secret
		err := login(c)
		require.Error(t, err, "a configured user is never left out")
		t.Logf("with a user: %v", err)
		return
	}
	g := realtarget.Start(t, p.kind, realtarget.Options{CHAP: true})
	c := p.config(g)
	require.ErrorContains(t, login(c), "set a CHAP user and secret")
	c.User, c.Secret = realtarget.User, "wrong-secret-here"
	err := login(c)
	require.ErrorContains(t, err, "authentication failed")
	require.NotContains(t, err.Error(), "wrong-secret-here")
	c.Secret = realtarget.Secret
	p.moves(t, g, c, 1<<20)
	c.MutualUser, c.MutualSecret = realtarget.MutualUser, realtarget.MutualSecret
	err = login(c)
	require.Error(t, err, "the target has no secret of its own to prove itself with")
	t.Logf("mutual where the target cannot: %v", err)
	p.row["CHAP"] = "yes"
	if !p.k.mutual {
		p.row["mutual CHAP"] = "no"
		return
	}
	g.Kill()
	g = realtarget.Start(t, p.kind, realtarget.Options{CHAP: true, Mutual: true})
	c.Address, c.TargetName = g.Portals()[0], g.Name()
	p.moves(t, g, c, 1<<20)
	c.MutualSecret = "carthage-must-fall"
	err = login(c)
	require.ErrorContains(t, err, "does not know the mutual secret")
	require.NotContains(t, err.Error(), "carthage")
	p.row["mutual CHAP"] = "yes"
}

func (p *peer) digests(t *testing.T) {
	var seen []string
	for _, d := range [][2]bool{{true, true}, {true, false}, {false, true}} {
		if !*complete && d != [2]bool{true, true} {
			continue
		}
		params := map[string]string{}
		for i, k := range []string{"HeaderDigest", "DataDigest"} {
			if d[i] {
				params[k] = "CRC32C"
			}
		}
		g := realtarget.Start(t, p.kind, realtarget.Options{Params: params})
		c := p.config(g)
		want := map[bool]initiator.Digest{true: initiator.DigestRequired}
		c.HeaderDigest, c.DataDigest = want[d[0]], want[d[1]]
		if !p.k.digests {
			s, err := initiator.Open(context.Background(), c)
			if err != nil {
				t.Logf("digests %v: %v", d, err)
				continue
			}
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			_, err = initiator.Identify(ctx, s, scsi.LUNFromNumber(g.LUN()))
			cancel()
			require.Error(t, err, "what it agreed to and does not do is noticed")
			t.Logf("digests %v: agreed to, then: %v", d, err)
			s.Abort(err)
			<-s.Done()
			continue
		}
		got := p.moves(t, g, c, p.k.largest)
		require.Equal(t, d, [2]bool{got.HeaderDigest, got.DataDigest})
		s := open(t, c)
		_, err := initiator.Identify(context.Background(), s, scsi.LUNFromNumber(g.LUN()))
		require.NoError(t, err)
		time.Sleep(1200 * time.Millisecond) // pings carry digests too
		require.NoError(t, s.Err())
		require.NoError(t, s.Close(context.Background()))
		g.Kill()
		seen = append(seen, map[[2]bool]string{{true, false}: "header", {false, true}: "data", {true, true}: "both"}[d])
	}
	if p.row["digests"] = strings.Join(seen, ", "); len(seen) == 0 {
		p.row["digests"] = "no"
	}
}
