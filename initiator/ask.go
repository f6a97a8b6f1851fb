package initiator

import (
	"context"
	"fmt"
	"time"

	"github.com/mpathd/mpathd/scsi"
)

// question is a control command, and what came of it.
type question struct {
	op    string
	cdb   scsi.CDB
	out   []byte // data to the unit
	alloc int    // bytes of Data-In that there is room for
	once  bool   // any answer will do
	data  []byte // what came
	err   error  // a *StatusError: the unit refused
}

// pipeliner is a Doer that can have several commands under way; see Session.DoAll.
type pipeliner interface {
	DoAll(ctx context.Context, cs []*Command) (n int, err error)
}

const attentions = 8 // unit attentions and busy answers that a control command rides out

// ask issues questions that do not need each other's answers, all at once where
// d can, and again those that met a unit attention or a busy unit. Refusals stay
// with each question; the error is the transport's or ctx's.
func ask(ctx context.Context, d Doer, lun [8]byte, qs ...*question) error {
	for try := 0; len(qs) > 0; try++ {
		cs := make([]*Command, len(qs))
		for i, q := range qs {
			cs[i] = &Command{LUN: lun, CDB: q.cdb, ShortOK: true}
			switch {
			case len(q.out) > 0:
				cs[i].Dir, cs[i].Data = DataOut, q.out
			case q.alloc > 0:
				cs[i].Dir, cs[i].Data = DataIn, make([]byte, q.alloc)
			}
		}
		if n, err := doAll(ctx, d, cs); err != nil {
			return fmt.Errorf("%s: %w", qs[n].op, err)
		}
		var again []*question
		busy := false
		for i, q := range qs {
			repeat, wait := q.take(cs[i])
			if repeat && !q.once && try < attentions {
				again, busy = append(again, q), busy || wait
			}
		}
		if qs = again; !busy {
			continue
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// take keeps the answer. It tells whether to ask again, and whether to wait before.
func (q *question) take(c *Command) (again, wait bool) {
	r := &c.Result
	if r.Status == scsi.StatusGood {
		q.data, q.err = c.Data[:min(int(r.Received), len(c.Data))], nil
		return false, false
	}
	e := &StatusError{q.op, r.Status, scsi.ParseSense(r.SenseData())}
	q.err = e
	switch r.Status {
	case scsi.StatusBusy, scsi.StatusTaskSetFull, scsi.StatusTaskAborted:
		return true, true
	case scsi.StatusCheckCondition:
		return e.Sense.Key == scsi.KeyUnitAttention || e.Sense.Deferred, false
	}
	return false, false
}

// doAll is Session.DoAll, one command after the other where d has no other way.
func doAll(ctx context.Context, d Doer, cs []*Command) (int, error) {
	if p, ok := d.(pipeliner); ok {
		return p.DoAll(ctx, cs)
	}
	for i, c := range cs {
		if err := d.Do(ctx, c); err != nil {
			return i, err
		}
	}
	return len(cs), nil
}

// one asks a single question and returns its Data-In; the error is ask's or the
// unit's refusal.
func one(ctx context.Context, d Doer, lun [8]byte, q *question) ([]byte, error) {
	if err := ask(ctx, d, lun, q); err != nil {
		return nil, err
	}
	return q.data, q.err
}

// run is one without a question in hand.
func run(ctx context.Context, d Doer, op string, lun [8]byte, cdb scsi.CDB, alloc int) ([]byte, error) {
	return one(ctx, d, lun, &question{op: op, cdb: cdb, alloc: alloc})
}
