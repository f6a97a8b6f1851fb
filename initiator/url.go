package initiator

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"net/url"
	"path"
	"strings"

	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/scsi"
)

func defaultDial(ctx context.Context, network, address string) (net.Conn, error) {
	return (&net.Dialer{KeepAlive: -1, Control: sys.SYNRetries}).DialContext(ctx, network, address)
}

// Transport is what carries a path's commands.
type Transport uint8

const (
	// Userspace is a session of this process: iscsi://.
	Userspace Transport = iota
	// Kernel is a session of the kernel's iscsi_tcp: kernel+iscsi://.
	Kernel
	// Local is a block device that this host has already: file://.
	Local
)

// URL is a path to a logical unit as libiscsi spells it:
// iscsi://[user[%secret]@]host[:port]/target-iqn/lun, the LUN as scsi.ParseLUN
// reads it. Without a LUN it means all units of the target. kernel+iscsi://... is the same through the kernel's
// initiator; file:///dev/sdX is a block device.
type URL struct {
	Transport   Transport
	Device      string  // of Local: the device file; all that follows is empty then
	Credentials         // the mutual ones are never spelled in a URL
	Address     string  // host:port
	Target      string  // in lower case, as names are compared
	spelled     string  // as it was written, if that is not lower case
	Group       *uint16 // the portal group tag that discovery named, if it did; no part of the text
	LUN         [8]byte // raw
	HasLUN      bool
}

// ParseURL reads a PATH-URL. Its errors never quote a secret.
func ParseURL(s string) (URL, error) {
	var u URL
	const want = "want iscsi://[user[%secret]@]host[:port]/target-iqn[/lun]"
	if file, ok := strings.CutPrefix(s, "file://"); ok {
		return localURL(file)
	}
	rest, ok := strings.CutPrefix(s, "iscsi://")
	if !ok {
		if rest, ok = strings.CutPrefix(s, "kernel+iscsi://"); !ok {
			return u, fmt.Errorf("path URL %.60q: %s, the same with kernel+iscsi://, or file:///dev/sdX", s, want)
		}
		u.Transport = Kernel
	}
	if at := strings.LastIndex(rest, "@"); at >= 0 && !strings.Contains(rest[:at], "/") {
		user, secret, _ := strings.Cut(rest[:at], "%")
		u.User, u.Secret = user, Secret(secret)
		rest = rest[at+1:]
		if u.User == "" {
			return u, fmt.Errorf("path URL: empty user before @; %s", want)
		}
	}
	host, rest, _ := strings.Cut(rest, "/")
	var err error
	if u.Address, err = WithPort(host); err != nil {
		return u, fmt.Errorf("path URL: %w; %s", err, want)
	}
	target, lun, hasLUN := strings.Cut(rest, "/")
	if t, err := url.PathUnescape(target); err == nil {
		target = t
	}
	u.name(target)
	if !validName(u.Target) {
		return u, fmt.Errorf("path URL: %.60q is no target name; %s", target, want)
	}
	if hasLUN && lun != "" {
		if u.LUN, err = scsi.ParseLUN(lun); err != nil {
			return u, fmt.Errorf("path URL: %w; %s", err, want)
		}
		u.HasLUN = true
	}
	return u, nil
}

// localURL reads what follows file://.
func localURL(file string) (URL, error) {
	if f, err := url.PathUnescape(file); err == nil {
		file = f
	}
	if !path.IsAbs(file) || file == "/" || path.Clean(file) != file || strings.ContainsFunc(file, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return URL{}, fmt.Errorf("path URL: %.60q is no absolute path of a device; want file:///dev/sdX", file)
	}
	return URL{Transport: Local, Device: file}, nil
}

// TargetURL is the URL of all units of a target that discovery found.
func TargetURL(at Portal, name string) URL {
	u := URL{Address: at.Address}
	if at.Group >= 0 {
		tag := uint16(at.Group)
		u.Group = &tag
	}
	u.name(name)
	return u
}

func (u *URL) name(target string) {
	if u.Target = strings.ToLower(target); u.Target != target {
		u.spelled = target
	}
}

// TargetName is the name to log in with: some targets know only their own
// spelling of it.
func (u URL) TargetName() string { return cmp.Or(u.spelled, u.Target) }

// String is the URL without its secret.
func (u URL) String() string {
	s := "iscsi://"
	switch u.Transport {
	case Local:
		return "file://" + u.Device
	case Kernel:
		s = "kernel+iscsi://"
	}
	if u.User != "" {
		s += u.User + "@"
	}
	s += u.Address + "/" + u.TargetName()
	if u.HasLUN {
		s += "/" + scsi.LUNText(u.LUN)
	}
	return s
}

// PathName is what a path to one unit is called, and what its ISID is made of:
// host:port/lun, the same after kernel+, or the device file.
func (u URL) PathName() string {
	name := u.Address + "/" + scsi.LUNText(u.LUN)
	switch u.Transport {
	case Local:
		return u.Device
	case Kernel:
		return "kernel+" + name
	}
	return name
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
