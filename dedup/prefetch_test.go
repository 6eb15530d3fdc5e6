package dedup

import (
	"fmt"
	"strconv"
	"testing"
)

// BenchmarkAddMany adds new ids to a large table one by one and in batches, as a
// pipelining client sends them.
func BenchmarkAddMany(b *testing.B) {
	const ids = 10_000_000
	for _, size := range []int{1, 2, 4, 8, 16, 32} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			m := newMemory(b, Config{Expect: ids})
			e := newEpochs(b, m)
			items, verdicts := make([]Item, size), make([]Verdict, size)
			n, window := 0, 0
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if i%size != 0 {
					continue
				}
				if n += size; n > ids {
					n, window = 0, window+1
				}
				for j := range items {
					items[j].ID = strconv.AppendUint(items[j].ID[:0], uint64(n+j)*7, 10)
				}
				m.Keys(items)
				in, _ := e.Enter(e.At(window), 0, uint64(size))
				if err := m.AddMany(in.Epoch, items, verdicts); err != nil || verdicts[size-1] != Unique {
					b.Fatal(err, verdicts)
				}
				in.Leave(uint64(size), 0, 0)
			}
		})
	}
}
