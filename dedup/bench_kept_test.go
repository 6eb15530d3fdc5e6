//go:build linux

package dedup

import (
	"context"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"verve/counter"
)

// BenchmarkAddKept is BenchmarkAdd with a journal: the difference is the price of ids that
// survive the process. Both are run in turns, and the journal is synced meanwhile, as in the
// server.
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
				run(b, m)
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
					in, _ := e.Enter(e.At(n), 0, 1)
					if v, err := addTo(m, in.Epoch, id); v != Unique || err != nil {
						b.Fatal(v, err)
					}
					in.Leave(1, 0, 0)
				}
			})
		}
	}
}

// BenchmarkStart opens the directory of a process that was killed with a given number of ids in
// the open epoch, in a table made for 46 million: 64 million slots.
func BenchmarkStart(b *testing.B) {
	for _, ids := range []int{0, 1_000_000, 10_000_000, 46_000_000} {
		b.Run(strconv.Itoa(ids), func(b *testing.B) {
			cfg := Config{Expect: 46_600_000, Dir: filepath.Join(b.TempDir(), "epochs")}
			l := newFakeSpool(b)
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
				slots, found = m.Stats().Slots, past.Recovered[0].Unique
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

// BenchmarkFirstWindow measures the cost of an id in the first window of a process with
// --expect-ids, for as many decimals and UUIDs as are expected. user-ns is the CPU time, and
// includes the formatting of the id.
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
					in, _ := e.Enter(e.At(0), 0, 1)
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
					in.Leave(0, 0, 1)
					b.ReportMetric(float64((userTime(b)-began).Nanoseconds())/ids, "user-ns/id")
					b.ReportMetric(float64(m.Stats().Levels), "levels")
					stop()
					b.StartTimer()
				}
			})
		}
	}
}

