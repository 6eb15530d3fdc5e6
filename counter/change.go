package counter

import "time"

// change is a change of the length of the windows that takes effect while this
// process runs.
//
// The label of a window is its start. Labels strictly increase, and each is a multiple of the
// length. If a data directory that was used with one length is opened with a longer one, the
// present window of the longer length may have begun before the last label, or have the same
// label, for which there is a record already. A window that began at the present time would not
// have a multiple of its length as its label, and waiting for the next start could take an
// hour. So the windows keep their old length until the first window of the longer length starts
// after the last label. The last window of the old length may end early, as at a stop.
//
// The present window of a shorter length usually begins after the last label. Then it is opened
// at once, and is not complete, because this process did not serve the whole of it.
type change struct {
	until int64 // Unix time, ns: the first start of a window of the new length; 0: nothing changes
	old   int64 // the length before, ns
}

// floor returns the number of the epoch at ns, for windows of the given length.
func floor(ns, window int64) int64 {
	n := ns / window
	if ns%window < 0 {
		n-- // before 1970
	}
	return n
}

// first returns the epoch that a process which starts at now begins with: the present one, or,
// if the clock is behind, the first one whose label may follow the last label.
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
	case length < 0: // the length is not known, and the clock is behind
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

// epochAt returns the start and the length of the epoch that a time belongs to.
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

// epochsBetween counts the epochs from one start to another.
func (c *Counter) epochsBetween(from, to int64) (n int64) {
	if old := min(to, c.change.until); from < old {
		n = (old - from + c.change.old - 1) / c.change.old
		from = old
	}
	return n + (to-from)/int64(c.cfg.Window)
}

// Change returns the old length of the windows and until when they keep it, if the data
// directory was used with another length than Window; otherwise changes is false. Safe for
// concurrent use.
func (c *Counter) Change() (old time.Duration, until time.Time, changes bool) {
	return time.Duration(c.change.old), time.Unix(0, c.change.until).UTC(), c.change.until > 0
}
