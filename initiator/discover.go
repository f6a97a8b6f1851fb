package initiator

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/mpathd/mpathd/initiator/pdu"
)

// Portal is an address of a target and its portal group.
type Portal struct {
	Address string // host:port
	Group   int
}

// DiscoveredTarget is one target of a SendTargets answer.
type DiscoveredTarget struct {
	Name    string
	Portals []Portal
}

const maxDiscovered = 4096

// Discover asks a portal which targets it serves (RFC 7143 appendix C).
func Discover(ctx context.Context, c Config) ([]DiscoveredTarget, error) {
	c.TargetName = ""
	if c.FailoverTime <= 0 {
		c.FailoverTime = time.Second
	}
	if c.LoginTimeout <= 0 {
		c.LoginTimeout = 5 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, c.LoginTimeout)
	defer cancel()
	if c.Dial == nil {
		c.Dial = defaultDial
	}
	ts, err := discover(ctx, &c)
	if err != nil {
		return nil, fmt.Errorf("discovery at %s: %w", c.Address, err)
	}
	return ts, nil
}

func discover(ctx context.Context, c *Config) ([]DiscoveredTarget, error) {
	conn, lg, err := connectAndLogin(ctx, c)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if d, ok := ctx.Deadline(); ok {
		conn.SetDeadline(d)
	}
	var text []byte
	ask, ttt, cmdSN, expStatSN := pdu.AppendKey(nil, "SendTargets", "All"), pdu.NoTag, lg.cmdSN, lg.expStatSN
	for range loginExchanges {
		var h pdu.Header
		h[0], h[1] = uint8(pdu.OpTextReq), pdu.Final
		h.SetITT(1)
		h.SetTTT(ttt)
		h.SetCmdSN(cmdSN)
		h.SetExpStatSN(expStatSN)
		if err := writePDU(conn, &h, ask); err != nil {
			return nil, err
		}
		ask = nil
		data, err := readPDU(conn, &h)
		if err != nil {
			return nil, err
		}
		if h.Opcode() != pdu.OpTextResp {
			return nil, breach("opcode %#02x as answer to SendTargets", h.Opcode())
		}
		if text = append(text, data...); len(text) > pdu.MaxTextLen {
			return nil, breach("target list without end")
		}
		expStatSN = h.StatSN() + 1
		cmdSN++
		if ttt = h.TTT(); h.IsFinal() {
			return parseTargets(text)
		}
	}
	return nil, breach("target list without end")
}

// parseTargets reads the joined answer to SendTargets, in order.
func parseTargets(text []byte) ([]DiscoveredTarget, error) {
	keys, err := pdu.ParseKeys(text)
	if err != nil {
		return nil, breach("%v", err)
	}
	var ts []DiscoveredTarget
	for _, k := range keys {
		switch k.Name {
		case "TargetName":
			if !validName(k.Value) {
				return nil, breach("target name %.64q", k.Value)
			}
			if len(ts) == maxDiscovered {
				return nil, breach("more than %d targets", maxDiscovered)
			}
			ts = append(ts, DiscoveredTarget{Name: k.Value})
		case "TargetAddress":
			if len(ts) == 0 {
				return nil, breach("an address before any target name")
			}
			a, tag, err := splitPortal(k.Value)
			if err != nil {
				return nil, breach("target address %.64q", k.Value)
			}
			t := &ts[len(ts)-1]
			t.Portals = append(t.Portals, Portal{a, tag})
		}
	}
	return ts, nil
}

// validName checks an iSCSI name (RFC 7143 4.2.7.1): iqn., eui. or naa., at
// most 223 bytes, nothing that could be a path or a terminal escape.
func validName(n string) bool {
	if len(n) > 223 || !(strings.HasPrefix(n, "iqn.") || strings.HasPrefix(n, "eui.") || strings.HasPrefix(n, "naa.")) || strings.Contains(n, "..") {
		return false
	}
	for _, r := range n {
		if r <= ' ' || r == '/' || r == '\\' || r == 0x7f || strings.ContainsRune("\"'`;<>", r) {
			return false
		}
	}
	return true
}
