// Package logline keeps the log cheap: a Writer that never makes its caller wait, and a Sampler
// that hides repeated lines.
//
// Every package that logs uses the Sampler; main puts the Writer between the
// logger and standard error.
package logline

import (
	"bytes"
	"io"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
)

// queued is how many lines may wait to be written: half a megabyte of typical lines, or several
// hours of a server that only logs its windows. That is enough for a start with many log lines
// while a sink fails.
const queued = 1024

// Writer passes log lines on to a writer that may be slow or block for ever, such as a pipe
// whose reader stalls, or a stopped terminal. Write never waits. If the queue is full, the line
// is dropped and counted; a line that cannot be written is counted, too. When lines can be
// written again, a line in that place reports how many are missing.
//
// It differs from zerolog's diode, which drops the oldest lines, all waiting ones at once, and
// whose Close waits for the blocked write.
//
// Safe for concurrent use. The goroutine that NewWriter starts never ends, because a write that
// blocks cannot be interrupted.
type Writer struct {
	out   io.Writer
	lines chan line

	missing atomic.Uint64 // lines that were dropped and not reported yet
	dropped atomic.Uint64 // all lines that were dropped
}

// line is a log line, and how many lines are missing before it; or a mark that Flush puts into
// the queue.
type line struct {
	text    []byte
	missing uint64
	flushed chan struct{} // not nil for a mark: closed when the lines before it were written
}

// NewWriter returns a Writer to out. One goroutine calls out.Write, with one line at a time.
// The line that reports missing lines is JSON, so out must accept JSON.
func NewWriter(out io.Writer) *Writer {
	w := &Writer{out: out, lines: make(chan line, queued)}
	go w.run()
	return w
}

// Write queues a copy of p, or drops it if the queue is full. It always returns len(p) and nil.
func (w *Writer) Write(p []byte) (int, error) {
	l := line{text: bytes.Clone(p), missing: w.missing.Swap(0)}
	select {
	case w.lines <- l:
	default:
		w.missing.Add(l.missing)
		w.lost()
	}
	return len(p), nil
}

// Dropped returns how many lines were dropped, or could not be written, since the start.
func (w *Writer) Dropped() uint64 { return w.dropped.Load() }

// Flush waits until the lines that were queued before it are written, but for within at most,
// so that a stalled reader does not delay the end of the process for longer.
func (w *Writer) Flush(within time.Duration) {
	timeout, mark := time.After(within), line{flushed: make(chan struct{})}
	select {
	case w.lines <- mark:
	case <-timeout:
		return
	}
	select {
	case <-mark.flushed:
	case <-timeout:
	}
}

func (w *Writer) lost() {
	w.missing.Add(1)
	w.dropped.Add(1)
}

func (w *Writer) run() {
	for l := range w.lines {
		w.report(l.missing)
		var err error
		if l.flushed == nil {
			_, err = w.out.Write(l.text)
		}
		if err != nil {
			w.lost()
		} else if len(w.lines) == 0 {
			w.report(w.missing.Swap(0)) // no queued line follows that could report it
		}
		if l.flushed != nil {
			close(l.flushed)
		}
	}
}

// report writes how many lines are missing here.
func (w *Writer) report(missing uint64) {
	if missing == 0 {
		return
	}
	var text bytes.Buffer // a buffer, because zerolog prints a message if its writer fails
	log := zerolog.New(&text).With().Timestamp().Logger()
	log.Warn().Uint64("dropped", missing).Msg("log lines were dropped here: their reader was too slow, or gone")
	if _, err := w.out.Write(text.Bytes()); err != nil {
		w.missing.Add(missing)
	}
}
