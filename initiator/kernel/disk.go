package kernel

import (
	"context"
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

	"github.com/ncw/directio"

	"github.com/mpathd/mpathd/initiator"
	"github.com/mpathd/mpathd/internal/sys"
	"github.com/mpathd/mpathd/scsi"
)

// Disk is a path to a block device that this host has already: of open-iscsi,
// Fibre Channel, SAS. A file name under /dev/disk stays with its disk.
type Disk struct {
	file     string
	sessions sessions
}

// NewDisk returns the path through a device file.
func NewDisk(file string) *Disk { return &Disk{file: file} }

// sessions are those of one path. A new one waits until the kernel has given
// back the I/O of those that ended: what is still there may yet be executed.
type sessions struct {
	mu   sync.Mutex
	list []*Session
}

func (l *sessions) add(s *Session) {
	l.mu.Lock()
	l.list = append(l.list, s)
	l.mu.Unlock()
}

// drain waits until the sessions that ended have left the kernel, at most for
// drainTime.
func (l *sessions) drain(ctx context.Context) error {
	l.mu.Lock()
	var live, ended []*Session
	for _, s := range l.list {
		switch {
		case isClosed(s.released):
		case isClosed(s.dying):
			ended = append(ended, s)
		default:
			live = append(live, s)
		}
	}
	l.list = append(live, ended...)
	l.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, drainTime)
	defer cancel()
	for _, s := range ended {
		select {
		case <-s.released:
		case <-ctx.Done():
			return fmt.Errorf("%s: %d calls of the session before still hang in the kernel: the path waits for them", s.device, max(s.stuck(), 1))
		}
	}
	return nil
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

const drainTime = 2 * time.Second

// Open begins a session on the device, which no file system, mapping or other
// process may hold: it is opened with O_EXCL and O_DIRECT. It waits two seconds for I/O
// that an earlier session left in the kernel, and fails if that is still there.
func (d *Disk) Open(ctx context.Context, o Options) (*Session, error) {
	if err := d.sessions.drain(ctx); err != nil {
		return nil, err
	}
	dev, err := openWithin(ctx, d.file, true)
	if err != nil {
		return nil, err
	}
	s := newSession(o, dev, d.file, dev.blockSize)
	s.start()
	d.sessions.add(s)
	if err := s.settle(ctx, dev.size); err != nil {
		s.Abort(err)
		return nil, err
	}
	return s, nil
}

// settle makes the kernel's idea of the capacity the unit's own.
func (s *Session) settle(ctx context.Context, size int64) error {
	ctx, cancel := context.WithTimeout(ctx, s.o.FailoverTime+4*time.Second)
	defer cancel()
	info, err := initiator.Identify(ctx, s, [8]byte{})
	if err != nil {
		return err
	}
	if info.Blocks > 0 && info.Size() != size {
		s.dev.rescan()
	}
	return nil
}

// Inquirer asks a device who it is, without using it as a path.
type Inquirer struct{ s *Session }

// Inquire opens a device for questions only: it may be in use. The caller
// closes it.
func Inquire(ctx context.Context, file string) (*Inquirer, error) {
	dev, err := openWithin(ctx, file, false)
	if err != nil {
		return nil, err
	}
	s := newSession(Options{FailoverTime: 10 * time.Second}, dev, file, dev.blockSize)
	s.start()
	return &Inquirer{s}, nil
}

// Do runs a control command (initiator.Doer).
func (q *Inquirer) Do(ctx context.Context, c *initiator.Command) error { return q.s.Do(ctx, c) }

// Close lets go of the device.
func (q *Inquirer) Close() { q.s.Close(context.Background()) }

// blockDevice is a SCSI disk of the kernel.
type blockDevice struct {
	f         *os.File
	fd        uintptr
	sysfs     string // its directory in sysfs, empty if unknown
	blockSize int
	size      int64 // bytes, as the kernel had it when it was opened
}

func (b *blockDevice) sg(r *sys.SGRequest) error               { return sys.SG(b.fd, r) }
func (b *blockDevice) readAt(p []byte, off int64) (int, error) { return sys.ReadAt(b.fd, p, off) }
func (b *blockDevice) writeAt(p []byte, off int64, durable bool) (int, error) {
	return sys.WriteAt(b.fd, p, off, durable)
}
func (b *blockDevice) reset() error { return sys.ResetUnit(b.fd) }
func (b *blockDevice) close()       { b.f.Close() }
func (b *blockDevice) rescan() {
	if b.sysfs != "" {
		os.WriteFile(filepath.Join(b.sysfs, "device", "rescan"), []byte("1"), 0)
	}
}

// opening are the files whose open hangs: each costs one thread, not more.
var opening sync.Map

// openWithin is openDevice, which may hang, as long as ctx lasts.
func openWithin(ctx context.Context, file string, use bool) (*blockDevice, error) {
	type result struct {
		dev *blockDevice
		err error
	}
	key := struct {
		file string
		use  bool
	}{file, use}
	if _, hangs := opening.LoadOrStore(key, true); hangs {
		return nil, fmt.Errorf("%s: an earlier attempt to open it still hangs in the kernel", file)
	}
	ch := make(chan result)
	go func() {
		dev, err := openDevice(file, use)
		opening.Delete(key)
		select {
		case ch <- result{dev, err}:
		case <-ctx.Done():
			if err == nil {
				dev.close()
			}
		}
	}()
	select {
	case r := <-ch:
		return r.dev, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: the kernel does not answer: %w", file, ctx.Err())
	}
}

