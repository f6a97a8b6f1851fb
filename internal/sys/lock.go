package sys

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Lock is a file that one process has at a time. The lock is the kernel's: it is
// held until the process ends, however it ends, or Release.
type Lock struct {
	once sync.Once
	file *os.File
}

// Release ends the lock; nil is none.
func (l *Lock) Release() {
	if l != nil {
		l.once.Do(func() { l.file.Close() })
	}
}

// HeldError says that a process that lives has the lock.
type HeldError struct{ PID string }

func (e *HeldError) Error() string { return "process " + e.PID + " has it" }

// LockFile makes a file and locks it, waiting at most that long. The error is a
// *HeldError if another process has it and lives.
func LockFile(path string, wait time.Duration) (*Lock, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
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
		holder := strings.TrimSpace(string(pid[:n]))
		if ending(holder) {
			return nil, fmt.Errorf("process %s, which was killed, has it still", holder)
		}
		return nil, &HeldError{holder}
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
	return &Lock{file: f}, nil
}

// ending says whether a process was killed, but cannot end yet: a thread of it
// waits in the kernel, for a local disk that hangs. It does nothing anymore.
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
