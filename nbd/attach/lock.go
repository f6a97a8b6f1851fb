package attach

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/mpathd/mpathd/internal/sys"
)

// lockDir has a locked file for each device that a process serves. The kernel's
// backend identifier says which disk a device is, not whether its server lives:
// without this a second daemon of the same disk would wait beside the first one,
// and go on with its device as soon as that one dies.
var lockDir = "/run/mpathd"

// lockTime is how long a process that has handed its devices over may take to end.
const lockTime = time.Second

// errServed says that a process that lives serves the device.
var errServed = errors.New("one disk has one mpathd on a host: stop that one, or let it have these paths too")

func lockPath(dir string, index int) string {
	return filepath.Join(dir, fmt.Sprintf("nbd%d.lock", index))
}

// lock takes the lock of a device, waiting at most that long. The error wraps
// errServed if another process has it and lives.
func lock(dir string, index int, wait time.Duration) (*sys.Lock, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	l, err := sys.LockFile(lockPath(dir, index), wait)
	var held *sys.HeldError
	if errors.As(err, &held) {
		return nil, fmt.Errorf("process %s serves it: %w", held.PID, errServed)
	}
	return l, err
}

// lockNew takes the lock of a device that the kernel has just made. Whoever has it
// served one that was taken away behind its back (nbd-client -d).
func lockNew(dir string, index int) (*sys.Lock, error) {
	os.Remove(lockPath(dir, index))
	return lock(dir, index, 0)
}
