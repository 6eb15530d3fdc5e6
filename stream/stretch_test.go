package stream

import (
	"fmt"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"verve/counter"
)

// BenchmarkTurnWithKeys reports for how long a goroutine that is ready waits for the one
// processor, at most, while a record with 100,000 keys is appended, or read for a sink and
// acknowledged: the median over the records. Put TMPDIR in memory to leave out the disk.
func BenchmarkTurnWithKeys(b *testing.B) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	sp, err := OpenSpool(SpoolConfig{Dir: b.TempDir(), Group: "verve", Instance: "host-1"})
	if err != nil {
		b.Fatal(err)
	}
	defer sp.Close()
	if err := sp.attach([]string{"a"}); err != nil {
		b.Fatal(err)
	}
	var keys []counter.KeyCount
	for i := range 100_000 {
		keys = append(keys, counter.KeyCount{Key: fmt.Sprintf("campaign-%05d", i), Unique: uint64(i%7 + 1)})
	}
	var longest atomic.Int64
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		for last := time.Now(); ; {
			select {
			case <-stop:
				return
			default:
			}
			runtime.Gosched()
			now := time.Now()
			longest.Store(max(longest.Load(), int64(now.Sub(last))))
			last = now
		}
	}()
	stretch := map[string][]int64{}
	measured := func(what string, work func() error) {
		longest.Store(0)
		if err := work(); err != nil {
			b.Fatal(err)
		}
		runtime.Gosched()
		stretch[what] = append(stretch[what], longest.Load())
	}
	for i := 0; b.Loop(); i++ {
		r := record(i)
		measured("append", func() error { return sp.append(&r, counter.KeyCountsOf(keys...), noStep) })
		measured("next", func() error { _, err := sp.next("a", 1, batchKeys); return err })
		measured("ack", func() error { return sp.ack("a", sp.head) })
	}
	for what, all := range stretch {
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)/2])/1e3, what+"-us")
	}
}
