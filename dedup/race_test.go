//go:build race

package dedup

// raceEnabled puts the tables on the Go heap, where the race detector observes them, and makes
// the tests smaller.
const raceEnabled = true
