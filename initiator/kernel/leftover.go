package kernel

import (
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// A kernel session outlives the process that made it. Its interface name says
// whose it is: mpathd-ISID-PID-START, the last being the start of the process in
// clock ticks, so that a number used again is not taken for it.
const markPrefix = "mpathd"

func mark(isid [6]byte) string {
	return fmt.Sprintf("%s-%x-%d-%s", markPrefix, isid, os.Getpid(), startOf(os.Getpid()))
}

// startOf is field 22 of /proc/PID/stat; empty if there is no such process.
func startOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, rest, ok := strings.Cut(string(b), ") ") // the name before may hold anything
	f := strings.Fields(rest)
	if !ok || len(f) < 20 {
		return ""
	}
	return f[19]
}

// leftover is a kernel session whose process is gone.
type leftover struct {
	sid    uint32
	isid   [6]byte
	target string
}

// leftovers are those of earlier runs. Sessions of other programs, and of an
// mpathd that lives, are none.
func leftovers() (out []leftover) {
	dirs, _ := filepath.Glob(filepath.Join(sysRoot, "class/iscsi_session/session*"))
	for _, d := range dirs {
		name := filepath.Base(d)
		sid, err := strconv.ParseUint(strings.TrimPrefix(name, "session"), 10, 32)
		f := strings.Split(attribute("class/iscsi_session", name, "ifacename"), "-")
		if err != nil || len(f) != 4 || f[0] != markPrefix || events.owns(uint32(sid)) {
			continue
		}
		isid, err := hex.DecodeString(f[1])
		pid, err2 := strconv.Atoi(f[2])
		if err != nil || err2 != nil || len(isid) != 6 || f[3] != "" && startOf(pid) == f[3] {
			continue
		}
		out = append(out, leftover{uint32(sid), [6]byte(isid), attribute("class/iscsi_session", name, "targetname")})
	}
	return out
}

// removeLeftovers destroys those that which picks. A new login with their ISID
// would end them at the target anyway.
func removeLeftovers(which func(leftover) bool) (n int, err error) {
	for _, l := range leftovers() {
		if !which(l) {
			continue
		}
		if e := destroy(l.sid); e != nil {
			err = e
			continue
		}
		n++
	}
	return n, err
}

// RemoveLeftovers destroys the kernel sessions that runs of mpathd left behind
// when they crashed, and tells how many there were.
func RemoveLeftovers() (int, error) {
	return removeLeftovers(func(leftover) bool { return true })
}
