package nbd

import (
	"fmt"
	"io/fs"
	"net/netip"
	"strconv"
	"strings"
)

// TLSMode says what a listener's clients may do before TLS (proto.md, "TLS
// support").
type TLSMode uint8

const (
	TLSOff      TLSMode = iota // TLS is not offered
	TLSOptional                // SELECTIVETLS
	TLSRequired                // FORCEDTLS
)

// Access is what a listener asks of its clients.
type Access struct {
	TLS TLSMode // but off if the server has no certificate
	// Allow, if not empty, are the networks from which clients may come over TCP.
	Allow []netip.Prefix
}

// Listener is where clients connect and who may.
type Listener struct {
	Network, Address string // unix or tcp; a path, or host:port
	Access
	// Mode, Owner and Group are those of a unix socket; Owner and Group, names or
	// numbers, may be empty.
	Mode         fs.FileMode
	Owner, Group string
}

// Open tells whether others than the owner may connect to a unix socket.
func (l Listener) Open() bool { return l.Mode&0o077 != 0 || l.Owner != "" }

// ParseListeners reads listeners, separated by commas: unix:PATH or
// tcp:HOST:PORT, followed by words like mode=0660, owner=root, group=kvm,
// tls=required|optional|off and allow=10.0.0.0/8, which may be repeated. What is
// not said is as in over for listeners over TCP; a unix socket is its owner's
// alone and takes clients without TLS.
func ParseListeners(spec string, over Access) (out []Listener, err error) {
	for one := range strings.SplitSeq(spec, ",") {
		words := strings.Fields(one)
		if len(words) == 0 {
			return nil, fmt.Errorf("%q: want unix:PATH or tcp:HOST:PORT", spec)
		}
		kind, address, _ := strings.Cut(words[0], ":")
		l := Listener{Network: kind, Address: address, Mode: 0o600}
		switch {
		case kind == "tcp" && strings.Contains(address, ":"):
			l.Access = over
		case kind != "unix" || address == "":
			return nil, fmt.Errorf("%q: want unix:PATH or tcp:HOST:PORT", words[0])
		}
		own := false // the listener has its own allow
		for _, w := range words[1:] {
			key, v, _ := strings.Cut(w, "=")
			unix := kind == "unix"
			switch {
			case key == "tls" && v == "required":
				l.TLS = TLSRequired
			case key == "tls" && v == "optional":
				l.TLS = TLSOptional
			case key == "tls" && v == "off":
				l.TLS = TLSOff
			case key == "allow" && !unix:
				p, err := ParsePrefix(v)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", words[0], err)
				}
				if !own {
					l.Allow, own = nil, true
				}
				l.Allow = append(l.Allow, p)
			case key == "mode" && unix:
				n, err := strconv.ParseUint(v, 8, 9)
				if err != nil {
					return nil, fmt.Errorf("%s: mode %q: want permissions in octal like 0660", words[0], v)
				}
				l.Mode = fs.FileMode(n)
			case key == "owner" && unix && v != "":
				l.Owner = v
			case key == "group" && unix && v != "":
				l.Group = v
			default:
				return nil, fmt.Errorf("%s: %q: want tls=required|optional|off, and %s", words[0], w,
					map[bool]string{true: "mode=0660, owner=USER, group=GROUP for a unix socket", false: "allow=NETWORK for TCP"}[unix])
			}
		}
		out = append(out, l)
	}
	return out, nil
}

// ParsePrefix reads an address or a network.
func ParsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if ip, e := netip.ParseAddr(s); err != nil && e == nil {
		p, err = ip.Prefix(ip.BitLen())
	}
	if err != nil {
		return p, fmt.Errorf("NBD clients allowed from %q: want an address or a network like 10.0.0.0/8", s)
	}
	return p.Masked(), nil
}
