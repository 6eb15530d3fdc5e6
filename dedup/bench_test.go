package dedup

import (
	"strconv"
	"testing"
	"time"

	"verve/counter"
)

// BenchmarkAdd brings new decimals to one epoch. The baselines and the other
// mixes are in package bench.
func BenchmarkAdd(b *testing.B) {
	for _, ids := range []int{50_000, 1_000_000, 10_000_000} {
		b.Run(strconv.Itoa(ids), func(b *testing.B) {
			m := newMemory(b, Config{Expect: uint64(ids)})
			e := newEpochs(b, m)
			n := 0
			id := make([]byte, 0, 20)
			b.ReportAllocs()
			in, _ := e.Enter(e.at(0), 0)
			in.Leave(counter.Void)
			for i := 0; b.Loop(); i++ {
				if i == ids {
					i = 0
					n++
					m.reclaim() // the cleaner's part
				}
				id = strconv.AppendUint(id[:0], uint64(i)*7, 10)
				in, _ := e.Enter(e.at(n), 0)
				v, err := m.Add(in.Epoch, id)
				if v != Unique || err != nil {
					b.Fatal(v, err)
				}
				in.Leave(counter.Unique)
			}
			b.ReportMetric(float64(m.arena.used.Load())/float64(ids), "B/id")
		})
	}
}

func BenchmarkDecimal(b *testing.B) {
	for _, id := range []string{"7", "1234567", "12345678901", "18446744073709551615"} {
		b.Run(strconv.Itoa(len(id)), func(b *testing.B) {
			raw := []byte(id)
			for b.Loop() {
				decimal(raw)
			}
		})
	}
}

func BenchmarkTimeNow(b *testing.B) {
	for b.Loop() {
		_ = time.Now().UnixNano()
	}
}
