package durable

import (
	"os"

	"golang.org/x/sys/unix"
)

// noCopyOnWrite is FS_NOCOW_FL of linux/fs.h.
const noCopyOnWrite = 0x800000

// Allocate gives f, an open and empty file, size bytes on the disk. Without that, a store into
// a mapped hole of the file would fault on a full disk. On Btrfs even a store into an allocated
// page needs new space, so Allocate sets a flag with which Btrfs writes the file in place.
// Other file systems refuse that flag, or do not need it. An error may be one for which NoSpace
// is true.
func Allocate(f *os.File, size int) error {
	if flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS); err == nil {
		_ = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags|noCopyOnWrite))
	}
	err := Retry(func() error { return unix.Fallocate(int(f.Fd()), 0, 0, int64(size)) })
	if Unsupported(err) {
		return writeZeros(f, size)
	}
	if err != nil {
		return &os.PathError{Op: "allocate", Path: f.Name(), Err: err}
	}
	return nil
}
