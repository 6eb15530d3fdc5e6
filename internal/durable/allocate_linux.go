package durable

import (
	"os"

	"golang.org/x/sys/unix"
)

// Allocate gives an open file its size on the disk: a store into a mapped hole of
// a full disk would be a fault.
func Allocate(f *os.File, size int) error {
	err := Retry(func() error { return unix.Fallocate(int(f.Fd()), 0, 0, int64(size)) })
	if Unsupported(err) {
		return writeZeros(f, size)
	}
	if err != nil {
		return &os.PathError{Op: "allocate", Path: f.Name(), Err: err}
	}
	return nil
}
