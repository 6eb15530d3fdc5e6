package stream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"verve/counter"
	"verve/internal/logline"
	"verve/internal/retry"
)

// worker delivers records from the spool to one sink.
type worker struct {
	sink   sink
	name   string // in the spool and the log
	target string // what Stats shows of it
	stream *Stream

	// patience is how long a delivery may take before it is reported as failing. A write to a
	// pipe whose reader stalls, or to a file system that hangs, cannot be interrupted, and
	// must not delay a stop: then its goroutine is left behind. 0: the sink has timeouts of
	// its own, with better errors.
	patience time.Duration

	log logline.Sampler // of failures; begins anew when the sink works again

	// prepare, if not nil, is called until it succeeds or there is a record, so that what
	// keeps records from the sink shows before there is one. Only run uses it.
	prepare func(ctx context.Context) error

	// mu guards what Stats reports.
	mu           sync.Mutex
	failingSince time.Time // zero while the sink works
	failure      error     // the last one since then
}

func (w *worker) run(ctx context.Context) {
	var wait retry.Backoff
	for ctx.Err() == nil {
		moved, err := w.step(ctx)
		if moved || err == nil {
			wait = retry.Backoff{} // after progress it tries again soon
		}
		if err == nil || ctx.Err() != nil {
			continue
		}
		w.failed(err)
		if wait.Sleep(ctx) != nil {
			return
		}
	}
}

// step delivers one batch, or prepares the sink, or waits for a record. moved is set
// if records were acknowledged.
func (w *worker) step(ctx context.Context) (moved bool, err error) {
	counter.Rest() // an append and an acknowledgement wake the workers
	spool := w.stream.spool
	_, changed := spool.watch()
	batch, err := spool.next(w.name, batchSize, batchKeys)
	switch {
	case err != nil:
		return false, err
	case len(batch) > 0:
		w.prepare = nil // the delivery shows the same errors
		counter.Rest()
		moved, err = w.deliverBatch(ctx, batch)
	case w.prepare != nil:
		if err = w.prepare(ctx); err == nil {
			w.prepare = nil
		}
	default:
		select {
		case <-changed:
		case <-ctx.Done():
		}
		return false, nil
	}
	if err == nil {
		w.recovered()
	}
	return moved, err
}

// deliverBatch delivers the batch and acknowledges the records that the sink took. A record
// that it can never take becomes a dead letter, and is then acknowledged too.
func (w *worker) deliverBatch(ctx context.Context, batch []spooled) (moved bool, err error) {
	n, err := w.deliver(ctx, batch)
	if poison, is := errors.AsType[*poisonError](err); is {
		if err = w.deadLetter(batch[n], poison.err); err == nil {
			n++
		}
	}
	if n > 0 {
		err = cmp.Or(err, w.ack(ctx, batch[n-1].index))
	}
	return n > 0, err
}

// deliver hands a batch to the sink, see patience.
func (w *worker) deliver(ctx context.Context, batch []spooled) (int, error) {
	if w.patience == 0 {
		return w.sink.deliver(ctx, batch)
	}
	var n int
	var err error
	done := launch(func() { n, err = w.sink.deliver(ctx, batch) })
	patience, cancel := context.WithTimeout(ctx, w.patience)
	defer cancel()
	over := await(patience, done)
	if over != nil && ctx.Err() == nil {
		w.failed(fmt.Errorf("a write has not returned for %s: the reader stalls, or the file system hangs", w.patience))
		over = await(ctx, done)
	}
	if over != nil {
		return 0, over
	}
	return n, err
}

// ack writes into the spool up to where the sink has the records. While the disk fails, only
// this process has that; the next one finds it out by looking into the sink.
func (w *worker) ack(ctx context.Context, to uint64) error {
	var wait retry.Backoff
	for {
		counter.Rest()
		err := w.stream.spool.ack(w.name, to)
		if err == nil {
			w.stream.step(stepAcked)
			return nil
		}
		err = fmt.Errorf("acknowledge in the spool: %w", err)
		w.failed(err)
		if wait.Sleep(ctx) != nil {
			return err
		}
	}
}

func (w *worker) deadLetter(e spooled, reason error) error {
	if err := w.stream.spool.deadLetter(w.name, e, reason.Error()); err != nil {
		return fmt.Errorf("keep a dead letter: %w", err)
	}
	w.stream.cfg.Log.Error().Str("sink", w.name).Str("key", e.record.Key()).RawJSON("record", e.value).Err(reason).
		Msg("record was refused for good and is a dead letter; this sink lacks its count")
	return nil
}

// failed notes an error for Stats, and logs it.
func (w *worker) failed(err error) {
	w.mu.Lock()
	w.failure = err
	if w.failingSince.IsZero() {
		w.failingSince = time.Now()
	}
	w.mu.Unlock()
	w.log.Msg(w.stream.cfg.Log.Warn().Str("sink", w.name).Err(err), "records are not delivered, trying again")
}

func (w *worker) recovered() {
	w.mu.Lock()
	since := w.failingSince
	w.failingSince = time.Time{}
	w.mu.Unlock()
	if !since.IsZero() {
		w.log.Reset()
		w.stream.cfg.Log.Info().Str("sink", w.name).Dur("after_ms", time.Since(since)).Msg("records are delivered again")
	}
}

func (w *worker) stats() SinkStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	st := SinkStats{Name: w.name, Target: w.target}
	if !w.failingSince.IsZero() {
		st.Failing = w.failure.Error()
	}
	return st
}
