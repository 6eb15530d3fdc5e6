package dedup

import "unsafe"

// prefetch prefetches the place where the search for x begins, in each of the first levels
// that has far buckets or more; the smaller ones are in the cache, or hold few ids. It waits
// for nothing, and may be called after the table was freed: pages that are not mapped are
// ignored.
//
// A method of the level for the body of the loop made an add to a large table a
// fifth slower (BenchmarkAdd of bench, 10 million ids).
func (t *table[B]) prefetch(x, levels uint64) {
	for i := range levels {
		l := t.levels[i].Load()
		if uint64(len(l.buckets)) >= t.far.Load() {
			b, rest := l.choose(x)
			prefetch(unsafe.Add(unsafe.Pointer(b), home(rest)*uint64(unsafe.Sizeof(*b)/slotsPerBucket)))
		}
		x = l.next(x)
	}
}
