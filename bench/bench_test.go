//go:build unix

package bench

import (
	"flag"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var idsFlag = flag.String("ids", "50000,1000000", "unique ids per epoch to benchmark, comma-separated; above 10000000 without the seed design")

func sizes(b *testing.B) (sizes []int) {
	for s := range strings.SplitSeq(*idsFlag, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 50_000 {
			b.Fatalf("-ids=%s: want numbers from 50000", *idsFlag)
		}
		sizes = append(sizes, n)
	}
	return sizes
}

// eachMaker runs f for the designs in turn on the same case, so that the ratios
// of a run are between neighbours.
func eachMaker(b *testing.B, ids int, name string, f func(*testing.B, Maker)) {
	for _, m := range Makers {
		if m.MaxIDs > 0 && ids > m.MaxIDs {
			continue
		}
		b.Run(fmt.Sprintf("design=%s/ids=%d%s", m.Name, ids, name), func(b *testing.B) {
			f(b, m)
			debug.FreeOSMemory() // the next one starts with a clean heap
		})
	}
}

// BenchmarkAdd adds ids to a set made for as many, window by window.
//
// unique and half time whole windows, from an empty epoch through its turn
// until everything it left is reclaimed; their memory comes from a window
// before, where a design keeps any. dup99 times adds to an epoch that is nearly
// full: 99 of 100 are repeats of ids drawn from all that are in.
//
// cpu-ns/op is the CPU time of the whole process for one add, with the garbage
// collections that its garbage calls for (meter.stop) and with reading the id
// from the tape, which is the same for all.
func BenchmarkAdd(b *testing.B) {
	var shelf shelf
	defer shelf.clear()
	for _, ids := range sizes(b) {
		for _, k := range []kind{decimal, uuids, text} {
			for _, m := range []mixture{unique, half, dup99} {
				for _, writers := range []int{1, 2} {
					name := fmt.Sprintf("/kind=%s/mix=%s/writers=%d", k, m, writers)
					eachMaker(b, ids, name, func(b *testing.B, maker Maker) {
						before, timed := shelf.get(k, m, ids)
						d := maker.New(k.sizes(ids))
						defer d.Close()
						if m == dup99 {
							addRepeats(b, d, before, timed, writers)
						} else {
							addWindows(b, d, maker.Keeps, timed, writers)
						}
					})
				}
			}
		}
	}
}

// addWindows times whole windows.
func addWindows(b *testing.B, d Design, warm bool, t *tape, writers int) {
	if warm {
		fill(b, d, t, writers)
		d.Turn()
		d.Settle()
	}
	var cost meter
	adds := 0
	cost.start()
	for b.Loop() {
		fill(b, d, t, writers)
		d.Turn()
		adds += t.length
	}
	d.Settle()
	cost.stop()
	cost.report(b, adds)
}

// addRepeats times the adds of a tape of repeats to a set filled before.
func addRepeats(b *testing.B, d Design, before, t *tape, writers int) {
	var cost meter
	adds := 0
	for b.Loop() {
		b.StopTimer()
		d.Turn()
		d.Settle()
		fill(b, d, before, writers)
		cost.start()
		b.StartTimer()
		fill(b, d, t, writers)
		b.StopTimer()
		cost.stop()
		adds += t.length
		b.StartTimer()
	}
	cost.report(b, adds)
}

// fill adds the ids of t with several writers, each a part.
func fill(b *testing.B, d Design, t *tape, writers int) {
	var fresh atomic.Int64
	write := func(w int) {
		n, i, end := 0, t.length*w/writers, t.length*(w+1)/writers
		if many, ok := d.(Batcher); ok {
			ids := make([][]byte, together)
			for ; i < end; i += len(ids) {
				ids = ids[:min(together, end-i)]
				for j := range ids {
					ids[j] = t.at(i + j)
				}
				n += many.AddMany(ids, w)
			}
		}
		for ; i < end; i++ {
			if d.Add(t.at(i), w) {
				n++
			}
		}
		fresh.Add(int64(n))
	}
	if writers == 1 {
		write(0)
	} else {
		var all sync.WaitGroup
		for w := range writers {
			all.Go(func() { write(w) })
		}
		all.Wait()
	}
	if got := int(fresh.Load()); got != t.uniques {
		b.Fatalf("%d ids were new, want %d", got, t.uniques)
	}
}

// BenchmarkResident reports the bytes of physical memory for each id when the
// epoch is full: in the first epoch (B/id), and in the third (steady-B/id),
// when a design has seen how many come and holds what it keeps of the epochs
// before. expect=right tells it the number of ids, expect=under a tenth.
func BenchmarkResident(b *testing.B) {
	var shelf shelf
	defer shelf.clear()
	for _, ids := range sizes(b) {
		if ids < 1_000_000 {
			continue // the process itself would be the larger part
		}
		for _, k := range []kind{decimal, uuids} {
			for _, expect := range []struct {
				name string
				ids  int
			}{{"right", ids}, {"under", ids / 10}} {
				eachMaker(b, ids, fmt.Sprintf("/kind=%s/expect=%s", k, expect.name), func(b *testing.B, maker Maker) {
					_, t := shelf.get(k, unique, ids)
					if maker.AddsOnly {
						b.Skip("has the memory of another")
					}
					for b.Loop() {
						rss, heap := resident(b), heapAlloc()
						d := maker.New(k.sizes(expect.ids))
						fill(b, d, t, 1)
						b.ReportMetric(float64(int64(resident(b)-rss))/float64(ids), "B/id")
						b.ReportMetric(float64(int64(heapAlloc()-heap))/float64(ids), "heap-B/id")
						if v, ok := d.(*Verve); ok {
							b.ReportMetric(float64(v.Resident())/float64(ids), "mapped-B/id")
						}
						for range 2 {
							d.Turn()
							d.Settle()
							// Minutes are long: the background work of a design
							// is through with one before the next ends.
							time.Sleep(time.Second)
							fill(b, d, t, 1)
						}
						time.Sleep(time.Second)
						b.ReportMetric(float64(int64(resident(b)-rss))/float64(ids), "steady-B/id")
						d.Close()
					}
					b.ReportMetric(0, "ns/op")
				})
			}
		}
	}
}

// BenchmarkGC times a full collection with the set full: the median, as one
// that waits for another process's core says nothing.
func BenchmarkGC(b *testing.B) {
	var shelf shelf
	defer shelf.clear()
	for _, ids := range sizes(b) {
		eachMaker(b, ids, "", func(b *testing.B, maker Maker) {
			if maker.AddsOnly {
				b.Skip("has the memory of another")
			}
			_, t := shelf.get(decimal, unique, ids)
			d := maker.New(decimal.sizes(ids))
			defer d.Close()
			fill(b, d, t, 2)
			runtime.GC() // sweeps what filling left
			var took []time.Duration
			for b.Loop() {
				began := time.Now()
				runtime.GC()
				took = append(took, time.Since(began))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2])/1e6, "ms/gc")
		})
	}
}
