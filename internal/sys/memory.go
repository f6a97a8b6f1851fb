package sys

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// WriteBack makes this process one that dirty memory can be written through
// (PR_SET_IO_FLUSHER, prctl(2)), on all its threads and those to come: the kernel
// never waits for I/O, which may be ours to do, to find memory for it.
func WriteBack() error {
	_, _, e := syscall.AllThreadsSyscall(syscall.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0)
	if e == syscall.ENOTSUP {
		return errors.New("PR_SET_IO_FLUSHER: this program was built with cgo: build it with CGO_ENABLED=0")
	}
	return os.NewSyscallError("PR_SET_IO_FLUSHER", errOf(e))
}

// LockMemory keeps what the process has in memory there (mlockall(2)), what it
// maps later once it has used it, and brings the program's own file in now, so
// that no code needs to be read when a path fails.
func LockMemory() error {
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return fmt.Errorf("mlockall: %w: it needs CAP_IPC_LOCK or LimitMEMLOCK=infinity", err)
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		var from, to uintptr
		if _, err := fmt.Sscanf(s.Text(), "%x-%x", &from, &to); err != nil || !strings.HasSuffix(s.Text(), " "+exe) {
			continue
		}
		if _, _, e := syscall.Syscall(syscall.SYS_MADVISE, from, to-from, unix.MADV_POPULATE_READ); e != 0 {
			return os.NewSyscallError("madvise MADV_POPULATE_READ", e)
		}
	}
	return nil
}

func errOf(e syscall.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

// Populate gives memory of Map its pages now.
func Populate(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	return os.NewSyscallError("madvise MADV_POPULATE_WRITE", unix.Madvise(b, unix.MADV_POPULATE_WRITE))
}

// Distance is the number of bytes from the start of region to that of part,
// which lies in it.
func Distance(region, part []byte) int {
	return int(uintptr(unsafe.Pointer(unsafe.SliceData(part))) - uintptr(unsafe.Pointer(unsafe.SliceData(region))))
}
