package dedup

import "time"

// GroupStats describes the Redis and the group as this instance sees them.
type GroupStats struct {
	LedgerStats

	Start  time.Time // of the epoch opened last
	Unique uint64    // ids of the whole group in that epoch, as of the last reply from each lane

	// Away is the present failure of Redis, empty if there is none. Ready reports whether
	// ids are answered even so.
	Away  string
	Ready bool // false: ids are refused, and the instance is not ready

	Batches   uint64 // sent
	Retries   uint64 // of them that failed
	TakenBack uint64 // ids removed again, because their requests had already got 503
	Twice     uint64 // ids that Redis had already when an instance added them again
	Restored  uint64 // ids added again after Redis had lost them
	Dropped   uint64 // ids answered as new that are in no record
	Pending   uint64 // ids that wait for an answer
}

// LedgerStats describes the group as one of its members sees it.
type LedgerStats struct {
	Members int           // alive, this one among them
	Leading bool          // this one publishes
	Offset  time.Duration // how far the clock of Redis is ahead of this one
	Waiting int           // epochs whose records are not known to be delivered, the open one among them

	// Problem is the reason why this instance should get no requests: its clock or its
	// windows are not those of the group. Empty if there is none.
	Problem string
}
