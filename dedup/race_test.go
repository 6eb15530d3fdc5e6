//go:build race

package dedup

// raceEnabled puts the tables on the heap, where the race detector sees them,
// and makes the tests smaller.
const raceEnabled = true
