package server

import (
	"sync"
	"time"
)

// logSampler lets some lines per second through and counts the others.
type logSampler struct {
	perSecond int

	mu     sync.Mutex
	second int64
	lines  int
	hidden uint64
}

// allow reports whether a line may be written now, and how many were hidden
// since the last one.
func (s *logSampler) allow(now time.Time) (hidden uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if second := now.Unix(); second != s.second {
		s.second, s.lines = second, 0
	}
	if s.lines++; s.lines > s.perSecond {
		s.hidden++
		return 0, false
	}
	hidden, s.hidden = s.hidden, 0
	return hidden, true
}
