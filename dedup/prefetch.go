package dedup

import "unsafe"

// PrefetchMax is the most ids one call of Prefetch looks at: as many misses as
// a core can have under way, with some to spare.
const PrefetchMax = 16

// Prefetcher is a Set that can bring near what adding ids will read.
type Prefetcher interface {
	// Prefetch starts to load the places of up to PrefetchMax ids in the epoch
	// opened last. It waits for nothing, changes nothing and promises nothing.
	Prefetch(ids [][]byte)
}

// Prefetch asks for the home of each decimal in the largest levels; the small
// ones are near anyway, or hold few ids. The place of an id in a large table is
// a cache miss, and most of the time that an add takes: this way those of several
// ids pass at once (BenchmarkPrefetch).
//
// Only the addresses of buckets are used, never their memory, which may be gone
// with its epoch: an instruction that prefetches does not fault.
func (m *Memory) Prefetch(ids [][]byte) {
	v := m.latest.Load()
	if v == nil {
		return
	}
	half := len(v.narrow.levels[v.narrow.largest.Load()].Load().buckets) / 2
	for _, id := range ids[:min(len(ids), PrefetchMax)] {
		key, ok := decimal(id)
		if !ok {
			continue
		}
		x := m.secret.scatter(key)
		for i := range v.narrow.levels {
			l := v.narrow.levels[i].Load()
			if l == nil {
				break
			}
			if len(l.buckets) >= half {
				b, rest := l.choose(x)
				prefetch(unsafe.Pointer(&b[home(rest)]))
			}
			x = l.next(x)
		}
	}
}
