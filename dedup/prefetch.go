package dedup

import "unsafe"

// prefetch prefetches the place where the search for x begins, in each of the first levels that
// has t.far buckets or more; smaller levels are in the cache, or hold few ids. levels is
// t.farLevels. It waits for nothing, and may be called after the table was freed: the processor
// ignores a prefetch of a page that is not mapped.
//
// With the body of the loop as a method of level, an add to a large table was a fifth slower
// (BenchmarkAdd of bench, 10 million ids).
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
