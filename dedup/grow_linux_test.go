package dedup

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// resident returns how many pages of a level are in memory, and how many it has.
func resident(t *testing.T, l *level[narrowBucket]) (n, all int) {
	t.Helper()
	pages := make([]byte, (len(l.memory)+4095)/4096)
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&l.memory[0])), uintptr(len(l.memory)), uintptr(unsafe.Pointer(&pages[0]))); errno != 0 {
		t.Fatal(errno)
	}
	for _, p := range pages {
		n += int(p & 1)
	}
	return n, len(pages)
}

// TestLevelsAreResidentBeforeTheirIds: a level that a request adds can be used at once, and the
// cleaner makes it resident without changing its ids; a level that the cleaner adds is resident
// before it has an id.
func TestLevelsAreResidentBeforeTheirIds(t *testing.T) {
	const expect = 10_000_000
	from := &arena{}
	table := &table[narrowBucket]{expect: expect}
	defer table.free(from)
	sizes := func() []uint64 { return table.sizes(table.slots) }
	first, second := firstLevels(expect)
	if grown, err := table.grow(0, sizes, from); !grown || err != nil {
		t.Fatalf("got %t, %v", grown, err)
	}
	if table.depth != 2 || uint64(len(table.levels[0].Load().buckets)) != first || uint64(len(table.levels[1].Load().buckets)) != second {
		t.Fatalf("%d levels, want one of %d buckets and one of %d", table.depth, first, second)
	}
	if n, _ := resident(t, table.levels[0].Load()); n > 0 {
		t.Errorf("the request has waited for %d pages", n)
	}
	table.levels[0].Load().buckets[0][3].Store(42)
	if grown := table.prepare(true, table.slots, sizes, from); grown != 0 {
		t.Errorf("%d levels were added behind two that are new", grown)
	}
	if n, all := resident(t, table.levels[0].Load()); n < all || table.levels[0].Load().buckets[0][3].Load() != 42 {
		t.Errorf("%d pages of %d, and a word is %d, want 42", n, all, table.levels[0].Load().buckets[0][3].Load())
	}
	want := table.slots * 3 / 4 / slotsPerBucket
	if grown := table.prepare(true, table.slots, sizes, from); grown != 1 {
		t.Fatalf("%d levels were added to a table that is crowded", grown)
	}
	l := table.levels[2].Load()
	if n, all := resident(t, l); uint64(len(l.buckets)) != want || n < all {
		t.Errorf("the cleaner made a level of %d buckets with %d pages of %d, want %d", len(l.buckets), n, all, want)
	}
	if grown := table.prepare(false, table.slots, sizes, from); grown != 0 {
		t.Errorf("%d levels were added without need", grown)
	}
}

// TestLevelsUseTheMemoryThatIsLeft: if there is no memory for the level that is wanted, a
// smaller one is made; if there is none for that either, the smallest.
func TestLevelsUseTheMemoryThatIsLeft(t *testing.T) {
	size := func(buckets uint64) uint64 { return buckets * uint64(unsafe.Sizeof(narrowBucket{})) }
	from := &arena{max: size(minBuckets + 8*minBuckets + 2*minBuckets)}
	table := new(table[narrowBucket])
	defer table.free(from)
	want := func(buckets uint64) func() []uint64 { return func() []uint64 { return []uint64{buckets} } }
	if grown, err := table.grow(0, want(minBuckets), from); !grown || err != nil {
		t.Fatalf("got %t, %v", grown, err)
	}
	table.cold = nil
	for _, made := range []int{1, 0} { // an eighth of that is too large the second time
		if grown := table.prepare(true, table.slots, want(32*minBuckets), from); grown != made {
			t.Errorf("%d levels were made, want %d", grown, made)
		}
	}
	if got := table.slots; got != 9*minBuckets*slotsPerBucket {
		t.Errorf("%d slots", got)
	}
	for range 2 {
		if grown, err := table.grow(table.depth, want(4*minBuckets), from); !grown || err != nil {
			t.Errorf("got %t, %v", grown, err)
		}
	}
	if grown, err := table.grow(table.depth, want(minBuckets), from); grown || err == nil {
		t.Errorf("got %t, %v without memory", grown, err)
	}
}
