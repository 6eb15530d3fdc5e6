package dedup

import "unsafe"

// Prefetcher is a Set that can bring near what adding an id will read.
type Prefetcher interface {
	// Prefetch starts to load the place of id in the epoch opened last. It waits
	// for nothing, changes nothing and promises nothing.
	Prefetch(id []byte)
}

// Prefetch asks for the home of a decimal in the largest levels; the small ones
// are near anyway, or hold few ids. The place of an id in a large table is a
// cache miss, and most of the time that an add takes: meanwhile its request can
// be read on (BenchmarkPrefetch).
//
// Only the addresses of buckets are used, never their memory, which may be gone
// with its epoch: an instruction that prefetches does not fault.
func (m *Memory) Prefetch(id []byte) {
	key, ok := decimal(id)
	v := m.latest.Load()
	if !ok || v == nil {
		return
	}
	x := m.secret.scatter(key)
	half := len(v.narrow.levels[v.narrow.largest.Load()].Load().buckets) / 2
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
