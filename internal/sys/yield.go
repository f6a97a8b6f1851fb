package sys

import "syscall"

// Yield lets other threads of this CPU run first (sched_yield(2)); with none
// waiting it returns at once.
func Yield() { syscall.RawSyscall(syscall.SYS_SCHED_YIELD, 0, 0, 0) }
