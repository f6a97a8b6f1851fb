package paths

import (
	"fmt"
)

// placed is a Session that knows where its login ended.
type placed interface {
	TargetPortalGroup() uint16
	Redirected() string // the portal, if it is another one than was asked for
}

// nexusOf names what of a session's nexus (SAM-5 4.7.2; RFC 7143 4.4.2) its
// path does not choose: the portal group, and the portal after a redirect. Empty:
// the session does not tell.
func nexusOf(s Session) string {
	p, ok := s.(placed)
	if !ok {
		return ""
	}
	if at := p.Redirected(); at != "" {
		return fmt.Sprintf("group %d at %s", p.TargetPortalGroup(), at)
	}
	return fmt.Sprintf("group %d", p.TargetPortalGroup())
}

// moved compares a new session's nexus with the one before. A login in another
// portal group, or at another portal after a redirect, reinstates nothing: what
// the self-test found there is forgotten, in both directions, and fencing
// of the old nexus through other portals goes on.
func (p *Path) moved(s Session) bool {
	now := nexusOf(s)
	p.g.mu.Lock()
	was := p.nexus
	p.nexus = now
	moved := was != "" && now != was
	if moved {
		p.trust, p.taken = Untested, false
		clear(p.via)
		for _, q := range p.g.paths {
			delete(q.via, p)
		}
	}
	announced := p.Announced
	first := was == ""
	p.g.mu.Unlock()
	if moved {
		p.g.log.Warn("the path leads to another nexus than before: its login does not end the old session, and is tested anew", "path", p.Name, "was", was, "is", now)
	}
	if pl, ok := s.(placed); ok && first && announced != nil && *announced != pl.TargetPortalGroup() {
		p.g.log.Warn("the target's portal group is not the one that discovery named", "path", p.Name, "discovered", *announced, "is", pl.TargetPortalGroup())
	}
	return moved
}

// trustFor is how far a login of this path is proof that e's session is over.
func (p *Path) trustFor(e *epoch) Trust {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	if e.nexus != "" && p.nexus != "" && e.nexus != p.nexus {
		return Untrusted
	}
	return p.classLocked()
}
