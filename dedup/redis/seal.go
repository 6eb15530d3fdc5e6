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

// sealedIDs is what sealing the ids of an epoch came to.
type sealedIDs struct {
	unique uint64 // ids in Redis
	exact  bool   // no id is known to be given twice or forgotten
	whole  bool   // no write can have been lost since the epoch began
}

// sealIDs seals an epoch in every lane: from then on nobody adds to it, and its
// count is the same for whoever asks, until keepSeal is over. It need not have
// been opened here, nor hold ids. It is whole only if each lane has the sessions, those
// that have answered ids: "+" stands before one that has not reported how many, for
// which nothing waits, "=" before the others.
//
// It waits while ids that were lost are being added again. An error leaves some
// lanes sealed and others not; calling it again goes on.
func (r *Set) sealIDs(ctx context.Context, s counter.Span, sessions []string) (sealedIDs, error) {
	type part struct {
		answer
		err error
	}
	parts := make(chan part, len(r.lanes))
	for i := range r.lanes {
		go func() {
			a, err := r.sealLane(ctx, &r.lanes[i], s, sessions)
			parts <- part{a, err}
		}()
	}
	sum := sealedIDs{exact: true, whole: true}
	var err error
	for range r.lanes {
		p := <-parts
		if p.err != nil {
			err = p.err
		}
		sum.unique += p.n
		sum.exact = sum.exact && p.exact
		sum.whole = sum.whole && p.whole
	}
	if err != nil {
		return sealedIDs{}, fmt.Errorf("sealing %s: %w", s.Start.UTC().Format(time.RFC3339Nano), err)
	}
	return sum, nil
}

func (r *Set) sealLane(ctx context.Context, l *lane, s counter.Span, sessions []string) (answer, error) {
	var missing time.Time // since when
	for {
		giveUp := flag(!missing.IsZero() && time.Since(missing) > missingFor)
		args := append([]string{"seal", epochKey(s.Start, s.Window), seconds(keepSeal(s.Window)), switchWait, giveUp, idsTTL}, sessions...)
		a, err := r.call(ctx, l.key, args...)
		if err != nil || a.status == statusSealed {
			return a, err
		}
		if a.status == statusMissing && missing.IsZero() {
			missing = time.Now()
		}
		select {
		case <-ctx.Done():
			return a, ctx.Err()
		case <-time.After(sealRetry):
		}
	}
}