// BenchmarkHotKey lets writers, as many as -cpu, add new ids under one key and under a
// thousand. The difference is the cost of all writers counting in the same word. See
// bench/README.md.
func BenchmarkHotKey(b *testing.B) {
	const ids = 1_000_000
	for _, keys := range []int{1, 1000} {
		b.Run(fmt.Sprintf("keys=%d", keys), func(b *testing.B) {
			m := newMemory(b, Config{ExpectWide: ids, Dir: b.TempDir()})
			run(b, m)
			e := newEpochs(b, m)
			under := make([][]byte, keys)
			for i := range under {
				under[i] = fmt.Appendf(nil, "campaign-%d", i)
			}
			var next atomic.Int64
			began := userTime(b)
			b.RunParallel(func(pb *testing.PB) {
				var id []byte
				for pb.Next() {
					i := next.Add(1)
					id = strconv.AppendInt(id[:0], i*7, 10)
					o := Options{Under: under[i%int64(keys)]}
					items, verdicts := []Item{{ID: id, Options: &o}}, []Verdict{Turned}
					m.Keys(items)
					in, _ := e.Enter(e.At(int(i/ids)), 0, 1)
					err := m.AddMany(in.Epoch, items, verdicts)
					in.Leave(1, 0, 0)
					if verdicts[0] == Turned { // the other writer is in the next epoch
						continue
					}
					if verdicts[0] != Unique || err != nil {
						b.Error(verdicts, err)
						return
					}
				}
			})
			b.ReportMetric(float64((userTime(b)-began).Nanoseconds())/float64(b.N), "user-ns/id")
		})
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

// BenchmarkOptions adds new ids with a token, ids under one of many keys, and ids with neither,
// one at a time and in batches, with a journal. It measures what a token and a key cost in time
// and, at the end of an epoch, in bytes of the tables. The items of a batch share their
// options. user-ns is the CPU time outside of the kernel.
func BenchmarkOptions(b *testing.B) {
	const ids = 1_000_000
	for _, uuids := range []bool{false, true} {
		for _, size := range []int{1, 64} {
			for _, with := range []optionForm{{"plain", false, false, 0}, {"token", false, true, 0}, {"key", false, false, 1000}, {"hotkey", false, false, 1}, {"lines", true, false, 1}} {
				if size == 1 && with.shared {
					continue
				}
				b.Run(fmt.Sprintf("uuids=%t/batch=%d/%s", uuids, size, with.name), func(b *testing.B) { benchmarkOptions(b, with, ids, size, uuids) })
			}
		}
	}
}

// optionForm is how ids come with options in BenchmarkOptions.
type optionForm struct {
	name   string
	shared bool // by all items of a batch
	token  bool
	keys   int
}

func benchmarkOptions(b *testing.B, with optionForm, ids, size int, uuids bool) {
	cfg := Config{Expect: uint64(ids), Dir: b.TempDir()}
	if uuids || with.keys > 0 {
		cfg.Expect, cfg.ExpectWide = 0, uint64(ids)
	}
	m := newMemory(b, cfg)
	run(b, m)
	e := newEpochs(b, m)
	texts := make([][2][]byte, size) // an id and a token
	under := make([][]byte, with.keys)
	for i := range under {
		under[i] = fmt.Appendf(nil, "campaign-%d", i)
	}
	items, verdicts, options := make([]Item, size), make([]Verdict, size), make([]Options, size)
	began := userTime(b)
	n, left := 0, ids
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if i%size != 0 {
			continue
		}
		if left -= size; left < 0 {
			n, left = n+1, ids-size
		}
		for at := range items {
			text := &texts[at]
			if text[0] = strconv.AppendUint(text[0][:0], uint64(i+at)*7, 10); uuids {
				text[0] = uuidOf(text[0][:0], uint64(i+at)*7)
			}
			items[at], verdicts[at] = Item{ID: text[0]}, Turned
			o := &options[at]
			if with.shared {
				o = &options[0]
			} else {
				*o = Options{}
			}
			if with.token || with.keys > 0 {
				items[at].Options = o
			}
			if with.token {
				text[1] = strconv.AppendUint(append(text[1][:0], "attempt-"...), uint64(i+at), 10)
				o.Token = text[1]
			}
			if with.keys > 0 {
				o.Under = under[(i+at)%with.keys]
			}
		}
		m.Keys(items)
		in, _ := e.Enter(e.At(n), 0, uint64(size))
		if err := m.AddMany(in.Epoch, items, verdicts); verdicts[size-1] != Unique || err != nil {
			b.Fatal(verdicts, err)
		}
		in.Leave(uint64(size), 0, 0)
	}
	b.ReportMetric(float64((userTime(b)-began).Nanoseconds())/float64(b.N), "user-ns/id")
	b.ReportMetric(float64(m.current.Load().tokens.table.slots*8)/float64(ids), "token-B/id")
}

// uuidOf appends the UUID of a number.
func uuidOf(id []byte, n uint64) []byte {
	const hex = "0123456789abcdef"
	id = append(id, "00000000-0000-4000-8000-000000000000"...)
	for i := len(id) - 1; n > 0; i, n = i-1, n>>4 {
		id[i] = hex[n&15]
	}
	return id
}

// BenchmarkResidentUnderKeys adds ten million ids under 100,000 keys and reports the memory
// of the tables and of the keys, for each.
func BenchmarkResidentUnderKeys(b *testing.B) {
	const ids, keys = 10_000_000, 100_000
	for _, uuids := range []bool{false, true} {
		b.Run(fmt.Sprintf("uuids=%t", uuids), func(b *testing.B) {
			for b.Loop() {
				var before, after runtime.MemStats
				runtime.GC()
				runtime.ReadMemStats(&before)
				m := newMemory(b, Config{ExpectAny: ids})
				e := newEpochs(b, m)
				in, _ := e.Enter(e.At(0), 0, 1)
				items, verdicts := make([]Item, 1), make([]Verdict, 1)
				var id, under []byte
				for i := range uint64(ids) {
					if id = strconv.AppendUint(id[:0], i*7, 10); uuids {
						id = uuidOf(id[:0], i*7)
					}
					under = strconv.AppendUint(append(under[:0], "campaign-"...), i%keys, 10)
					o := &Options{Under: under}
					items[0], verdicts[0] = Item{ID: id, Options: o}, Turned
					m.Keys(items)
					if err := m.AddMany(in.Epoch, items, verdicts); verdicts[0] != Unique || err != nil {
						b.Fatal(verdicts[0], err)
					}
				}
				runtime.GC()
				runtime.ReadMemStats(&after)
				b.ReportMetric((float64(m.arena.used.Load())+float64(after.HeapAlloc-before.HeapAlloc))/ids, "B/id")
				if n := in.Keys().Len(); n != keys {
					b.Errorf("%d keys", n)
				}
				in.Leave(0, 0, 1)
			}
		})
	}
}

// BenchmarkToken measures what a token costs. It adds new ids without a token to one Memory and
// with a token to another, in turns of a few thousand ids, so that other load of the machine
// affects both. All texts are made beforehand. plain-ns is the CPU time of the thread for an id
// without a token, and token-ns what its token adds.
func BenchmarkToken(b *testing.B) {
	for _, ids := range []int{100_000, 4_000_000} {
		for _, size := range []int{1, 16, 512} {
			b.Run(fmt.Sprintf("ids=%d/batch=%d", ids, size), func(b *testing.B) { benchmarkToken(b, ids, size) })
		}
	}
}

func benchmarkToken(b *testing.B, ids, size int) {
	const slice = 4096
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	type side struct {
		m       *Memory
		e       epochs
		n       int // ids so far
		spent   []float64
		options []Options
	}
	var sides [2]*side
	for i := range sides {
		m := newMemory(b, Config{Expect: uint64(ids), Dir: b.TempDir()})
		run(b, m)
		sides[i] = &side{m: m, e: newEpochs(b, m), options: make([]Options, slice)}
	}
	texts := make([]byte, 0, slice*48)
	items, verdicts := make([]Item, slice), make([]Verdict, slice)
	turn := func(i int) {
		s := sides[i]
		texts = texts[:0]
		for at := range items {
			from := len(texts)
			texts = strconv.AppendUint(texts, uint64(s.n+at)*7919+1_000_000_000, 10)
			items[at], verdicts[at] = Item{ID: texts[from:]}, Turned
			if i == 1 {
				from = len(texts)
				texts = uuidOf(texts, uint64(s.n+at)*0x9e3779b97f4a7c15)
				s.options[at] = Options{Token: texts[from:]}
				items[at].Options = &s.options[at]
			}
		}
		window := s.n / ids
		began := threadTime(b)
		for at := 0; at < slice; at += size {
			some, of := items[at:at+size], verdicts[at:at+size]
			s.m.Keys(some)
			in, _ := s.e.Enter(s.e.At(window), 0, uint64(size))
			if err := s.m.AddMany(in.Epoch, some, of); err != nil || of[0] != Unique {
				b.Fatal(of[0], err)
			}
			in.Leave(uint64(size), 0, 0)
		}
		spent := float64((threadTime(b) - began).Nanoseconds()) / slice
		if i == 1 && s.n%ids < slice {
			waitForSieves(s.m)
		}
		if s.n += slice; s.n > 3*ids {
			s.spent = append(s.spent, spent)
		}
	}
	for b.Loop() {
		turn(0)
		turn(1)
	}
	for len(sides[1].spent) < 50 {
		turn(0)
		turn(1)
	}
	// The tenth percentile, because other load of the machine only adds time.
	var cost [2]float64
	for i, s := range sides {
		slices.Sort(s.spent)
		cost[i] = s.spent[len(s.spent)/10]
	}
	b.ReportMetric(cost[0], "plain-ns")
	b.ReportMetric(cost[1]-cost[0], "token-ns")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkSieves measures the CPU time that the cleaner takes after a turn for each token of
// the window before.
func BenchmarkSieves(b *testing.B) {
	const tokens, together = 4_000_000, 512
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	m := newMemory(b, Config{Expect: tokens})
	e := newEpochs(b, m)
	items, verdicts, options := make([]Item, together), make([]Verdict, together), make([]Options, together)
	var spent time.Duration
	window := 0
	for b.Loop() {
		for n := 0; n < tokens; n += together {
			for i := range items {
				options[i] = Options{Token: strconv.AppendInt(options[i].Token[:0], int64(window*tokens+n+i), 10)}
				items[i], verdicts[i] = Item{ID: strconv.AppendInt(items[i].ID[:0], int64(n+i), 10), Options: &options[i]}, Turned
			}
			m.Keys(items)
			in, _ := e.Enter(e.At(window), 0, together)
			if err := m.AddMany(in.Epoch, items, verdicts); err != nil {
				b.Fatal(err)
			}
			in.Leave(together, 0, 0)
			if n == 0 {
				m.growAhead() // makes the pages resident, in any case
				began := threadTime(b)
				m.sift()
				if window > 1 { // the table of the first window has many levels
					spent += threadTime(b) - began
				}
				m.release()
			}
		}
		window++
	}
	b.ReportMetric(float64(spent.Nanoseconds())/float64(max(window-2, 1))/tokens, "ns/token")
	b.ReportMetric(0, "ns/op")
}

// waitForSieves waits until the cleaner has filled the sieves of the open window, for a second
// at most: it takes a part of a window of a minute, and longer than the short ones here.
func waitForSieves(m *Memory) {
	for range 1000 {
		if m.current.Load().tokens.sieved.Load() {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// threadTime is the CPU time of this thread.
func threadTime(b *testing.B) time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		b.Fatal(err)
	}
	return time.Duration(t.Nano())
}
