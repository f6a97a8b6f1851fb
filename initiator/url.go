package initiator

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
)

func defaultDial(ctx context.Context, network, address string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, network, address)
}

// Credentials are those of CHAP (RFC 7143 12.1). An empty User means none; with
// MutualSecret the target must prove itself too, as MutualUser if that is set.
type Credentials struct {
	User, Secret             string
	MutualUser, MutualSecret string
}

// URL is a path to a logical unit as libiscsi spells it:
// iscsi://[user[%secret]@]host[:port]/target-iqn/lun. Without a LUN it means
// all units of the target.
type URL struct {
	Credentials        // the mutual ones are never spelled in a URL
	Address     string // host:port
	Target      string
	LUN         uint64
	HasLUN      bool
}

// ParseURL reads a PATH-URL. Its errors never quote a secret.
func ParseURL(s string) (URL, error) {
	var u URL
	const want = "want iscsi://[user[%secret]@]host[:port]/target-iqn[/lun]"
	rest, ok := strings.CutPrefix(s, "iscsi://")
	if !ok {
		return u, fmt.Errorf("path URL %.60q: %s", s, want)
	}
	if at := strings.LastIndex(rest, "@"); at >= 0 && !strings.Contains(rest[:at], "/") {
		u.User, u.Secret, _ = strings.Cut(rest[:at], "%")
		rest = rest[at+1:]
		if u.User == "" {
			return u, fmt.Errorf("path URL: empty user before @; %s", want)
		}
	}
	host, path, _ := strings.Cut(rest, "/")
	var err error
	if u.Address, err = WithPort(host); err != nil {
		return u, fmt.Errorf("path URL: %w; %s", err, want)
	}
	target, lun, hasLUN := strings.Cut(path, "/")
	if t, err := url.PathUnescape(target); err == nil {
		target = t
	}
	if u.Target = strings.ToLower(target); !validName(u.Target) {
		return u, fmt.Errorf("path URL: %.60q is no target name; %s", target, want)
	}
	if hasLUN && lun != "" {
		if u.LUN, err = strconv.ParseUint(lun, 10, 64); err != nil {
			return u, fmt.Errorf("path URL: %.20q is no LUN; %s", lun, want)
		}
		u.HasLUN = true
	}
	return u, nil
}

// String is the URL without its secret.
func (u URL) String() string {
	s := "iscsi://"
	if u.User != "" {
		s += u.User + "@"
	}
	s += u.Address + "/" + u.Target
	if u.HasLUN {
		s += "/" + strconv.FormatUint(u.LUN, 10)
	}
	return s
}

// PathISID derives a path's ISID, T=10b (RFC 7143 11.12.5): the same for the
// same path across reconnects and restarts, so that a new login reinstates the
// old session, and different for paths side by side.
func PathISID(initiatorName, targetName, address string) (isid [6]byte) {
	sum := sha256.Sum256([]byte(initiatorName + "\n" + targetName + "\n" + address))
	copy(isid[:], sum[:])
	isid[0] = 0x80 | isid[0]&0x3f
	return isid
}
