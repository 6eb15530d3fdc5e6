//go:build unix

package dedup

import (
	"os"

	"golang.org/x/sys/unix"

	"verve/internal/durable"
)

const mappable = true

// mapFile maps the first size bytes of an open file, shared: a store into them is in the page
// cache at once, and outlives the process. The mapping stays when the file is closed.
func mapFile(f *os.File, size int) (b []byte, err error) {
	err = durable.Retry(func() (err error) {
		b, err = unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		return err
	})
	if err != nil {
		return nil, cannotKeep(&os.PathError{Op: "mmap", Path: f.Name(), Err: err})
	}
	return b, nil
}

func unmapFile(b []byte) {
	_ = durable.Retry(func() error { return unix.Munmap(b) }) // fails only for memory that mapFile did not return
}

// syncMapped writes b to the disk, and returns when it is there.
func syncMapped(b []byte) error {
	return cannotKeep(durable.Retry(func() error { return unix.Msync(b, unix.MS_SYNC) }))
}
