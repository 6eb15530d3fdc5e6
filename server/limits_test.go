package server

import (
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"verve/server/callback"
)

// TestLimitsStayWithinTheRoom: for every number of descriptors and every memory limit
// there is room for what is not a caller's connection.
func TestLimitsStayWithinTheRoom(t *testing.T) {
	for _, c := range []struct {
		name    string
		cfg     Config
		conns   int
		lowered string // a part of the reason
	}{
		{"no limit", Config{}, DefaultMaxConns, ""},
		{"a value without a limit", Config{MaxConns: 100_000}, 100_000, ""},
		{"the descriptors of the unit", Config{Descriptors: 131072}, DefaultMaxConns, ""},
		{"ulimit -n 64", Config{Descriptors: 64}, 29, "64 files"},
		{"ulimit -n 200", Config{Descriptors: 200}, 90, "200 files"},
		{"ulimit -n 2000 and a value below it", Config{MaxConns: 1500, Descriptors: 2000}, 1500, ""},
		{"ulimit -n 2000 and a value above it", Config{MaxConns: 2000, Descriptors: 2000}, 1522, "2000 files"},
		{"64 MiB", Config{Memory: 64 << 20}, 2730, "64 MiB"},
		{"128 MiB", Config{Memory: 128 << 20}, 8192, "128 MiB"},
		{"128 MiB with TLS", Config{Memory: 128 << 20, TLS: new(Certificate)}, 1706, "128 MiB"},
		{"1 GiB", Config{Memory: 1 << 30}, DefaultMaxConns, ""},
		{"both, memory is less", Config{Descriptors: 131072, Memory: 128 << 20}, 8192, "128 MiB"},
		{"both, descriptors are less", Config{Descriptors: 1024, Memory: 1 << 30}, 717, "1024 files"},
		{"next to nothing", Config{Descriptors: 20, Memory: 16 << 20}, leastConns, "20 files"},
	} {
		l := LimitsFor(c.cfg)
		if l.MaxConns != c.conns || c.lowered == "" != (l.Lowered == "") || !strings.Contains(l.Lowered, c.lowered) {
			t.Errorf("%s: got %d, %q, want %d, %q", c.name, l.MaxConns, l.Lowered, c.conns, c.lowered)
		}
		if room := int64(c.cfg.Memory/2) - fixedBytes; l.BatchMemory < batchNeeds(DefaultMaxBatchBytes, DefaultMaxBatchIDs) || l.BatchMemory > defaultBatchMemory || room > 64<<20 && l.BatchMemory > room/6 {
			t.Errorf("%s: %d bytes for batches", c.name, l.BatchMemory)
		}
		if l.MaxServed < 1 || l.MaxServed > l.MaxConns || l.MaxTurnedAway < 1 || l.MaxAdmin < 1 {
			t.Errorf("%s: got %+v", c.name, l)
		}
		if all := uint64(l.MaxConns + l.MaxTurnedAway + l.MaxAdmin); c.cfg.Descriptors >= 64 && all+min(c.cfg.Descriptors/3, 128) > c.cfg.Descriptors {
			t.Errorf("%s: %d connections and %d descriptors leave too few", c.name, all, c.cfg.Descriptors)
		}
	}
	for descriptors := uint64(32); descriptors < 1<<18; descriptors += descriptors/7 + 1 {
		if l := LimitsFor(Config{MaxConns: 1 << 20, Descriptors: descriptors}); l.MaxConns > leastConns && uint64(l.MaxConns+l.MaxTurnedAway) >= descriptors {
			t.Errorf("%d descriptors: got %+v", descriptors, l)
		}
	}
}

// Callbacks can have their descriptors while all connections of callers are open.
func TestLimitsLeaveRoomForCallbacks(t *testing.T) {
	for _, concurrency := range []int{1, 8, 130, 1000} {
		for descriptors := uint64(512); descriptors < 1<<18; descriptors += descriptors/7 + 1 {
			calls, err := callback.New(callback.Config{
				Concurrency: concurrency, Descriptors: descriptors, Log: zerolog.Nop(),
				Live: func() (start time.Time, unique uint64) { return start, 0 },
			})
			if err != nil {
				t.Fatal(err)
			}
			l := LimitsFor(Config{MaxConns: 1 << 20, Descriptors: descriptors, Callbacks: calls})
			if most := l.MaxConns + l.MaxTurnedAway + l.MaxAdmin + fileDescriptors + calls.Descriptors(); uint64(most) > descriptors {
				t.Errorf("--callback-concurrency=%d: %d of %d descriptors may be open, %d by callbacks", concurrency, most, descriptors, calls.Descriptors())
			}
		}
	}
}
