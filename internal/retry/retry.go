// Package retry waits between attempts that fail, for all parts that use a disk, a broker or
// Redis.
package retry

import (
	"context"
	"math/rand/v2"
	"time"
)

// The waits double from shortest to longest, with jitter, so that instances that lost the same
// server do not reconnect at the same time. With five seconds, a server that is back is found
// well within half a minute.
const (
	shortest = 100 * time.Millisecond
	longest  = 5 * time.Second
)

// Backoff waits longer each time. The zero value begins with the shortest wait. Only one
// goroutine at a time may use it.
type Backoff struct{ next time.Duration }

// Sleep waits before the next attempt: between half of the present wait and all of it. It
// returns the error of ctx if ctx ends first.
func (b *Backoff) Sleep(ctx context.Context) error {
	d := min(max(b.next, shortest), longest)
	b.next = 2 * d
	return Sleep(ctx, d/2+rand.N(d/2))
}

// Sleep waits for d. It returns the error of ctx if ctx ends first. Safe for concurrent use.
func Sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
