// Package attach owns /dev/nbdX: it hands one end of each of its socket pairs to
// the kernel's NBD client over generic netlink (drivers/block/nbd.c, family "nbd"),
// replaces those that the kernel gives up and takes the device away again. No handshake takes place on that socket.
package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"

	"github.com/mpathd/mpathd/internal/sys"
)

// Commands and attributes of include/uapi/linux/nbd-netlink.h.
const (
	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3

	attrIndex           = 1
	attrSizeBytes       = 2
	attrBlockSizeBytes  = 3
	attrServerFlags     = 5
	attrSockets         = 7
	attrDeadConnTimeout = 8
	attrBackend         = 10

	sockItem = 1
	sockFD   = 1
)

// Options describe the device to make.
type Options struct {
	Device      string        // /dev/nbdX, or empty for the first free one
	Others      []string      // devices that are not to be taken for a free one
	Size        int64         // bytes
	BlockSize   int           // bytes
	Flags       uint16        // NBD transmission flags
	Backend     string        // shown in /sys/block/nbdX/backend; guards the device against strangers
	Connections int           // of a new device, default 1; one per CPU at most, because the kernel uses no more
	DeadTimeout time.Duration // how long the kernel waits for a new connection; default one day

	// Serve serves a connection of the kernel's, which it owns. It returns when none
	// of its requests is in flight: nil if the kernel left by itself or nobody may
	// serve it here any more, else the connection is replaced.
	Serve  func(net.Conn) error
	Ctx    context.Context // when it ends no connection is replaced; default: never
	Logger *slog.Logger    // nil: nothing is logged
}

func (o *Options) defaults() {
	if o.DeadTimeout <= 0 {
		o.DeadTimeout = 24 * time.Hour
	}
	if o.Ctx == nil {
		o.Ctx = context.Background()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	o.Connections = max(1, min(o.Connections, MaxConnections, runtime.NumCPU()))
}

// Device is an attached kernel device (drivers/block/nbd.c). It outlives the process
// until Disconnect.
type Device struct {
	index   int
	backend string
	lock    *sys.Lock // nil for a device that this process does not serve
}

// MaxConnections bounds the connections of a device: each is a hardware queue of
// 128 requests in the kernel, and has its own buffers here.
const MaxConnections = 16

// Path is the device node.
func (d *Device) Path() string { return fmt.Sprintf("/dev/nbd%d", d.index) }

// Available is nil if this kernel has NBD over generic netlink (nbd_genl_*,
// include/uapi/linux/nbd-netlink.h), else why not and what to do.
func Available() error {
	c, _, err := dial()
	if err != nil {
		return err
	}
	return c.Close()
}

func dial() (*genetlink.Conn, genetlink.Family, error) {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return nil, genetlink.Family{}, fmt.Errorf("kernel NBD: generic netlink: %w", err)
	}
	fam, err := c.GetFamily("nbd")
	if err != nil {
		c.Close()
		if errors.Is(err, fs.ErrNotExist) {
			err = errors.New("the nbd module is not loaded: run `modprobe nbd nbds_max=0`")
		}
		return nil, genetlink.Family{}, fmt.Errorf("kernel NBD: %w", err)
	}
	return c, fam, nil
}

// Connect attaches and keeps the device connected.
func Connect(o Options) (*Device, error) {
	o.defaults()
	index := -1
	if o.Device != "" {
		n, err := strconv.Atoi(strings.TrimPrefix(o.Device, "/dev/nbd"))
		if err != nil || n < 0 {
			return nil, fmt.Errorf("attach %s: want /dev/nbdX", o.Device)
		}
		index = n
	}
	c, fam, err := dial()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	k := newKeeper(o)
	kernel, err := k.open(o.Connections) // served from now on: the kernel and udev read at once
	if err != nil {
		return nil, err
	}
	defer closeAll(kernel)
	d, err := choose(index, o.Others, func(index int) (*Device, error) { return connect(c, fam, o, index, kernel) })
	if err != nil {
		k.abandon()
		return nil, err
	}
	if d.lock, err = lockNew(lockDir, d.index); err != nil {
		o.Logger.Warn("the device is not locked: a second mpathd of this disk would not notice", "device", d.Path(), "cause", err)
	}
	k.is(d)
	return d, nil
}

var errInUse = errors.New("the device is in use")

