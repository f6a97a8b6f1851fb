package attach

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// lockDir has a locked file for each device that a process serves. The kernel's
// backend identifier says which disk a device is, not whether its server lives:
// without this a second daemon of the same disk would wait beside the first one,
// and go on with its device as soon as that one dies.
var lockDir = "/run/mpathd"

// lockTime is how long a process that has handed its devices over may take to end.
const lockTime = time.Second

// deviceLock is held until the process ends, however it ends, or release.
type deviceLock struct {
	once sync.Once
	file *os.File
}

func (l *deviceLock) release() {
	if l != nil {
		l.once.Do(func() { l.file.Close() })
	}
}

// errServed says that a process that lives serves the device.
var errServed = errors.New("one disk has one mpathd on a host: stop that one, or let it have these paths too")

// lock takes the lock of a device, waiting at most that long. The error wraps
// errServed if another process has it and lives.
func lock(dir string, index int, wait time.Duration) (*deviceLock, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, fmt.Sprintf("nbd%d.lock", index)), os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(wait); ; time.Sleep(5 * time.Millisecond) {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) || time.Now().After(end) {
			break
		}
	}
	if errors.Is(err, syscall.EWOULDBLOCK) {
		pid := make([]byte, 16)
		n, _ := f.ReadAt(pid, 0)
		f.Close()
		server := strings.TrimSpace(string(pid[:n]))
		if ending(server) {
			return nil, fmt.Errorf("process %s, which was killed, has it still", server)
		}
		return nil, fmt.Errorf("process %s serves it: %w", server, errServed)
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = fmt.Fprintln(f, os.Getpid())
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return &deviceLock{file: f}, nil
}

// ending says whether a process was killed, but cannot end yet: a thread of it
// waits in the kernel, for a local disk that hangs. It serves nothing anymore.
// proc(5) has the signals as a mask in hexadecimal, SIGKILL is bit 8.
func ending(pid string) bool {
	n, err := strconv.ParseUint(pid, 10, 31)
	if err != nil {
		return false
	}
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", n))
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		switch value = strings.TrimSpace(value); key {
		case "State":
			if strings.HasPrefix(value, "Z") || strings.HasPrefix(value, "X") {
				return true
			}
		case "SigPnd", "ShdPnd":
			if mask, err := strconv.ParseUint(value, 16, 64); err == nil && mask&(1<<(syscall.SIGKILL-1)) != 0 {
				return true
			}
		}
	}
	return false
}
