package logline

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
)

// Sampler lets the first Lines lines of each period of Every through and counts
// the others. Both are set before its first use, and not changed.
//
// Safe for concurrent use, and cheap where thousands fail at once: a goroutine
// that does not get the lock is hidden without waiting for it.
type Sampler struct {
	Lines int           // 0 is 1
	Every time.Duration // length of a period

	hidden atomic.Uint64 // lines kept back since the last that was let through

	// mu guards the period that runs.
	mu    sync.Mutex
	began time.Time
	lines int
}

// Allow reports whether a line may be written now, and how many were hidden since
// the last one.
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

// Msg writes a line, with how many were hidden, if one may be written now. It is for what
// fails a few times a second: the line is made even if it is hidden.
func (s *Sampler) Msg(e *zerolog.Event, text string) {
	if hidden, ok := s.Allow(time.Now()); ok {
		e.Uint64("hidden", hidden).Msg(text)
	}
}

// TakeHidden returns how many lines were hidden since the last one: for a report
// when none follows.
func (s *Sampler) TakeHidden() uint64 { return s.hidden.Swap(0) }

// Reset begins a new period: the next line is let through, and reports none as hidden.
func (s *Sampler) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.began = time.Time{}
	s.hidden.Store(0)
}
