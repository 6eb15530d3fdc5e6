package dedup

import (
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"verve/internal/durable"
)

// hugePage is the size that the pages of large tables have where the system
// allows them.
const hugePage = 2 << 20

// mapMemory maps zeroed memory outside the Go heap, in huge pages where the
// system allows them: a table is read at random, and small pages would cost a
// miss of the translation buffer with each read. So many workers populate it.
func mapMemory(size uint64, populate int) ([]byte, error) {
	var b []byte
	err := durable.Retry(func() (err error) {
		b, err = unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		return err
	})
	if err != nil {
		return nil, err
	}
	if size < populateMin {
		return b, nil
	}
	// Advice: where it is not taken the table works with small pages.
	_ = advise(b, unix.MADV_HUGEPAGE)
	populateMemory(b, populate)
	return b, nil
}

// populatePart is what one worker makes resident at a time.
const populatePart = 4 * hugePage

// populateMemory makes b resident. The time is that of zeroing it, and under a
// hypervisor that has to find it first ten times that.
func populateMemory(b []byte, workers int) {
	// Up to the next boundary of a part first: no huge page belongs to two.
	head := min(len(b), int(-uintptr(unsafe.Pointer(&b[0]))%populatePart))
	var taken atomic.Int64
	var running sync.WaitGroup
	for range workers {
		running.Go(func() {
			for {
				n := int(taken.Add(1)) - 1
				from, to := max(0, head+(n-1)*populatePart), min(len(b), head+n*populatePart)
				if from >= len(b) {
					return
				}
				if from < to {
					touchMemory(b[from:to])
				}
			}
		})
	}
	running.Wait()
}

// touchMemory changes nothing in b, which may be in use.
func touchMemory(b []byte) {
	if advise(b, unix.MADV_POPULATE_WRITE) != nil {
		for i := 0; i+8 <= len(b); i += 4096 { // before Linux 5.14
			(*atomic.Uint64)(unsafe.Pointer(&b[i])).Add(0)
		}
	}
}

func unmapMemory(b []byte) {
	// Fails only for memory that was not mapped by mapMemory.
	_ = durable.Retry(func() error { return unix.Munmap(b) })
}
