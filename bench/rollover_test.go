//go:build unix

package bench

import (
	"flag"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var retireFlag = flag.Int("retire", 10_000_000, "ids retired by each turn of BenchmarkRollover")

const (
	rolloverWriters = 2
	afterTurn       = 100 * time.Millisecond // what counts as the turn
	steady          = 300 * time.Millisecond // before it, to compare with

	// paceRate is a load below what any of the designs can take: adds a second
	// over all writers.
	paceRate = 1_000_000

	// paceBatch adds are made between two looks at the schedule: one
	// millisecond's, the resolution of a sleep.
	paceBatch = paceRate / rolloverWriters / 1000
)

// rolloverDesigns are those with a turn worth looking at beside Verve's: what
// a Go programmer writes first, and the seed.
var rolloverDesigns = map[string]bool{"verve": true, "gomaps": true, "seed": true}

// BenchmarkRollover turns epochs of 10 million ids under two writers and tells
// the latency of an add in the 100 ms after the turn (turn-…) from that in the
// 300 ms before it (steady-…). The ratios are turn/steady; adds-ratio is of
// the adds per second. An operation is one turn.
//
// load=full: the writers go as fast as they can, on as many cores as there are,
// so that background work of a design takes its time from them. load=paced: a
// million adds a second while it is measured. The time of an add is from the
// end of the one before, with reading the clock and the id, but not the pause
// of the pace.
func BenchmarkRollover(b *testing.B) {
	var tapes [rolloverWriters]*tape
	defer func() {
		for _, t := range tapes {
			if t != nil {
				t.free()
			}
		}
	}()
	for _, load := range []string{"full", "paced"} {
		for _, maker := range Makers {
			if !rolloverDesigns[maker.Name] {
				continue
			}
			b.Run(fmt.Sprintf("design=%s/retired=%d/load=%s", maker.Name, *retireFlag, load), func(b *testing.B) {
				if tapes[0] == nil {
					for w := range tapes {
						// As long as a window even if one writer did all of it.
						n := *retireFlag*3/2 + 10_000_000
						tapes[w] = newTape(decimal, n, n, func(i int) uint64 { return uint64(i*rolloverWriters + w) })
					}
				}
				d := maker.New(decimal.sizes(*retireFlag * 5 / 4))
				defer d.Close()
				rollover(b, d, tapes, load == "paced")
			})
		}
	}
}

// phase says which histogram an add goes to.
type phase int32

const (
	filling phase = iota
	before
	after
	phases
)

// rolloverRun is what the writers and the clock of a run share.
type rolloverRun struct {
	design Design
	phase  atomic.Int32
	paced  atomic.Bool
	stop   atomic.Bool
	epoch  atomic.Int64
	base   time.Time

	writers [rolloverWriters]struct {
		made    atomic.Int64 // adds in the open epoch, now and then
		repeats int64
		seen    [phases]histogram
		_       [128]byte
	}
}

func rollover(b *testing.B, d Design, tapes [rolloverWriters]*tape, paced bool) {
	run := &rolloverRun{design: d, base: time.Now()}
	var writers sync.WaitGroup
	for w := range tapes {
		writers.Go(func() { run.write(w, tapes[w]) })
	}
	var spent [phases]time.Duration
	fillEpoch := func() {
		for sum := int64(0); sum < int64(*retireFlag); {
			time.Sleep(time.Millisecond)
			sum = 0
			for w := range run.writers {
				sum += run.writers[w].made.Load()
			}
		}
	}
	during := func(p phase, t time.Duration, first func()) {
		began := time.Now()
		run.phase.Store(int32(p))
		first()
		time.Sleep(t - time.Since(began))
		run.phase.Store(int32(filling))
		spent[p] += time.Since(began)
	}
	turn := func() {
		run.epoch.Add(1)
		d.Turn()
	}
	fillEpoch()
	turn() // the first epoch warms up
	for b.Loop() {
		fillEpoch()
		run.paced.Store(paced)
		during(before, steady, func() {})
		during(after, afterTurn, turn)
		run.paced.Store(false)
	}
	run.stop.Store(true)
	writers.Wait()

	var seen [phases]histogram
	for w := range run.writers {
		if n := run.writers[w].repeats; n > 0 {
			b.Fatalf("writer %d: %d ids were called repeats", w, n)
		}
		for p := range seen {
			seen[p].add(&run.writers[w].seen[p])
		}
	}
	for _, q := range []struct {
		name string
		at   float64
	}{{"p50", .5}, {"p99", .99}, {"p99.9", .999}, {"p99.99", .9999}} {
		steady, turn := seen[before].quantile(q.at), seen[after].quantile(q.at)
		b.ReportMetric(float64(steady), "steady-"+q.name+"-ns")
		b.ReportMetric(float64(turn), "turn-"+q.name+"-ns")
		if q.name == "p99.99" {
			b.ReportMetric(float64(turn)/float64(steady), q.name+"-ratio")
		}
	}
	b.ReportMetric(float64(seen[before].max), "steady-max-ns")
	b.ReportMetric(float64(seen[after].max), "turn-max-ns")
	rate := func(p phase) float64 { return float64(seen[p].total) / spent[p].Seconds() }
	b.ReportMetric(rate(before), "steady-adds/s")
	b.ReportMetric(rate(after), "turn-adds/s")
	b.ReportMetric(rate(after)/rate(before), "adds-ratio")
	b.ReportMetric(0, "ns/op")
}

// write adds ids until the end. The ids of an epoch begin anywhere on the tape and do not
// repeat within it.
func (r *rolloverRun) write(w int, t *tape) {
	me := &r.writers[w]
	epoch, made, due := int64(0), int64(0), time.Duration(0)
	last := time.Since(r.base)
	for i := 0; !r.stop.Load(); i++ {
		if i == t.length {
			i = 0
		}
		fresh := r.design.Add(t.at(i), w)
		now := time.Since(r.base)
		me.seen[r.phase.Load()].record(now - last)
		last = now
		if made++; !fresh {
			me.repeats++
		}
		if made%paceBatch != 0 {
			continue
		}
		if e := r.epoch.Load(); e != epoch {
			epoch, made = e, 0
		}
		me.made.Store(made)
		if !r.paced.Load() {
			due = 0
			continue
		}
		if due == 0 {
			due = now
		}
		if due += time.Millisecond; due > now {
			time.Sleep(due - now)
			last = time.Since(r.base)
		}
	}
}
