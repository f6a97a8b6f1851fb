package main

import (
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/mpathd/mpathd/internal/sys"
)

// memoryLimit is the size of everything that Go manages at which it collects
// garbage more often, unless GOMEMLIMIT says otherwise.
const memoryLimit = 256 << 20

// reside prepares a process that serves kernel devices for hosts that are short
// of memory: dirty pages of these devices can only be freed through it. What is
// refused, as outside of root, leaves a warning.
func reside(log *slog.Logger) {
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
	for _, f := range []func() error{sys.WriteBack, sys.LockMemory, unkillable} {
		if err := f(); err != nil {
			log.Warn("kernel devices may stall when memory is short", "cause", err)
		}
	}
}

// unkillable keeps the out-of-memory killer away: what it wants to free may have
// to be written through this process (proc(5), oom_score_adj).
func unkillable() error {
	return os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
}
