package stream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// reader is the other end of standard output. While it stalls no write returns.
type reader struct {
	mu    sync.Mutex
	lines bytes.Buffer
	stall chan struct{} // nil: it reads; closed: it reads again
}

func (r *reader) Write(p []byte) (int, error) {
	r.mu.Lock()
	stall := r.stall
	r.mu.Unlock()
	if stall != nil {
		<-stall
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lines.Write(p)
}

func (r *reader) text() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lines.String()
}

// printed is what standard output has to have of n windows, each line once.
func wantPrinted(t *testing.T, text string, n int) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if len(lines) != n {
		t.Fatalf("%d lines, want %d:\n%s", len(lines), n, text)
	}
	for i, line := range lines {
		r, err := parseRecord([]byte(line))
		if err != nil || !r.WindowStart.Equal(window(i).Start) {
			t.Errorf("line %d: %s, %v", i, line, err)
		}
	}
}

// TestStalledStandardOutputIsReported: while its reader stalls records go into the
// spool, the sink says that it fails, and every line is there once when the reader
// is back.
func TestStalledStandardOutputIsReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &reader{stall: make(chan struct{})}
		sp := testSpool(t, t.TempDir())
		s, err := New(Config{Scope: ScopeInstance, CountsFile: "-", stdout: out}, sp)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = s.Run(ctx) })
		publish := func(from, to int) {
			t.Helper()
			for i := from; i < to; i++ {
				if err := s.Publish(ctx, window(i)); err != nil {
					t.Fatal(err)
				}
			}
		}
		failing := func(want bool) {
			t.Helper()
			if got := s.Stats().Sinks[0].Failing; strings.Contains(got, "stalls") != want || !want && got != "" {
				t.Errorf("the sink fails by %q; want a stalled reader: %t", got, want)
			}
		}
		publish(0, 1)
		synctest.Wait()
		failing(false)
		time.Sleep(filePatience)
		synctest.Wait()
		failing(true)
		publish(1, 400)
		close(out.stall)
		if err := s.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		failing(false)
		wantPrinted(t, out.text(), 400)
		cancel()
		running.Wait()
		s.Close()
		if err := sp.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestStopLeavesAStalledWriteBehind: Run ends although a write does not return, and
// the next process writes what this one could not: no line is lost, and none of
// those that were taken is written again.
func TestStopLeavesAStalledWriteBehind(t *testing.T) {
	dir := t.TempDir()
	out := &reader{}
	sp := testSpool(t, dir)
	s, err := New(Config{Scope: ScopeInstance, CountsFile: "-", stdout: &stallsAfter{reader: out, lines: 30}}, sp)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		if err := s.Publish(t.Context(), window(i)); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = s.Run(ctx) })
	for strings.Count(out.text(), "\n") < 30 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	running.Wait() // would be for ever
	s.Close()
	if err := sp.Close(); err != nil {
		t.Fatal(err)
	}

	sp = testSpool(t, dir)
	if s, err = New(Config{Scope: ScopeInstance, CountsFile: "-", stdout: out}, sp); err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	running.Go(func() { _ = s.Run(ctx) })
	if err := s.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	cancel()
	running.Wait()
	s.Close()
	if err := sp.Close(); err != nil {
		t.Fatal(err)
	}
	wantPrinted(t, out.text(), 100)
}

// stallsAfter stalls for ever after some lines.
type stallsAfter struct {
	*reader
	lines int
}

func (s *stallsAfter) Write(p []byte) (int, error) {
	if s.lines--; s.lines < 0 {
		select {}
	}
	return s.reader.Write(p)
}

// TestBrokenOffLineIsGoneOnWith: what takes half a line gets the other half, not the
// line again.
func TestBrokenOffLineIsGoneOnWith(t *testing.T) {
	var out bytes.Buffer
	halves := writerFunc(func(p []byte) (int, error) {
		n := (len(p) + 1) / 2
		out.Write(p[:n])
		if n < len(p) {
			return n, io.ErrShortWrite
		}
		return n, nil
	})
	batch := entries(t, 0, 3)
	f := newFileSink("-", halves, 0, noStep)
	for tries := 0; len(batch) > 0; tries++ {
		n, err := f.deliver(t.Context(), batch)
		if err != nil && !errors.Is(err, io.ErrShortWrite) || tries > 100 {
			t.Fatalf("delivered %d, %v", n, err)
		}
		batch = batch[n:]
	}
	wantPrinted(t, out.String(), 3)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
