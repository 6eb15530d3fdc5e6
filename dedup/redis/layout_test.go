package redis

import (
	"testing"
	"time"

	"verve/counter"
)

// TestKeysInRedisAreThoseOfTheLayout: instances of two versions share a Redis for the time of an
// upgrade. If a key, or what is in it, changes, layout counts up, and they refuse each other.
func TestKeysInRedisAreThoseOfTheLayout(t *testing.T) {
	const written = 5 // the layout whose keys are below
	if layout != written {
		t.Fatalf("layout is %d: write its keys down here", layout)
	}
	s := counter.Span{Start: time.UnixMilli(1_763_793_360_000), Window: time.Minute}
	keys := newLedgerKeys("a{b")
	r := &Set{cfg: Config{Group: "g"}, lanes: make([]lane, 1)}
	r.lanes[0].init(r, 0)
	for name, key := range map[string]struct{ got, want string }{
		"members":   {keys.members, "verve:{a%7Bb}:5:members"},
		"unsettled": {keys.unsettled, "verve:{a%7Bb}:5:unsettled"},
		"windows":   {keys.windows, "verve:{a%7Bb}:5:windows"},
		"length":    {keys.length, "verve:{a%7Bb}:5:length"},
		"leader":    {keys.leader, "verve:{a%7Bb}:5:leader"},
		"opened":    {keys.opened, "verve:{a%7Bb}:5:opened"},
		"epochs":    {keys.epochs, "verve:{a%7Bb}:5:epochs"},
		"an epoch":  {keys.ofEpoch(s), "verve:{a%7Bb}:5:epoch:1763793360000:60000"},
		"a lane":    {r.lanes[0].redisKey, "verve:{04s}:g:lane5"},
		"its keys":  {r.countsOf(0, s), "verve:{04s}:g:lane5:1763793360000:60000:n"},
	} {
		if key.got != key.want {
			t.Errorf("%s: got %q, want %q: does layout count up?", name, key.got, key.want)
		}
	}
}
