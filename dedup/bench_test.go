package dedup

import (
	"math/rand/v2"
	"strconv"
	"testing"
)

// BenchmarkAdd adds new decimals to one epoch. The baselines and the other mixes are in
// package bench.
func BenchmarkAdd(b *testing.B) {
	for _, ids := range []int{50_000, 1_000_000, 10_000_000} {
		b.Run(strconv.Itoa(ids), func(b *testing.B) {
			m := newMemory(b, Config{Expect: uint64(ids)})
			e := newEpochs(b, m)
			n := 0
			id := make([]byte, 0, 20)
			b.ReportAllocs()
			in, _ := e.Enter(e.At(0), 0, 1)
			in.Leave(0, 0, 1)
			for i := 0; b.Loop(); i++ {
				if i == ids {
					i = 0
					n++
					m.reclaim() // the cleaner's part
				}
				id = strconv.AppendUint(id[:0], uint64(i)*7, 10)
				in, _ := e.Enter(e.At(n), 0, 1)
				v, err := addTo(m, in.Epoch, id)
				if v != Unique || err != nil {
					b.Fatal(v, err)
				}
				in.Leave(1, 0, 0)
			}
			b.ReportMetric(float64(m.arena.used.Load())/float64(ids), "B/id")
		})
	}
}

// BenchmarkDecimal parses numbers of different lengths, and random numbers of 64 bits, and
// compares with the standard library, which does not check that they are canonical.
func BenchmarkDecimal(b *testing.B) {
	parsers := []struct {
		name  string
		parse func([]byte) (uint64, bool)
	}{
		{"verve", decimal},
		{"strconv", func(id []byte) (uint64, bool) {
			n, err := strconv.ParseUint(string(id), 10, 64)
			return n, err == nil
		}},
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, length := range []int{1, 3, 7, 11, 16, 20, 0} {
		ids, name := make([][]byte, 4096), strconv.Itoa(length)
		for i := range ids {
			if length == 0 {
				ids[i], name = strconv.AppendUint(nil, rnd.Uint64(), 10), "random"
				continue
			}
			ids[i] = append(ids[i], "1234567890123456789"[:length-1]...)
			ids[i] = append(ids[i], '0'+byte(rnd.IntN(10)))
		}
		for _, p := range parsers {
			b.Run(name+"/"+p.name, func(b *testing.B) {
				for i := 0; b.Loop(); i++ {
					if _, ok := p.parse(ids[i%len(ids)]); !ok {
						b.Fatalf("%s is a number", ids[i%len(ids)])
					}
				}
			})
		}
	}
}
