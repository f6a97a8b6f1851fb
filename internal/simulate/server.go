package simulate

import (
	"math/rand/v2"
	"slices"
	"time"
)

// behaviour is how a kind of target deals with old sessions and with what they
// left. The facts were measured on the real ones, see docs/write-safety.md; where
// nothing is known, the hostile variant is taken.
type behaviour struct {
	name        string
	keeps       bool          // a login ends no old session
	secure      bool          // a login ends one only if it begins at CSG 0
	loginWaits  bool          // a login waits for the backend I/O of the old session
	loginTakes  time.Duration // until a login has ended the old session
	ignoresLUR  bool          // LOGICAL UNIT RESET is answered and does nothing
	resetAborts bool          // LOGICAL UNIT RESET and ABORT TASK end commands that wait for data too
	dataTimeout time.Duration // a session whose Data-Out is later than this is closed
	resetEnds   bool          // LOGICAL UNIT RESET ends every other session first
	resetTakes  time.Duration // until it is answered, at least
	pings       time.Duration // how often it asks whether its peer is still there; 0: hardly ever
	serial      bool          // one command at a time, in order; one that waits for data holds all up
}

var behaviours = map[string]*behaviour{
	"tgt":   {name: "tgt", secure: true},
	"LIO":   {name: "LIO", loginWaits: true, resetAborts: true, dataTimeout: 3 * time.Second, pings: 15 * time.Second},
	"istgt": {name: "istgt", loginTakes: 950 * time.Millisecond, resetEnds: true, resetTakes: time.Second, serial: true, dataTimeout: 8 * time.Second, pings: 20 * time.Second},
	"hasty": {name: "hasty", secure: true, ignoresLUR: true}, // tgt, if it did not wait
	"liar":  {name: "liar", keeps: true, ignoresLUR: true},
}

// server is one target process on one machine.
type server struct {
	*behaviour
	w       *world
	iqn     string
	r       *rand.Rand
	power   bool
	running bool
	hung    bool // the process is stopped: its kernel still takes bytes
	stalled bool // backend I/O takes seconds
	conns   []*tconn
	queue   []*task // serial: accepted, in order; the first is in work
	work    []*task // in the backend
	waiters []waiter
	cuts    int             // power cuts
	told    map[[6]byte]int // how many of them each nexus was told of
}

func (s *server) accept(c *conn) *tconn {
	tc := &tconn{c: c, s: s}
	s.conns = append(s.conns, tc)
	if s.pings > 0 {
		tc.ping()
	}
	return tc
}

// stop ends the server's process, or with cut its machine: then its cache and
// everything in its backend is lost, and nobody hears of it.
func (s *server) stop(cut bool) {
	ts := slices.Concat(s.work, s.queue)
	conns := s.conns
	s.conns, s.queue, s.work, s.waiters = nil, nil, nil, nil
	for _, t := range ts {
		if !cut && !t.ended && t.inWork && s.r.IntN(2) == 0 { // its kernel finishes it
			s.execute(t)
		}
		t.ended = true
	}
	for _, tc := range conns {
		for _, t := range tc.tasks {
			t.ended = true
		}
		tc.dead, tc.buf, tc.tasks = true, nil, nil
		if !cut {
			tc.c.push(&tc.c.down, chunk{end: true})
		}
	}
	s.running, s.hung = false, false
	if cut {
		s.power = false
		s.cuts++
		s.w.disk.lose(s)
	}
}

// start brings it up again.
func (s *server) start() {
	s.power, s.running = true, true
	for _, l := range s.w.net.links {
		if l.srv == s {
			s.w.after(time.Millisecond, func() { s.w.net.connect(l) })
		}
	}
}

// resume ends a hang; which connection is read first is anybody's guess.
func (s *server) resume() {
	s.hung = false
	cs := slices.Clone(s.conns)
	s.r.Shuffle(len(cs), func(i, j int) { cs[i], cs[j] = cs[j], cs[i] })
	for _, tc := range cs {
		tc.process()
	}
}
