//go:build linux

package dedup

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"verve/counter"
)

// runSet runs the background work until the test is over.
func runSet(t testing.TB, s Set) {
	var running sync.WaitGroup
	ctx, stop := context.WithCancel(context.Background())
	running.Go(func() { _ = s.Run(ctx) })
	t.Cleanup(func() {
		stop()
		running.Wait()
	})
}

// BenchmarkAddKept is BenchmarkAdd with a journal beside the table: what it adds
// is the price of surviving the process. The two are run in turns, and the
// journal is synced meanwhile as in the server.
func BenchmarkAddKept(b *testing.B) {
	for _, ids := range []int{50_000, 1_000_000, 10_000_000} {
		for _, kept := range []bool{false, true} {
			name := "memory"
			if kept {
				name = "kept"
			}
			b.Run(strconv.Itoa(ids)+"/"+name, func(b *testing.B) {
				cfg := Config{Expect: uint64(ids)}
				if kept {
					cfg.Dir = b.TempDir()
				}
				m := newMemory(b, cfg)
				runSet(b, m)
				e := newEpochs(b, m)
				n := 0
				id := make([]byte, 0, 20)
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					if i == ids {
						i = 0
						n++
					}
					id = strconv.AppendUint(id[:0], uint64(i)*7, 10)
					in, _ := e.Enter(e.At(n), 0)
					if v, err := addTo(m, in.Epoch, id); v != Unique || err != nil {
						b.Fatal(v, err)
					}
					in.Leave(counter.Unique)
				}
			})
		}
	}
}

// BenchmarkStart opens the directory of a process that was killed with so many
// ids in the running epoch, in a table made for 46 million: 64 million slots.
func BenchmarkStart(b *testing.B) {
	for _, ids := range []int{0, 1_000_000, 10_000_000, 46_000_000} {
		b.Run(strconv.Itoa(ids), func(b *testing.B) {
			cfg := Config{Expect: 46_600_000, Dir: filepath.Join(b.TempDir(), "epochs")}
			l := newLedger(b)
			p := live(b, cfg, counter.MaxWindow, l)
			var group sync.WaitGroup
			for w := range 2 {
				group.Go(func() {
					var id []byte
					for i := w; i < ids; i += 2 {
						id = strconv.AppendInt(id[:0], int64(i)*7, 10)
						if v, err := addTo(p.m, p.c.Last(), id); v != Unique || err != nil {
							b.Errorf("id %s: %v, %v", id, v, err)
							return
						}
					}
				})
			}
			group.Wait()
			p.kill()
			var slots, found uint64
			for b.Loop() {
				m, err := NewMemory(cfg)
				if err != nil {
					b.Fatal(err)
				}
				past := m.Past(l.published())
				slots, found = m.Stats().Slots, past.Left[0].Unique
				if past.Over {
					b.Fatal("the hour is over: nothing is put back")
				}
				b.StopTimer()
				abandon(m)
				b.StartTimer()
			}
			if found != uint64(ids) {
				b.Errorf("found %d ids, want %d", found, ids)
			}
			b.ReportMetric(float64(slots)/(1<<20), "Mslots")
		})
	}
}

// BenchmarkFirstWindow is what an id costs in the first window of a process with
// --expect-ids: decimals and UUIDs, as many as are expected. user-ns is the CPU time;
// what it takes to write an id is in it.
func BenchmarkFirstWindow(b *testing.B) {
	const ids = 11_000_000
	for name, format := range map[string]string{"decimal": "1%d", "uuid": "6ba7b810-9dad-11d1-80b4-%012x"} {
		for expected, cfg := range map[string]Config{"as decimals": {Expect: ids}, "as any": {ExpectAny: ids}} {
			b.Run(name+" expected "+expected, func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					m := newMemory(b, cfg)
					e := newEpochs(b, m)
					ctx, stop := context.WithCancel(context.Background())
					go func() { _ = m.Run(ctx) }()
					in, _ := e.Enter(e.At(0), 0)
					var id []byte
					began := userTime(b)
					b.StartTimer()
					for i := range ids {
						id = fmt.Appendf(id[:0], format, i)
						if v, err := addTo(m, in.Epoch, id); v != Unique || err != nil {
							b.Fatal(v, err)
						}
					}
					b.StopTimer()
					in.Leave(counter.Void)
					b.ReportMetric(float64((userTime(b)-began).Nanoseconds())/ids, "user-ns/id")
					b.ReportMetric(float64(m.Stats().Levels), "levels")
					stop()
					b.StartTimer()
				}
			})
		}
	}
}

// userTime is the CPU time of this process outside of the kernel.
func userTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano())
}
