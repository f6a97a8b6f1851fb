package sys

import (
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctls of the SCSI generic interface (linux/include/scsi/sg.h).
const (
	sgIO           = 0x2285
	sgReset        = 0x2284
	sgResetUnit    = 1
	sgNoEscalation = 0x100
)

// Directions of an SGRequest, as sg.h numbers them.
const (
	SGNone = -1
	SGOut  = -2 // to the device
	SGIn   = -3 // from the device
)

// SGRequest is one SCSI command for SG. It must be on the heap: the kernel holds
// pointers into it.
type SGRequest struct {
	CDB       [16]byte
	CDBLen    int
	Direction int
	Data      []byte // owned by the kernel until SG returns
	TimeoutMS uint32 // after which the kernel aborts the command

	// The outcome. Host and Driver are the kernel's DID_ and DRIVER_ codes
	// (linux/include/scsi/scsi_status.h).
	Status       uint8
	Sense        [96]byte
	SenseLen     int
	Host, Driver uint16
	Residual     int // bytes not transferred

	hdr sgHeader
}

// sgHeader is struct sg_io_hdr.
type sgHeader struct {
	interfaceID    int32
	direction      int32
	cmdLen         uint8
	senseMax       uint8
	iovecCount     uint16
	dataLen        uint32
	data           unsafe.Pointer
	cmd            unsafe.Pointer
	sense          unsafe.Pointer
	timeout        uint32
	flags          uint32
	packID         int32
	_              [4]byte
	usr            unsafe.Pointer
	status         uint8
	maskedStatus   uint8
	msgStatus      uint8
	senseLen       uint8
	host           uint16
	driver         uint16
	residual       int32
	duration, info uint32
}

// SG sends a SCSI command to the device behind fd (SG_IO) and waits until the
// kernel gives it back. An error means that the kernel did not send it.
func SG(fd uintptr, r *SGRequest) error {
	h := &r.hdr
	*h = sgHeader{interfaceID: 'S', direction: int32(r.Direction), cmdLen: uint8(r.CDBLen), senseMax: uint8(len(r.Sense)),
		cmd: unsafe.Pointer(&r.CDB), sense: unsafe.Pointer(&r.Sense), timeout: r.TimeoutMS}
	if len(r.Data) > 0 {
		h.data, h.dataLen = unsafe.Pointer(&r.Data[0]), uint32(len(r.Data))
	}
	for {
		_, _, e := syscall.Syscall(syscall.SYS_IOCTL, fd, sgIO, uintptr(unsafe.Pointer(h)))
		if e == syscall.EINTR {
			continue
		}
		runtime.KeepAlive(r)
		if e != 0 {
			return os.NewSyscallError("SG_IO", e)
		}
		r.Status, r.SenseLen, r.Host, r.Driver, r.Residual = h.status, int(h.senseLen), h.host, h.driver, int(h.residual)
		return nil
	}
}

// ResetUnit asks the kernel for a logical unit reset of the device behind fd,
// without escalation to more than the unit (SG_SCSI_RESET).
func ResetUnit(fd uintptr) error {
	what := int32(sgResetUnit | sgNoEscalation)
	_, _, e := syscall.Syscall(syscall.SYS_IOCTL, fd, sgReset, uintptr(unsafe.Pointer(&what)))
	if e != 0 {
		return os.NewSyscallError("SG_SCSI_RESET", e)
	}
	return nil
}

// BlockDevice tells size and logical block size, in bytes, as the kernel has them.
func BlockDevice(fd uintptr) (size int64, blockSize int, err error) {
	if blockSize, err = unix.IoctlGetInt(int(fd), unix.BLKSSZGET); err != nil {
		return 0, 0, os.NewSyscallError("BLKSSZGET", err)
	}
	if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, fd, unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size))); e != 0 {
		return 0, 0, os.NewSyscallError("BLKGETSIZE64", e)
	}
	return size, blockSize, nil
}

// ReadAt is pread(2): it may read less than asked for, at the end 0 bytes.
func ReadAt(fd uintptr, b []byte, off int64) (int, error) {
	for {
		n, err := unix.Pread(int(fd), b, off)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// WriteAt is pwritev2(2), with RWF_DSYNC if the bytes must be durable when it
// returns.
func WriteAt(fd uintptr, b []byte, off int64, durable bool) (int, error) {
	for {
		var n int
		var err error
		if durable {
			n, err = unix.Pwritev2(int(fd), [][]byte{b}, off, unix.RWF_DSYNC)
		} else {
			n, err = unix.Pwrite(int(fd), b, off)
		}
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// DeviceNumber is the major and minor number of a block device file; ok is
// false if st is of something else.
func DeviceNumber(st os.FileInfo) (major, minor uint32, ok bool) {
	t, is := st.Sys().(*syscall.Stat_t)
	if !is || st.Mode()&os.ModeDevice == 0 || st.Mode()&os.ModeCharDevice != 0 {
		return 0, 0, false
	}
	return unix.Major(t.Rdev), unix.Minor(t.Rdev), true
}