// maxDevices bounds the search for a free one.
const maxDevices = 4096

// choose connects the device of an index or, if that is negative, the first free
// one that is not among others. With these the kernel cannot choose.
func choose(index int, others []string, connect func(index int) (*Device, error)) (*Device, error) {
	if index >= 0 || len(others) == 0 {
		return connect(index)
	}
	for index = range maxDevices {
		if d := (&Device{index: index}); slices.Contains(others, d.Path()) {
			continue
		}
		if d, err := connect(index); !errors.Is(err, errInUse) {
			return d, err
		}
	}
	return nil, errors.New("attach: no device is free")
}

func connect(c *genetlink.Conn, fam genetlink.Family, o Options, index int, kernel []*os.File) (*Device, error) {
	b, err := encode(o, index, true, kernel)
	if err != nil {
		return nil, err
	}
	// CONNECT answers with the index by itself: no acknowledgement asked.
	ms, err := c.Execute(genetlink.Message{Header: genetlink.Header{Command: cmdConnect, Version: 1}, Data: b}, fam.ID, netlink.Request)
	runtime.KeepAlive(kernel)
	if err != nil {
		if errors.Is(err, fs.ErrExist) || strings.Contains(err.Error(), "busy") {
			return nil, fmt.Errorf("attach %s: %w%s: detach it first or choose another", o.Device, errInUse, holder("/", index))
		}
		return nil, fmt.Errorf("attach %s: %w", o.Device, err)
	}
	for _, m := range ms {
		ad, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			continue
		}
		for ad.Next() {
			if ad.Type() == attrIndex {
				index = int(ad.Uint32())
			}
		}
	}
	if index < 0 {
		return nil, errors.New("attach: the kernel did not name the device")
	}
	d := &Device{index: index, backend: o.Backend}
	if err = tooOld("/", index, o.Backend); err == nil {
		err = d.tune(len(kernel))
	}
	if err != nil {
		d.disconnect()
		return nil, err
	}
	return d, nil
}

// tooOld tells whether the kernel did not keep the backend identifier (before
// Linux 5.14), without which a device cannot be found again.
func tooOld(root string, index int, backend string) error {
	b, err := os.ReadFile(filepath.Join(root, fmt.Sprintf("sys/block/nbd%d/backend", index)))
	if err == nil && strings.TrimSpace(string(b)) == backend {
		return nil
	}
	version, _ := os.ReadFile(filepath.Join(root, "proc/sys/kernel/osrelease"))
	return fmt.Errorf("attach: this kernel's NBD is too old (%s): it keeps no backend identifier, so that /dev/nbd%d would not outlive a restart: Linux 6.1 or later is needed",
		strings.TrimSpace(string(version)), index)
}

// holder tells who has a device, in words to go behind "in use", or "".
func holder(root string, index int) string {
	at := filepath.Join(root, fmt.Sprintf("sys/block/nbd%d", index))
	if b, err := os.ReadFile(filepath.Join(at, "backend")); err == nil {
		return " as the backend " + strings.TrimSpace(string(b))
	}
	if b, err := os.ReadFile(filepath.Join(at, "pid")); err == nil {
		pid := strings.TrimSpace(string(b))
		comm, err := os.ReadFile(filepath.Join(root, "proc", pid, "comm"))
		if err == nil {
			return fmt.Sprintf(" by process %s (%s)", pid, strings.TrimSpace(string(comm)))
		}
		return " by something that does not run any more"
	}
	return ""
}

// encode makes the attributes of CONNECT, or without geometry those of RECONFIGURE.
func encode(o Options, index int, geometry bool, sockets []*os.File) ([]byte, error) {
	e := netlink.NewAttributeEncoder()
	if index >= 0 {
		e.Uint32(attrIndex, uint32(index))
	}
	if geometry {
		e.Uint64(attrSizeBytes, uint64(o.Size))
		e.Uint64(attrBlockSizeBytes, uint64(o.BlockSize))
		e.Uint64(attrServerFlags, uint64(o.Flags))
	}
	e.Uint64(attrDeadConnTimeout, uint64(o.DeadTimeout/time.Second))
	e.String(attrBackend, o.Backend)
	e.Nested(attrSockets, func(ne *netlink.AttributeEncoder) error {
		for _, s := range sockets {
			fd := uint32(s.Fd())
			ne.Nested(sockItem, func(ie *netlink.AttributeEncoder) error {
				ie.Uint32(sockFD, fd)
				return nil
			})
		}
		return nil
	})
	return e.Encode()
}

