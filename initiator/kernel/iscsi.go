package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/u-root/iscsinl"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/initiator/pdu"
	"github.com/mpathd/mpathd/scsi"
)

// ISCSI is a path through sessions of the kernel's iscsi_tcp. This process logs
// in, with all that initiator can do, and hands the connection over; the kernel
// never logs in by itself. A connection that failed is not repaired: the kernel
// session is destroyed, and the next Open makes another one with the same ISID,
// so that the target ends what is left of the old.
type ISCSI struct {
	lun      [8]byte
	sessions sessions
}

// NewISCSI returns the path to a unit, by its raw LUN.
func NewISCSI(lun [8]byte) *ISCSI { return &ISCSI{lun: lun} }

// Kernel timers, seconds: ours are finer, these come second.
const (
	kernelPing  = "2" // NOP after this silence, and how long to wait for its answer
	kernelAbort = "3" // ABORT TASK and LOGICAL UNIT RESET
	// kernelRecovery 0 fails I/O as soon as the connection does: no relogin of
	// the kernel's could help, other paths can.
	kernelRecovery = "0"
)

// deviceTime is how long the kernel may take to show the disk of a session.
const deviceTime = 10 * time.Second

// Open logs in and hands the connection to the kernel, which then shows a disk; ctx
// bounds all of it. c.Dial must give TCP connections. It first waits two seconds for
// I/O that an earlier session left in the kernel, and removes kernel sessions of the same
// target and ISID that a crash left. Errors as those of initiator.Open, or the kernel's.
func (t *ISCSI) Open(ctx context.Context, c initiator.Config) (*Session, error) {
	if err := t.sessions.drain(ctx); err != nil {
		return nil, err
	}
	if err := Available(); err != nil {
		return nil, err
	}
	removeLeftovers(func(l leftover) bool { return l.target == c.TargetName && l.isid == c.ISID })
	login, err := initiator.LogIn(ctx, c)
	if err != nil {
		return nil, err
	}
	k, err := handOver(&c, login)
	if err != nil {
		login.Conn.Close()
		return nil, fmt.Errorf("kernel session to %s at %s: %w", c.TargetName, c.Address, err)
	}
	s, err := t.disk(ctx, &c, k)
	if err != nil {
		k.end(false)
		return nil, fmt.Errorf("kernel session to %s at %s: %w", c.TargetName, c.Address, err)
	}
	return s, nil
}

// kernelSession is a session that the kernel has.
type kernelSession struct {
	sid, cid, host uint32
	conn           net.Conn // ours beside the kernel's: says how the connection ends
	events         *watched
}

// handOver makes a kernel session out of a login. On error nothing is left but
// login.Conn, which stays the caller's.
func handOver(c *initiator.Config, l *initiator.Login) (k *kernelSession, err error) {
	tc, ok := l.Conn.(*net.TCPConn)
	if !ok {
		return nil, fmt.Errorf("%T is no TCP connection", l.Conn)
	}
	f, err := tc.File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	k = &kernelSession{conn: l.Conn}
	depth := uint16(1) << bits.Len16(uint16(min(max(c.QueueDepth, 32), 1024)-1)) // a power of two
	if err := asking.do(func(nc *iscsinl.IscsiIpcConn) (err error) {
		k.sid, k.host, err = nc.CreateSession(max(2*depth, 128), min(depth, 64))
		return err
	}); err != nil {
		return nil, fmt.Errorf("create session: %w", err)
	}
	defer func() {
		if err != nil {
			destroy(k.sid)
			events.remove(k.sid)
		}
	}()
	if k.events, err = events.add(k.sid); err != nil {
		return nil, err
	}
	return k, asking.do(func(nc *iscsinl.IscsiIpcConn) (err error) {
		if k.cid, err = nc.CreateConnection(k.sid); err != nil {
			return fmt.Errorf("create connection: %w", err)
		}
		if err = nc.BindConnection(k.sid, k.cid, int(f.Fd())); err != nil {
			return fmt.Errorf("bind connection: %w", err)
		}
		for _, p := range parameters(c, l) {
			if err = nc.SetParam(k.sid, k.cid, p.name, p.value); err != nil {
				return fmt.Errorf("set %v to %s: %w", p.name, p.value, err)
			}
		}
		if err = nc.StartConnection(k.sid, k.cid); err != nil {
			return fmt.Errorf("start connection: %w", err)
		}
		return nil
	})
}

