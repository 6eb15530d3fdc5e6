//go:build unix

package dedup

import (
	"os"

	"golang.org/x/sys/unix"

	"verve/internal/durable"
)

const mappable = true

// mapFile maps the whole of an open file, shared: what is stored there outlives
// the process in the page cache. The mapping stays when the file is closed.
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
	_ = durable.Retry(func() error { return unix.Munmap(b) }) // fails only for what mapFile did not return
}

// syncMapped returns when what was stored in b is on the disk.
func syncMapped(b []byte) error {
	return cannotKeep(durable.Retry(func() error { return unix.Msync(b, unix.MS_SYNC) }))
}
