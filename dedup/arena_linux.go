package dedup

import (
	"golang.org/x/sys/unix"
)

// mapMemory maps zeroed memory outside the Go heap, in huge pages where the
// system allows them: a table is read at random, and small pages would cost a
// miss of the translation buffer with each read.
func mapMemory(size uint64, populate bool) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	if !populate {
		return b, nil
	}
	// Advice: where it is not taken the table works with small pages.
	_ = unix.Madvise(b, unix.MADV_HUGEPAGE)
	if unix.Madvise(b, unix.MADV_POPULATE_WRITE) != nil {
		for i := 0; i < len(b); i += 4096 { // before Linux 5.14
			b[i] = 0
		}
	}
	return b, nil
}

func unmapMemory(b []byte) {
	// Fails only for memory that was not mapped by mapMemory.
	_ = unix.Munmap(b)
}