// How long the block layer's timer lets a request be in the kernel's hands, in
// ms. With one connection and no NBD timeout it only reports, and sends anew what
// a dead connection had: soon, after a crash of the server. With several it cuts
// the connection of a request that takes longer (nbd_xmit_timeout), so that it
// must be longer than paths take to fail over.
const (
	timerOfOne     = "5000"
	timerOfSeveral = "30000"
)

// tune sets the queue for a fast device whose requests may wait long.
func (d *Device) tune(connections int) error {
	timer := timerOfOne
	if connections > 1 {
		timer = timerOfSeveral
	}
	for _, kv := range [][2]string{{"scheduler", "none"}, {"io_timeout", timer}, {"max_sectors_kb", "1024"}, {"discard_max_bytes", "2147483648"}} {
		err := os.WriteFile(fmt.Sprintf("/sys/block/nbd%d/queue/%s", d.index, kv[0]), []byte(kv[1]), 0)
		if err != nil && kv[0] != "discard_max_bytes" { // absent where the unit cannot trim
			return fmt.Errorf("attach: queue setting %s: %w", kv[0], err)
		}
	}
	return nil
}

// Find looks for a device that an earlier run attached for this backend and
// that still waits for a server: its path, or "".
func Find(backend string) string {
	names, _ := filepath.Glob("/sys/block/nbd*/backend")
	for _, f := range names {
		b, err := os.ReadFile(f)
		if err == nil && strings.TrimSpace(string(b)) == backend {
			return "/dev/" + filepath.Base(filepath.Dir(f))
		}
	}
	return ""
}

// Unserved are the devices that an earlier run attached and nobody serves: their
// I/O waits.
func Unserved() (ds []*Device) { return unserved("/", lockDir) }

func unserved(root, locks string) (ds []*Device) {
	names, _ := filepath.Glob(filepath.Join(root, "sys/block/nbd*/backend"))
	for _, f := range names {
		d, err := open(root, "/dev/"+filepath.Base(filepath.Dir(f)))
		if err != nil {
			continue
		}
		if l, err := lock(locks, d.index, 0); err == nil {
			l.Release()
			ds = append(ds, d)
		}
	}
	return ds
}

// Adopt goes on with a device that Find found. The sockets that the run before
// handed over are served as they are; the device's other connections are replaced,
// and what waits in the kernel goes on. Size and block size stay; see Resize. A
// device that another process serves, and did not hand over, is refused.
func Adopt(o Options, handed ...*os.File) (*Device, error) {
	o.defaults()
	defer closeAll(handed)
	d, err := Open(o.Device)
	if err != nil {
		return nil, fmt.Errorf("adopt: %w", err)
	}
	if d.backend != o.Backend {
		return nil, fmt.Errorf("adopt %s: it is not the device of %s", o.Device, o.Backend)
	}
	switch d.lock, err = lock(lockDir, d.index, lockTime); {
	case errors.Is(err, errServed) && len(handed) == 0:
		return nil, fmt.Errorf("adopt %s: %w", o.Device, err)
	case err != nil:
		o.Logger.Warn("the device is not locked: a second mpathd of this disk would not notice", "device", d.Path(), "cause", err)
	}
	k, missing := newKeeper(o), d.Connections()
	k.is(d)
	for _, f := range handed {
		c, err := net.FileConn(f)
		if err != nil {
			o.Logger.Warn("a connection of the device was not handed over whole", "device", o.Device, "cause", err)
			continue
		}
		missing--
		go k.keep(c)
	}
	if missing <= 0 {
		return d, nil
	}
	kernel, err := k.open(missing)
	if err != nil {
		d.lock.Release()
		return nil, err
	}
	defer closeAll(kernel)
	if err := d.reconnect(o.DeadTimeout, kernel...); err != nil {
		d.lock.Release()
		k.abandon()
		return nil, fmt.Errorf("adopt %s: %w", o.Device, err)
	}
	return d, nil
}

