// Package logline keeps the log from costing more than it is worth: a Writer that
// never makes its caller wait, and a Sampler that keeps repeats out.
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

// queued is how many lines may wait for a reader: half a megabyte of usual ones,
// and several hours of a server that only logs its windows. It is room for what a
// busy start and a failing sink log at once.
const queued = 1024

// Writer passes log lines on to a slower writer that may block for ever: a pipe
// whose reader stalls, a terminal that is stopped. Write never waits. A line that
// finds the queue full is dropped and counted; one whose write fails is counted
// too. When lines get through again, a line at that place reports how many are
// missing.
//
// It is zerolog's diode with another choice: the diode drops the oldest lines and
// all that wait at once, and its Close waits for the blocked write.
//
// Safe for concurrent use. The goroutine that NewWriter starts never ends, as the
// write that it may be in cannot be interrupted.
type Writer struct {
	out   io.Writer
	lines chan line

	missing atomic.Uint64 // dropped and not reported yet
	dropped atomic.Uint64 // dropped ever
}

// line is a log line, and how many lines are missing before it; or the mark of a Flush.
type line struct {
	text    []byte
	missing uint64
	flushed chan struct{} // of a mark: closed when the lines before it were written
}

// NewWriter returns a Writer to out, which one goroutine calls with a line at a
// time. A line of JSON reports missing ones, so out has to take JSON.
func NewWriter(out io.Writer) *Writer {
	w := &Writer{out: out, lines: make(chan line, queued)}
	go w.run()
	return w
}

// Write queues a copy of p. It never fails.
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

// Dropped returns how many lines were dropped.
func (w *Writer) Dropped() uint64 { return w.dropped.Load() }

// Flush waits until the lines that were queued before it are written, or for
// within: a reader that stalls does not hold the end of the process up for longer.
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
			w.report(w.missing.Swap(0)) // no line follows that would carry it
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
	var text bytes.Buffer // by way of a buffer, as zerolog prints what a writer refuses
	log := zerolog.New(&text).With().Timestamp().Logger()
	log.Warn().Uint64("dropped", missing).Msg("log lines were dropped here: their reader was too slow, or gone")
	if _, err := w.out.Write(text.Bytes()); err != nil {
		w.missing.Add(missing)
	}
}
