// Package proc tells what a process uses, as proc(5) has it. A process that is
// not there uses nothing.
package proc

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// CPU is the time that a process used, seconds.
func CPU(pid int) float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 13 {
		return 0
	}
	u, _ := strconv.ParseFloat(f[11], 64)
	k, _ := strconv.ParseFloat(f[12], 64)
	return (u + k) / 100
}

// Resident is a process's memory now, KiB.
func Resident(pid int) int { return status(pid, "VmRSS:") }

// Peak is the most it was, KiB.
func Peak(pid int) int { return status(pid, "VmHWM:") }

func status(pid int, line string) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for l := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(l, line); ok {
			n, _ := strconv.Atoi(strings.Fields(v)[0])
			return n
		}
	}
	return 0
}
