package dedup

import (
	"fmt"
	"strconv"
	"testing"

	"verve/counter"
)

// TestPrefetchChangesNothing: ids brought near are as new as before, whatever
// they look like and however many there are.
func TestPrefetchChangesNothing(t *testing.T) {
	m := newMemory(t, Config{})
	e := newEpochs(t, m)
	ids := [][]byte{nil, {}}
	for _, id := range alike {
		ids = append(ids, []byte(id))
	}
	for i := range ids {
		m.Prefetch(ids[i:])
		m.Prefetch(ids[:i])
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
			batch := make([][]byte, PrefetchMax)
			n, window := 0, 0
			for i := 0; b.Loop(); i++ {
				if i%PrefetchMax == 0 {
					if n += PrefetchMax; n > ids {
						n, window = 0, window+1
					}
					for j := range batch {
						batch[j] = strconv.AppendUint(batch[j][:0], uint64(n+j)*7, 10)
					}
					if prefetch {
						m.Prefetch(batch)
					}
				}
				in, _ := e.Enter(e.at(window), 0)
				if v, err := m.Add(in.Epoch, batch[i%PrefetchMax]); v != Unique || err != nil {
					b.Fatal(v, err)
				}
				in.Leave(counter.Unique)
			}
		})
	}
}
