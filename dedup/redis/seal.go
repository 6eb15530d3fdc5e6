package redis

import (
	"context"
	"fmt"
	"time"

	"verve/counter"
)

const (
	// switchWait is how long a seal waits, in seconds, after a failover, for
	// every session to show that nothing of it is lost.
	switchWait = "3"

	sealRetry = 20 * time.Millisecond
)

// keepSeal is how long a lane remembers that an epoch is sealed.
func keepSeal(window time.Duration) time.Duration {
	return max(20*window, 2*time.Minute)
}

// sealIDs seals an epoch in every lane: from then on nobody adds to it, and its
// count is the same for whoever asks, until keepSeal is over. It need not have
// been opened here, nor hold ids. exact is false where ids are known to have been
// given twice or to be lost.
//
// It waits while ids that were lost are being added again. An error leaves some
// lanes sealed and others not; calling it again goes on.
func (r *Set) sealIDs(ctx context.Context, s counter.Span) (unique uint64, exact bool, err error) {
	type part struct {
		answer
		err error
	}
	parts := make(chan part, len(r.lanes))
	epoch := epochKey(s.Start, s.Window)
	for i := range r.lanes {
		go func() {
			a, err := r.sealLane(ctx, &r.lanes[i], epoch, s.Window)
			parts <- part{a, err}
		}()
	}
	exact = true
	for range r.lanes {
		p := <-parts
		if p.err != nil {
			err = p.err
		}
		unique += p.n
		exact = exact && p.exact
	}
	if err != nil {
		return 0, false, fmt.Errorf("sealing %s: %w", s.Start.UTC().Format(time.RFC3339Nano), err)
	}
	return unique, exact, nil
}

func (r *Set) sealLane(ctx context.Context, l *lane, epoch string, window time.Duration) (answer, error) {
	for {
		a, err := r.call(ctx, l.key, "seal", epoch, seconds(keepSeal(window)), switchWait)
		if err != nil || a.status == statusSealed {
			return a, err
		}
		select {
		case <-ctx.Done():
			return a, ctx.Err()
		case <-time.After(sealRetry):
		}
	}
}
