package dedup

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestLevelIsThereBeforeItsPages: a request that adds a level does not wait for memory,
// and when the cleaner sees to it, ids that are in the level stay.
func TestLevelIsThereBeforeItsPages(t *testing.T) {
	from := &arena{}
	table, err := newTable[narrowBucket](1_000_000, from)
	if err != nil {
		t.Fatal(err)
	}
	defer table.free(from)
	have := table.depth
	if grown, err := table.grow(have, table.slots, from); !grown || err != nil {
		t.Fatalf("got %t, %v", grown, err)
	}
	level := table.levels[have].Load()
	resident := func() (n int) {
		pages := make([]byte, (level.memory.size()+4095)/4096)
		if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&level.memory.bytes[0])), uintptr(level.memory.size()), uintptr(unsafe.Pointer(&pages[0]))); errno != 0 {
			t.Fatal(errno)
		}
		for _, p := range pages {
			n += int(p & 1)
		}
		return n
	}
	if level.memory.size() < populateMin || resident() > 0 {
		t.Fatalf("a new level of %d bytes has %d pages", level.memory.size(), resident())
	}
	level.buckets[0][3].Store(42)
	table.warm(from)
	if got, want := resident(), int(level.memory.size()/4096); got < want || level.buckets[0][3].Load() != 42 {
		t.Errorf("after warm: %d pages of %d, and a word is %d, want 42", got, want, level.buckets[0][3].Load())
	}
	if len(table.cold) > 0 {
		t.Errorf("%d levels are still to be made resident", len(table.cold))
	}
}
