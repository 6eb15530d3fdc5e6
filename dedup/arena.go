package dedup

import (
	"fmt"
	"sync/atomic"
	"unsafe"
)

// arena allocates the memory of the tables, up to a limit.
type arena struct {
	heap bool   // the memory comes from the Go heap, not from the system
	max  uint64 // bytes, 0: no limit
	used atomic.Uint64

	// workers is how many goroutines populate a table: all processors at the start, and one
	// (or 0) while requests are answered.
	workers int
}

// populateMin is the size in bytes of the smallest table whose pages are made resident at once.
// In a smaller table the page faults of the first use cost less than pages that are never used.
const populateMin = 2 << 20

// allocate returns n zeroed values of type B, which must not hold pointers, aligned to cache
// lines. With resident, the pages of a large allocation are resident when it returns: a page
// fault in a request costs more than the request. Pages that are not resident take memory when
// they are first used.
func allocate[B any](a *arena, n uint64, resident bool) (values []B, memory []byte, err error) {
	var b B
	size := n * uint64(unsafe.Sizeof(b))
	if err := a.room(size); err != nil {
		return nil, nil, err
	}
	// If two goroutines ask for the last free memory at the same time, both may be refused.
	if used := a.used.Add(size); a.max > 0 && used > a.max {
		a.used.Add(-size)
		return nil, nil, errNoRoom
	}
	if a.heap {
		// B has no pointers, so the garbage collector does not scan it.
		values = make([]B, n)
		return values, unsafe.Slice((*byte)(unsafe.Pointer(&values[0])), size), nil
	}
	workers := 0
	if resident && size >= populateMin {
		workers = max(1, a.workers)
	}
	if memory, err = mapMemory(size, workers); err != nil {
		a.used.Add(-size)
		return nil, nil, fmt.Errorf("%w: %d bytes: %w", ErrFull, size, err)
	}
	return unsafe.Slice((*B)(unsafe.Pointer(&memory[0])), n), memory, nil
}

// errNoRoom is made only once, because every request gets it while the tables are full.
var errNoRoom = fmt.Errorf("%w: the memory for ids is used up", ErrFull)

// room reports an error if size more bytes would exceed the limit.
func (a *arena) room(size uint64) error {
	if a.max > 0 && a.used.Load()+size > a.max {
		return errNoRoom
	}
	return nil
}

// populate makes memory resident, which requests may be using already.
func (a *arena) populate(memory []byte) {
	if !a.heap && len(memory) >= populateMin {
		populateMemory(memory, max(1, a.workers))
	}
}

func (a *arena) free(memory []byte) {
	a.used.Add(-uint64(len(memory)))
	if !a.heap {
		unmapMemory(memory)
	}
}
