// Package retry paces attempts that fail, for everything that talks to a disk, a
// broker or Redis.
package retry

import (
	"context"
	"math/rand/v2"
	"time"
)

// Waits are between these, doubling, with jitter so that instances that lost the
// same server do not return in step. Five seconds leaves a server that came back
// found well within half a minute.
const (
	shortest = 100 * time.Millisecond
	longest  = 5 * time.Second
)

// Backoff waits longer each time. The zero value starts with the shortest. One goroutine at a
// time uses it.
type Backoff struct{ next time.Duration }

// Sleep waits before the next attempt. It returns the error of ctx if that ends
// first.
func (b *Backoff) Sleep(ctx context.Context) error {
	d := min(max(b.next, shortest), longest)
	b.next = 2 * d
	return Sleep(ctx, d/2+rand.N(d/2))
}

// Sleep waits for d. It returns the error of ctx if that ends first.
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
