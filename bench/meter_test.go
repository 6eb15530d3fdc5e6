//go:build unix

package bench

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// meter adds up what the timed parts of a benchmark cost the whole process:
// writers, background work of the design, and garbage collection.
type meter struct {
	cpu    time.Duration // user and system
	allocs uint64
	bytes  uint64

	began     time.Duration
	beganHeap runtime.MemStats
}

// start begins a timed part with no garbage on the heap.
func (m *meter) start() {
	runtime.GC()
	runtime.ReadMemStats(&m.beganHeap)
	m.began = cpuTime()
}

// stop ends it. The collections that happened within are paid for already. For
// the garbage left, which would have called for the next one, it adds that
// share of a full collection's CPU by which the heap has grown from its live
// size towards the size that starts one.
func (m *meter) stop() {
	m.cpu += cpuTime() - m.began
	var heap runtime.MemStats
	runtime.ReadMemStats(&heap)
	m.allocs += heap.Mallocs - m.beganHeap.Mallocs
	m.bytes += heap.TotalAlloc - m.beganHeap.TotalAlloc

	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	alive := float64(live[0].Value.Uint64())
	share := (float64(heap.HeapAlloc) - alive) / (float64(heap.NextGC) - alive)
	gc := cpuTime()
	runtime.GC()
	m.cpu += time.Duration(min(max(share, 0), 1) * float64(cpuTime()-gc))
}

// report gives b the costs of one add.
func (m *meter) report(b *testing.B, adds int) {
	b.ReportAllocs() // shows the two last ones
	b.ReportMetric(float64(m.cpu)/float64(adds), "cpu-ns/op")
	b.ReportMetric(float64(b.Elapsed())/float64(adds), "ns/op")
	b.ReportMetric(float64(m.allocs)/float64(adds), "allocs/op")
	b.ReportMetric(float64(m.bytes)/float64(adds), "B/op")
}

// cpuTime is the CPU time of all threads of the process.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err) // only a bad argument makes it fail
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// resident returns the bytes of the process in physical memory, with nothing
// on the heap that could be given back.
func resident(b *testing.B) uint64 {
	debug.FreeOSMemory()
	// Not statm, whose counters lag behind by some pages for each thread.
	smaps, err := os.ReadFile("/proc/self/smaps_rollup")
	if err != nil {
		b.Skip("resident memory is known on Linux only: ", err)
	}
	_, rest, _ := strings.Cut(string(smaps), "\nRss:")
	kib, err := strconv.ParseUint(strings.Fields(rest)[0], 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return kib << 10
}

func heapAlloc() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
