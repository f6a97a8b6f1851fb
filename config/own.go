package config

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/nbd"
	"github.com/mpathd/mpathd/nbd/attach"
)

// owned tells whether the section that is open is one of mpathd's own.
func (p *parser) owned() bool {
	if p.skip > 0 || len(p.stack) == 0 {
		return false
	}
	return slices.Contains([]string{"initiator", "target", "nbd"}, p.stack[len(p.stack)-1].name)
}

// pairs reads what stands on one line of a section of mpathd's own, where a
// line may hold several settings and the braces too.
func (p *parser) pairs(toks []token) {
	for first := true; len(toks) > 0; first = false {
		t := toks[0]
		switch {
		case t.is("}"):
			p.close()
			if len(toks) > 1 {
				p.fail(toks[1].col, "nothing may follow `}` on its line: it would be lost")
			}
			return
		case t.is("{"):
			p.fail(t.col, "`{` belongs behind the name of its section")
			return
		case len(toks) > 1 && toks[1].is("{"):
			if p.open(t); !p.owned() {
				if len(toks) > 2 {
					p.fail(toks[2].col, "nothing may follow `{` on its line: it would be lost, and the section stay open")
				}
				return
			}
			toks = toks[2:]
		case !first && !slices.Contains(p.keywords(), t.text):
			p.fail(t.col, "only one value is read, this would be lost: put quotes around the whole value")
			return
		case len(toks) == 1 || toks[1].is("}"):
			p.setting(t, nil)
			toks = toks[1:]
		default:
			p.setting(t, toks[1:2])
			toks = toks[2:]
		}
	}
}

// keywords are those of the section of mpathd's own that is open.
func (p *parser) keywords() []string {
	if p.stack[len(p.stack)-1].name == "nbd" {
		return nbdKeywords
	}
	return initiatorKeywords
}

var (
	initiatorKeywords = []string{"name", "discover", "target", "url", "chap_user", "chap_secret_file", "mutual_chap_user", "mutual_chap_secret_file", "chap_algs", "chap_short_secrets", "redirect_allow", "failover_time", "header_digest", "data_digest", "lenient"}
	nbdKeywords       = []string{"listen", "attach", "attach_connections", "tls_cert", "tls_key", "tls_ca", "tls_optional", "allow"}
)

func (p *parser) initiator(b *block, t, v token, val string) {
	var err error
	switch key := t.text; {
	case key == "discover" && b.name == "initiator":
		if _, err = initiator.WithPort(val); err == nil {
			p.c.Initiator.Discover = append(p.c.Initiator.Discover, val)
			return
		}
	case key == "target" && b.name == "initiator", key == "url" && b.name == "target":
		if _, err = initiator.ParseURL(val); err == nil {
			if b.name == "target" {
				p.set(b, t, val)
			} else {
				p.c.Initiator.Target, p.c.targetsAt = append(p.c.Initiator.Target, Section{"url": val}), append(p.c.targetsAt, places{})
			}
			return
		}
	case key == "name" && b.name == "initiator":
		err = CheckInitiatorName(val)
	case key == "failover_time" && b.name == "initiator":
		err = duration(val)
	case key == "header_digest" || key == "data_digest":
		if b.name != "initiator" {
			err = errors.New("digests are set in the initiator section, for all targets")
		} else {
			err = new(initiator.Digest).Set(val)
		}
	case key == "lenient" && b.name == "initiator":
		err = strictly(val, "yes", "no")
	case key == "chap_user" || key == "mutual_chap_user":
	case key == "redirect_allow" && b.name == "initiator":
		_, err = initiator.ParseNetworks(val)
	case key == "chap_algs":
		_, err = initiator.ParseAlgorithms(val)
	case key == "chap_short_secrets":
		err = strictly(val, "yes", "no")
	case key == "chap_secret_file" || key == "mutual_chap_secret_file":
		if !filepath.IsAbs(val) {
			err = fmt.Errorf("%q: want an absolute path", val)
		}
	default:
		p.fail(t.col, "unknown keyword %q in %s%s", key, b.name, hint(key, initiatorKeywords))
		return
	}
	if err != nil {
		p.fail(v.col, "%s: %v", t.text, err)
		return
	}
	p.set(b, t, val)
}

// CheckInitiatorName tells why a name cannot be that of an iSCSI node, or nil: by
// its type and its length (RFC 7143 4.2.7).
func CheckInitiatorName(name string) error {
	if !strings.HasPrefix(name, "iqn.") && !strings.HasPrefix(name, "eui.") && !strings.HasPrefix(name, "naa.") || len(name) > 223 {
		return fmt.Errorf("%q: an initiator name begins with iqn., eui. or naa. and has at most 223 bytes", name)
	}
	return nil
}

func (p *parser) nbd(b *block, t, v token, val string) {
	var err error
	switch t.text {
	case "listen":
		if !strings.HasPrefix(val, "unix:/") && !strings.HasPrefix(val, "tcp:") {
			err = fmt.Errorf("%q: want unix:PATH or tcp:HOST:PORT", val)
		} else if _, err = nbd.ParseListeners(val, nbd.Access{}); err == nil && b.into["listen"] != "" {
			val = b.into["listen"] + ", " + val
		}
	case "tls_cert", "tls_key", "tls_ca":
		if !filepath.IsAbs(val) {
			err = fmt.Errorf("%q: want an absolute path", val)
		}
	case "tls_optional":
		err = strictly(val, "yes", "no")
	case "allow":
		for _, a := range strings.FieldsFunc(val, func(r rune) bool { return r == ',' || r == ' ' }) {
			if _, err = nbd.ParsePrefix(a); err != nil {
				break
			}
		}
	case "attach":
		if val != "auto" && val != "none" && !strings.HasPrefix(val, "/dev/nbd") {
			err = fmt.Errorf("%q: want auto, none or /dev/nbdN", val)
		}
	case "attach_connections":
		if n, e := strconv.Atoi(val); e != nil || n < 1 || n > attach.MaxConnections {
			err = fmt.Errorf("%q: want 1 to %d", val, attach.MaxConnections)
		}
	default:
		p.fail(t.col, "unknown keyword %q in nbd%s", t.text, hint(t.text, nbdKeywords))
		return
	}
	if err != nil {
		p.fail(v.col, "%s: %v", t.text, err)
		return
	}
	if t.text == "listen" { // repeatable
		b.into["listen"] = val
		return
	}
	p.set(b, t, val)
}
