package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/u-root/iscsinl"
	"github.com/vishvananda/netlink/nl"

	"github.com/mpathd/mpathd/internal/sys"
)

// netlinkISCSI is NETLINK_ISCSI (linux/include/uapi/linux/netlink.h).
const netlinkISCSI = 8

const requestTime = 30 * time.Second // the kernel answers when it is done

// Available tells why sessions of the kernel's initiator are impossible here,
// or nil.
func Available() error {
	_, err := transportHandle()
	return err
}

// transportHandle is by what the kernel knows iscsi_tcp.
func transportHandle() (uint64, error) {
	file := filepath.Join(sysRoot, "class/iscsi_transport/tcp/handle")
	b, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, errors.New("the kernel's iSCSI initiator is not loaded: modprobe iscsi_tcp (and sd_mod), or use iscsi://")
	case errors.Is(err, fs.ErrPermission):
		return 0, fmt.Errorf("%s: sessions of the kernel's iSCSI initiator need root: %w", file, err)
	case err != nil:
		return 0, fmt.Errorf("the kernel's iSCSI initiator: %w", err)
	}
	h, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", file, err)
	}
	return h, nil
}

// requests are what the kernel is asked for, one at a time. The socket joins no
// group, so that events of other sessions cannot come between.
type requests struct {
	mu sync.Mutex
	c  *iscsinl.IscsiIpcConn
}

var asking requests

// do runs f with the request socket. After an error the socket is replaced: an
// answer may still be on its way.
func (r *requests) do(f func(c *iscsinl.IscsiIpcConn) error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.c == nil {
		handle, err := transportHandle()
		if err != nil {
			return err
		}
		s, err := nl.Subscribe(netlinkISCSI)
		if errors.Is(err, syscall.EPROTONOSUPPORT) {
			return errors.New("the kernel has no iSCSI netlink socket: modprobe iscsi_tcp")
		}
		if err != nil {
			return fmt.Errorf("iSCSI netlink socket: %w", err)
		}
		s.SetReceiveTimeout(sys.Timeval(requestTime))
		s.SetSendTimeout(sys.Timeval(requestTime))
		r.c = &iscsinl.IscsiIpcConn{Conn: s, TransportHandle: handle}
	}
	err := f(r.c)
	if err != nil {
		r.c.Conn.Close()
		r.c = nil
		if errors.Is(err, syscall.EPERM) {
			err = fmt.Errorf("%w: sessions of the kernel's iSCSI initiator need CAP_SYS_ADMIN", err)
		}
	}
	return err
}

// destroy ends a kernel session and all that belongs to it: its commands come
// back with errors and its disks go.
func destroy(sid uint32) error {
	var all []error
	conns, _ := filepath.Glob(filepath.Join(sysRoot, "class/iscsi_connection", fmt.Sprintf("connection%d:*", sid)))
	for _, c := range conns {
		cid, err := strconv.ParseUint(c[strings.LastIndex(c, ":")+1:], 10, 32)
		if err != nil {
			continue
		}
		// A connection that failed may be stopped already.
		asking.do(func(c *iscsinl.IscsiIpcConn) error { return c.StopConnection(sid, uint32(cid)) })
		if err := asking.do(func(c *iscsinl.IscsiIpcConn) error { return c.DestroyConnection(sid, uint32(cid)) }); err != nil {
			all = append(all, err)
		}
	}
	if err := asking.do(func(c *iscsinl.IscsiIpcConn) error { return c.DestroySession(sid) }); err != nil {
		all = append(all, err)
	}
	if _, err := os.Stat(filepath.Join(sysRoot, "class/iscsi_session", fmt.Sprintf("session%d", sid))); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return fmt.Errorf("kernel session %d does not end: %w", sid, errors.Join(all...))
}
