package dedup

import (
	"fmt"
	"sync/atomic"
	"unsafe"
)

// arena hands out the memory of the tables and keeps to its limit.
type arena struct {
	heap bool   // from the Go heap, not from the system
	max  uint64 // bytes, 0: no limit
	used atomic.Uint64

	// workers is how many goroutines populate a table: all processors at the start, and one
	// (or 0) while requests are answered.
	workers int
}

// populateMin is the smallest table whose pages are made resident at once.
// In a smaller one the faults of first use cost less than pages that are never used.
const populateMin = 2 << 20

// allocate returns n zeroed values of type B, which must not hold pointers,
// aligned to their own cache lines. Large ones are resident when it returns:
// a fault in a request costs more than the request. Those that are not resident
// take memory as they are used.
func allocate[B any](a *arena, n uint64, resident bool) (values []B, memory []byte, err error) {
	var b B
	size := n * uint64(unsafe.Sizeof(b))
	if err := a.room(size); err != nil {
		return nil, nil, err
	}
	// Two that ask for the last room at the same time can both be refused.
	if used := a.used.Add(size); a.max > 0 && used > a.max {
		a.used.Add(-size)
		return nil, nil, errNoRoom
	}
	if a.heap {
		// No pointers inside: the garbage collector does not look into it.
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

// errNoRoom is made once: with the tables full it answers every request.
var errNoRoom = fmt.Errorf("%w: the memory for ids is used up", ErrFull)

// room reports an error if size more bytes would exceed the limit.
func (a *arena) room(size uint64) error {
	if a.max > 0 && a.used.Load()+size > a.max {
		return errNoRoom
	}
	return nil
}

// populate makes memory resident that others may be using.
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
