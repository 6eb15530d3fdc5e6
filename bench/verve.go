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
	v.count, err = counter.New(counter.Config{Window: window, Store: v.set, Publish: v})
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
func (v *Verve) Add(id []byte, writer int) bool {
	key := v.set.Key(id)
	for {
		in, open := v.count.Enter(v.now.Load(), uint64(writer))
		if !open {
			panic("bench: Add after Close")
		}
		verdict, err := v.set.Add(in.Epoch, id, key)
		switch {
		case err != nil:
			in.Leave(counter.Void)
			panic(err) // no limit is set
		case verdict == dedup.Unique:
			in.Leave(counter.Unique)
			return true
		case verdict == dedup.Repeat:
			in.Leave(counter.Repeat)
			return false
		}
		in.Leave(counter.Void) // the epoch turned: ask in the next
	}
}

// Together is Verve as it is used for requests that arrive together.
type Together struct{ *Verve }

// AddMany is the counting part of the server's fast path.
func (v Together) AddMany(ids [][]byte, writer int) (fresh int) {
	var made [together]dedup.Key
	var verdicts [together]dedup.Verdict
	for i, id := range ids {
		made[i] = v.set.Key(id)
	}
	for keys := made[:len(ids)]; len(keys) > 0; {
		in, open := v.count.EnterMany(v.now.Load(), uint64(writer), uint64(len(keys)))
		if !open {
			panic("bench: AddMany after Close")
		}
		n, err := v.set.AddMany(in.Epoch, keys, verdicts[:])
		if err != nil {
			panic(err) // no limit is set
		}
		var left [2]uint64
		for _, verdict := range verdicts[:n] {
			left[verdict]++
		}
		in.LeaveMany(left[dedup.Unique], left[dedup.Repeat], uint64(len(keys)-n))
		fresh += int(left[dedup.Unique])
		keys = keys[n:] // if the epoch turned, the others ask in the next
	}
	return fresh
}

// Turn moves the clock to the next window.
func (v *Verve) Turn() { v.now.Add(int64(window)) }

// Settle turns the epoch, if no Add has, and waits until those before are
// closed. What they left in the tables needs no reclaiming.
func (v *Verve) Settle() uint64 {
	if in, open := v.count.Enter(v.now.Load(), 0); open {
		in.Leave(counter.Void)
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
