package redis

import (
	"cmp"
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/redis/rueidis"

	"verve/counter"
	"verve/internal/retry"
)

const (
	// switchWait is how long a seal waits, in seconds, after a failover, for
	// every session to show that none of its ids are lost.
	switchWait = "3"

	sealRetry = 20 * time.Millisecond

	// copyWait is how long a replica has to confirm a seal, which takes one trip. If none
	// answers, the record is that much later.
	copyWait = 500 * time.Millisecond
)

func seconds(d time.Duration) string { return strconv.FormatInt(int64(d/time.Second), 10) }

// keepSeal is how long a lane remembers that an epoch is sealed.
func keepSeal(window time.Duration) time.Duration {
	return max(20*window, 2*time.Minute)
}

// keepTokens is how long the tokens of an epoch are kept after its seal: as long as the
// next epoch can be open.
func keepTokens(window, skew time.Duration) time.Duration {
	return 2*window + 2*skew + time.Minute
}

// sealedIDs is the result of sealing the ids of an epoch.
type sealedIDs struct {
	unique     uint64 // ids in Redis
	exact      bool   // no id is known to be given twice or forgotten
	whole      bool   // no write can have been lost since the epoch began
	under      uint64 // ids in Redis that were counted under keys
	unanswered bool   // ids of sessions that have not reported may have had no answer
}

// sealIDs seals an epoch in every lane: from then on no id is added to it, and its
// count is the same for every caller, until keepSeal is over. The epoch need not have
// been opened here, nor hold ids. sessions are those that have answered ids, or may have: "+"
// stands before one that has not reported how many, "?" before one of which it is not known
// that it answered any, "=" before the others. The result is whole only if each lane has them.
//
// It waits while lost ids are being added again, but not for a session with "+". After an
// error some lanes may be sealed and others not; calling it again seals the rest.
func (r *Set) sealIDs(ctx context.Context, s counter.Span, sessions []string) (sealedIDs, error) {
	parts, errs := make([]sealedIDs, len(r.lanes)), make([]error, len(r.lanes))
	var all sync.WaitGroup
	for i := range r.lanes {
		all.Go(func() { parts[i], errs[i] = r.sealLane(ctx, &r.lanes[i], s, sessions) })
	}
	all.Wait()
	sum := sealedIDs{exact: true, whole: true}
	for _, p := range parts {
		sum.unique += p.unique
		sum.under += p.under
		sum.exact = sum.exact && p.exact
		sum.whole = sum.whole && p.whole
		sum.unanswered = sum.unanswered || p.unanswered
	}
	if err := cmp.Or(errs...); err != nil {
		return sealedIDs{}, fmt.Errorf("sealing %s: %w", s.Start.UTC().Format(time.RFC3339Nano), err)
	}
	return sum, nil
}

// sealLane seals an epoch in one lane. It waits until sessions have added the ids again that
// Redis lacks, or gives these up after a time. awaitSeal has waited for the members to leave
// the epoch before.
func (r *Set) sealLane(ctx context.Context, l *lane, s counter.Span, sessions []string) (sealedIDs, error) {
	var missing time.Time // since when
	for {
		giveUp := flag(!missing.IsZero() && time.Since(missing) > missingFor)
		args := append([]string{"seal", epochName(s), seconds(keepSeal(s.Window)), switchWait, giveUp, idsTTL, seconds(keepTokens(s.Window, r.cfg.MaxSkew))}, sessions...)
		a, err := r.call(ctx, l.redisKey, args...)
		if err == nil && a.status == statusSealed && a.replicas {
			var has bool
			has, err = r.confirmed(ctx, l.redisKey)
			a.sealed.exact, a.sealed.whole = a.sealed.exact && has, a.sealed.whole && has
		}
		if err != nil || a.status == statusSealed {
			return a.sealed, err
		}
		if a.status == statusMissing && missing.IsZero() {
			missing = time.Now()
		}
		if err := retry.Sleep(ctx, sealRetry); err != nil {
			return a.sealed, err
		}
	}
}

// confirmed reports whether a replica has all that was written to a lane so far. If not, the
// master may be cut off, and another one counts the same window; or a replica that becomes
// the master takes ids of an epoch that is published.
func (r *Set) confirmed(ctx context.Context, redisKey string) (bool, error) {
	client, err := r.conn()
	if err != nil {
		return false, err
	}
	var replicas int64
	err = client.Dedicated(func(c rueidis.DedicatedClient) error {
		// WAIT is for what its connection has written.
		out := c.DoMulti(ctx, c.B().Arbitrary("EXPIRE").Keys(redisKey).Args(idsTTL).Build(),
			c.B().Wait().Numreplicas(1).Timeout(copyWait.Milliseconds()).Build())
		if err := out[0].Error(); err != nil {
			return err
		}
		if replicas, err = out[1].AsInt64(); isRefusal(err) {
			return nil // the user may not run it
		}
		return err
	})
	return replicas > 0, err
}

const (
	// scanned is about how many keys one command reads: Redis does nothing else meanwhile.
	scanned = "1000"

	// keysLinger is how long the counts of the keys are kept once the record is delivered,
	// for an instance that reads the count of the window late.
	keysLinger = time.Minute
)

// keyCounts returns how many ids a sealed epoch has under each key: the same to all
// instances, until dropKeys.
func (r *Set) keyCounts(ctx context.Context, s counter.Span) (keys counter.KeyCounts, err error) {
	client, err := r.conn()
	if err != nil {
		return keys, err
	}
	counts := map[string]uint64{}
	for i := range r.lanes {
		// HSCAN may return a field twice while Redis resizes the hash.
		lane := map[string]uint64{}
		for cursor, first := uint64(0), true; first || cursor != 0; first = false {
			page, err := client.Do(ctx, client.B().Arbitrary("HSCAN").Keys(r.countsOf(i, s)).
				Args(strconv.FormatUint(cursor, 10), "COUNT", scanned).ReadOnly()).AsScanEntry()
			if err != nil {
				return keys, fmt.Errorf("reading the keys of %s: %w", s.Start.UTC().Format(time.RFC3339Nano), err)
			}
			cursor = page.Cursor
			for f := 0; f+1 < len(page.Elements); f += 2 {
				if lane[page.Elements[f]], err = strconv.ParseUint(page.Elements[f+1], 10, 64); err != nil {
					return keys, fmt.Errorf("reading the keys: %w", err)
				}
			}
		}
		for key, unique := range lane {
			counts[key] += unique
		}
	}
	for key, unique := range counts {
		keys.Add([]byte(key), unique)
	}
	return keys, nil
}

// dropKeys lets the counts of an epoch's keys expire, after keysLinger: its record is
// delivered.
func (r *Set) dropKeys(ctx context.Context, s counter.Span) error {
	client, err := r.conn()
	for i := 0; err == nil && i < len(r.lanes); i++ {
		err = client.Do(ctx, client.B().Pexpire().Key(r.countsOf(i, s)).Milliseconds(keysLinger.Milliseconds()).Build()).Error()
	}
	return err
}

func (r *Set) countsOf(lane int, s counter.Span) string {
	return r.lanes[lane].redisKey + ":" + epochName(s) + ":n"
}
