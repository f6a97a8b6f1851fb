package paths

import (
	"math"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/scsi"
)

// A target that answers BUSY or TASK SET FULL gets fewer commands at once: half
// as many, once per round trip, and one more per round trip that succeeds, up to
// the queue depth again. With BUSY, or if no command is left whose end could
// make room, it gets none for a while first. If nothing succeeds for the time
// stubborn, the path is kept for when nothing else is left.
const (
	pauseFullMin = 50 * time.Millisecond
	pauseFullMax = 500 * time.Millisecond
	reliefMin    = 5 * time.Second
	reliefMax    = time.Minute
)

// depth bounds the commands in flight on a path. Guarded by Path.amu.
type depth struct {
	most    int // the configured queue depth
	limit   int // no command beyond it; 0 during a pause
	allowed int // what limit is outside of pauses
	taken   int // attempts in use
	gained  int // successes since allowed was changed last
	halved  int64
	pause   time.Duration
	pausing bool
	since   int64 // first refusal since the last success, 0 without
	told    bool  // it was logged that allowed is below the queue depth
}

// take returns an attempt and the session to use it on, or nil. A flush, which
// is one command, does not count against the depth.
func (p *Path) take(flush bool) (*attempt, Session) {
	box := p.current.Load()
	if box == nil {
		return nil, nil
	}
	p.amu.Lock()
	defer p.amu.Unlock()
	if p.depth.taken >= p.depth.limit && !flush {
		return nil, nil
	}
	if p.free == nil {
		p.grow()
	}
	a := p.free
	if a == nil {
		return nil, nil
	}
	p.free = a.next
	p.depth.taken++
	return a, box.Session
}

// give takes an attempt back; good means that the unit did what it was told.
func (p *Path) give(a *attempt, good bool) {
	p.amu.Lock()
	a.next = p.free
	p.free = a
	d := &p.depth
	d.taken--
	if d.allowed < d.most && good {
		p.gain(d)
	}
	p.amu.Unlock()
}

// gain lets one more command go per round trip. Caller holds amu.
func (p *Path) gain(d *depth) {
	d.since, d.pause = 0, 0
	if d.gained++; d.gained < d.allowed {
		return
	}
	d.gained = 0
	d.allowed++
	if !d.pausing {
		d.limit = d.allowed
	}
	if d.allowed == d.most {
		d.told = false
	}
}

// full takes the answer BUSY or TASK SET FULL to a command that was sent at
// start, before its attempt is given back. Answers to what was sent before the
// last one that counted tell nothing new. A full task set has room again when
// one of the commands under way has ended (SAM-5 5.3.1); without any, and for
// BUSY, nothing tells but time.
func (p *Path) full(start int64, status uint8) {
	p.amu.Lock()
	defer p.amu.Unlock()
	d := &p.depth
	if d.since == 0 {
		d.since = now()
	}
	if start < d.halved || d.pausing {
		return
	}
	d.allowed = max(1, min(d.allowed, d.taken)/2)
	d.limit = d.allowed
	d.halved, d.gained = now(), 0
	if !d.told {
		d.told = true
		allowed := d.allowed
		time.AfterFunc(0, func() { // nothing logs on the fast path
			p.g.log.Warn("the target answers BUSY or TASK SET FULL: it gets fewer commands at once", "path", p.Name, "queue_depth", allowed)
		})
	}
	if status == scsi.StatusBusy || d.taken == 1 {
		d.pause = min(max(2*d.pause, pauseFullMin), pauseFullMax)
		d.pausing, d.limit = true, 0
		time.AfterFunc(d.pause, p.resume)
	}
}

// resume ends a pause.
func (p *Path) resume() {
	p.amu.Lock()
	d := &p.depth
	d.pausing, d.limit = false, d.allowed
	stuck := d.since != 0 && now()-d.since > int64(stubborn)
	p.amu.Unlock()
	if stuck {
		p.relieve()
	}
	var plug block.Plug
	p.g.drain(&plug)
	plug.Flush()
}

// relieve keeps a path whose target takes nothing for when nothing else is left.
func (p *Path) relieve() {
	g := p.g
	g.mu.Lock()
	if g.closed || p.held&heldFull != 0 || !p.usable() {
		g.mu.Unlock()
		return
	}
	p.held |= heldFull
	p.relief = min(max(2*p.relief, reliefMin), reliefMax)
	wait := p.relief
	g.publish()
	g.mu.Unlock()
	g.log.Warn("path delayed: its target is busy with nothing it tells", "path", p.Name, "for", wait)
	time.AfterFunc(wait, func() { p.release(heldFull) })
}

// refill gives a new session the whole queue depth: it may be another target.
func (p *Path) refill() {
	p.amu.Lock()
	d := &p.depth
	d.allowed, d.gained, d.halved, d.pause, d.since, d.told = d.most, 0, math.MinInt64, 0, 0, false
	if !d.pausing {
		d.limit = d.allowed
	}
	p.amu.Unlock()
}

// queueDepth is how many commands the path takes at once.
func (p *Path) queueDepth() int {
	p.amu.Lock()
	defer p.amu.Unlock()
	return p.depth.allowed
}
