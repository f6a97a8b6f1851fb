package initiator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// Portal is an address of a target and its portal group.
type Portal struct {
	Address string // host:port
	Group   int    // target portal group tag, -1 if the target does not tell
}

// DiscoveredTarget is one target of a SendTargets answer.
type DiscoveredTarget struct {
	Name    string   // as the target spells it
	Portals []Portal // in its order; the one that was asked, if the target names none
}

// Discovered is what a portal said of itself. Skipped says what of it cannot be
// used and why; it is fit for a log, whatever the portal sent.
type Discovered struct {
	Targets []DiscoveredTarget // in its order
	Skipped []string           // a sentence each, at most 64
}

const (
	maxDiscovered = 4096 // targets
	maxPortals    = 8192 // of all targets together: each is a path to bring up
	maxSkipped    = 64   // messages
	logoutTime    = 500 * time.Millisecond
)

// Discover asks a portal which targets it serves (RFC 7143 appendix C), within
// LoginTimeout. Errors as those of Open.
func Discover(ctx context.Context, c Config) (Discovered, error) {
	c.TargetName, c.QueueDepth = "", 1
	c.Offer = Offer{MaxData: maxTextPDU}
	c.OnState, c.OnRoom = nil, nil
	if c.LoginTimeout <= 0 {
		c.LoginTimeout = defaultLoginTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, c.LoginTimeout)
	defer cancel()
	found, err := discover(ctx, c)
	if err != nil {
		return Discovered{}, fmt.Errorf("discovery at %s: %w", c.Address, err)
	}
	return found, nil
}

func discover(ctx context.Context, c Config) (Discovered, error) {
	c.complete()
	s, err := open(ctx, c)
	if err != nil {
		return Discovered{}, err
	}
	found, err := s.SendTargets(ctx, "All")
	end, cancel := context.WithTimeout(context.Background(), logoutTime)
	defer cancel()
	s.Close(end)
	return found, err
}

// parseTargets reads the joined answer to SendTargets that came from portal
// from. What it cannot use costs the target or portal that it is about, what
// makes no sense as a whole the answer.
func parseTargets(text []byte, from string) (Discovered, error) {
	var found Discovered
	keys, err := pdu.ParseList(text, maxList, maxList/8)
	if err != nil {
		return found, breach("%v", err)
	}
	skip := func(format string, a ...any) {
		if len(found.Skipped) < maxSkipped {
			found.Skipped = append(found.Skipped, fmt.Sprintf(format, a...))
		}
	}
	var t *DiscoveredTarget // nil: none yet, or one to skip
	named, addressed, targets, portals := false, false, 0, 0
	complete := func() {
		if t != nil && !addressed { // the default: where we asked
			t.Portals = append(t.Portals, Portal{from, -1})
		}
	}
	for _, k := range keys {
		switch k.Name {
		case "TargetName":
			complete()
			named, addressed, t = true, false, nil
			if targets++; targets > maxDiscovered {
				return Discovered{}, fmt.Errorf("the portal names more than %d targets: let it show this initiator only its own, or name the target in the configuration", maxDiscovered)
			}
			if !validName(strings.ToLower(k.Value)) {
				skip("target name %.80q is not valid", k.Value)
				continue
			}
			found.Targets = append(found.Targets, DiscoveredTarget{Name: k.Value})
			t = &found.Targets[len(found.Targets)-1]
		case "TargetAddress":
			if !named {
				return Discovered{}, breach("an address before any target name")
			}
			if addressed = true; t == nil {
				continue
			}
			a, tag, err := splitPortal(k.Value)
			if err == nil {
				a, err = reachable(a, from)
			}
			if err != nil {
				skip("portal %.80q of %s: %v", k.Value, t.Name, err)
				continue
			}
			if p := (Portal{a, tag}); !slices.Contains(t.Portals, p) {
				if portals++; portals > maxPortals {
					return Discovered{}, fmt.Errorf("the portal names more than %d portals: let it show this initiator only its own, or name the target in the configuration", maxPortals)
				}
				t.Portals = append(t.Portals, p)
			}
		}
	}
	complete()
	return found, nil
}

// reachable rules out addresses that no route leads to, which many targets
// list: those of their own loopback or of a link without a name. A link-local
// IPv6 address gets the zone through which we asked.
func reachable(address, from string) (string, error) {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return address, nil // a name
	}
	var asked netip.Addr
	if f, err := netip.ParseAddrPort(from); err == nil {
		asked = f.Addr()
	}
	a := ap.Addr().Unmap()
	switch {
	case a.IsUnspecified(), a.IsMulticast():
		return "", errors.New("not an address to connect to")
	case a.IsLoopback() && !asked.IsLoopback() && asked.IsValid():
		return "", errors.New("the target's own loopback address")
	case a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == "":
		if asked.Zone() == "" {
			return "", errors.New("a link-local address, without the interface that leads there")
		}
		return netip.AddrPortFrom(a.WithZone(asked.Zone()), ap.Port()).String(), nil
	case a.Is4() && a.IsLinkLocalUnicast() && asked.IsValid() && !asked.IsLinkLocalUnicast():
		return "", errors.New("a link-local address")
	}
	return address, nil
}

// validName checks a normalised iSCSI name (RFC 7143 4.2.7): iqn., eui. or
// naa., at most 223 bytes of UTF-8, nothing that could be a path or a terminal
// escape.
func validName(n string) bool {
	if len(n) > 223 || !utf8.ValidString(n) || !(strings.HasPrefix(n, "iqn.") || strings.HasPrefix(n, "eui.") || strings.HasPrefix(n, "naa.")) || strings.Contains(n, "..") {
		return false
	}
	for _, r := range n {
		if r <= ' ' || r == '/' || r == '\\' || !unicode.IsPrint(r) || strings.ContainsRune("\"'`;<>", r) {
			return false
		}
	}
	return true
}
