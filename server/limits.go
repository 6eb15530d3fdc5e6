package server

import (
	"cmp"
	"fmt"

	"verve/server/callback"
)

// What a connection costs, measured with 8,000 of them in a memory cgroup, the
// kernel's share among it (docs/operations.md, Sizing).
const (
	idleBytes    = 5 << 10  // parked: 3.7 KB of the process, 1.4 KB of the kernel
	idleTLSBytes = 24 << 10 // parked, with the state of TLS
	servedBytes  = 48 << 10 // with a request: buffers, a stack, 8 KiB of headers twice, the first 8 KiB of a body

	// turnedAwayBytes lets those that are turned away take half of what those with a
	// request may.
	turnedAwayBytes = 16 << 10

	// fixedBytes is what the process takes without ids and connections: the Go
	// runtime, the metrics, and the pages of the binary that are always in use.
	fixedBytes = 16 << 20

	// leastConns keeps a server usable that has almost nothing.
	leastConns = 16
)

// Descriptors that are not for connections: data directory, brokers, Redis; the
// workers and the kept connections of callbacks.
const (
	fileDescriptors     = 64
	callbackDescriptors = 768
	adminConns          = 64
)

// What the limits are where there is room.
const (
	defaultTurnedAway  = 1024
	defaultBatchMemory = 64 << 20
)

// Limits are the bounds of connections and batches that keep the process within its
// descriptors and its memory.
type Limits struct {
	MaxConns      int // open at once on the public listener
	MaxServed     int // of them, with a request under way
	MaxTurnedAway int // over MaxConns, that are read on
	MaxAdmin      int // on the admin listener

	BatchMemory int64 // of all batches that are read and judged, in bytes

	// Lowered is why MaxConns is less than was wanted; empty if it is not.
	Lowered string
}

// LimitsFor returns the limits for what cfg has of connections, batches, descriptors and
// memory.
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
		kept := min(all/2, fileDescriptors+l.MaxAdmin+min(callbackDescriptors, all/callback.DescriptorShare)) + l.MaxTurnedAway
		l.lower(all-kept, fmt.Sprintf("the process may open %d files (ulimit -n), and keeps %d for others than callers", all, kept))
	}
	if cfg.Memory > 0 {
		// Idle connections have five parts of six, those with a request and batches the
		// rest: half of it each, and batches as much as one of them needs.
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
