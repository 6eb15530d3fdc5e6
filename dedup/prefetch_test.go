package dedup

import (
	"fmt"
	"strconv"
	"testing"

	"verve/counter"
)

// TestPrefetchChangesNothing: ids brought near are as new as before, whatever
// they look like.
func TestPrefetchChangesNothing(t *testing.T) {
	m := newMemory(t, Config{})
	e := newEpochs(t, m)
	m.Prefetch(nil)
	for _, id := range alike {
		m.Prefetch([]byte(id))
	}
	for _, id := range alike {
		e.want(t, m, 0, id, Unique)
	}
}

// BenchmarkPrefetch adds batches of new ids to a large table, as a pipelining
// client brings them, with and without bringing their places near first.
func BenchmarkPrefetch(b *testing.B) {
	const ids = 10_000_000
	for _, prefetch := range []bool{false, true} {
		b.Run(fmt.Sprint(prefetch), func(b *testing.B) {
			m := newMemory(b, Config{Expect: ids})
			e := newEpochs(b, m)
			batch := make([][]byte, 16)
			n, window := 0, 0
			for i := 0; b.Loop(); i++ {
				if i%len(batch) == 0 {
					if n += len(batch); n > ids {
						n, window = 0, window+1
					}
					for j := range batch {
						batch[j] = strconv.AppendUint(batch[j][:0], uint64(n+j)*7, 10)
					}
					if prefetch {
						for _, id := range batch {
							m.Prefetch(id)
						}
					}
				}
				in, _ := e.Enter(e.at(window), 0)
				if v, err := m.Add(in.Epoch, batch[i%len(batch)]); v != Unique || err != nil {
					b.Fatal(v, err)
				}
				in.Leave(counter.Unique)
			}
		})
	}
}
