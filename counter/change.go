package counter

import "time"

// change is a change of the length of the windows that takes effect while this
// process runs.
//
// A data directory that was used with one length may be opened with a longer one
// within a window of that. Its label, the start, may then be one that has a record
// already, or lie before the last one, and labels strictly increase. A window that
// began at the present time would have a true label, but not one that is a multiple
// of its length, which an epoch is; waiting for the next start takes up to an hour.
// So the windows keep the length that they had until the first start of a longer
// one behind the last label. The last of them may end before its time, as at a stop.
//
// A shorter window begins behind the last label as a rule, and then is opened at
// once, as one that this process did not serve whole.
type change struct {
	until int64 // Unix time, ns: the first start of a window of the new length; 0: nothing changes
	old   int64 // the length before, ns
}

// floor is the number of the epoch of a length at ns.
func floor(ns, window int64) int64 {
	n := ns / window
	if ns%window < 0 {
		n-- // before 1970
	}
	return n
}

// first returns the epoch to begin with at now: the one of that time, or, if the
// clock is behind, the first one whose label may follow the last.
func (c *Counter) first(now int64) (start, window int64) {
	window = int64(c.cfg.Window)
	start = floor(now, window) * window
	var last, length int64
	resumable := false
	if past := c.cfg.Past; past.Serial > 0 {
		last, length, resumable = past.Start.UnixNano(), int64(past.Window), !past.Over
	}
	if b := c.cfg.NotBefore; !b.IsZero() && (length == 0 || b.UnixNano() > last) {
		last, length, resumable = b.UnixNano(), c.lastLength(now), true
	}
	switch {
	case length == 0 || start > last:
		return start, window
	case length < 0: // not known, and the clock is behind
		return (floor(last-1, window) + 1) * window, window
	case length == window && !resumable:
		return max(start, last+window), window
	case length == window:
		return last, window
	}
	c.change = change{until: (floor(last, window) + 1) * window, old: length}
	start = max(floor(now, length), floor(last, length)) * length
	if start < last || start == last && !resumable {
		start += length
	}
	if start >= c.change.until {
		return c.change.until, window
	}
	return start, length
}

// lastLength returns the length of the window that starts at NotBefore: LastLen if that is
// set. Otherwise it is guessed: the present length if a window of it can start there, or the
// longest divisor of that length for which this holds. It is -1 if the clock is behind
// NotBefore: nothing can be guessed then.
func (c *Counter) lastLength(now int64) int64 {
	last := c.cfg.NotBefore.UnixNano()
	if c.cfg.LastLen > 0 {
		return int64(c.cfg.LastLen)
	}
	if last > now {
		return -1
	}
	a, b := int64(c.cfg.Window), last
	for b != 0 {
		a, b = b, a%b
	}
	return max(a, int64(MinWindow))
}

// epochAt returns the start and the length of the epoch of a time.
func (c *Counter) epochAt(ns int64) (start, window int64) {
	window = int64(c.cfg.Window)
	if ns < c.change.until {
		window = c.change.old
	}
	return floor(ns, window) * window, window
}

// endOf returns the end of an epoch: when the next one is due.
func (c *Counter) endOf(start, window int64) int64 {
	if start < c.change.until {
		return min(start+window, c.change.until)
	}
	return start + window
}

// epochsBetween counts the epochs from a start to another one.
func (c *Counter) epochsBetween(from, to int64) (n int64) {
	if old := min(to, c.change.until); from < old {
		n = (old - from + c.change.old - 1) / c.change.old
		from = old
	}
	return n + (to-from)/int64(c.cfg.Window)
}

// Change returns the length that the windows keep until a later moment, if the
// data directory was used with another one than Window.
func (c *Counter) Change() (old time.Duration, until time.Time, changes bool) {
	return time.Duration(c.change.old), time.Unix(0, c.change.until).UTC(), c.change.until > 0
}
