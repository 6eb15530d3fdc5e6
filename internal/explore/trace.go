package explore

import (
	"fmt"
	"path"
	"runtime"
	"strconv"
	"strings"
)

// schedule returns the order of the threads as text: for each turn of a thread a letter, and
// how many steps the thread takes.
func (e *execution) schedule() string {
	var b strings.Builder
	for i := 0; i < len(e.choices); {
		n := 1
		for i+n < len(e.choices) && e.choices[i+n] == e.choices[i] {
			n++
		}
		fmt.Fprintf(&b, "%c%d", 'a'+e.choices[i], n)
		i += n
	}
	return b.String()
}

func parseSchedule(s string) (threads []int, err error) {
	for s != "" {
		n := 1
		for n < len(s) && '0' <= s[n] && s[n] <= '9' {
			n++
		}
		count, err := strconv.Atoi(s[1:n])
		if err != nil || s[0] < 'a' || s[0] >= 'a'+maxThreads {
			return nil, fmt.Errorf("%q is no schedule: want letters, each with a number", s)
		}
		for range count {
			threads = append(threads, int(s[0]-'a'))
		}
		s = s[n:]
	}
	return threads, nil
}

// note adds a line to the trace: the thread, its operation, and the place in the source.
func (e *execution) note(t *thread, what string) {
	var callers [32]uintptr
	frames := runtime.CallersFrames(callers[:runtime.Callers(3, callers[:])])
	where := ""
	for {
		f, more := frames.Next()
		if !strings.Contains(f.Function, "/internal/explore.") && !strings.Contains(f.Function, "/internal/explore/") ||
			strings.Contains(f.Function, "explore_test.") {
			name := f.Function[strings.LastIndexByte(f.Function, '/')+1:]
			where = fmt.Sprintf("%s (%s:%d)", name, path.Base(f.File), f.Line)
			break
		}
		if !more {
			break
		}
	}
	e.search.trace = append(e.search.trace, fmt.Sprintf("%4d  %c %-10s %-14s %s", e.depth, 'a'+t.id, t.name, what, where))
}

// Tracing reports whether Returned will be used: whether a trace is being made.
func Tracing() bool { return active != nil && active.search.tracing }

// Returned adds the result of the last operation to the trace.
func Returned(v any) {
	if !Tracing() {
		return
	}
	last := &active.search.trace[len(active.search.trace)-1]
	if u, is := v.(uint64); is && u > 1<<20 {
		*last += fmt.Sprintf(" -> %#x", u)
	} else {
		*last += fmt.Sprintf(" -> %v", v)
	}
}

// Note adds a line of the scenario to the trace.
func Note(format string, args ...any) {
	if Tracing() {
		t := active.run.threads[active.current]
		active.search.trace = append(active.search.trace, fmt.Sprintf("      %c %-10s %s", 'a'+t.id, t.name, fmt.Sprintf(format, args...)))
	}
}

// story returns the trace as text; of a long trace only the end.
func (s *search) story() string {
	const most = 400
	if n := len(s.trace); n > most {
		return fmt.Sprintf("(%d steps)\n", n-most) + strings.Join(s.trace[n-most:], "\n")
	}
	return strings.Join(s.trace, "\n")
}