// reconnect replaces dead connections (NBD_CMD_RECONFIGURE), and with none dead
// does nothing: the kernel closes what it does not need. Neither the size nor
// anything else that freezes the queue is sent: it would wait for the requests
// that wait for this connection.
func (d *Device) reconnect(timeout time.Duration, kernel ...*os.File) error {
	c, fam, err := dial()
	if err != nil {
		return err
	}
	defer c.Close()
	b, err := encode(Options{Backend: d.backend, DeadTimeout: timeout}, d.index, false, kernel)
	if err != nil {
		return err
	}
	_, err = c.Execute(genetlink.Message{Header: genetlink.Header{Command: cmdReconfigure, Version: 1}, Data: b}, fam.ID, netlink.Request|netlink.Acknowledge)
	runtime.KeepAlive(kernel)
	return err
}

// Connections is how many the device was made with: the kernel has a hardware
// queue for each.
func (d *Device) Connections() int { return connections("/", d.index) }

func connections(root string, index int) int {
	qs, _ := filepath.Glob(filepath.Join(root, fmt.Sprintf("sys/block/nbd%d/mq/[0-9]*", index)))
	return min(max(1, len(qs)), MaxConnections)
}

// Size is the kernel's idea of the device's size in bytes, 0 if it has none.
func (d *Device) Size() int64 {
	b, _ := os.ReadFile(fmt.Sprintf("/sys/block/nbd%d/size", d.index))
	n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	return n * 512
}

const links = "/dev/mpath"

// Link makes /dev/mpath/NAME point to the device; the function removes it. A
// link of that name that leads elsewhere is replaced, and other names of the
// device, which a run under another alias left when it died, are removed.
func (d *Device) Link(name string) (remove func(), err error) { return linkIn(links, name, d.Path()) }

func linkIn(dir, name, to string) (remove func(), err error) {
	if name == "" || strings.ContainsAny(name, "/\x00") || name == "." || name == ".." {
		return nil, fmt.Errorf("%s/%s: not a file name", dir, name)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	at, tmp := filepath.Join(dir, name), filepath.Join(dir, "."+name+".new")
	os.Remove(tmp)
	if err := os.Symlink(to, tmp); err != nil {
		return nil, err
	}
	if err := os.Rename(tmp, at); err != nil {
		return nil, err
	}
	unlink := func(at string) {
		if have, err := os.Readlink(at); err == nil && have == to {
			os.Remove(at)
		}
	}
	names, _ := os.ReadDir(dir)
	for _, n := range names {
		if n.Name() != name {
			unlink(filepath.Join(dir, n.Name()))
		}
	}
	return func() { unlink(at) }, nil
}

// Resize tells the kernel the device's new size in bytes (nbd_genl_reconfigure).
func (d *Device) Resize(size int64) error {
	c, fam, err := dial()
	if err != nil {
		return err
	}
	defer c.Close()
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(d.index))
	e.Uint64(attrSizeBytes, uint64(size))
	if d.backend != "" { // the kernel wants to see that the device is ours
		e.String(attrBackend, d.backend)
	}
	b, err := e.Encode()
	if err != nil {
		return err
	}
	if _, err := c.Execute(genetlink.Message{Header: genetlink.Header{Command: cmdReconfigure, Version: 1}, Data: b}, fam.ID, netlink.Request|netlink.Acknowledge); err != nil {
		return fmt.Errorf("resize %s to %d bytes: %w", d.Path(), size, err)
	}
	return nil
}

// Disconnect takes the device away; I/O that waits in the kernel fails. One that
// was taken away behind our back (nbd-client -d) may be somebody else's by now.
func (d *Device) Disconnect() error {
	if d.ours("/") {
		if err := d.disconnect(); err != nil {
			return err
		}
	}
	d.lock.Release()
	return nil
}

// ours tells whether the device is still the one that was attached for its backend.
func (d *Device) ours(root string) bool {
	b, err := os.ReadFile(filepath.Join(root, fmt.Sprintf("sys/block/nbd%d/backend", d.index)))
	return err == nil && strings.TrimSpace(string(b)) == d.backend
}

func (d *Device) disconnect() error {
	c, fam, err := dial()
	if err != nil {
		return err
	}
	defer c.Close()
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(d.index))
	b, err := e.Encode()
	if err != nil {
		return err
	}
	if _, err := c.Execute(genetlink.Message{Header: genetlink.Header{Command: cmdDisconnect, Version: 1}, Data: b}, fam.ID, netlink.Request|netlink.Acknowledge); err != nil {
		return fmt.Errorf("detach %s: %w", d.Path(), err)
	}
	return nil
}
