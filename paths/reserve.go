package paths

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mpathd/mpathd/block"
	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/scsi"
)

// What FenceBy can be.
const (
	ByReset   = "reset"   // reinstate the old session, then LOGICAL UNIT RESET
	ByPreempt = "preempt" // PREEMPT AND ABORT of the dead path's reservation key, where reservations are free to use
)

// With ByPreempt each path registers a key of its own before it serves, and the
// unit is reserved for registrants (SPC-4 5.9, Write Exclusive - All Registrants):
// PREEMPT AND ABORT of a dead path's key then ends its commands and refuses those
// that arrive later. Without the reservation it would end only what has arrived.

// KeyOwner is the part of a key that all keys of one host share.
const KeyOwner uint64 = 0xffffffffff << 24

const (
	preemptTime  = 5 * time.Second
	preemptTries = 2 * time.Second // then fencing by reset begins as well
)

// reserving tells whether p should have a key.
func (p *Path) reserving() bool {
	return p.Key != 0 && p.g.cfg().FenceBy == ByPreempt && !p.g.unreserved.Load()
}

// register gives the path its key, and reserves the unit when all paths that
// are up have theirs. An error fails the path, which would meet RESERVATION CONFLICT.
func (p *Path) register(ctx context.Context, s Session) error {
	if !p.reserving() {
		if p.keyed.Swap(false) { // the configuration changed, or others use reservations
			p.unreserve(ctx, s)
			return p.unregister(ctx, s)
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, p.g.cfg().CheckTimeout)
	defer cancel()
	keys, holder, err := initiator.Reservations(ctx, s, p.LUN)
	if err != nil {
		return p.refusedReservation(ctx, s, err)
	}
	var ours, others []uint64
	for _, k := range keys {
		if (k^p.Key)&KeyOwner == 0 {
			ours = append(ours, k)
		} else {
			others = append(others, k)
		}
	}
	switch {
	case len(others) > 0:
		return p.decline(ctx, s, fmt.Errorf("%d keys of others are registered", len(others)))
	case holder != nil && (len(ours) == 0 || holder.Type != scsi.WriteExclusiveAll):
		return p.decline(ctx, s, fmt.Errorf("it is reserved already, with type %d", holder.Type))
	}
	if holder != nil && !p.keyed.Load() {
		try, cancel := context.WithTimeout(ctx, preemptTime)
		lies, err := p.testPreempt(try, s)
		hangs := try.Err() != nil
		cancel()
		switch {
		case hangs: // istgt does not answer a WRITE of no blocks
			p.decline(ctx, s, err)
			return fmt.Errorf("test of reservations: %w", err)
		case err != nil:
			return p.refusedReservation(ctx, s, err)
		case lies != "":
			return p.decline(ctx, s, errors.New(lies))
		}
	}
	if err := initiator.Reserve(ctx, s, p.LUN, scsi.OutRegisterIgnore, 0, p.Key); err != nil {
		return p.refusedReservation(ctx, s, err)
	}
	p.keyed.Store(true)
	p.g.reserveMu.Lock()
	defer p.g.reserveMu.Unlock()
	if holder == nil {
		for _, q := range *p.g.everyPath.Load() {
			if q != p && q.current.Load() != nil && !q.keyed.Load() {
				q.ask(askVerify) // it reserves when it comes here
				return nil
			}
		}
		if err := initiator.Reserve(ctx, s, p.LUN, scsi.OutReserve, p.Key, 0); err != nil {
			return p.refusedReservation(ctx, s, err)
		}
	}
	if !p.g.reserved.Swap(true) {
		p.g.log.Info("the unit is reserved for this host's paths: old sessions are fenced by PREEMPT AND ABORT", "path", p.Name)
	}
	for _, k := range ours { // left by a run that crashed, from a path that is not here any more
		if !slices.ContainsFunc(*p.g.everyPath.Load(), func(q *Path) bool { return q.Key == k }) && !p.g.unfencedKey(k) {
			p.g.log.Info("a reservation key of an earlier run is removed", "key", fmt.Sprintf("%#x", k))
			initiator.Reserve(ctx, s, p.LUN, scsi.OutPreempt, p.Key, k)
		}
	}
	return nil
}

// testPreempt finds out, before the path takes I/O, whether the unit keeps a
// nexus without a key, and one whose key was preempted, from writing. lies is
// what it does not do.
func (p *Path) testPreempt(ctx context.Context, s Session) (lies string, err error) {
	if err := p.unregister(ctx, s); err != nil {
		return "", err
	}
	refused := func() (bool, error) { return initiator.WriteRefused(ctx, s, p.LUN, p.g.lu().BlockSize, p.g.lu().Use16) }
	if ok, err := refused(); !ok || err != nil {
		return "the unit does not keep a path without a key from writing", err
	}
	for _, q := range *p.g.everyPath.Load() {
		box := q.current.Load()
		if q == p || box == nil || !q.keyed.Load() {
			continue
		}
		if err := initiator.Reserve(ctx, s, p.LUN, scsi.OutRegisterIgnore, 0, p.Key); err != nil {
			return "", err
		}
		if ok, err := refused(); ok || err != nil {
			return "the unit keeps a path with a key from writing", err
		}
		if err := initiator.Reserve(ctx, box.Session, q.LUN, scsi.OutPreemptAbort, q.Key, p.Key); err != nil {
			return "", err
		}
		if ok, err := refused(); !ok || err != nil {
			return "the unit does not keep a path whose key was preempted from writing", err
		}
		p.g.preempts.Store(true)
		break
	}
	return "", nil
}

// unfencedKey tells whether a fence will still preempt this key.
func (g *Group) unfencedKey(k uint64) bool {
	g.ledger.mu.Lock()
	defer g.ledger.mu.Unlock()
	return slices.ContainsFunc(g.ledger.epochs, func(e *epoch) bool { return e.key == k })
}

// refusedReservation tells a unit that does not know or not allow this from one
// that does not answer.
func (p *Path) refusedReservation(ctx context.Context, s Session, err error) error {
	var refused *initiator.StatusError
	if !errors.As(err, &refused) {
		return err
	}
	// LIO answers NOT READY where it has no directory to keep registrations in.
	if refused.Sense.Key == scsi.KeyIllegalRequest || refused.Status == scsi.StatusCheckCondition && !p.g.reserved.Load() {
		return p.decline(ctx, s, err)
	}
	return fmt.Errorf("reservation key not registered: %w", err)
}

// decline leaves reservations alone from now on, on all paths.
func (p *Path) decline(ctx context.Context, s Session, why error) error {
	if !p.g.unreserved.Swap(true) {
		p.g.log.Warn("fence_by preempt is not possible here: old sessions are fenced by reset", "path", p.Name, "cause", why)
		for _, q := range *p.g.everyPath.Load() {
			if q != p && q.keyed.Load() {
				q.ask(askVerify)
			}
		}
	}
	p.g.preempts.Store(false)
	p.keyed.Store(false)
	p.unreserve(ctx, s)
	return p.unregister(ctx, s)
}

// unreserve gives the reservation up for all paths: before the keys, or those
// without one would be refused, and because istgt keeps it without any.
func (p *Path) unreserve(ctx context.Context, s Session) {
	ctx, cancel := context.WithTimeout(ctx, preemptTime)
	defer cancel()
	p.g.reserved.Store(false)
	initiator.Reserve(ctx, s, p.LUN, scsi.OutRelease, p.Key, 0) // RESERVATION CONFLICT: we have it no more
}

// unregister takes the path's key back; with the last one the reservation goes.
func (p *Path) unregister(ctx context.Context, s Session) error {
	ctx, cancel := context.WithTimeout(ctx, preemptTime)
	defer cancel()
	err := initiator.Reserve(ctx, s, p.LUN, scsi.OutRegisterIgnore, 0, 0)
	var refused *initiator.StatusError
	if errors.As(err, &refused) {
		err = nil // there is none
	}
	return err
}

// leaveReservation is for the end of the map, with nothing in flight, which would be
// refused without the key: keys of paths that are not there to take theirs back
// are preempted, so that the disk is free for others.
func (p *Path) leaveReservation(ctx context.Context, s Session) {
	if !p.keyed.Load() {
		return
	}
	defer p.keyed.Store(false)
	p.g.mu.Lock()
	closed := p.g.closed
	p.g.mu.Unlock()
	for _, q := range *p.g.everyPath.Load() {
		if closed && q != p && q.Key != 0 && q.current.Load() == nil {
			initiator.Reserve(ctx, s, p.LUN, scsi.OutPreempt, p.Key, q.Key) // RESERVATION CONFLICT: it has none
		}
	}
	if closed {
		p.unreserve(ctx, s)
	}
	if err := p.unregister(ctx, s); err != nil {
		p.g.log.Warn("reservation key not removed: another host may not be able to write until it is", "path", p.Name, "key", fmt.Sprintf("%#x", p.Key), "cause", err)
	}
}

// conflict is RESERVATION CONFLICT where we use reservations: the path's key was
// preempted by a fence that came late, or by somebody else, or we are about to give the
// reservation up. Registering again finds out.
func (p *Path) conflict() Action {
	if p.keyed.Load() {
		p.doubt()
	}
	return Action{Verb: RetryElsewhere, Err: block.ErrReservation, Limit: retriesHere, Pause: pauseBusy}
}

// preempt fences e through paths that serve. It reports whether that ended it,
// or is not worth another try.
func (g *Group) preempt(ctx context.Context, e *epoch) (over bool) {
	for _, q := range *g.everyPath.Load() {
		box := q.current.Load()
		if box == nil || !q.keyed.Load() || q.Name == e.name || !g.reserved.Load() || !g.preempts.Load() {
			continue
		}
		try, cancel := context.WithTimeout(ctx, preemptTime)
		began := time.Now()
		err := initiator.Reserve(try, box.Session, q.LUN, scsi.OutPreemptAbort, q.Key, e.key)
		cancel()
		var refused *initiator.StatusError
		switch {
		case err == nil:
			g.closeEpoch(e, fenceProven, "preempt", "through", q.Name, "preempt", time.Since(began).Round(10*time.Microsecond))
			return true
		case ctx.Err() != nil:
			return false
		case errors.As(err, &refused) && refused.Sense.Key == scsi.KeyIllegalRequest: // tgt knows PREEMPT only
			q.decline(ctx, box.Session, err)
			return false
		}
		g.log.Warn("PREEMPT AND ABORT failed", "path", e.name, "through", q.Name, "cause", err)
		if errors.As(err, &refused) && refused.Status == scsi.StatusReservationConflict {
			return false // the key is not there: that is no proof
		}
	}
	return false
}

// fencePreempt tries preempt, for a while if there is another way; false: reset
// has to do it.
func (g *Group) fencePreempt(ctx context.Context, e *epoch, other bool) bool {
	for end := time.Now().Add(preemptTries); ctx.Err() == nil; {
		if g.preempt(ctx, e) {
			return true
		}
		if g.unreserved.Load() || other && time.Now().After(end) {
			return false
		}
		select {
		case <-e.fenced:
			return true
		case <-ctx.Done():
		case <-time.After(fenceBackoff):
		}
	}
	return true
}
