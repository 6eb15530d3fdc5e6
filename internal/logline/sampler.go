package logline

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
)

// Sampler allows the first Lines lines of each period of length Every, and counts the others as
// hidden. Set Lines and Every before the first use, and do not change them.
//
// Safe for concurrent use, and cheap if thousands of goroutines fail at once: a line of a
// goroutine that does not get the lock at once is hidden.
type Sampler struct {
	Lines int           // lines allowed in a period; 0 means 1
	Every time.Duration // length of a period

	hidden atomic.Uint64 // lines hidden since the last one that was allowed

	// mu guards the present period.
	mu    sync.Mutex
	began time.Time
	lines int
}

// Allow reports whether a line may be written now; if so, hidden is how many lines were hidden
// since the last one that was allowed.
func (s *Sampler) Allow(now time.Time) (hidden uint64, ok bool) {
	if !s.mu.TryLock() {
		s.hidden.Add(1)
		return 0, false
	}
	defer s.mu.Unlock()
	// A clock that was set back ends the period as well.
	if passed := now.Sub(s.began); s.began.IsZero() || passed >= s.Every || passed < 0 {
		s.began, s.lines = now, 0
	}
	if s.lines >= max(s.Lines, 1) {
		s.hidden.Add(1)
		return 0, false
	}
	s.lines++
	return s.hidden.Swap(0), true
}

// Msg writes a line, with the number of hidden lines, if Allow allows it. It is meant for
// failures that occur a few times a second at most: e is built even if the line is hidden.
func (s *Sampler) Msg(e *zerolog.Event, text string) {
	if hidden, ok := s.Allow(time.Now()); ok {
		e.Uint64("hidden", hidden).Msg(text)
	}
}

// TakeHidden returns how many lines were hidden since the last one that was allowed, and sets
// that to 0. It is for a report when no further line may follow.
func (s *Sampler) TakeHidden() uint64 { return s.hidden.Swap(0) }

// Reset begins a new period: the next line is allowed, and reports no hidden lines.
func (s *Sampler) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.began = time.Time{}
	s.hidden.Store(0)
}
