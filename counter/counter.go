// Package counter counts unique ids per epoch, exactly and without a lock.
//
// An epoch is one window of time. A request enters the open epoch, asks the set whether its id
// is new in that epoch, and leaves with the result, which counts it. An epoch is sealed when it
// is no longer open and no request is left inside; only then is its count read and given to the
// Publisher. So the counts of an epoch add up to the answers given in it, whenever it turns and
// however long a request sleeps.
//
// The first request that arrives after an epoch's end turns it: it opens the next epoch. A
// ticker does so if no request comes. Neither waits for the old epoch to be closed.
//
// server calls Enter and Leave; dedup opens and retires each epoch as the Store; stream,
// or the group in dedup/redis, publishes the counts as the Publisher.
package counter

import (
	"cmp"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// The bounds of Config.Window.
const (
	MinWindow = 50 * time.Millisecond
	MaxWindow = time.Hour

	// maxSkipped bounds how many empty counts are published for a gap between two epochs (the
	// machine was suspended, or the clock set forward): a day of minutes. A longer gap is more
	// likely due to a wrong clock than to an outage that deserves a million records.
	maxSkipped = 1440

	// maxWaiting is how many ended epochs, of 4 KB each, are kept while the publisher stands
	// still. Beyond that number an epoch is kept only if it counted something. A Store on disk
	// refuses ids before that (dedup has 1,016 slots).
	maxWaiting = 2048

	// startWait is how long the caller may take between New and Run. A longer time counts as
	// one in which the process did not run.
	startWait = time.Minute
)

// Store keeps the ids of the epochs. Open is called before the first request can enter e. It
// must be quick: a lock is held that every turn needs.
type Store interface {
	// Open prepares e and returns what the Store holds for it, which becomes e.State. It
	// may be nil.
	Open(e *Epoch) State
}

// State is what a Store holds for one epoch.
type State interface {
	// Retire releases the State. It is called once, when the count of the epoch is published
	// and no request can be in the epoch any more. Epochs are retired in their order, with one
	// exception: an epoch in which nothing was counted may be retired early, by a turn, with
	// the same lock held as in Open.
	Retire()
}

// Config of a Counter. The zero value of an optional field is its default.
type Config struct {
	Window    time.Duration // length of an epoch, MinWindow to MaxWindow
	Store     Store         // keeps the ids; required
	Publisher Publisher     // gets the counts; required
	MaxKeys   int           // how many keys an epoch may have, at most MaxMaxKeys; 0: DefaultMaxKeys
	KeyMemory uint64        // how many bytes the keys of all unpublished epochs may take; 0: no limit
	NotBefore time.Time     // the start of the last epoch that an earlier process published; no epoch that starts before this is opened. Optional.
	LastLen   time.Duration // the length of the epoch that starts at NotBefore. Optional: without it the length is guessed.
	Past      Past          // what earlier processes left, as the Store has kept it. Optional.

	// InexactBefore is the time until which ids were counted elsewhere. The Store does not have
	// those ids, so an epoch that began before this time is not exact. Optional.
	InexactBefore time.Time

	OnClose func(Count, time.Duration, error) // called after each attempt to close an epoch: its count, how long draining and publishing took, and the error, if any. Optional.

	// MaxSkew is how far the wall clock may be set, or be behind the start of the open epoch,
	// and for how long the process may not run, before Stats reports it. 0: the clock is not
	// watched.
	MaxSkew time.Duration
	OnClock func(problem string)       // called when Clock.Problem begins (with its text) and ends (empty). Optional.
	OnPause func(absent time.Duration) // called after the process did not run, with the time it missed. Optional.

	clocks func() reading // for tests
}

// Past is what earlier processes left, as the Store has kept it. A Store that keeps nothing on
// disk has the zero value.
type Past struct {
	// Recovered are the counts that were not published, in order of their start. They are
	// published before all others, and after each its State is retired.
	Recovered []Recovered

	// Lost are counts for which no record can be made, because this publisher has already
	// published a later window. Only files of an earlier version can contain such counts.
	Lost []Recovered

	// Serial, Start and Window are those of the epoch opened last. If that is the epoch to
	// begin with, and not Over, it goes on under the same serial; otherwise the epoch to begin
	// with gets the next serial. No earlier epoch is opened.
	Serial uint64
	Start  time.Time
	Window time.Duration
	Over   bool
}

// Recovered is the count of an epoch that an earlier process opened and did not publish, or the
// part of that count that is not in any record yet.
type Recovered struct {
	Serial uint64        // as Epoch.Serial
	Start  time.Time     // start of the window, UTC
	Window time.Duration // length of the window
	Unique uint64        // ids counted and not published
	Keys   KeyCounts     // the same for each key
	Exact  bool          // false if ids may be missing
	NoKeys bool          // it is not known which ids are under keys: Keys is empty
	State  State         // what the Store holds for the epoch, as Epoch.State; may be nil
}

// Counter turns, closes and publishes epochs. All methods are safe for concurrent use, except
// that only one Run may be active at a time; Run ends after Seal.
type Counter struct {
	cfg Config

	// open is the epoch that requests may enter; nil after Seal. It never returns to an
	// earlier epoch.
	open atomic.Pointer[Epoch]

	mu     sync.Mutex    // guards last to clock, and closed; held for moments, as every turn takes it
	last   *Epoch        // the epoch opened last, also after Seal
	turned []*Epoch      // ended but not yet closed, oldest first
	spare  *Epoch        // memory for the next epoch, made before it is needed
	wake   chan struct{} // capacity 1: something was added to turned
	clock  clockWatch

	keys   keyMemory
	change change // of the window's length; fixed in New

	closed struct {
		unique, repeats uint64 // sums over all closed epochs
		keys            int    // how many the epoch closed last had
	}
	skipped atomic.Uint64
}

// CheckWindow returns an error if windows of this length cannot be counted or published: it
// must be between MinWindow and MaxWindow, in whole milliseconds, because records state it in
// milliseconds.
func CheckWindow(window time.Duration) error {
	if window < MinWindow || window > MaxWindow || window%time.Millisecond != 0 {
		return fmt.Errorf("want %v to %v, in whole milliseconds", MinWindow, MaxWindow)
	}
	return nil
}

// CheckMaxKeys returns an error if n is not a valid Config.MaxKeys: 0 (the default) to
// MaxMaxKeys.
func CheckMaxKeys(n int) error {
	if n < 0 || n > MaxMaxKeys {
		return fmt.Errorf("want 1 to %d", MaxMaxKeys)
	}
	return nil
}

// New makes a Counter and opens its first epoch, the present one as a rule. Run must be called
// to close epochs. New returns an error if CheckWindow refuses Window, if Store or Publisher is
// missing, or if MaxSkew or MaxKeys is out of bounds.
func New(cfg Config) (*Counter, error) {
	if err := CheckWindow(cfg.Window); err != nil {
		return nil, fmt.Errorf("counter: Window %v: %w", cfg.Window, err)
	}
	if cfg.Store == nil || cfg.Publisher == nil {
		return nil, fmt.Errorf("counter: Store and Publisher are required")
	}
	if cfg.MaxSkew < 0 {
		return nil, fmt.Errorf("counter: MaxSkew must not be negative")
	}
	if err := CheckMaxKeys(cfg.MaxKeys); err != nil {
		return nil, fmt.Errorf("counter: MaxKeys %d: %w", cfg.MaxKeys, err)
	}
	cfg.MaxKeys = cmp.Or(cfg.MaxKeys, DefaultMaxKeys)
	if cfg.clocks == nil {
		cfg.clocks = readClocks
	}
	c := &Counter{cfg: cfg, wake: make(chan struct{}, 1)}
	c.keys.limit = int64(cfg.KeyMemory)
	c.clock.skew = int64(cfg.MaxSkew)
	now := cfg.clocks()
	start, window := c.first(now.wall)
	serial, past := uint64(1), cfg.Past
	if past.Serial > 0 {
		serial = past.Serial + 1
		if !past.Over && int64(past.Window) == window && past.Start.UnixNano() == start {
			serial = past.Serial
		}
	}
	for _, l := range past.Recovered {
		if l.Serial == serial && l.Unique == 0 {
			continue // this epoch goes on, and will get a record
		}
		c.turned = append(c.turned, c.newRecovered(l))
	}
	e := c.newEpoch(nil, start, window)
	e.serial = serial
	if past.Serial > 0 && serial > past.Serial {
		e.before = past.Start.UnixNano()
	}
	if e.Start().Before(cfg.InexactBefore) {
		e.MarkInexact()
	}
	e.State = cfg.Store.Open(e)
	c.last = e
	c.open.Store(e)
	c.watch(now, startWait)
	return c, nil
}

// Enter puts n requests that arrived together, at now (Unix time, ns), into the open epoch. If
// the time of that epoch is over, Enter turns it first. It returns false after Seal. Requests
// with different hints mostly count in different cache lines: pass a number that stays with a
// core, such as that of the connection.
//
// Safe for concurrent use. It takes a lock only if it finds the epoch over.
func (c *Counter) Enter(now int64, hint, n uint64) (Entry, bool) {
	for {
		e := c.open.Load()
		if e == nil {
			return Entry{}, false
		}
		if now >= e.end {
			c.turn(now)
			continue
		}
		s := &e.stripes[hint%stripeCount].stripe
		s.entered.Add(n)
		// A turn first moves c.open, and then the closer reads the stripes. A request first
		// marks its stripe, and then reads c.open again. So at least one of the two sees the
		// other: the closer waits for the Entry, or it is not given.
		if c.open.Load() == e {
			return Entry{e, s}, true
		}
		s.void.Add(n)
	}
}

// turn opens the epoch that now belongs to, if the open one is over. If the clock was set back
// it does nothing: the open epoch stays until the clock has passed its end.
func (c *Counter) turn(now int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.open.Load()
	if e == nil || now < e.end {
		return // turned meanwhile
	}
	c.advance(e, now, now)
}

// TurnFrom opens the epoch after e if e is still the open one. A request calls it when the
// Store has answered that e is over: the clocks of instances that count into one store may
// differ, and this answer is how an instance whose clock lags finds out that the others have
// sealed e. The label of the next epoch is then ahead of this clock until the clock gets there.
//
// Safe for concurrent use. It does nothing if e is no longer open, or after Seal.
func (c *Counter) TurnFrom(e *Epoch) {
	if c.open.Load() != e {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open.Load() == e {
		c.advance(e, e.end, e.end)
	}
}

// advance opens the epoch that the time at belongs to. e is the open epoch, and now the present
// time. c.mu is held.
func (c *Counter) advance(e *Epoch, at, now int64) {
	start, window := c.epochAt(at)
	next := c.newEpoch(e, start, window)
	if next.start > e.end {
		e.complete = false
		e.gap = next.start
	}
	if c.clock.skew > 0 { // the ticker may notice a step or a pause only when next is open already
		if step, pause := c.clock.irregular(c.cfg.clocks()); step != 0 || pause > 0 {
			e.complete = false
			next.complete = next.complete && now-next.start <= c.clock.skew
		}
	}
	next.State = c.cfg.Store.Open(next)
	c.last = next
	c.open.Store(next) // from here on no request enters e
	if n := len(c.turned); n >= maxWaiting && e.Idle() && e.Unique()+e.Repeats() == 0 {
		// The publisher has stood still for that long, and in e the Store refused all ids, or
		// no caller sent any. The window of e becomes part of the gap after the last epoch in
		// turned. The closer is not working on that one: it closes the first one.
		c.turned[n-1].gap = next.start
		c.turned[n-1].complete = false
		e.retire()
		e.keys.release(false) // ids that were refused may have added keys
		return
	}
	c.handOver(e)
}

// Seal ends the open epoch before its time. From then on Enter returns false, and Run returns
// when it has published all counts. A second call does nothing. Safe for concurrent use.
func (c *Counter) Seal() {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.open.Load()
	if e == nil {
		return
	}
	e.complete = false
	c.open.Store(nil)
	c.handOver(e)
}

// handOver gives e, which no request enters any more, to the closer. c.mu is held.
func (c *Counter) handOver(e *Epoch) {
	c.turned = append(c.turned, e)
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// newEpoch makes the epoch that starts at start and follows prev. c.mu is held, or
// no other goroutine has c yet.
func (c *Counter) newEpoch(prev *Epoch, start, window int64) *Epoch {
	e := c.spare
	if e == nil {
		e = c.blank()
	}
	c.spare = nil
	e.number, e.serial = floor(start, window), 1
	e.start, e.end, e.window, e.before = start, start+window, window, start-window
	if prev != nil {
		e.serial, e.before = prev.serial+1, prev.start
		e.complete = prev.end == start
	}
	if end := c.endOf(start, window); end < e.end {
		e.end, e.complete = end, false
	}
	e.label = time.Unix(0, e.start).UTC().AppendFormat(e.label[:0], time.RFC3339Nano)
	return e
}

// newRecovered makes a sealed epoch from a count that an earlier process left.
func (c *Counter) newRecovered(l Recovered) *Epoch {
	e := c.blank()
	e.start, e.window = l.Start.UnixNano(), int64(l.Window)
	e.end, e.number = e.start+e.window, e.start/e.window
	e.serial, e.recovered, e.State, e.owed = l.Serial, true, l.State, l.Keys
	e.label = l.Start.UTC().AppendFormat(e.label, time.RFC3339Nano)
	e.inexact.Store(!l.Exact)
	e.stripes[0].entered.Store(l.Unique)
	e.stripes[0].unique.Store(l.Unique)
	return e
}

// blank allocates an epoch and its label.
func (c *Counter) blank() *Epoch {
	e := &Epoch{label: make([]byte, 0, len(time.RFC3339Nano))}
	e.keys.max, e.keys.memory = c.cfg.MaxKeys, &c.keys
	return e
}

// provide makes the spare epoch, so that a turn allocates nothing. It also prepares a table for
// as many keys as the epoch closed last had, and reuses the memory of that epoch's table; so it
// does this only while no epoch waits to be closed.
func (c *Counter) provide() {
	c.mu.Lock()
	if c.spare == nil {
		c.spare = c.blank()
	}
	e, keys := c.spare, c.closed.keys
	if len(c.turned) > 0 {
		keys = 0
	}
	c.mu.Unlock()
	if keys > 0 {
		e.keys.prepare(keys)
	}
}

// Last returns the epoch opened last: until Seal that is the open one.
func (c *Counter) Last() *Epoch {
	if e := c.open.Load(); e != nil {
		return e
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last
}

// Taking reports whether ids are counted, which they are until Seal.
func (c *Counter) Taking() bool { return c.open.Load() != nil }

// Stats is a snapshot for the metrics.
type Stats struct {
	Unique   uint64 // answered as new, since the start of the process
	Repeats  uint64 // answered as already seen, since the start of the process
	Unclosed int    // epochs that have ended but are not published yet
	Skipped  uint64 // epochs that were not opened: the clock was set forward, or the process did not run
	Lost     int    // windows of the Past for which no record can be made
	Clock    Clock  // the wall clock, and pauses of the process
}

// Stats sums over the closed, the unclosed and the open epochs. Requests count while it reads,
// so the sums are not those of one instant; but they never fall.
func (c *Counter) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := Stats{
		Unique:   c.closed.unique,
		Repeats:  c.closed.repeats,
		Unclosed: len(c.turned),
		Skipped:  c.skipped.Load(),
		Lost:     len(c.cfg.Past.Lost),
		Clock:    c.clock.seen,
	}
	for _, e := range c.turned {
		if !e.recovered {
			s.Unique += e.Unique()
			s.Repeats += e.Repeats()
		}
	}
	if e := c.open.Load(); e != nil {
		s.Unique += e.Unique()
		s.Repeats += e.Repeats()
	}
	return s
}
