//go:build unix

package bench

import (
	"sync"
	"sync/atomic"
	"testing"
)

func eachDesign(t *testing.T, k kind, expect int, f func(*testing.T, Design)) {
	for _, m := range Makers {
		t.Run(m.Name, func(t *testing.T) {
			d := m.New(k.sizes(expect))
			defer d.Close()
			f(t, d)
		})
	}
}

func TestIdIsNewOncePerEpoch(t *testing.T) {
	ids := []string{
		"0", "42", "042", "+42", "18446744073709551615", "18446744073709551616",
		"a", "A", "123e4567-e89b-12d3-a456-426614174000", "123E4567-e89b-12d3-a456-426614174000",
		"123e4567-e89b-12d3-a456-426614174001", "0:42", "1:42", ":", "\x00", "\x00\x00",
	}
	eachDesign(t, text, 100, func(t *testing.T, d Design) {
		for epoch := range 5 {
			for round := range 3 {
				for _, id := range ids {
					if got, want := d.Add([]byte(id), 0), round == 0; got != want {
						t.Errorf("epoch %d, round %d, id %q: got new %v, want %v", epoch, round, id, got, want)
					}
				}
			}
			d.Turn()
			if got, want := d.Settle(), uint64((epoch+1)*len(ids)); got != want {
				t.Errorf("after epoch %d: got %d ids in all, want %d", epoch, got, want)
			}
		}
	})
}

// TestOneWriterIsTold: if several writers add the same id at the same time, exactly one
// gets the answer that it is new, also while the maps grow.
func TestOneWriterIsTold(t *testing.T) {
	const ids, writers, epochs = 20_000, 4, 3
	for _, k := range []kind{decimal, uuids, text} {
		tape := newTape(k, ids, ids, func(i int) uint64 { return uint64(i) })
		defer tape.free()
		eachDesign(t, k, ids/10, func(t *testing.T, d Design) {
			for epoch := range epochs {
				told := make([]atomic.Int32, ids)
				var all sync.WaitGroup
				for w := range writers {
					all.Go(func() {
						for i := range ids {
							if d.Add(tape.at(i), w) {
								told[i].Add(1)
							}
						}
					})
				}
				all.Wait()
				for i := range told {
					if n := told[i].Load(); n != 1 {
						t.Fatalf("epoch %d: %s was new %d times", epoch, tape.at(i), n)
					}
				}
				d.Turn()
				if got, want := d.Settle(), uint64((epoch+1)*ids); got != want {
					t.Fatalf("after epoch %d: got %d ids in all, want %d", epoch, got, want)
				}
			}
		})
	}
}

// TestTurnDuringAdds: whatever an Add beside a Turn counts for, the epochs
// after it are whole again.
func TestTurnDuringAdds(t *testing.T) {
	const ids, turns = 5_000, 20
	tape := newTape(decimal, ids, ids, func(i int) uint64 { return uint64(i) })
	defer tape.free()
	eachDesign(t, decimal, ids, func(t *testing.T, d Design) {
		var all sync.WaitGroup
		for w := range 2 {
			all.Go(func() {
				for i := range turns * ids {
					d.Add(tape.at(i%ids), w)
				}
			})
		}
		for range turns {
			d.Turn()
		}
		all.Wait()
		d.Turn()
		for i := range ids {
			if !d.Add(tape.at(i), 0) || d.Add(tape.at(i), 1) {
				t.Fatalf("%s is not new exactly once in an epoch of its own", tape.at(i))
			}
		}
	})
}

func TestTapesHoldTheIdsTheySay(t *testing.T) {
	const ids = 20_000
	for _, k := range []kind{decimal, uuids, text} {
		for _, m := range []mixture{unique, half, dup99} {
			before, timed := tapes(k, m, max(ids, 2*dupAdds/100))
			defer timed.free()
			seen := map[string]bool{}
			if before != nil {
				defer before.free()
				for i := range before.length {
					seen[string(before.at(i))] = true
				}
			}
			had := len(seen)
			for i := range timed.length {
				seen[string(timed.at(i))] = true
			}
			if got := len(seen) - had; got != timed.uniques {
				t.Errorf("%s %s: got %d new ids, want %d", k, m, got, timed.uniques)
			}
		}
	}
}
