package dedup

import (
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// resident returns how many pages of a level are in memory, and how many it has.
func resident(t *testing.T, l *level[narrowBucket]) (n, all int) {
	t.Helper()
	pages := make([]byte, (l.memory.size()+4095)/4096)
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&l.memory.bytes[0])), uintptr(l.memory.size()), uintptr(unsafe.Pointer(&pages[0]))); errno != 0 {
		t.Fatal(errno)
	}
	for _, p := range pages {
		n += int(p & 1)
	}
	return n, len(pages)
}

// TestRequestMakesNoLargeLevel: what a table needs is made by the cleaner and is resident
// before requests use it; they go on with small levels meanwhile.
func TestRequestMakesNoLargeLevel(t *testing.T) {
	const expect = 10_000_000
	from := &arena{}
	table := &table[narrowBucket]{expect: expect}
	defer table.free(from)
	sizes := func() []uint64 { return table.sizes(table.slots) }
	first, second := firstLevels(expect)
	quick := uint64(quickBytes / unsafe.Sizeof(narrowBucket{}))
	grow := func(want uint64) {
		t.Helper()
		have := table.depth
		if grown, err := table.grow(have, sizes, from); !grown || err != nil {
			t.Fatalf("got %t, %v", grown, err)
		}
		l := table.levels[have].Load()
		if n, _ := resident(t, l); uint64(len(l.buckets)) != want || n > 0 {
			t.Errorf("a request made a level of %d buckets with %d pages, want %d and none", len(l.buckets), n, want)
		}
	}
	prepare := func(want ...uint64) {
		t.Helper()
		have := table.depth
		if got := table.prepare(false, 0, sizes, from); got != len(want) {
			t.Fatalf("%d levels were made, want %d", got, len(want))
		}
		for i, n := range want {
			l := table.levels[have+i].Load()
			if got, all := resident(t, l); uint64(len(l.buckets)) != n || got < all {
				t.Errorf("the cleaner made a level of %d buckets with %d pages of %d, want %d", len(l.buckets), got, all, n)
			}
		}
	}
	grow(quick)
	if !slices.Equal(table.wanted, []uint64{first, second}) {
		t.Errorf("the cleaner is asked for %d, want %d and %d", table.wanted, first, second)
	}
	table.levels[0].Load().buckets[0][3].Store(42)
	prepare(first, second)
	if got := table.levels[0].Load().buckets[0][3].Load(); got != 42 {
		t.Errorf("a word became %d", got)
	}
	prepare() // nothing is wanted

	// Full again, and twice before the cleaner comes by: one large level for both.
	grow(quick)
	grow(2 * quick)
	made := table.slots * 3 / 4 / slotsPerBucket
	table.making = true // as while the cleaner makes it
	table.wanted = nil
	grow(4 * quick)
	if table.wanted != nil {
		t.Errorf("asked for %d while such a level is being made", table.wanted)
	}
	table.making = false
	table.wanted = []uint64{made}
	prepare(made)
	grow(quick)
}

// TestLevelsUseTheMemoryThatIsLeft: without memory for the level that is wanted a smaller
// one is made, and with none for that the smallest.
func TestLevelsUseTheMemoryThatIsLeft(t *testing.T) {
	size := func(buckets uint64) uint64 { return buckets * uint64(unsafe.Sizeof(narrowBucket{})) }
	from := &arena{max: size(8*minBuckets) + size(2*minBuckets)}
	table := new(table[narrowBucket])
	defer table.free(from)
	for _, c := range []struct{ wanted, want uint64 }{{32 * minBuckets, 8 * minBuckets}, {32 * minBuckets, 0}} {
		table.wanted = []uint64{c.wanted}
		if grown := table.prepare(false, 0, nil, from); grown != min(1, int(c.want)) {
			t.Errorf("%d levels were made, want %d buckets", grown, c.want)
		}
	}
	if got := table.slots; got != 8*minBuckets*slotsPerBucket {
		t.Errorf("%d slots", got)
	}
	for range 2 {
		if grown, err := table.grow(table.depth, func() []uint64 { return []uint64{4 * minBuckets} }, from); !grown || err != nil {
			t.Errorf("got %t, %v", grown, err)
		}
	}
	if grown, err := table.grow(table.depth, func() []uint64 { return []uint64{minBuckets} }, from); grown || err == nil {
		t.Errorf("got %t, %v without memory", grown, err)
	}
}
