package server

import (
	"bytes"
	"encoding/json"
	"os"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"verve/counter"
)

// history has the windows that were closed last. With a path it outlives the
// process: each window is appended to that file, which is read at the start.
//
// It is only shown, and no count depends on it. The file is not synced, a line that
// cannot be read is skipped, and a line that cannot be written is missing after the
// next start.
type history struct {
	path            string // empty: in memory only
	group, instance string // windows of others in the file are ignored
	log             zerolog.Logger

	mu      sync.Mutex
	windows []window // oldest first; the last maxWindows of them are shown
	failed  bool     // the file lacks windows, and that is logged
}

// window is one line of /api/windows.
type window struct {
	Start      time.Time `json:"window_start"`
	MS         int64     `json:"window_ms"`
	Unique     uint64    `json:"unique"`
	Duplicates uint64    `json:"duplicates"`
	Keys       int       `json:"keys,omitempty"` // how many keys have ids; 0: no key was used
	Complete   bool      `json:"complete"`
	Exact      bool      `json:"exact"`
	State      string    `json:"state,omitempty"` // open, sealed, spooled, delivered; given when it is shown

	// WholeGroup is there if the ids of the group are counted together: the other
	// figures are those of this instance.
	WholeGroup *groupWindow `json:"whole_group,omitempty"`

	restored bool // an earlier process closed it
	cut      bool // it was open when the process ended: the next process may go on with it

	// largest are the largest keys, the largest first: those of the whole group if its
	// record has any, else those of this instance. They are in memory, see keptKeys; those
	// of a window that was cut are in the file, too.
	largest []counter.KeyCount
}

// over reports whether the time of the window has passed.
func (w *window) over() bool {
	return !time.Now().Before(w.Start.Add(time.Duration(w.MS) * time.Millisecond))
}

// same reports whether a and b are parts of one window.
func (w *window) same(b *window) bool { return w.Start.Equal(b.Start) && w.MS == b.MS }

// groupWindow is the count of a window in the whole group; for the open one, what is
// known of it so far.
type groupWindow struct {
	Unique   uint64 `json:"unique"`
	Keys     int    `json:"keys,omitempty"`
	Complete bool   `json:"complete"`
	Exact    bool   `json:"exact"`
}

// historyLine is a line of the file.
type historyLine struct {
	Group    string `json:"group"`
	Instance string `json:"instance"`
	window
	Largest map[string]uint64 `json:"largest,omitempty"` // of a window that was cut
}

// openHistory reads what earlier processes of this instance have left.
func openHistory(path, group, instance string, log zerolog.Logger) *history {
	h := &history{path: path, group: group, instance: instance, log: log}
	if path == "" {
		return h
	}
	old, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		h.report(err)
		return h
	}
	for line := range bytes.Lines(old) {
		var l historyLine
		if json.Unmarshal(line, &l) != nil || l.Group != group || l.Instance != instance || l.Start.IsZero() {
			continue
		}
		l.restored = true
		if len(l.Largest) > 0 && !l.over() {
			l.cut, l.largest = true, largestOf(l.Largest)
		}
		// If the process is started many times within a window, there are many parts of it.
		if n := len(h.windows); n > 0 && h.windows[n-1].same(&l.window) {
			l.include(h.windows[n-1])
			h.windows = h.windows[:n-1]
		}
		h.windows = append(h.windows, l.window)
	}
	h.windows = h.windows[max(0, len(h.windows)-maxWindows):]
	h.rewrite()
	return h
}

// add appends a closed window.
func (h *history) add(w window) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.windows = append(h.windows, w)
	tooMany := len(h.windows) > 2*maxWindows
	if tooMany {
		n := copy(h.windows, h.windows[len(h.windows)-maxWindows:])
		clear(h.windows[n:]) // they may have keys
		h.windows = h.windows[:n]
	}
	kept := 0
	for i := len(h.windows) - 1; i >= 0; i-- {
		w := &h.windows[i]
		if kept += len(w.largest); kept > keptKeys {
			w.largest = nil
		}
	}
	if h.path != "" && (h.failed || tooMany || h.append(w) != nil) {
		h.rewrite()
	}
}

// append adds a line to the file.
func (h *history) append(w window) error {
	f, err := os.OpenFile(h.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer f.Close() // its error does not matter: no count depends on the file
	_, err = f.Write(h.line(w))
	return err
}

// line returns the line of w in the file. It begins with the newline, so that half a line
// before it, of a write that was cut short, spoils only itself.
func (h *history) line(w window) []byte {
	l := historyLine{h.group, h.instance, w, nil}
	if w.cut && len(w.largest) > 0 {
		l.Largest = make(map[string]uint64, len(w.largest))
		for _, k := range w.largest {
			l.Largest[k.Key] = k.Unique
		}
	}
	b, _ := json.Marshal(l) // never fails: all fields can be encoded
	return append([]byte{'\n'}, b...)
}

// rewrite replaces the file by one with the windows that are shown. h.mu is held,
// or h is not shared yet.
func (h *history) rewrite() {
	var all []byte
	for _, w := range h.windows[max(0, len(h.windows)-maxWindows):] {
		all = append(all, h.line(w)...)
	}
	next := h.path + ".new"
	err := os.WriteFile(next, all, 0o644)
	if err == nil {
		err = os.Rename(next, h.path)
	}
	h.report(err)
}

// report logs the first of a row of errors. The next window tries again.
func (h *history) report(err error) {
	if err != nil && !h.failed {
		h.log.Warn().Err(err).Msg("cannot save the windows that the live page and /api/windows show: the next start begins without them")
	}
	h.failed = err != nil
}

// last returns up to limit windows, the newest first. A window that was closed
// more than once, because the process was started again within it, is returned once,
// with the sums of its parts.
func (h *history) last(limit int) []window {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]window, 0, min(limit, len(h.windows)))
	for i := len(h.windows) - 1; i >= 0; i-- {
		w := h.windows[i]
		if n := len(out); n > 0 && out[n-1].same(&w) {
			out[n-1].include(w)
			continue
		}
		if len(out) == limit {
			break
		}
		out = append(out, w)
	}
	return out
}

// hasKeys reports whether a key was used in the window.
func (w *window) hasKeys() bool { return w.Keys > 0 || w.WholeGroup != nil && w.WholeGroup.Keys > 0 }

// forgotten reports whether the keys of the window, or of a part of it, are not in memory
// any more.
func (w *window) forgotten() bool { return w.hasKeys() && len(w.largest) == 0 }

// include adds an earlier part of the same window.
func (w *window) include(part window) {
	w.Unique += part.Unique
	w.Duplicates += part.Duplicates
	group := func(w window) bool { return w.WholeGroup != nil && w.WholeGroup.Keys > 0 }
	switch ours, theirs := group(*w), group(part); {
	case ours: // w is the newer one
	case theirs:
		w.largest = part.largest
	case w.forgotten() || part.forgotten():
		w.largest = nil
	default:
		w.largest = addKeys(w.largest, part.largest)
	}
	w.Keys = max(w.Keys, part.Keys, len(w.largest)) // at least this many: which keys both parts have is only known of the largest
	w.Complete = w.Complete && part.Complete
	w.Exact = w.Exact && part.Exact
	if w.WholeGroup == nil {
		w.WholeGroup = part.WholeGroup // a count of the whole group is not a part
	}
}