// openDevice opens a SCSI disk, for I/O or for questions only.
func openDevice(file string, use bool) (*blockDevice, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, openError(file, err)
	}
	major, minor, ok := sys.DeviceNumber(st)
	if !ok {
		return nil, fmt.Errorf("%s is no block device", file)
	}
	dir, err := sysfsOf(file, major, minor)
	if err != nil {
		return nil, err
	}
	var f *os.File
	if use {
		if f, err = directio.OpenFile(file, os.O_RDWR|syscall.O_EXCL, 0); errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.EACCES) && os.Geteuid() == 0 {
			f, err = directio.OpenFile(file, os.O_RDONLY|syscall.O_EXCL, 0) // write protected
		}
	} else {
		f, err = os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	}
	if err != nil {
		return nil, openError(file, err)
	}
	b := &blockDevice{f: f, fd: f.Fd(), sysfs: dir}
	size, bs, err := sys.BlockDevice(b.fd)
	if err == nil {
		b.size, b.blockSize = size, bs
		err = b.speaksSCSI(file)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return b, nil
}

// speaksSCSI sends the first command.
func (b *blockDevice) speaksSCSI(file string) error {
	rq := new(sys.SGRequest)
	prepare(rq, scsi.Inquiry(false, 0, 36), Options{CommandTimeout: 5 * time.Second})
	rq.Direction, rq.Data = sys.SGIn, make([]byte, 36)
	err := b.sg(rq)
	if errors.Is(err, syscall.ENOTTY) || errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EOPNOTSUPP) {
		return errNoSCSI(file, err)
	}
	return read(rq, err, file).lost
}

func errNoSCSI(file string, cause error) error {
	return fmt.Errorf("%s is no SCSI disk (%w): it has no SCSI ID by which it could be grouped", file, cause)
}

// openError puts the usual reasons in plain words.
func openError(file string, err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s does not exist: is its driver loaded, is its session up? (%w)", file, err)
	case errors.Is(err, syscall.EBUSY):
		return fmt.Errorf("%s is in use: mounted, or held by device mapper (multipath?), md or another mpathd (%w)", file, err)
	case errors.Is(err, syscall.ENXIO), errors.Is(err, syscall.ENODEV):
		return fmt.Errorf("%s: the kernel took it offline, or its session is gone (%w)", file, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: no permission: a path to a block device needs root (%w)", file, err)
	}
	return fmt.Errorf("open %s: %w", file, err)
}

// sysRoot is where sysfs is; tests have their own.
var sysRoot = "/sys"

// sysfsOf is the directory of a disk in sysfs. Partitions and devices without
// hardware of their own (device mapper, loop, nbd) are no paths.
func sysfsOf(file string, major, minor uint32) (string, error) {
	dir, err := filepath.EvalSymlinks(filepath.Join(sysRoot, "dev/block", fmt.Sprintf("%d:%d", major, minor)))
	if err != nil {
		return "", nil // no sysfs here: SG_IO tells
	}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		return "", fmt.Errorf("%s is a partition: name its whole disk, /dev/%s", file, filepath.Base(filepath.Dir(dir)))
	}
	if _, err := os.Stat(filepath.Join(dir, "device")); err != nil {
		return "", errNoSCSI(file, fmt.Errorf("%s is a device of the kernel's own", filepath.Base(dir)))
	}
	return dir, nil
}

// Place is where a local disk comes from, as far as the kernel knows.
type Place struct {
	Portal string // host:port of its iSCSI session, else host:channel:target:LUN of the SCSI layer
	Target string // name of the iSCSI target, else empty
	LUN    uint64 // as the kernel counts
}

// PlaceOf looks a device up in sysfs.
func PlaceOf(file string) (p Place) {
	st, err := os.Stat(file)
	if err != nil {
		return p
	}
	major, minor, ok := sys.DeviceNumber(st)
	if !ok {
		return p
	}
	dir, err := sysfsOf(file, major, minor)
	if err != nil || dir == "" {
		return p
	}
	return placeIn(dir)
}

// placeIn reads the place from a sysfs directory such as
// .../host3/session1/target3:0:0/3:0:0:0/block/sdb.
func placeIn(dir string) (p Place) {
	for at := filepath.Dir(filepath.Dir(dir)); len(at) > 1; at = filepath.Dir(at) {
		name := filepath.Base(at)
		if p.Portal == "" && strings.Count(name, ":") == 3 {
			p.Portal = name
			p.LUN, _ = strconv.ParseUint(name[strings.LastIndex(name, ":")+1:], 10, 64)
		}
		if !strings.HasPrefix(name, "session") {
			continue
		}
		p.Target = attribute("class/iscsi_session", name, "targetname")
		conns, _ := filepath.Glob(filepath.Join(sysRoot, "class/iscsi_connection", "connection"+strings.TrimPrefix(name, "session")+":*"))
		if len(conns) > 0 {
			c := filepath.Base(conns[0])
			if a, port := attribute("class/iscsi_connection", c, "persistent_address"), attribute("class/iscsi_connection", c, "persistent_port"); a != "" && port != "" {
				if full, err := initiator.WithPort(hostPort(a, port)); err == nil {
					p.Portal = full
				}
			}
		}
		return p
	}
	return p
}

func hostPort(host, port string) string {
	if strings.Contains(host, ":") && !strings.HasPrefix(host, "[") {
		host = "[" + host + "]"
	}
	return host + ":" + port
}

// attribute reads a sysfs attribute; empty if there is none. The kernel prints
// (null) for a string that was never set.
func attribute(elem ...string) string {
	b, err := os.ReadFile(filepath.Join(append([]string{sysRoot}, elem...)...))
	v := strings.TrimSpace(string(b))
	if err != nil || v == "(null)" || v == "<NULL>" {
		return ""
	}
	return v
}
