//go:build race

package counter

// raceEnabled makes the tests smaller. Tests do not count allocations then, because the race
// detector allocates.
const raceEnabled = true
