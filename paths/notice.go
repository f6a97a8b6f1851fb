package paths

import (
	"context"
	"errors"
	"time"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// What a path's own goroutine should look into: bits of Path.asks.
const (
	askVerify   uint32 = 1 << iota // prove the unit again, in service or not
	askRank                        // ask for the priority
	askStart                       // START UNIT
	askClearACA                    // CLEAR ACA
	askRescan                      // the target's LUNs may have changed
	askThin                        // say that the thin pool runs full
	askDeferred                    // say that an acknowledged write failed
	askReserve                     // is the reservation key still registered
	askEvent                       // say what event the target sent
)

// ask leaves bits for the path's goroutine. It never waits.
func (p *Path) ask(bits uint32) {
	p.asks.Or(bits)
	select {
	case p.asked <- struct{}{}:
	default:
	}
}

// noticer is a Session that tells what a unit reports beside results.
type noticer interface {
	OnNotice(func(initiator.Notice))
}

// doubter is a Session that can resolve commands which a reset may have ended.
type doubter interface{ Doubt(lun [8]byte) }

// listen hears what the session learns of the unit: unit attentions that met a
// checker's command count as much as those that met I/O.
func (p *Path) listen(s Session) {
	if n, ok := s.(noticer); ok {
		n.OnNotice(p.notice)
	}
}

// notice runs on the session's reader.
func (p *Path) notice(n initiator.Notice) {
	lunMap := n.Sense.Valid && n.Sense.ASC == 0x3f && n.Sense.ASCQ == 0x0e // of the target, whichever unit says it
	switch {
	case n.LUN != p.LUN && !lunMap:
	case n.Reset:
		p.g.unitReset(p.Target, p)
	case !n.Sense.Valid:
		p.event.Store(uint32(n.Event))
		p.ask(askEvent)
	default:
		if n.Sense.Key == scsi.KeyUnitAttention && n.Sense.ASC == 0x29 {
			p.heardReset.Store(time.Now().UnixNano())
		}
		act := classifySense(n.Sense)
		if act.Deferred {
			p.g.loss.lose(now(), p.g.ledger.omit)
			act.Ask |= askDeferred
		}
		if poweredOn(n.Sense) {
			p.lostPower()
		}
		serving := p.current.Load() != nil
		if act.Foreign && serving {
			p.suspectForeign()
		} else if act.Doubt || act.Foreign {
			if act.Foreign {
				p.strange.Store(true)
			}
			p.doubt()
		}
		p.ask(act.Ask)
	}
}

// unitReset tells the other sessions to the same target that the unit was reset,
// by a path or by a fence: what they have in flight may never be answered. Those of another target are left
// alone: it may be another server, whose writes hang while it waits for its
// peer, and a unit attention tells them if they were hit.
func (g *Group) unitReset(target string, by *Path) {
	for _, q := range *g.everyPath.Load() {
		if q.Target != target || q == by {
			continue
		}
		if box := q.current.Load(); box != nil {
			if d, ok := box.Session.(doubter); ok {
				d.Doubt(q.LUN)
			}
		}
	}
}

// answer does what was asked for. An error ends the session.
func (p *Path) answer(ctx context.Context, s Session, info *initiator.LUInfo) (*initiator.LUInfo, error) {
	bits := p.asks.Swap(0)
	log := p.g.log.With("path", p.Name)
	if bits&askEvent != 0 && seldom(&p.eventTold) {
		log.Info("the target sent an asynchronous event that asks for nothing", "event", p.event.Load())
	}
	if bits&askThin != 0 && seldom(&p.thinTold) {
		log.Warn("the unit's thin pool runs full: add space before writes fail", "sense", scsi.Sense{Valid: true, Key: scsi.KeyUnitAttention, ASC: 0x38, ASCQ: 0x07}.String())
	}
	if bits&askDeferred != 0 {
		if seldom(&p.deferredTold) {
			log.Error("a write that was acknowledged before has failed in the unit: the next flush fails, check the data")
		}
		p.g.saveLoss()
	}
	if bits&askRescan != 0 {
		if f := p.g.cfg().OnLUNs; f != nil {
			f(p.Portal, p.Target)
		}
	}
	if bits&askClearACA != 0 {
		if err := p.clearACA(ctx, s); err != nil {
			log.Warn("CLEAR ACA failed", "cause", err)
		}
	}
	if bits&askStart != 0 {
		p.startUnit(ctx, s, info)
	}
	switch {
	case bits&askVerify != 0, bits&askReserve != 0 && p.keyed.Load():
		return p.reverify(ctx, s)
	case bits&askRank != 0:
		p.rankAndPublish(ctx, s, info)
		if p.transitioning() { // ask again until the target has made up its mind
			time.AfterFunc(transitionPoll, p.askRank)
		}
	}
	return info, nil
}

const transitionPoll = 500 * time.Millisecond

func (p *Path) transitioning() bool {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	return p.access == int(scsi.Transitioning)
}

func (p *Path) clearACA(ctx context.Context, s Session) error {
	c, ok := s.(interface {
		ClearACA(ctx context.Context, lun [8]byte) error
	})
	if !ok {
		return errors.New("this kind of path cannot")
	}
	ctx, cancel := context.WithTimeout(ctx, p.g.cfg().CheckTimeout)
	defer cancel()
	return c.ClearACA(ctx, p.LUN)
}

// seldom tells, once a minute, that it is time for what a target may ask for, or
// make us log, at any pace.
func seldom(last *time.Time) bool {
	if !last.IsZero() && time.Since(*last) < time.Minute {
		return false
	}
	*last = time.Now()
	return true
}

// startUnit sends START STOP UNIT to a unit that asks for it, once a minute. A
// unit with asymmetric access is left alone: starting it may move it.
func (p *Path) startUnit(ctx context.Context, s Session, info *initiator.LUInfo) {
	if info.TPGS != 0 || !seldom(&p.startTried) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, p.g.cfg().CheckTimeout)
	defer cancel()
	if err := initiator.StartUnit(ctx, s, p.LUN); err != nil {
		p.g.log.Warn("the unit was stopped and does not start", "path", p.Name, "cause", err)
	} else {
		p.g.log.Warn("the unit was stopped and is started again", "path", p.Name)
	}
}

