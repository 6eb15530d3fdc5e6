package bench

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"verve/counter"
	"verve/dedup"
)

// Verve is the server's own set and counter, with their background work, used
// as the server uses them.
type Verve struct {
	set   *dedup.Memory
	count *counter.Counter

	// now stands for the time of arrival that the server takes from fasthttp.
	// Turn moves it; the first Add that sees it turns the epoch.
	now     atomic.Int64
	entered uint64 // ids of the closed epochs; written by the closer, read when it rests
	stop    context.CancelFunc
	stopped sync.WaitGroup
}

// window is so long that only Turn ends it.
const window = time.Hour

// NewVerve makes tables of the size expected.
func NewVerve(expect Sizes) *Verve {
	v := new(Verve)
	var err error
	v.set, err = dedup.NewMemory(dedup.Config{Expect: uint64(expect.Numbers), ExpectWide: uint64(expect.Others)})
	if err != nil {
		panic(err) // no memory for the benchmark
	}
	v.count, err = counter.New(counter.Config{Window: window, Store: v.set, Publisher: v})
	if err != nil {
		panic(err) // a mistake in the line above
	}
	v.now.Store(v.count.Last().Start().UnixNano())
	ctx, cancel := context.WithCancel(context.Background())
	v.stop = cancel
	v.stopped.Go(func() { _ = v.set.Run(ctx) })   // ends with ctx
	v.stopped.Go(func() { _ = v.count.Run(ctx) }) // ends with ctx
	return v
}

// Add is the counting part of the server's handler.
func (v *Verve) Add(id []byte, writer int) bool { return v.judge([][]byte{id}, writer) == 1 }

// Together is Verve as it is used for requests that arrive together.
type Together struct{ *Verve }

// AddMany is the counting part of the server's fast path.
func (v Together) AddMany(ids [][]byte, writer int) (fresh int) { return v.judge(ids, writer) }

// judge is Server.judge.
func (v *Verve) judge(ids [][]byte, writer int) (fresh int) {
	var made [together]dedup.Item
	var verdicts [together]dedup.Verdict
	for i, id := range ids {
		made[i].ID = id
	}
	v.set.Keys(made[:len(ids)])
	for items := made[:len(ids)]; len(items) > 0; {
		in, open := v.count.Enter(v.now.Load(), uint64(writer), uint64(len(items)))
		if !open {
			panic("bench: an id after Close")
		}
		of := verdicts[:len(items)]
		for i := range of {
			of[i] = dedup.Turned
		}
		if err := v.set.AddMany(in.Epoch, items, of); err != nil {
			panic(err) // no limit is set
		}
		var left [dedup.Verdicts]uint64
		for _, verdict := range of {
			left[verdict]++
		}
		in.Leave(left[dedup.Unique], left[dedup.Repeat], left[dedup.Turned])
		fresh += int(left[dedup.Unique])
		items = items[uint64(len(items))-left[dedup.Turned]:] // if the epoch turned, the others ask in the next
	}
	return fresh
}

// Turn moves the clock to the next window.
func (v *Verve) Turn() { v.now.Add(int64(window)) }

// Settle turns the epoch, if no Add has, and waits until those before are
// closed. What they left in the tables needs no reclaiming.
func (v *Verve) Settle() uint64 {
	if in, open := v.count.Enter(v.now.Load(), 0, 1); open {
		in.Leave(0, 0, 1)
	}
	for v.count.Stats().Unclosed > 0 {
		time.Sleep(50 * time.Microsecond)
	}
	return v.entered
}

// Publish implements counter.Publisher. The counter's lock, which Settle takes
// after it, makes the sum visible there.
func (v *Verve) Publish(_ context.Context, c counter.Count) error {
	v.entered += c.Unique
	return nil
}

// Resident returns the bytes of the tables.
func (v *Verve) Resident() uint64 { return v.set.Stats().Bytes }

// Close implements Design.
func (v *Verve) Close() {
	v.stop()
	v.stopped.Wait()
	_ = v.set.Close() // unmapping what was mapped does not fail
}
