package server

import (
	"runtime/debug"
	"sync"
	"time"

	"verve/counter"
	"verve/dedup"
)

// together is how many ids of a batch are put into the set at once: as many as a shared store
// takes in one trip. In memory, their cache misses overlap.
const together = 512

// work is the ids that are judged together, and their verdicts. It is reused.
type work struct {
	items    []dedup.Item
	keyed    int              // of items, from the front, have their Key
	verdicts []dedup.Verdict  // Turned: not judged
	epochs   []*counter.Epoch // in which each was judged; only with WindowHeader
	shared   dedup.Options    // of all items that have none of their own
}

var works = sync.Pool{New: func() any { return new(work) }}

// reset empties w for at most n items.
func (w *work) reset(n int) {
	if cap(w.items) < n {
		w.items = make([]dedup.Item, 0, n)
		w.verdicts = make([]dedup.Verdict, n)
		w.epochs = make([]*counter.Epoch, n)
	}
	w.items, w.keyed = w.items[:0], 0
	w.verdicts, w.epochs = w.verdicts[:cap(w.items)], w.epochs[:cap(w.items)]
}

// sharing keeps o as the options of the items without options of their own, and returns a
// pointer to it; nil if o is empty.
func (w *work) sharing(o *dedup.Options) *dedup.Options {
	if o.Under == nil && o.Token == nil {
		return nil
	}
	w.shared = *o
	return &w.shared
}

// judge adds w.items to the set in the open epoch, and counts each verdict in the epoch in
// which it was given. Ids whose epoch turned meanwhile are added again in the next epoch. An id
// has the verdict Turned at the end only after Seal, or if the set panicked. err is the reason
// for the first verdict Full or Unavailable.
//
// now is when the request arrived, in Unix ns; hint spreads requests over cache lines.
func (s *Server) judge(now int64, hint uint64, w *work) (err error) {
	from, to := 0, len(w.items)
	for i := range to {
		w.verdicts[i] = dedup.Turned
	}
	for left := to; left > 0; {
		entry, open := s.cfg.Counter.Enter(now, hint, uint64(to-from))
		if !open {
			return err
		}
		turned, panicked, cause := s.addAndLeave(entry, w, from, to)
		if err == nil {
			err = cause
		}
		if s.cfg.WindowHeader {
			w.note(entry.Epoch, from, to)
		}
		if left -= to - from - turned; left == 0 || panicked {
			return err
		}
		if turned > 0 {
			s.cfg.Counter.TurnFrom(entry.Epoch)
		}
		// The ids that turned are the last ones, unless the lanes of a shared store turned
		// one after the other: then each run of such ids is judged by itself.
		for w.verdicts[from] != dedup.Turned {
			from++
		}
		to = from
		for to < len(w.items) && w.verdicts[to] == dedup.Turned {
			to++
		}
	}
	return err
}

// note keeps the epoch of those of w.items[from:to] that were judged.
func (w *work) note(e *counter.Epoch, from, to int) {
	for i := from; i < to; i++ {
		if w.verdicts[i] != dedup.Turned {
			w.epochs[i] = e
		}
	}
}

// addAndLeave adds w.items[from:to] to the set, and leaves the epoch whatever happens there:
// an entry that is never left would keep its epoch from being sealed for ever. The verdicts are
// Turned before the call; after a panic, those of ids that were not judged still are.
func (s *Server) addAndLeave(entry counter.Entry, w *work, from, to int) (turned int, panicked bool, err error) {
	defer func() {
		if p := recover(); p != nil {
			panicked, err = true, errPanicked
			s.logPanic(p)
		}
		var left [dedup.Verdicts]int
		for _, v := range w.verdicts[from:to] {
			left[v]++
		}
		turned = left[dedup.Turned]
		unique, repeats := left[dedup.Unique], left[dedup.Repeat]
		entry.Leave(uint64(unique), uint64(repeats), uint64(to-from-unique-repeats))
	}()
	for at := from; at < to; at += together {
		end := min(at+together, to)
		if w.keyed < end {
			s.cfg.Set.Keys(w.items[w.keyed:end])
			w.keyed = end
		}
		if cause := s.cfg.Set.AddMany(entry.Epoch, w.items[at:end], w.verdicts[at:end]); err == nil {
			err = cause
		}
		if w.verdicts[end-1] == dedup.Turned {
			break // so are those after them
		}
	}
	return 0, false, err
}

// logPanic logs a panic of the set or of the handler, sampled: a client whose request causes
// one may send it again and again.
func (s *Server) logPanic(p any) {
	if hidden, ok := s.panicLog.Allow(time.Now()); ok {
		s.cfg.Log.Error().Interface("panic", p).Bytes("stack", debug.Stack()).Uint64("hidden", hidden).Msg("a request panicked")
	}
}
