package dedup

import (
	"context"
	"fmt"
	"testing"
	"time"

	"verve/counter"
)

// TestExpectedIdsOfAnyKindHaveTheirRoom: the first id of a kind makes a table for as
// many as are expected, and a kind that does not come takes nothing.
func TestExpectedIdsOfAnyKindHaveTheirRoom(t *testing.T) {
	const ids = 300_000
	for name, format := range map[string]string{
		"decimal": "1%d", "uuid": "6ba7b810-9dad-11d1-80b4-%012x", "text": "text %d",
	} {
		t.Run(name, func(t *testing.T) {
			m := newMemory(t, Config{ExpectAny: ids, Heap: raceEnabled})
			if s := m.Stats(); s.Bytes != 0 || s.Levels != 0 {
				t.Errorf("before the first id there are %d bytes in %d levels", s.Bytes, s.Levels)
			}
			e := newEpochs(t, m)
			in, _ := e.Enter(e.at(0), 0)
			defer in.Leave(counter.Void)
			for i := range ids {
				if v, err := addTo(m, in.Epoch, fmt.Appendf(nil, format, i)); v != Unique || err != nil {
					t.Fatalf("id %d: %v, %v", i, v, err)
				}
			}
			s := m.Stats()
			if most := uint64(ids * 1.6 * 16); s.Levels > 2 || s.Bytes > most {
				t.Errorf("%d ids take %d bytes in %d levels, want 2 levels and %d bytes at most", ids, s.Bytes, s.Levels, most)
			}
		})
	}
}

// TestKindThatNeverComesIsSwept: epochs turn for longer than tags last while a kind
// has no table.
func TestKindThatNeverComesIsSwept(t *testing.T) {
	m := newMemory(t, Config{ExpectAny: 1000, Heap: true})
	e := newEpochs(t, m)
	for n := range 3 * lap {
		e.want(t, m, n, "42", Unique)
		m.reclaim()
	}
	e.want(t, m, 3*lap, "a text", Unique)
	e.want(t, m, 3*lap, "a text", Repeat)
}

// BenchmarkFirstWindow is what an id costs in the first window of a process with
// --expect-ids: decimals and UUIDs, as many as are expected.
func BenchmarkFirstWindow(b *testing.B) {
	const ids = 11_000_000
	for name, format := range map[string]string{"decimal": "1%d", "uuid": "6ba7b810-9dad-11d1-80b4-%012x"} {
		for expected, cfg := range map[string]Config{"as decimals": {Expect: ids}, "as any": {ExpectAny: ids}} {
			b.Run(name+" expected "+expected, func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					m := newMemory(b, cfg)
					e := newEpochs(b, m)
					ctx, stop := context.WithCancel(context.Background())
					go func() { _ = m.Run(ctx) }()
					in, _ := e.Enter(e.at(0), 0)
					var id []byte
					began := time.Now()
					b.StartTimer()
					for i := range ids {
						id = fmt.Appendf(id[:0], format, i)
						if v, err := addTo(m, in.Epoch, id); v != Unique || err != nil {
							b.Fatal(v, err)
						}
					}
					b.StopTimer()
					in.Leave(counter.Void)
					b.ReportMetric(float64(time.Since(began).Nanoseconds())/ids, "ns/id")
					b.ReportMetric(float64(m.Stats().Levels), "levels")
					stop()
					b.StartTimer()
				}
			})
		}
	}
}
