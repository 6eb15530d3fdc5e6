package dedup

import (
	"hash/crc32"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"verve/internal/durable"
)

// touch makes mapped pages resident and writable, so that no request has to wait for that.
func touch(b []byte) {
	if advise(b, unix.MADV_POPULATE_WRITE) != nil {
		_ = advise(b, unix.MADV_WILLNEED) // before Linux 5.14 the pages can only be read ahead
	}
}

func advise(b []byte, advice int) error {
	return durable.Retry(func() error { return unix.Madvise(b, advice) })
}

// bootID differs between the boots of the machine; 0 if it is not known.
func bootID() uint32 {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || len(id) == 0 {
		return 0
	}
	return max(1, crc32.ChecksumIEEE(id))
}

// bootTime returns when the machine was started, by the present wall clock.
func bootTime() time.Time {
	var up unix.Timespec
	if durable.Retry(func() error { return unix.ClockGettime(unix.CLOCK_BOOTTIME, &up) }) != nil {
		return time.Now()
	}
	return time.Now().Add(-time.Duration(up.Nano()))
}