// reverify proves the unit again, puts the path back into service, and lets the
// others look when the capacity changed.
func (p *Path) reverify(ctx context.Context, s Session) (*initiator.LUInfo, error) {
	info, state, err := p.verify(ctx, s)
	if err == nil && p.foreign.Load() {
		err = errForeign // what is in flight may be another disk's
	}
	if err != nil {
		return nil, err
	}
	p.rank(ctx, s, info)
	if p.strange.Load() { // and it is asked again
		return info, nil
	}
	p.set(func() {
		select {
		case <-s.Done():
		default:
			p.doubted.Store(false)
			p.current.Store(&sessionBox{s})
			p.up, p.checkState = true, state
		}
	})
	p.g.regrow()
	for _, q := range *p.g.everyPath.Load() {
		if q.sees() < info.Blocks { // the others hear of it when they are asked
			q.doubt()
		}
	}
	return info, nil
}

// rester is a Session whose target may want to be left alone after its end.
type rester interface {
	Time2Wait() (wait time.Duration, announced bool)
}

// rest notes how long the target of a session that ended wants to be left
// alone. What it announced holds. The wait that was negotiated for connections
// that break (RFC 7143 13.15) is kept only while it costs nothing: another path
// serves, and no old writes wait for the login that ends them.
func (p *Path) rest(s Session) {
	r, ok := s.(rester)
	if !ok {
		return
	}
	wait, announced := r.Time2Wait()
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	if !announced && (p.failedByHand || len(p.g.table.Load().all) == 0 || len(p.g.ledger.of(p.Name)) > 0) {
		return
	}
	p.restUntil, p.restFirmly = time.Now().Add(wait), announced
	if announced && wait > 0 {
		p.g.log.Info("the target wants to be left alone", "path", p.Name, "for", wait)
	}
}

// wakeRested lets paths log in that rest or back off only because others serve.
// Caller holds mu.
func (g *Group) wakeRested() {
	for _, p := range g.paths {
		rests := !p.restUntil.IsZero()
		if p.restFirmly && rests || !rests && !p.patient {
			continue
		}
		p.restUntil = time.Time{}
		select {
		case p.wake <- struct{}{}:
		default:
		}
	}
}

// resting is how much longer the path must not log in.
func (p *Path) resting() time.Duration {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	return max(0, time.Until(p.restUntil))
}

func (p *Path) leave(cause error) {
	p.current.Store(nil)
	p.set(func() {
		p.leaving = true
		p.lastError = cause.Error()
		p.g.log.Warn("path leaves: its I/O moves, it logs out and in again", "path", p.Name, "cause", cause)
	})
}
