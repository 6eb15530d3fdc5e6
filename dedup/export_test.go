package dedup

import "testing"

// What the suite in set_test.go needs of the inside.

// NewTestMemory is a Memory on the heap.
func NewTestMemory(t testing.TB, maxIDs uint64) Set { return newMemory(t, Config{MaxIDs: maxIDs}) }

// NewTestJournal is a Memory with a journal.
func NewTestJournal(t testing.TB, maxIDs uint64) Set {
	return newMemory(t, Config{MaxIDs: maxIDs, Dir: t.TempDir()})
}

// NewTestBatches is a Memory to which each id comes two times in one batch.
func NewTestBatches(t testing.TB, maxIDs uint64) Set {
	return twice{newMemory(t, Config{MaxIDs: maxIDs}), t}
}

// ReclaimTest reclaims what past epochs left in one of those.
func ReclaimTest(s Set) {
	if two, batches := s.(twice); batches {
		s = two.Memory
	}
	s.(*Memory).reclaim()
}

// TestLap is how many epochs there are tags for.
const TestLap = lap

// TestMany is 15 times the ids of the smallest table, or less where each costs more.
var TestMany = func() int {
	if raceEnabled {
		return 300_000
	}
	return 1_000_000
}()
