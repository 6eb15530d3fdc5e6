package dedup_test

import (
	"testing"

	"verve/dedup"
	"verve/internal/settest"
)

func TestSet(t *testing.T) {
	for name, newSet := range map[string]func(t testing.TB, maxIDs uint64) dedup.Set{
		"memory":             dedup.NewTestMemory,
		"memory, in batches": dedup.NewTestBatches,
		"kept":               dedup.NewTestJournal,
	} {
		t.Run(name, func(t *testing.T) {
			settest.Run(t, settest.Config{
				New: newSet, Many: dedup.TestMany, Turns: dedup.TestLap + 100, Reclaim: dedup.ReclaimTest,
			})
		})
	}
}
