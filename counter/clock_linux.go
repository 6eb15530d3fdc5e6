package counter

import (
	"syscall"
	"time"
	"unsafe"
)

const clockBoottime = 7 // CLOCK_BOOTTIME of clock_gettime(2): runs while the machine is suspended

// maxReading is the longest time that may pass between reading the two clocks. If the process
// were stopped between the two, it would look as if the clock had been set.
const maxReading = 10 * time.Millisecond

func readClocks() reading {
	for {
		before := boottime()
		wall := time.Now().UnixNano()
		if after := boottime(); after-before <= int64(maxReading) {
			return reading{wall, before}
		}
	}
}

func boottime() int64 {
	var t syscall.Timespec
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockBoottime, uintptr(unsafe.Pointer(&t)), 0); errno != 0 {
		return monotonic(time.Now()) // a filter of system calls (seccomp) refused it
	}
	return t.Nano()
}
