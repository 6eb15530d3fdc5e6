package server

import (
	"cmp"
	"fmt"

	"verve/server/callback"
)

// The bytes that a connection takes, measured with 8,000 of them in a memory cgroup; the
// kernel's part is included (docs/operations.md, Sizing).
const (
	idleBytes    = 5 << 10  // parked: 3.7 KB of the process, 1.4 KB of the kernel
	idleTLSBytes = 24 << 10 // parked, with the state of TLS
	servedBytes  = 48 << 10 // with a request: buffers, a stack, 8 KiB of headers twice, the first 8 KiB of a body

	// turnedAwayBytes is counted for a connection that is turned away: together these may
	// take a sixth as much memory as all other connections and batches.
	turnedAwayBytes = 16 << 10

	// fixedBytes is what the process takes without ids and connections: the Go
	// runtime, the metrics, and the pages of the binary that are always in use.
	fixedBytes = 16 << 20

	// leastConns keeps a server usable that has almost no memory or descriptors.
	leastConns = 16
)

// Descriptors that are not for callers' connections: for the data directory, brokers and
// Redis; for the admin listener. Those of callbacks are Sender.Descriptors.
const (
	fileDescriptors = 64
	adminConns      = 64
)

// The limits if there is room for them.
const (
	defaultTurnedAway  = 1024
	defaultBatchMemory = 64 << 20
)

// Limits are the bounds of connections and batches that keep the process within its
// descriptors and its memory.
type Limits struct {
	MaxConns      int // open at once on the public listener
	MaxServed     int // of these, with a request under way
	MaxTurnedAway int // over MaxConns, that are read on until their client has the answer
	MaxAdmin      int // on the admin listener

	BatchMemory int64 // of all batches that are read and judged, in bytes

	// Lowered is why MaxConns is less than was wanted; empty if it is not.
	Lowered string
}

// LimitsFor returns the limits that follow from the connections, batches, descriptors and
// memory in cfg.
func LimitsFor(cfg Config) Limits {
	least := batchNeeds(cmp.Or(cfg.MaxBatchBytes, DefaultMaxBatchBytes), cmp.Or(cfg.MaxBatchIDs, DefaultMaxBatchIDs))
	l := Limits{
		MaxConns: cmp.Or(cfg.MaxConns, DefaultMaxConns), MaxTurnedAway: defaultTurnedAway, MaxAdmin: adminConns,
		BatchMemory: max(defaultBatchMemory, least),
	}
	if cfg.Descriptors > 0 && cfg.Descriptors < 1<<30 {
		all := int(cfg.Descriptors)
		l.MaxTurnedAway = max(1, min(l.MaxTurnedAway, all/20))
		l.MaxAdmin = min(l.MaxAdmin, max(4, all/8))
		callbacks := all / callback.DescriptorShare
		if cfg.Callbacks != nil {
			callbacks = min(callbacks, cfg.Callbacks.Descriptors())
		}
		kept := min(all/2, fileDescriptors+l.MaxAdmin+callbacks) + l.MaxTurnedAway
		l.lower(all-kept, fmt.Sprintf("the process may open %d files (ulimit -n), and keeps %d for others than callers", all, kept))
	}
	if cfg.Memory > 0 {
		// Idle connections get five sixths. The rest is for connections with a request and
		// for batches, half each; but batches get at least what one of them needs.
		sixth := (max(cfg.Memory/2, fixedBytes+fixedBytes/2) - fixedBytes) / 6
		served := sixth - sixth/2
		l.BatchMemory = max(int64(min(sixth/2, defaultBatchMemory)), least)
		each := uint64(idleBytes)
		if cfg.TLS != nil {
			each = idleTLSBytes
		}
		l.lower(int(min(5*sixth/each, DefaultMaxConns<<4)),
			fmt.Sprintf("the memory limit is %d MiB, half of it for ids, and a connection takes %d KiB", cfg.Memory>>20, each>>10))
		l.MaxTurnedAway = min(l.MaxTurnedAway, max(leastConns, int(min(sixth/turnedAwayBytes, defaultTurnedAway))))
		l.MaxServed = int(min(served/servedBytes, DefaultMaxConns<<4))
	}
	if l.MaxServed == 0 || l.MaxServed > l.MaxConns {
		l.MaxServed = l.MaxConns
	}
	return l
}

func (l *Limits) lower(to int, why string) {
	if to = max(to, leastConns); to < l.MaxConns {
		l.MaxConns, l.Lowered = to, why
	}
}
