package dedup

import (
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"verve/internal/durable"
)

// hugePage is the size in bytes that the pages of large tables have if the system allows it.
const hugePage = 2 << 20

// mapMemory maps zeroed memory outside the Go heap, in huge pages if the system allows it: a
// table is read at random places, and with small pages each read would miss the translation
// buffer (TLB). populate is the number of goroutines that make the pages resident; 0: none are
// made resident.
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
	// This is only advice: if the system does not follow it, the table works with small pages.
	_ = advise(b, unix.MADV_HUGEPAGE)
	populateMemory(b, populate)
	return b, nil
}

// populatePart is how many bytes one worker makes resident at a time.
const populatePart = 4 * hugePage

// populateMemory makes b resident. That takes as long as zeroing it, or ten times as long under
// a hypervisor that has to find the memory first.
func populateMemory(b []byte, workers int) {
	// The first part ends at a multiple of populatePart, so that no huge page belongs to two
	// parts.
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

// touchMemory makes the pages of b resident. It changes no value in b, which requests may be
// using.
func touchMemory(b []byte) {
	if advise(b, unix.MADV_POPULATE_WRITE) != nil {
		for i := 0; i+8 <= len(b); i += 4096 { // before Linux 5.14
			(*atomic.Uint64)(unsafe.Pointer(&b[i])).Add(0)
		}
	}
}

func unmapMemory(b []byte) {
	// It fails only for memory that mapMemory did not map.
	_ = durable.Retry(func() error { return unix.Munmap(b) })
}
