//go:build race

package counter

// raceEnabled makes the tests smaller, and leaves allocations uncounted: the
// race detector allocates.
const raceEnabled = true
