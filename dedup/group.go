package dedup

import (
	"time"

	"verve/counter"
)

// GroupStats describes the Redis and the group as this instance sees them.
type GroupStats struct {
	LedgerStats

	Unique uint64 // ids of the whole group in the open epoch, as last heard

	// Away says what is wrong with Redis; empty if nothing is. Ready says whether
	// ids are answered all the same.
	Away  string
	Ready bool

	Batches  uint64 // sent
	Retries  uint64 // of them that failed
	Untold   uint64 // ids taken back, as nobody could be told of them
	Twice    uint64 // ids given in several instances while Redis was away
	Replayed uint64 // ids added again after Redis had lost them
	Dropped  uint64 // ids answered as new that are in no record
	Pending  uint64 // ids that wait for an answer
}

// Group returns a snapshot for the metrics.
func (r *Redis) Group() GroupStats {
	s := GroupStats{
		LedgerStats: r.ledger.Stats(),
		Unique:      r.Live(),
		Batches:     r.counts.batches.Load(),
		Retries:     r.counts.retries.Load(),
		Untold:      r.counts.untold.Load(),
		Twice:       r.counts.twice.Load(),
		Replayed:    r.counts.replayed.Load(),
		Dropped:     r.counts.dropped.Load(),
		Pending:     uint64(max(0, r.pending.Load())),
	}
	s.Ready, s.Away = r.Health()
	return s
}

// IsDelivered reports whether the record of an epoch that this instance has left
// is known to be delivered, by whichever instance.
func (l *Ledger) IsDelivered(s counter.Span) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.find(s) == nil && time.Since(s.End()) > 0
}
