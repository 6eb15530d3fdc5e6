package dedup

import (
	"math/bits"
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

// Prefetch loads the first bucket of each decimal. Adding ids one by one waits
// for one cache miss after the other; here the misses overlap
// (BenchmarkPrefetch).
func (m *Memory) Prefetch(e *counter.Epoch, ids [][]byte) {
	v := e.State.(*view)
	l := v.narrow.levels[0].Load()
	var words [PrefetchMax]*atomic.Uint64
	n := 0
	for _, id := range ids[:min(len(ids), PrefetchMax)] {
		if key, ok := decimal(id); ok {
			i, _ := bits.Mul64(m.secret.scatter(key), uint64(len(l.buckets)))
			words[n] = &l.buckets[i][0]
			n++
		}
	}
	for _, w := range words[:n] {
		w.Load()
	}
}
