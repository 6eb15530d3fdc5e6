package durable

import (
	"os"

	"golang.org/x/sys/unix"
)

// noCopyOnWrite is FS_NOCOW_FL of linux/fs.h.
const noCopyOnWrite = 0x800000

// Allocate gives an open file, which is empty, its size on the disk: a store into a
// mapped hole of a full disk would be a fault. So would one into a file of Btrfs, which
// takes new room for each store, whatever the file has; so that file is written in its
// place. Other file systems refuse that flag, or do not need it.
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
