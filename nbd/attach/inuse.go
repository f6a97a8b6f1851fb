package attach

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mpathd/mpathd/internal/sys"
)

// InUse tells who holds the device or a partition of it, in words, or "": a
// mount in any namespace, swap, a device on top of it, a guest (xen-blkback), a
// process. In doubt the device is in use.
func (d *Device) InUse() string {
	if who := inUse("/", fmt.Sprintf("nbd%d", d.index)); who != "" {
		return who
	}
	return claimed(d.Path())
}

// claimTime bounds the look at the device itself: opening it may read the
// partition table, which waits while no path is left.
const claimTime = 2 * time.Second

// claimed tells whether the kernel has given a device to one holder alone, as it
// does for a mount or swap (blkdev_get_by_dev, FMODE_EXCL).
func claimed(path string) string {
	tried := make(chan error, 1)
	go func() {
		f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_EXCL|syscall.O_NONBLOCK, 0)
		if err == nil {
			f.Close()
		}
		tried <- err
	}()
	select {
	case err := <-tried:
		if errors.Is(err, syscall.EBUSY) {
			return path + " is claimed by a file system, swap or another device"
		}
		return ""
	case <-time.After(claimTime):
		return path + " has I/O that waits"
	}
}

func inUse(root, name string) string {
	names := []string{name}
	parts, _ := filepath.Glob(filepath.Join(root, "sys/block", name, name+"p*"))
	for _, p := range parts {
		names = append(names, filepath.Base(p))
	}
	numbers := map[string]string{} // major:minor -> name
	for i, n := range names {
		at := filepath.Join(root, "sys/block", name)
		if i > 0 {
			at = filepath.Join(at, n)
		}
		if b, err := os.ReadFile(filepath.Join(at, "dev")); err == nil {
			numbers[strings.TrimSpace(string(b))] = n
		}
		if hs, _ := os.ReadDir(filepath.Join(at, "holders")); len(hs) > 0 {
			return fmt.Sprintf("%s is part of %s", n, hs[0].Name())
		}
	}
	// Our own mount namespace may lack mounts of the host's, and containers have theirs.
	seen := map[string]bool{}
	processes, _ := filepath.Glob(filepath.Join(root, "proc/[0-9]*"))
	for _, p := range append([]string{filepath.Join(root, "proc/self")}, processes...) {
		ns, _ := os.Readlink(filepath.Join(p, "ns/mnt"))
		if ns != "" && seen[ns] {
			continue
		}
		seen[ns] = true
		b, _ := os.ReadFile(filepath.Join(p, "mountinfo"))
		for line := range bytes.Lines(b) {
			if f := strings.Fields(string(line)); len(f) > 4 && numbers[f[2]] != "" {
				return fmt.Sprintf("%s is mounted on %s", numbers[f[2]], f[4])
			}
		}
	}
	b, _ := os.ReadFile(filepath.Join(root, "proc/swaps"))
	for line := range bytes.Lines(b) {
		for _, n := range names {
			if strings.HasPrefix(string(line), "/dev/"+n+" ") {
				return n + " is swapped on"
			}
		}
	}
	// xen-blkback holds the device without a file descriptor of any process.
	guests, _ := filepath.Glob(filepath.Join(root, "sys/bus/xen-backend/devices/vbd-*/physical_device"))
	for _, f := range guests {
		b, _ := os.ReadFile(f)
		if n := numbers[decimal(strings.TrimSpace(string(b)))]; n != "" {
			return fmt.Sprintf("%s is a guest's disk (%s)", n, filepath.Base(filepath.Dir(f)))
		}
	}
	fds, _ := filepath.Glob(filepath.Join(root, "proc/[0-9]*/fd/*"))
	for _, f := range fds {
		to, err := os.Readlink(f)
		if err != nil {
			continue
		}
		for _, n := range names {
			if to == "/dev/"+n {
				process := filepath.Dir(filepath.Dir(f))
				comm, _ := os.ReadFile(filepath.Join(process, "comm"))
				return fmt.Sprintf("%s is open in process %s (%s)", n, filepath.Base(process), strings.TrimSpace(string(comm)))
			}
		}
	}
	return ""
}

// decimal turns xen-blkback's major:minor, which is hexadecimal, into sysfs's.
func decimal(s string) string {
	major, minor, _ := strings.Cut(s, ":")
	a, err1 := strconv.ParseUint(major, 16, 32)
	b, err2 := strconv.ParseUint(minor, 16, 32)
	if err1 != nil || err2 != nil {
		return ""
	}
	return fmt.Sprintf("%d:%d", a, b)
}

// Open is the device at a path, if mpathd attached it, running or not. The error
// says whose it is otherwise, and what its owner would do.
func Open(path string) (*Device, error) { return open("/", path) }

func open(root, path string) (*Device, error) {
	index, err := strconv.Atoi(strings.TrimPrefix(path, "/dev/nbd"))
	if err != nil || index < 0 {
		return nil, fmt.Errorf("%s: want /dev/nbdX", path)
	}
	at := filepath.Join(root, fmt.Sprintf("sys/block/nbd%d", index))
	if _, err := os.Stat(at); err != nil {
		return nil, fmt.Errorf("%s: there is no such device", path)
	}
	b, err := os.ReadFile(filepath.Join(at, "backend"))
	if backend := strings.TrimSpace(string(b)); err == nil && strings.HasPrefix(backend, BackendPrefix) {
		return &Device{index: index, backend: backend}, nil
	}
	who := holder(root, index)
	if who == "" {
		return nil, fmt.Errorf("%s is free: nothing is attached to it", path)
	}
	return nil, fmt.Errorf("%s is not attached by mpathd but%s: end that, or `nbd-client -d %s`", path, who, path)
}

// Server is the process that serves the device, or "".
func (d *Device) Server() (pid string) { return server(lockDir, d.index) }

func server(dir string, index int) (pid string) {
	l, err := sys.LockFile(lockPath(dir, index), 0)
	l.Release()
	var held *sys.HeldError
	if errors.As(err, &held) {
		return held.PID
	}
	return ""
}

// WWID is that of the unit that the device was attached for.
func (d *Device) WWID() string { return strings.TrimPrefix(d.backend, BackendPrefix) }

// BackendPrefix begins the backend identifier of every device of mpathd's; the
// WWID follows.
const BackendPrefix = "mpathd:"
