package dedup

import "unsafe"

// prefetch asks for the home of k in the largest levels; the small ones are near
// anyway, or hold few ids. It waits for nothing.
func (v *view) prefetch(k idKey) {
	if k.kind == narrowKind {
		t, x := v.narrow, k.lo
		half := t.half()
		for i := range t.levels {
			l := t.levels[i].Load()
			if l == nil {
				return
			}
			if len(l.buckets) >= half {
				b, rest := l.choose(x)
				prefetch(unsafe.Pointer(&b[home(rest)]))
			}
			x = l.next(x)
		}
		return
	}
	t, x := v.wide, k.hi
	half := t.half()
	for i := range t.levels {
		l := t.levels[i].Load()
		if l == nil {
			return
		}
		if len(l.buckets) >= half {
			b, rest := l.choose(x)
			prefetch(unsafe.Pointer(&b.first[home(rest)]))
			prefetch(unsafe.Pointer(&b.second[home(rest)]))
		}
		x = l.next(x)
	}
}

// half is half the number of buckets of the largest level.
func (t *table[B]) half() int { return len(t.levels[t.largest.Load()].Load().buckets) / 2 }
