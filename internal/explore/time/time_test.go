package time_test

import (
	"maps"
	"testing"

	"verve/internal/explore"
	"verve/internal/explore/time"
)

// TestTimePassesWhenAllWait: and before that, as often as the scenario allows.
func TestTimePassesWhenAllWait(t *testing.T) {
	for moves, want := range []map[time.Duration]bool{{0: true}, {0: true, time.Second: true}, {0: true, time.Second: true, 3 * time.Second: true}} {
		seen := map[time.Duration]bool{}
		_, err := explore.Search(explore.Options{Preemptions: 2}, func(r *explore.Run) {
			c := time.Start(r, moves)
			began := c.Now
			r.Go("waits", func() {
				timer := time.NewTimer(time.Second)
				explore.Receive(timer.C)
				timer.Reset(2 * time.Second)
				explore.Receive(timer.C)
				if passed := time.Since(began); passed != 3*time.Second {
					t.Errorf("%v have passed after both timers, want 3s", passed)
				}
				c.End()
			})
			r.Go("looks", func() { seen[time.Since(began)] = true })
		})
		if err != nil {
			t.Fatal(err)
		}
		if !maps.Equal(seen, want) {
			t.Errorf("with %d moves: a thread that need not wait saw %v pass, want %v", moves, seen, want)
		}
	}
}
