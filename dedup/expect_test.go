package dedup

import (
	"fmt"
	"testing"
)

// TestExpectedIdsOfAnyKindHaveTheirRoom: the first id of a kind makes a table for all expected
// ids, and a kind of which no id comes takes no memory.
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
			in, _ := e.Enter(e.At(0), 0, 1)
			defer in.Leave(0, 0, 1)
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
