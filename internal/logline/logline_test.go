package logline

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// pipe is a writer whose reader stalls, reads or has gone.
type pipe struct {
	mu    sync.Mutex
	cond  sync.Cond
	state string // "stalls", "reads", "gone"
	text  bytes.Buffer
}

func newPipe(state string) *pipe {
	p := &pipe{state: state}
	p.cond.L = &p.mu
	return p
}

func (p *pipe) become(state string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state = state
	p.cond.Broadcast()
}

func (p *pipe) Write(line []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.state == "stalls" {
		p.cond.Wait()
	}
	if p.state == "gone" {
		return 0, errors.New("broken pipe")
	}
	return p.text.Write(line)
}

// read returns the lines that were written, and how many lines they report as dropped.
func (p *pipe) read(t *testing.T) (lines []string, dropped uint64) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, line := range strings.Split(strings.TrimSpace(p.text.String()), "\n") {
		var report struct{ Dropped uint64 }
		if strings.HasPrefix(line, "{") {
			if err := json.Unmarshal([]byte(line), &report); err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			dropped += report.Dropped
		} else {
			lines = append(lines, line)
		}
	}
	return lines, dropped
}

// write logs numbered lines and leaves the slice dirty, as zerolog does.
func write(w *Writer, from, to int) {
	for i := from; i < to; i++ {
		line := fmt.Appendf(nil, "line %d\n", i)
		w.Write(line)
		clear(line)
	}
}

// wantLines checks that lines are in order and that missing ones are reported.
func wantLines(t *testing.T, p *pipe, w *Writer, written int) {
	t.Helper()
	lines, told := p.read(t)
	last := -1
	for _, line := range lines {
		var n int
		if _, err := fmt.Sscanf(line, "line %d", &n); err != nil || n <= last {
			t.Fatalf("after line %d: %q, %v", last, line, err)
		}
		last = n
	}
	if uint64(len(lines))+told != uint64(written) || w.Dropped() != told {
		t.Errorf("%d lines and %d said to be dropped, %d counted; %d were written", len(lines), told, w.Dropped(), written)
	}
}

func TestLogGoesThroughInOrder(t *testing.T) {
	p := newPipe("reads")
	w := NewWriter(p)
	for i := range 5 {
		write(w, i*100, i*100+100)
		w.Flush(time.Minute)
	}
	if lines, _ := p.read(t); len(lines) != 500 {
		t.Errorf("%d lines, want 500", len(lines))
	}
	wantLines(t, p, w, 500)
}

// TestStalledReaderHoldsUpNobody: Write does not wait, Flush gives up, and when the reader goes
// on, one line reports how many lines are missing, in their place.
func TestStalledReaderHoldsUpNobody(t *testing.T) {
	p := newPipe("stalls")
	w := NewWriter(p)
	write(w, 0, 1)
	for len(w.lines) > 0 { // until run is in the write
		time.Sleep(time.Millisecond)
	}
	write(w, 1, 3*queued)
	if w.Dropped() < queued {
		t.Errorf("%d lines dropped of %d", w.Dropped(), 3*queued)
	}
	w.Flush(10 * time.Millisecond)
	p.become("reads")
	w.Flush(time.Minute)
	write(w, 3*queued, 3*queued+10)
	w.Flush(time.Minute)
	wantLines(t, p, w, 3*queued+10)
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := strings.Count(p.text.String(), "dropped"); n != 2 { // once in the message and once as a field
		t.Errorf("the word occurs %d times, want 2: in one line", n)
	}
}

// TestLinesOfABrokenPipeAreCounted: and they are reported when the pipe is read again.
func TestLinesOfABrokenPipeAreCounted(t *testing.T) {
	p := newPipe("gone")
	w := NewWriter(p)
	write(w, 0, 100)
	w.Flush(time.Minute)
	if w.Dropped() != 100 {
		t.Errorf("%d lines dropped, want 100", w.Dropped())
	}
	p.become("reads")
	write(w, 100, 101)
	w.Flush(time.Minute)
	wantLines(t, p, w, 101)
}

func TestConcurrentLinesAreWholeAndCounted(t *testing.T) {
	p := newPipe("reads")
	w := NewWriter(p)
	const writers, each = 8, 2000
	var all sync.WaitGroup
	for range writers {
		all.Go(func() {
			for range each {
				w.Write([]byte("a line\n"))
			}
		})
	}
	all.Wait()
	w.Flush(time.Minute)
	lines, told := p.read(t)
	for _, line := range lines {
		if line != "a line" {
			t.Fatalf("got %q", line)
		}
	}
	if uint64(len(lines))+told != writers*each || told != w.Dropped() {
		t.Errorf("%d lines, %d dropped, of %d", len(lines), told, writers*each)
	}
}

func TestSamplerCountsWhatItHides(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := Sampler{Lines: 2, Every: time.Second}
		var shown, hidden uint64
		for range 100 { // one each 100 ms
			if h, ok := s.Allow(time.Now()); ok {
				shown++
				hidden += h
			}
			time.Sleep(100 * time.Millisecond)
		}
		hidden += s.TakeHidden()
		if shown != 20 || hidden != 80 {
			t.Errorf("%d shown and %d hidden, want 20 and 80", shown, hidden)
		}
		s.Allow(time.Now())
		s.Allow(time.Now())
		s.Allow(time.Now())
		s.Reset()
		if h, ok := s.Allow(time.Now()); !ok || h != 0 {
			t.Errorf("after a reset: %v, %d hidden", ok, h)
		}
		if _, ok := s.Allow(time.Now().Add(-time.Hour)); !ok {
			t.Error("a clock that was set back silences the log")
		}
	})
}

func TestSamplerLosesNoneUnderLoad(t *testing.T) {
	s := Sampler{Every: time.Millisecond}
	const callers, each = 8, 20_000
	var shown, hidden [callers]uint64
	var all sync.WaitGroup
	for i := range callers {
		all.Go(func() {
			for range each {
				if h, ok := s.Allow(time.Now()); ok {
					shown[i]++
					hidden[i] += h
				}
			}
		})
	}
	all.Wait()
	sum := s.TakeHidden()
	for i := range callers {
		sum += shown[i] + hidden[i]
	}
	if sum != callers*each {
		t.Errorf("%d shown or hidden, of %d", sum, callers*each)
	}
}
