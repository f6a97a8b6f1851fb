package daemon

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/mpathd/mpathd/nbd"
)

// listen opens a socket; one on unix with its permissions from the first moment
// on. A socket that a dead daemon left is replaced, one in use is an error.
func listen(l nbd.Listener) (net.Listener, error) {
	if l.Network == "tcp" {
		return net.Listen("tcp", l.Address)
	}
	uid, gid, err := owners(l)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l.Address, err)
	}
	dir := os.FileMode(0o700)
	if l.Open() {
		dir = 0o711 // others may pass, and see nothing
	}
	if err := os.MkdirAll(filepath.Dir(l.Address), dir); err != nil {
		return nil, err
	}
	if c, err := net.Dial("unix", l.Address); err == nil {
		c.Close()
		return nil, fmt.Errorf("%s is in use by a running daemon: stop it or choose another path", l.Address)
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		os.Remove(l.Address)
	}
	old := syscall.Umask(0o177)
	ln, err := net.Listen("unix", l.Address)
	syscall.Umask(old)
	if err != nil {
		return nil, err
	}
	if uid >= 0 || gid >= 0 {
		err = os.Lchown(l.Address, uid, gid)
	}
	if err == nil {
		err = os.Chmod(l.Address, l.Mode)
	}
	if err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}

// owners are the numbers of a socket's owner and group, -1 where it does not say.
func owners(l nbd.Listener) (uid, gid int, err error) {
	uid, gid = -1, -1
	if l.Owner != "" {
		if uid, err = strconv.Atoi(l.Owner); err != nil {
			u, err := user.Lookup(l.Owner)
			if err != nil {
				return 0, 0, fmt.Errorf("owner %s: there is no such user", l.Owner)
			}
			uid, _ = strconv.Atoi(u.Uid)
		}
	}
	if l.Group != "" {
		if gid, err = strconv.Atoi(l.Group); err != nil {
			g, err := user.LookupGroup(l.Group)
			if err != nil {
				return 0, 0, fmt.Errorf("group %s: there is no such group", l.Group)
			}
			gid, _ = strconv.Atoi(g.Gid)
		}
	}
	return uid, gid, nil
}
