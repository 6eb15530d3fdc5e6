package server

import (
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"verve/counter"
)

const (
	defaultShownKeys = 100  // of /api/windows/WINDOW_START/keys
	maxShownKeys     = 1000 // of the same: as many as are kept of a closed window

	// keptKeys bounds the keys that are kept of all closed windows together, the newest
	// windows first: some 15 MB if the names of the keys are long.
	keptKeys = 100_000

	// liveKeys is how many keys the live page shows. The server looks for them once per
	// liveRate at most, and then rests for liveKeysRest times as long as it took, so that it
	// uses 1 % of a core: an epoch has up to counter.MaxMaxKeys keys.
	liveKeys     = 10
	liveKeysRest = 100
)

// keyShare is a key with its part of a window.
type keyShare struct {
	Key    string  `json:"key"`
	Unique uint64  `json:"unique"`
	Share  float64 `json:"share"` // of the unique ids of the window
}

func keyShares(counts []counter.KeyCount, unique uint64) []keyShare {
	out := make([]keyShare, len(counts))
	for i, c := range counts {
		// A request counts under its key before it counts in its window.
		out[i] = keyShare{c.Key, c.Unique, float64(c.Unique) / float64(max(unique, c.Unique, 1))}
	}
	return out
}

// largestOf returns the largest of some keys.
func largestOf(keys map[string]uint64) []counter.KeyCount {
	var counts counter.KeyCounts
	for key, unique := range keys {
		if key != "" && len(key) <= counter.MaxKeyLen { // else someone has changed the file
			counts.Add([]byte(key), unique)
		}
	}
	return counts.Largest(maxShownKeys)
}

// addKeys adds the largest keys of two parts of a window.
func addKeys(a, b []counter.KeyCount) []counter.KeyCount {
	if len(a) == 0 || len(b) == 0 {
		return slices.Concat(a, b)
	}
	sums := counter.SumKeys(counter.KeyCountsOf(a...), counter.KeyCountsOf(b...))
	return sums.Largest(maxShownKeys)
}

// windowKeys is the answer of /api/windows/WINDOW_START/keys.
type windowKeys struct {
	Start   time.Time  `json:"window_start"`
	Scope   string     `json:"scope"` // as of a record: instance or group
	Keys    int        `json:"keys"`
	Unique  uint64     `json:"unique"`
	Results []keyShare `json:"results"`
}

// keys lists the largest keys of the open epoch or of a closed window.
func (a *Admin) keys(w http.ResponseWriter, r *http.Request) {
	limit, ok := limitOf(w, r, defaultShownKeys, maxShownKeys)
	if !ok {
		return
	}
	start, err := time.Parse(time.RFC3339Nano, r.PathValue("window_start"))
	if err != nil {
		writeError(w, http.StatusBadRequest, "the start of a window is a time as in its record: 2026-11-22T06:36:00Z")
		return
	}
	out := windowKeys{Start: start.UTC(), Scope: "instance"}
	c, ok := a.windowAt(start)
	if !ok {
		writeError(w, http.StatusNotFound, "no such window, or it is too long ago: /api/windows?limit="+strconv.Itoa(maxWindows)+" lists those that are kept")
		return
	}
	if c.forgotten() {
		writeError(w, http.StatusGone, "the keys of this window are not in memory any more: an earlier process closed it, or a part of it, or later windows took its place; the records by key have them")
		return
	}
	out.Keys, out.Unique = c.Keys, c.Unique
	if g := c.WholeGroup; g != nil && g.Keys > 0 {
		out.Scope, out.Keys, out.Unique = "group", g.Keys, g.Unique
	}
	out.Results = keyShares(c.largest[:min(limit, len(c.largest))], out.Unique)
	writeJSON(w, http.StatusOK, out)
}

// windowAt returns a window with its largest keys, if it is open or among those that are kept.
func (a *Admin) windowAt(start time.Time) (w window, ok bool) {
	closed := a.history.last(maxWindows)
	at := slices.IndexFunc(closed, func(c window) bool { return c.Start.Equal(start) })
	e := a.server.cfg.Counter.Last()
	switch {
	case e.Start().Equal(start) && (at < 0 || a.server.cfg.Counter.Taking()):
		w = openWindow(e)
		w.largest = e.Keys().Counts().Largest(maxShownKeys)
		if part, ok := a.earlierPart(&w, closed); ok {
			w.include(part)
		}
	case at >= 0:
		w = closed[at]
	default:
		return w, false
	}
	return w, true
}

// limitOf returns the parameter limit of a request, or otherwise if there is none. If it is no
// number from 1 to most, limitOf answers 400 and ok is false.
func limitOf(w http.ResponseWriter, r *http.Request, otherwise, most int) (limit int, ok bool) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		writeError(w, http.StatusBadRequest, "the query is badly formed")
		return 0, false
	}
	given := query["limit"]
	if len(given) == 0 || len(given) == 1 && given[0] == "" {
		return otherwise, true
	}
	limit, err = strconv.Atoi(given[0])
	if err != nil || len(given) > 1 || limit < 1 || limit > most {
		writeError(w, http.StatusBadRequest, "limit must be a number from 1 to "+strconv.Itoa(most))
		return 0, false
	}
	return limit, true
}

func writeError(w http.ResponseWriter, status int, text string) {
	writeJSON(w, status, map[string]string{"error": text})
}
