package dedup

import (
	"errors"
	"hash/crc32"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// reserve gives an open file its size on the disk: a store into a mapped hole
// of a full disk would be a fault.
func reserve(f *os.File, size int) error {
	err := unix.Fallocate(int(f.Fd()), 0, 0, int64(size))
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return writeZeros(f, size)
	}
	if err != nil {
		return &os.PathError{Op: "allocate", Path: f.Name(), Err: err}
	}
	return nil
}

// touch makes mapped pages resident and writable, so that no request does.
func touch(b []byte) {
	if unix.Madvise(b, unix.MADV_POPULATE_WRITE) != nil {
		_ = unix.Madvise(b, unix.MADV_WILLNEED) // before Linux 5.14: advice is all there is
	}
}

// bootID tells the boots of the machine apart; 0 if it cannot.
func bootID() uint32 {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || len(id) == 0 {
		return 0
	}
	return max(1, crc32.ChecksumIEEE(id))
}

// bootTime is when the machine was started, by the present clock.
func bootTime() time.Time {
	var up unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &up) != nil {
		return time.Now()
	}
	return time.Now().Add(-time.Duration(up.Nano()))
}