type parameter struct {
	name  iscsinl.IscsiParam
	value string
}

// parameters are those that the kernel must know of a login. Names come first:
// a crash at any point leaves a session that the next run recognises.
func parameters(c *initiator.Config, l *initiator.Login) []parameter {
	yes := map[bool]string{true: "1", false: "0"}
	p := &l.Params
	host, port, _ := net.SplitHostPort(c.Address)
	r2t := 1
	for r2t < p.MaxR2T { // the kernel wants a power of two
		r2t *= 2
	}
	return []parameter{
		{iscsinl.ISCSI_PARAM_IFACE_NAME, mark(c.ISID)},
		{iscsinl.ISCSI_PARAM_TARGET_NAME, c.TargetName},
		{iscsinl.ISCSI_PARAM_INITIATOR_NAME, c.InitiatorName},
		{iscsinl.ISCSI_PARAM_PERSISTENT_ADDRESS, host},
		{iscsinl.ISCSI_PARAM_PERSISTENT_PORT, port},
		{iscsinl.ISCSI_PARAM_TPGT, strconv.Itoa(int(l.TargetPortalGroup))},
		{iscsinl.ISCSI_PARAM_MAX_RECV_DLENGTH, strconv.Itoa(l.MaxData)},
		{iscsinl.ISCSI_PARAM_MAX_XMIT_DLENGTH, strconv.Itoa(p.TargetMaxData)},
		{iscsinl.ISCSI_PARAM_HDRDGST_EN, yes[p.HeaderDigest]},
		{iscsinl.ISCSI_PARAM_DATADGST_EN, yes[p.DataDigest]},
		{iscsinl.ISCSI_PARAM_INITIAL_R2T_EN, yes[p.InitialR2T]},
		{iscsinl.ISCSI_PARAM_IMM_DATA_EN, yes[p.ImmediateData]},
		{iscsinl.ISCSI_PARAM_FIRST_BURST, strconv.Itoa(p.FirstBurst)},
		{iscsinl.ISCSI_PARAM_MAX_BURST, strconv.Itoa(p.MaxBurst)},
		{iscsinl.ISCSI_PARAM_MAX_R2T, strconv.Itoa(r2t)},
		{iscsinl.ISCSI_PARAM_PDU_INORDER_EN, "1"},
		{iscsinl.ISCSI_PARAM_DATASEQ_INORDER_EN, "1"},
		{iscsinl.ISCSI_PARAM_ERL, "0"},
		{iscsinl.ISCSI_PARAM_EXP_STATSN, strconv.FormatUint(uint64(l.ExpStatSN), 10)},
		{iscsinl.ISCSI_PARAM_FAST_ABORT, "1"},
		{iscsinl.ISCSI_PARAM_ABORT_TMO, kernelAbort},
		{iscsinl.ISCSI_PARAM_LU_RESET_TMO, kernelAbort},
		{iscsinl.ISCSI_PARAM_PING_TMO, kernelPing},
		{iscsinl.ISCSI_PARAM_RECV_TMO, kernelPing},
		{iscsinl.ISCSI_PARAM_SESS_RECOVERY_TMO, kernelRecovery},
	}
}

// disk finds the disk of the path's unit behind a kernel session and begins to
// use it.
func (t *ISCSI) disk(ctx context.Context, c *initiator.Config, k *kernelSession) (*Session, error) {
	ctx, cancel := context.WithTimeout(ctx, deviceTime)
	defer cancel()
	file, err := k.attachUnit(ctx, t.lun)
	if err != nil {
		return nil, err
	}
	dev, err := openNew(ctx, file)
	if err != nil {
		return nil, err
	}
	s := newSession(Options{FailoverTime: c.FailoverTime, CommandTimeout: c.CommandTimeout, QueueDepth: c.QueueDepth, OnState: c.OnState, OnRoom: c.OnRoom}, dev, file, dev.blockSize)
	s.lun = t.lun
	s.teardown = func() { k.end(s.err == errClosed) }
	s.start()
	t.sessions.add(s)
	k.events.attach(s)
	return s, nil
}

