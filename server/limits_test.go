package server

import (
	"strings"
	"testing"
)

// TestLimitsStayWithinTheRoom: for every number of descriptors and every memory limit
// there is room for what is not a caller's connection.
func TestLimitsStayWithinTheRoom(t *testing.T) {
	for _, c := range []struct {
		name    string
		wanted  int
		room    Room
		conns   int
		lowered string // a part of the reason
	}{
		{"no limit", 0, Room{}, DefaultMaxConns, ""},
		{"a value without a limit", 100_000, Room{}, 100_000, ""},
		{"the descriptors of the unit", 0, Room{Descriptors: 131072}, DefaultMaxConns, ""},
		{"ulimit -n 64", 0, Room{Descriptors: 64}, 29, "64 files"},
		{"ulimit -n 200", 0, Room{Descriptors: 200}, 90, "200 files"},
		{"ulimit -n 2000 and a value below it", 1500, Room{Descriptors: 2000}, 1500, ""},
		{"ulimit -n 2000 and a value above it", 2000, Room{Descriptors: 2000}, 1522, "2000 files"},
		{"64 MiB", 0, Room{Memory: 64 << 20}, 2730, "64 MiB"},
		{"128 MiB", 0, Room{Memory: 128 << 20}, 8192, "128 MiB"},
		{"128 MiB with TLS", 0, Room{Memory: 128 << 20, TLS: true}, 1706, "128 MiB"},
		{"1 GiB", 0, Room{Memory: 1 << 30}, DefaultMaxConns, ""},
		{"both, memory is less", 0, Room{Descriptors: 131072, Memory: 128 << 20}, 8192, "128 MiB"},
		{"both, descriptors are less", 0, Room{Descriptors: 1024, Memory: 1 << 30}, 717, "1024 files"},
		{"next to nothing", 0, Room{Descriptors: 20, Memory: 16 << 20}, leastConns, "20 files"},
	} {
		l := LimitsFor(c.wanted, c.room)
		if l.MaxConns != c.conns || c.lowered == "" != (l.Lowered == "") || !strings.Contains(l.Lowered, c.lowered) {
			t.Errorf("%s: got %d, %q, want %d, %q", c.name, l.MaxConns, l.Lowered, c.conns, c.lowered)
		}
		if room := int64(c.room.Memory/2) - fixedBytes; l.BatchMemory < batchNeeds(DefaultMaxBatchBytes, DefaultMaxBatchIDs) || l.BatchMemory > defaultBatchMemory || room > 64<<20 && l.BatchMemory > room/6 {
			t.Errorf("%s: %d bytes for batches", c.name, l.BatchMemory)
		}
		if l.MaxServed < 1 || l.MaxServed > l.MaxConns || l.MaxTurnedAway < 1 || l.MaxAdmin < 1 {
			t.Errorf("%s: got %+v", c.name, l)
		}
		if all := uint64(l.MaxConns + l.MaxTurnedAway + l.MaxAdmin); c.room.Descriptors >= 64 && all+min(c.room.Descriptors/3, 128) > c.room.Descriptors {
			t.Errorf("%s: %d connections and %d descriptors leave too few", c.name, all, c.room.Descriptors)
		}
	}
	for descriptors := uint64(32); descriptors < 1<<18; descriptors += descriptors/7 + 1 {
		if l := LimitsFor(1<<20, Room{Descriptors: descriptors}); l.MaxConns > leastConns && uint64(l.MaxConns+l.MaxTurnedAway) >= descriptors {
			t.Errorf("%d descriptors: got %+v", descriptors, l)
		}
	}
}
