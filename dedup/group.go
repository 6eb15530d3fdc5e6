package dedup

import "time"

// GroupStats describes the Redis and the group as this instance sees them.
type GroupStats struct {
	LedgerStats

	Start  time.Time // of the epoch opened last
	Unique uint64    // ids of the whole group in that epoch, as of the last reply from each lane

	// Away describes the present failure of Redis; it is empty if there is none. Ready reports
	// whether ids are answered in spite of it.
	Away  string
	Ready bool // false: ids are refused, and the instance is not ready

	Batches   uint64 // batches sent to Redis
	Retries   uint64 // batches that failed, and were sent again
	TakenBack uint64 // ids removed again, because their requests had already got 503
	Twice     uint64 // ids that Redis already had when an instance added them again
	Restored  uint64 // ids added again after Redis had lost them
	Dropped   uint64 // ids answered as new that are in no record
	Pending   uint64 // ids that wait for an answer
}

// LedgerStats describes the group as one of its members sees it.
type LedgerStats struct {
	Members int           // members that are alive, including this one
	Leading bool          // this instance publishes for the group
	Offset  time.Duration // how far the clock of Redis is ahead of the clock of this instance
	Waiting int           // epochs whose records are not known to be delivered, including the open one

	// Problem is the reason why this instance should get no requests: its clock or its windows
	// differ from those of the group. Empty if there is no such reason.
	Problem string
}