// openNew opens a disk that has just appeared: the kernel may still be making
// it, and look at its partitions.
func openNew(ctx context.Context, file string) (dev *blockDevice, err error) {
	for range 50 {
		dev, err = openWithin(ctx, file, true)
		if !errors.Is(err, syscall.ENXIO) && !errors.Is(err, syscall.EBUSY) {
			break
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil, err
		}
	}
	return dev, err
}

// attachUnit has the kernel look for one unit, not for all that the target has,
// and returns its device file.
func (k *kernelSession) attachUnit(ctx context.Context, lun [8]byte) (string, error) {
	n := kernelLUN(lun)
	if err := os.WriteFile(filepath.Join(sysRoot, "class/scsi_host", fmt.Sprintf("host%d", k.host), "scan"), fmt.Appendf(nil, "0 0 %d", n), 0); err != nil {
		return "", fmt.Errorf("look for LUN %s: %w", scsi.LUNText(lun), err)
	}
	unit := filepath.Join(sysRoot, "class/iscsi_session", fmt.Sprintf("session%d", k.sid), "device/target*", fmt.Sprintf("*:*:*:%d", n))
	for {
		if found, _ := filepath.Glob(filepath.Join(unit, "block", "*")); len(found) > 0 {
			file := filepath.Join("/dev", filepath.Base(found[0]))
			if _, err := os.Stat(file); err == nil {
				return file, nil
			}
		}
		if err := k.events.failed(); err != nil {
			return "", err
		}
		select {
		case <-time.After(20 * time.Millisecond):
			continue
		case <-ctx.Done():
		}
		if found, _ := filepath.Glob(unit); len(found) == 0 {
			return "", fmt.Errorf("the kernel finds no LUN %s at this target", scsi.LUNText(lun))
		}
		if found, _ := filepath.Glob(filepath.Join(unit, "block", "*")); len(found) > 0 {
			return "", fmt.Errorf("/dev/%s does not appear: is /dev a devtmpfs, or udev slow?", filepath.Base(found[0]))
		}
		return "", fmt.Errorf("the kernel makes no disk of LUN %s: modprobe sd_mod, or see dmesg", scsi.LUNText(lun))
	}
}

func (w *watched) failed() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// kernelLUN is how the kernel numbers a raw LUN (scsilun_to_int).
func kernelLUN(l [8]byte) (n uint64) {
	for i := 0; i < len(l); i += 2 {
		n |= uint64(l[i])<<(8*i+8) | uint64(l[i+1])<<(8*i)
	}
	return n
}

// end leaves nothing of a kernel session behind: politely with a logout, else
// with a reset of the connection, which drops what the kernel has not sent.
func (k *kernelSession) end(politely bool) {
	if politely {
		k.logOut()
	} else if tc, ok := k.conn.(*net.TCPConn); ok {
		tc.SetLinger(0)
	}
	destroy(k.sid)
	events.remove(k.sid)
	k.conn.Close()
}

// logoutTime is how long the target may take to answer a logout.
const logoutTime = time.Second

// logOut takes the disks away while the target still answers, and logs out.
func (k *kernelSession) logOut() {
	disks, _ := filepath.Glob(filepath.Join(sysRoot, "class/iscsi_session", fmt.Sprintf("session%d", k.sid), "device/target*/*:*:*:*/delete"))
	for _, d := range disks {
		if err := os.WriteFile(d, []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return
		}
	}
	var h logoutPDU
	h[0], h[1] = uint8(pdu.OpLogoutReq)|pdu.Immediate, pdu.Final // reason 0: close the session
	if err := asking.do(func(c *iscsinl.IscsiIpcConn) error { return c.SendPDU(k.sid, k.cid, &h) }); err != nil {
		return
	}
	select {
	case <-k.events.loggedOut:
	case <-time.After(logoutTime):
	}
}

// logoutPDU is a header for iscsinl; the kernel fills in tag and numbers.
type logoutPDU pdu.Header

func (h *logoutPDU) HeaderLen() uint32 { return uint32(len(h)) }
func (h *logoutPDU) DataLen() uint32   { return 0 }
func (h *logoutPDU) Serialize() []byte { return h[:] }
