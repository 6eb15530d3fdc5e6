package counter

import (
	"syscall"
	"time"
	"unsafe"
)

const clockBoottime = 7 // CLOCK_BOOTTIME of clock_gettime(2): runs while the machine is suspended

// maxReading is how far the two clocks may be read apart. A process that is
// stopped between the two would look like one whose clock was set.
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
		return monotonic(time.Now()) // refused by a filter of system calls
	}
	return t.Nano()
}
