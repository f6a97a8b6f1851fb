package initiator

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// maxRedirects bounds the hops of one login.
const maxRedirects = 8

// Home is where logins through one portal begin. It is the address of the
// config until the target says that it moved for good; a temporary redirect
// leaves it alone, so that the next login asks there again. Sessions through
// one portal share it, for the life of the process. The zero value is ready;
// nil forgets.
type Home struct{ moved atomic.Pointer[string] }

// Address is where to begin, host:port.
func (h *Home) Address(configured string) string {
	if h != nil {
		if a := h.moved.Load(); a != nil {
			return *a
		}
	}
	return configured
}

// redirect is the target's word that it is elsewhere (RFC 7143 11.13.5, class 1).
type redirect struct {
	address   string
	permanent bool
}

func (r *redirect) Error() string { return "redirected to " + r.address }

// refusal is the error of a login response whose status is not success. Of the
// redirections only 0102 is permanent; 0100, which some targets send, counts
// as temporary.
func refusal(class, detail uint8, data []byte) error {
	if class != 1 {
		return &LoginError{class, detail}
	}
	keys, err := pdu.ParseKeys(data)
	if err != nil {
		return breach("%v", err)
	}
	for _, k := range keys {
		if k.Name == "TargetAddress" {
			a, _, err := splitPortal(k.Value)
			if err != nil {
				return breach("redirect to %.64q", k.Value)
			}
			return &redirect{a, detail == 2}
		}
	}
	return breach("redirect without an address (status %02x%02x)", class, detail)
}

// route is the way of one login through redirects. Target name and ISID stay
// the same all along.
type route struct {
	address string
	hops    int
	passing bool // a temporary redirect was followed: what comes is no new home
}

// follow goes where the target says. Only a move for good of the place where
// logins begin changes c.Home.
func (r *route) follow(to *redirect, c *Config) error {
	if r.hops++; r.hops > maxRedirects {
		return unsettled("more than %d redirects, the last to %s: check the target's portals", maxRedirects, to.address)
	}
	if len(c.RedirectTo) > 0 && !within(c.RedirectTo, to.address) {
		return unsettled("the target redirects to %s, which redirect_allow does not cover", to.address)
	}
	r.address = to.address
	r.passing = r.passing || !to.permanent
	if !r.passing && c.Home != nil {
		c.Home.moved.Store(&to.address)
	}
	return nil
}

// explain names the portal that an error is about, if it is not the configured one.
func (r *route) explain(err error) error {
	if r.hops == 0 {
		return err
	}
	return fmt.Errorf("redirected to %s: %w", r.address, err)
}

// elsewhere is where the login ended, if that is not where the config says.
func (lg *login) elsewhere() string {
	if lg.address == lg.c.Address {
		return ""
	}
	return lg.address
}

// ParseNetworks reads networks and addresses with commas, like
// "10.0.0.0/8, 192.168.1.7".
func ParseNetworks(v string) (out []netip.Prefix, err error) {
	for _, word := range strings.FieldsFunc(v, func(r rune) bool { return r == ',' || r == ' ' }) {
		n, err := netip.ParsePrefix(word)
		if err != nil {
			a, err := netip.ParseAddr(word)
			if err != nil {
				return nil, fmt.Errorf("%.40q: want networks like 10.0.0.0/8, with commas", word)
			}
			n = netip.PrefixFrom(a, a.BitLen())
		}
		out = append(out, n)
	}
	return out, nil
}

// within tells whether an address is in one of the networks. A name is in none.
func within(networks []netip.Prefix, address string) bool {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return false
	}
	for _, n := range networks {
		if n.Contains(ap.Addr().WithZone("").Unmap()) {
			return true
		}
	}
	return false
}

// splitPortal reads host[:port][,tpgt], with IPv6 in brackets, as TargetAddress
// carries it; the port defaults to 3260, the tag is -1 if there is none.
func splitPortal(v string) (address string, tag int, err error) {
	host, text, ok := strings.Cut(v, ",")
	tag = -1
	if ok {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil {
			return "", 0, fmt.Errorf("portal %.64q: bad group tag", v)
		}
		tag = int(n)
	}
	address, err = WithPort(host)
	return address, tag, err
}

// WithPort completes a portal with iSCSI's port 3260 if it names none. The host
// is an address, IPv6 in brackets, or a domain name.
func WithPort(v string) (string, error) {
	host, port, err := net.SplitHostPort(v)
	if err != nil {
		host, port = v, "3260"
		if inner, ok := strings.CutPrefix(v, "["); ok && strings.HasSuffix(inner, "]") {
			host = strings.TrimSuffix(inner, "]")
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || !validHost(host) {
		return "", fmt.Errorf("portal %.80q: want host[:port], IPv6 in brackets", v)
	}
	return net.JoinHostPort(host, port), nil
}

// validHost tells an address or a domain name from what could break a log
// line, a file name or a URL.
func validHost(host string) bool {
	bare, zone, zoned := strings.Cut(host, "%")
	if _, err := netip.ParseAddr(bare); err == nil {
		return !zoned || label(zone)
	}
	return host != "" && len(host) <= 253 && label(host)
}

func label(s string) bool {
	for _, c := range []byte(s) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '-' || c == '_') {
			return false
		}
	}
	return s != ""
}
