package target

import (
	"encoding/binary"
	"maps"
	"slices"
)

// Asymmetric access (SPC-4 5.15) of a unit by target portal group.
const (
	Optimized     = 0x0
	NonOptimized  = 0x1
	Standby       = 0x2
	Unavailable   = 0x3
	Transitioning = 0xf
)

// Access is how a portal group reaches the unit.
type Access struct {
	State     uint8
	Preferred bool
}

// access is the whole ALUA state of a unit, immutable.
type access struct {
	groups   map[uint16]Access
	explicit bool
}

// SetAccess makes the unit one with asymmetric access: groups by target portal
// group tag. With explicit, SET TARGET PORT GROUPS moves the states: the group
// that becomes optimized takes that from those that have it. Sessions hear of
// every change by UNIT ATTENTION.
func (s *Server) SetAccess(l *LU, explicit bool, groups map[uint16]Access) {
	l.access.Store(&access{maps.Clone(groups), explicit})
	s.Attention(l, 0x2a, 0x06)
}

// Access is the state of a portal group.
func (l *LU) Access(group uint16) Access {
	if a := l.access.Load(); a != nil {
		return a.groups[group]
	}
	return Access{}
}

// Attention leaves a UNIT ATTENTION for the unit in every session.
func (s *Server) Attention(l *LU, asc, ascq uint8) {
	for _, p := range s.Portals() {
		for _, c := range p.list() {
			c.post(func() {
				if !c.full || c.target == nil {
					return
				}
				for i, x := range c.target.units() {
					if x == l {
						c.ua = append(c.ua, attention{i, asc, ascq})
					}
				}
			})
		}
	}
}

// refusal is the sense of a command that the state of its port group forbids.
func (a *access) refusal(group uint16, op uint8) Sense {
	if a == nil {
		return noSense
	}
	switch op {
	case opInquiry, opReportLUNs, opRequestSense, opModeSense6, opModeSense10, opMaintenanceIn, opMaintenanceOut:
		return noSense
	}
	switch a.groups[group].State {
	case Standby:
		return Sense{0x02, 0x04, 0x0b}
	case Unavailable:
		return Sense{0x02, 0x04, 0x0c}
	case Transitioning:
		return Sense{0x02, 0x04, 0x0a}
	}
	return noSense
}

// reportGroups is REPORT TARGET PORT GROUPS (SPC-4 6.37).
func (c *conn) reportGroups(lu *LU, cdb *[16]byte) ([]byte, Sense) {
	a := lu.access.Load()
	if a == nil || cdb[1]&0x1f != 0x0a {
		return nil, errOpcode
	}
	b := c.scratch[:4]
	clear(b)
	if cdb[1]>>5 == 1 {
		b = append(b, 0x10, 1, 0, 0)
	}
	for _, id := range slices.Sorted(maps.Keys(a.groups)) {
		g := a.groups[id]
		d := g.State
		if g.Preferred {
			d |= 0x80
		}
		ports := 0
		at := len(b)
		b = append(b, d, 0x0f, byte(id>>8), byte(id), 0, 0, 0, 0)
		for _, p := range c.srv.Portals() {
			if p.group == id {
				b = append(b, 0, 0, byte(p.index>>8), byte(p.index))
				ports++
			}
		}
		b[at+7] = byte(ports)
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return cut(b, binary.BigEndian.Uint32(cdb[6:])), noSense
}

// setGroups is SET TARGET PORT GROUPS (SPC-4 6.45).
func (c *conn) setGroups(lu *LU, cdb *[16]byte, param []byte) Sense {
	a := lu.access.Load()
	if a == nil || !a.explicit || cdb[1]&0x1f != 0x0a {
		return errOpcode
	}
	if len(param) < 8 {
		return errParamLength
	}
	groups := maps.Clone(a.groups)
	for d := param[4:]; len(d) >= 4; d = d[4:] {
		id, state := binary.BigEndian.Uint16(d[2:]), d[0]&0x0f
		g, ok := groups[id]
		if !ok || state > Unavailable {
			return errParamList
		}
		if state == Optimized {
			for o, x := range groups {
				if x.State == Optimized && o != id {
					x.State = g.State // they change places
					groups[o] = x
				}
			}
		}
		g.State = state
		groups[id] = g
	}
	go c.srv.SetAccess(lu, true, groups) // posts to sessions: not under this one's lock
	return noSense
}
