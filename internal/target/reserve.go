package target

import (
	"encoding/binary"
	"slices"
)

// Persistent reservations (SPC-4 5.9): registrations per nexus, and one
// reservation, which all registrants hold whatever its type says.

const (
	opPersistentIn  = 0x5e
	opPersistentOut = 0x5f

	statusReservationConflict = 0x18
)

// errConflict is answered with RESERVATION CONFLICT instead of sense.
var errConflict = Sense{0xff, 0xff, 0xff}

type registration struct {
	nexus nexus
	key   uint64
}

// fenced tells whether a reservation keeps a nexus from changing the disk.
func (l *LU) fenced(n nexus) bool {
	l.reserve.Lock()
	defer l.reserve.Unlock()
	return l.reserved != 0 && !slices.ContainsFunc(l.registered, func(r registration) bool { return r.nexus == n })
}

// Keys are the registered keys of persistent reservations.
func (l *LU) Keys() (keys []uint64, reserved bool) {
	l.reserve.Lock()
	defer l.reserve.Unlock()
	for _, r := range l.registered {
		keys = append(keys, r.key)
	}
	return keys, l.reserved != 0
}

// Register registers a key for a nexus of another host, and reserves the unit
// for it if typ is not 0.
func (l *LU) Register(initiator string, key uint64, typ uint8) {
	l.reserve.Lock()
	defer l.reserve.Unlock()
	l.registered = append(l.registered, registration{nexus{initiator: initiator}, key})
	if typ != 0 {
		l.reserved = typ
	}
}

// changes tells whether an operation changes the disk.
func changes(op byte) bool {
	return op == opWrite10 || op == opWrite16 || op == opUnmap || op == opWriteSame16 || op == opCompareWrite
}

func (c *conn) persistentIn(lu *LU, cdb *[16]byte) ([]byte, Sense) {
	lu.reserve.Lock()
	defer lu.reserve.Unlock()
	b := c.scratch[:8]
	clear(b)
	switch cdb[1] & 0x1f {
	case 0:
		for _, r := range lu.registered {
			b = binary.BigEndian.AppendUint64(b, r.key)
		}
	case 1:
		if lu.reserved != 0 {
			b = append(b, make([]byte, 16)...)
			b[21] = lu.reserved
		}
	default:
		return nil, errField
	}
	binary.BigEndian.PutUint32(b[4:], uint32(len(b)-8))
	return cut(b, uint32(binary.BigEndian.Uint16(cdb[7:]))), noSense
}

func (c *conn) persistentOut(lu *LU, cdb *[16]byte, list []byte) Sense {
	if len(list) < 24 {
		return errParamLength
	}
	action, typ := cdb[1]&0x1f, cdb[2]&0x0f
	key, actionKey := binary.BigEndian.Uint64(list), binary.BigEndian.Uint64(list[8:])
	lu.reserve.Lock()
	defer lu.reserve.Unlock()
	own := slices.IndexFunc(lu.registered, func(r registration) bool { return r.nexus == c.nexus })
	known := own >= 0 && lu.registered[own].key == key
	switch {
	case action == 0 && !known && (own >= 0 || key != 0), action != 0 && action != 6 && !known:
		return errConflict
	}
	leave := func() {
		if len(lu.registered) == 0 {
			lu.reserved = 0
		}
	}
	switch action {
	case 0, 6: // REGISTER, AND IGNORE EXISTING KEY
		switch {
		case own >= 0 && actionKey == 0:
			lu.registered = slices.Delete(lu.registered, own, own+1)
			leave()
		case own >= 0:
			lu.registered[own].key = actionKey
		case actionKey != 0:
			lu.registered = append(lu.registered, registration{c.nexus, actionKey})
		}
	case 1:
		if lu.reserved != 0 && lu.reserved != typ {
			return errConflict
		}
		lu.reserved = typ
	case 2:
		lu.reserved = 0
	case 3:
		lu.registered, lu.reserved = nil, 0
	case 4, 5: // PREEMPT, AND ABORT
		var gone []nexus
		lu.registered = slices.DeleteFunc(lu.registered, func(r registration) bool {
			if r.key == actionKey && r.nexus != c.nexus {
				gone = append(gone, r.nexus)
				return true
			}
			return false
		})
		if len(gone) == 0 {
			return errConflict
		}
		c.preempted(lu, gone, action == 5)
	default:
		return errField
	}
	return noSense
}

// preempted tells the nexuses that lost their registration, and aborts their tasks.
func (c *conn) preempted(lu *LU, gone []nexus, abort bool) {
	if abort {
		c.srv.cancelLate(func(d *deferred) bool { return d.r.lu == lu && slices.Contains(gone, d.nexus) })
	}
	for _, p := range c.srv.Portals() {
		for _, o := range p.list() {
			if o == c {
				continue
			}
			o.post(func() {
				if !slices.Contains(gone, o.nexus) || o.target == nil {
					return
				}
				if abort {
					o.abortLU(lu, false)
				}
				for i, l := range o.target.LUs {
					if l == lu {
						o.ua = append(o.ua, attention{i, 0x2a, 0x05})
					}
				}
			})
		}
	}
}

// Unregister removes a key, all of them if it is 0, and tells nobody.
func (l *LU) Unregister(key uint64) {
	l.reserve.Lock()
	defer l.reserve.Unlock()
	l.registered = slices.DeleteFunc(l.registered, func(r registration) bool { return key == 0 || r.key == key })
}
