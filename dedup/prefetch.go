package dedup

import (
	"sync/atomic"

	"verve/counter"
)

// PrefetchMax is the most ids one call of Prefetch looks at: as many misses as
// a core can have under way, with some to spare.
const PrefetchMax = 16

// Prefetcher is a Set that can bring near what adding ids will read.
type Prefetcher interface {
	// Prefetch touches the places of up to PrefetchMax ids in e. It changes
	// nothing and promises nothing. The caller is inside e, as for Add.
	Prefetch(e *counter.Epoch, ids [][]byte)
}

// Prefetch loads the home of each decimal in the largest levels; the small ones
// are near anyway, or hold few ids. Adding ids one by one waits for one cache
// miss after the other; here the misses overlap (BenchmarkPrefetch).
func (m *Memory) Prefetch(e *counter.Epoch, ids [][]byte) {
	v := e.State.(*view)
	half := len(v.narrow.levels[v.narrow.largest.Load()].Load().buckets) / 2
	var words [2 * PrefetchMax]*atomic.Uint64
	n := 0
	for _, id := range ids[:min(len(ids), PrefetchMax)] {
		key, ok := decimal(id)
		if !ok {
			continue
		}
		x := m.secret.scatter(key)
		for i := range v.narrow.levels {
			l := v.narrow.levels[i].Load()
			if l == nil || n == len(words) {
				break
			}
			if len(l.buckets) >= half {
				b, rest := l.choose(x)
				words[n] = &b[home(rest)]
				n++
			}
			x = l.next(x)
		}
	}
	for _, w := range words[:n] {
		w.Load()
	}
}
