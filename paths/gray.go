package paths

import (
	"context"
	"time"

	"github.com/mpathd/mpathd/checker"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// A gray path answers, but not well enough to be given I/O that another path
// could carry. It is kept back (delayed): it serves when nothing else is left;
// or it is moved to a marginal group, which comes after all others.

// PathErrors is san_path_err_*: a path that failed and came back more than
// Threshold times is kept back for Recovery. ForgetRate good checks forget one
// failure. All three must be set.
type PathErrors struct {
	Threshold, ForgetRate int
	Recovery              time.Duration
}

func (e PathErrors) on() bool { return e.Threshold > 0 && e.ForgetRate > 0 && e.Recovery > 0 }

// Sampling is marginal_path_*: a path that failed twice within DoubleFailed is
// kept back and read from, ten times a second for Sample. With more than Rate
// errors in 1000 it stays so for Recheck and is sampled again. All four must be
// set; it goes before PathErrors.
type Sampling struct {
	DoubleFailed, Sample, Recheck time.Duration
	Rate                          int
}

func (m Sampling) on() bool {
	return m.DoubleFailed > 0 && m.Sample > 0 && m.Recheck > 0 && m.Rate > 0
}

// Values of Config.GrayPaths: what paths are compared with.
const (
	GrayOff   = "no"
	GrayGroup = "group" // those that share I/O with them
	GrayMap   = "map"   // those of other groups too, by probes
)

// held is why a path is gray: bits.
type held uint8

const (
	heldBlamed held = 1 << iota // its I/O failed again and again, see probation
	heldErrors                  // PathErrors
	heldSample                  // Sampling
	heldSlow                    // slower or worse than its siblings, see compare
	heldFull                    // its target is too busy for any command, see relieve
)

func (h held) String() string {
	for _, x := range []struct {
		bit  held
		text string
	}{{heldSlow, "worse than its siblings"}, {heldSample, "failed twice in a short time"}, {heldErrors, "failed too often"}, {heldFull, "its target is too busy"}, {heldBlamed, "its I/O fails"}} {
		if h&x.bit != 0 {
			return x.text
		}
	}
	return ""
}

// record is what is remembered of a path across its sessions. Guarded by
// Group.mu.
type record struct {
	returns int // times it failed and came back, less what was forgotten
	forget  int // good checks until the next is forgotten
	failed  time.Time
	twice   bool // failed twice within DoubleFailed since it last passed
	byHand  bool // what took it down last was the operator: no failure of its own
	timer   *time.Timer
}

// delayed tells whether the path is kept back. Caller holds Group.mu.
func (p *Path) delayed() bool {
	return p.held&(heldBlamed|heldFull) != 0 || p.held&(heldErrors|heldSample) != 0 && !p.g.cfg().MarginalGroups
}

// marginal tells whether the path belongs into a marginal group. Caller holds
// Group.mu.
func (p *Path) marginal() bool {
	return p.held&heldSlow != 0 || p.held&(heldErrors|heldSample) != 0 && p.g.cfg().MarginalGroups
}

func (p *Path) hold(why held)    { p.set(func() { p.held |= why }) }
func (p *Path) release(why held) { p.set(func() { p.held &^= why }) }

// noteFailure remembers that the path went down. Caller holds Group.mu.
func (p *Path) noteFailure() {
	now := time.Now()
	if m := p.g.cfg().Sampling; m.on() && !p.record.failed.IsZero() && now.Sub(p.record.failed) <= m.DoubleFailed {
		p.record.twice = true
	}
	p.record.failed, p.record.byHand = now, false
}

// noteReturn judges a path that failed and is about to serve again. Caller
// holds Group.mu.
func (p *Path) noteReturn() {
	c := p.g.cfg()
	switch {
	case c.Sampling.on():
		if p.record.twice {
			p.held |= heldSample
		}
	case c.PathErrors.on():
		e := c.PathErrors
		if p.record.returns == 0 {
			p.record.forget = e.ForgetRate
		}
		if !p.record.byHand {
			p.record.returns++
		}
		if p.record.returns <= e.Threshold {
			return
		}
		if p.held&heldErrors == 0 {
			p.g.log.Warn("path delayed: it failed too often", "path", p.Name, "failures", p.record.returns, "for", e.Recovery)
		}
		p.held |= heldErrors
		if p.record.timer != nil {
			p.record.timer.Stop() // a new failure restarts the wait
		}
		p.record.timer = time.AfterFunc(e.Recovery, p.recovered)
	}
}

// recovered ends the wait of PathErrors. A path that is down just then waits
// anew when it comes back.
func (p *Path) recovered() {
	p.set(func() {
		if !p.up || p.g.closed {
			return
		}
		p.held &^= heldErrors
		p.record.returns = 0
		p.g.log.Info("path is no longer delayed: it stayed up", "path", p.Name)
	})
}

// noteGoodCheck lets PathErrors forget. Caller holds Group.mu.
func (p *Path) noteGoodCheck() {
	if p.record.returns == 0 || p.held&heldErrors != 0 {
		return
	}
	if p.record.forget--; p.record.forget <= 0 {
		p.record.returns--
		p.record.forget = p.g.cfg().PathErrors.ForgetRate
	}
}

// stopGray ends what waits for the path. Caller holds Group.mu.
func (p *Path) stopGray() {
	if p.record.timer != nil {
		p.record.timer.Stop()
	}
}

// sampled samples the path over s, again and again, until it passes or the
// session ends: then the next session begins anew.
func (p *Path) sampled(ctx context.Context, s Session) {
	defer p.g.routines.Done()
	for {
		m := p.g.cfg().Sampling
		bad, total := 0, 0
		if m.on() {
			p.g.log.Warn("path delayed: it failed twice in a short time and is read from now", "path", p.Name, "for", m.Sample)
			if bad, total = p.sample(ctx, s, m.Sample); total == 0 {
				return
			}
		}
		if !m.on() || bad*1000 <= m.Rate*total {
			p.g.log.Info("path is no longer delayed: it reads well", "path", p.Name, "reads", total, "errors", bad)
			p.set(func() { p.held &^= heldSample; p.record.twice = false })
			return
		}
		p.g.log.Warn("path stays delayed: too many reads failed", "path", p.Name, "reads", total, "errors", bad, "again_after", m.Recheck)
		select {
		case <-time.After(m.Recheck):
		case <-s.Done():
			return
		case <-ctx.Done():
			return
		}
	}
}

const (
	sampleEvery = 100 * time.Millisecond
	sampleMost  = 32 // in flight
)

// sample reads for a while and counts; total is 0 if it was interrupted.
func (p *Path) sample(ctx context.Context, s Session, long time.Duration) (bad, total int) {
	end := time.NewTimer(long)
	defer end.Stop()
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	results := make(chan error, sampleMost)
	pending := 0
	defer func() { // the session's end or the check's time limit answers them
		for ; pending > 0; pending-- {
			<-results
		}
	}()
	for {
		select {
		case err := <-results:
			pending--
			if total++; err != nil {
				bad++
			}
		case <-tick.C:
			if pending < sampleMost {
				pending++
				go func() { results <- p.probe(ctx, s) }()
			}
		case <-end.C:
			return bad, total
		case <-s.Done():
			return 0, 0
		case <-ctx.Done():
			return 0, 0
		}
	}
}

// probe reads one block, or asks with TEST UNIT READY where a read could make
// an array move the unit.
func (p *Path) probe(ctx context.Context, s Session) error {
	ctx, cancel := context.WithTimeout(ctx, p.g.cfg().CheckTimeout)
	defer cancel()
	p.g.mu.Lock()
	readable := p.checkState != checker.Ghost && (p.access == accessUnknown || p.access == int(scsi.ActiveOptimized))
	p.g.mu.Unlock()
	if !readable {
		v := checker.TUR.Check(ctx, checker.LU{Doer: s, LUN: p.LUN})
		if v.State == checker.Up || v.State == checker.Ghost {
			return nil
		}
		return v.Err
	}
	l := p.g.lu()
	return initiator.ReadBlocks(ctx, s, p.LUN, 0, 1, l.BlockSize, l.Use16)
}

// forgiveGray ends what the policy in force does not ask for. Caller holds mu.
func (g *Group) forgiveGray() {
	for _, p := range g.paths {
		if !g.cfg().PathErrors.on() {
			p.held &^= heldErrors
			p.record.returns = 0
		}
		if !g.cfg().Sampling.on() {
			p.held &^= heldSample
			p.record.twice = false
		}
	}
}
