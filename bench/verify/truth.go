package main

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// truth is what the records must contain, according to the answers of a run.
// Connections report their answers in batches; the judge takes the windows at the end.
//
// Three promises are checked on the way, per window and per id:
//   - an id is answered `ok` at most once;
//   - an id is answered `failed` only if it was answered `ok` as well, to a
//     request that was already on its way, or a request for it is in doubt
//     (sent, never answered);
//   - a window whose successors are long open gets no more answers.
//
// One mutex guards everything. It is taken once per batch for some 50 ns an
// answer, a hundredth of what an answer costs over a socket; sharding it would
// buy nothing and make "never twice" a matter of argument.
type truth struct {
	mu      sync.Mutex
	windows map[int64]*windowTruth // by start, Unix milliseconds
	newest  []int64                // per target, the latest window answered
	doubts  []doubt                // all of the run, in the order in which they came
	expired int                    // the first ones, which cover only settled windows
	settled int64                  // windows before this one are settled
	mark    int64                  // the latest window at the previous settleOld
	ahead   int64                  // by how many milliseconds the server's clock is seen to lead

	// attempts are those with a lost request and no answer yet, by the number of their token.
	attempts map[uint64]*attempt
	span     int64 // length of a window, milliseconds: a token is good in the one that counted it and the next; 0: there are no tokens
	keys     *keys // under which ids are counted; nil: there are no keys

	grace     time.Duration
	strict    bool
	lenient   bool                  // a window whose record is not exact may not add up, or have an id ok twice
	clock     func(time.Time) int64 // the driver's, where it is not a test's: Unix milliseconds
	answers   uint64
	perTarget []uint64 // answers
	refused   uint64
	refusals  bitmap // ids that were refused, if lenient
	doubted   uint64
	lost      uint64 // replies that were not read, or thrown away
	replays   uint64
	aside     uint64 // attempts whose token was too old before they had an answer
	failed    uint64 // ids of a window that were answered `failed`, never `ok`, and may have counted
	faults    faults

	// waits are how long the first maxWaits refused requests took, of those that
	// were sent one at a time.
	waits []time.Duration
}

// maxWaits bounds what a server that refuses everything makes a run remember.
const maxWaits = 1 << 20

// grace is how long, in label time, a window stays open to late answers after
// its successor began: longer than any request may stay unanswered.
func newTruth(targets int, grace time.Duration, strict bool) *truth {
	return &truth{
		windows:   make(map[int64]*windowTruth),
		attempts:  make(map[uint64]*attempt),
		newest:    make([]int64, targets),
		perTarget: make([]uint64, targets),
		grace:     grace,
		strict:    strict,
		clock:     time.Time.UnixMilli,
		refusals:  bitmap{},
	}
}

// windowTruth is one window, according to the answers.
type windowTruth struct {
	start    int64
	accepted uint64
	repeated uint64
	twice    uint64 // of accepted, ids that were accepted before
	orphans  uint64 // ids answered `failed`, never `ok`, of which a request was refused: its instance may have been killed

	// Released when the window is settled. An answer `failed` may be read
	// before the `ok` that explains it, which another connection has yet to
	// read; early keeps when that happened, and there are few of them.
	ok    bitmap
	early map[uint64]time.Time

	// Set by settle. An id in doubt that was answered `failed` and never `ok`
	// must have been counted; one that was never answered may have been.
	settled     bool
	sure, maybe uint64

	keys map[int]*tally // by key; 0: ids without one. nil: there are no keys
}

// tally is a window's accepted, sure and maybe of one key.
type tally struct{ accepted, sure, maybe uint64 }

func (w *windowTruth) of(key int) *tally {
	if w.keys == nil {
		w.keys = make(map[int]*tally)
	}
	if w.keys[key] == nil {
		w.keys[key] = new(tally)
	}
	return w.keys[key]
}

// doubt is a request that was sent and never answered. It may have counted in
// any window from the newest one known when it was sent to the one that was
// open when the connection was known to be gone.
type doubt struct {
	id         uint64
	from, till int64
	over       bool // settled by the answer to a retry
}

// attempt is one with a token, of which requests were lost.
type attempt struct {
	doubts []int // in truth.doubts
	from   int64 // the earliest window that can have counted it
	okIn   int64 // an `ok` that was thrown away named this window; 0: none was
}

func (d doubt) covers(start int64) bool { return !d.over && d.from <= start && start <= d.till }

type kind uint8

const (
	answerOK kind = iota
	answerRepeat
	answerRefused
	answerUnplaced // ok or failed in a window that is not known, this one at the latest
)

type answer struct {
	id       uint64
	token    uint64
	window   int64
	kind     kind
	replayed bool
}

// record takes the answers that one connection to a target got to a batch that
// it had sent no earlier than the time given, and returns
// the latest window that this target has answered in: no request sent from now
// on can be judged in an earlier one.
func (t *truth) record(target int, sent time.Time, batch []answer) int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.perTarget[target] += uint64(len(batch))
	for _, a := range batch {
		t.answers++
		if a.kind != answerRefused {
			t.judged(target, sent, a)
			continue
		}
		t.refused++
		if t.lenient {
			t.refusals.set(a.id)
		}
		if len(batch) == 1 && len(t.waits) < maxWaits {
			t.waits = append(t.waits, time.Since(sent))
		}
	}
	return t.newest[target]
}

// judged takes an answer ok or failed. The caller holds mu.
//
// An attempt has one answer here, whatever was lost before: so an id that a window has
// `ok` twice, replayed or not, was counted for two attempts.
func (t *truth) judged(target int, sent time.Time, a answer) {
	if at := t.attempts[a.token]; at != nil {
		t.answered(at, a)
	}
	w := t.window(a.window)
	if w.settled {
		t.faults.add("late answer", "id #%d was judged in %s, long after that window ended", a.id, label(a.window))
		return
	}
	t.newest[target] = max(t.newest[target], a.window)
	failed, early := w.early[a.id]
	if a.kind == answerRepeat {
		w.repeated++
		if !early && !w.ok.has(a.id) {
			if w.early == nil {
				w.early = make(map[uint64]time.Time)
			}
			w.early[a.id] = time.Now()
		}
		return
	}
	w.accepted++
	if a.replayed {
		t.replays++
	}
	if t.keys != nil {
		w.of(t.keys.key(a.id)).accepted++
	}
	if w.ok.set(a.id) {
		if w.twice++; t.lenient {
			return // the judge, which has the records, decides
		}
		t.faults.add("ok twice", "id #%d was answered ok twice in %s", a.id, label(a.window))
	}
	if early && failed.Before(sent) && !a.replayed {
		t.faults.add("false duplicate", "id #%d was answered failed in %s and ok to a later request", a.id, label(a.window))
	}
}

func (t *truth) window(start int64) *windowTruth {
	w := t.windows[start]
	if w == nil {
		w = &windowTruth{start: start, ok: bitmap{}}
		// The first answer of a window can come after its time was settled.
		w.settled = start < t.settled
		if t.span > 0 && start%t.span != 0 {
			t.faults.add("protocol", "the window %s does not begin at a multiple of %dms: --window", label(start), t.span)
		}
		t.windows[start] = w
		t.ahead = max(t.ahead, start-t.clock(time.Now()))
	}
	return w
}

// answered ends an attempt of which requests were lost: it was counted in the window of
// the answer, or nowhere. The caller holds mu.
//
// A request that the driver gave up may still be judged, later than its retry: after
// `failed` it may count in a window that follows, after `ok` in one for which the token
// is too old.
func (t *truth) answered(at *attempt, a answer) {
	delete(t.attempts, a.token)
	if a.window > at.from+t.span {
		t.aside++ // a retry was judged after its token was good: it may have counted twice
		return
	}
	next := a.window + t.span
	if a.kind == answerOK {
		next += t.span
	}
	for _, i := range at.doubts {
		d := &t.doubts[i]
		if d.from = max(d.from, next); d.from > d.till {
			d.over = true
			t.doubted--
		}
	}
	if at.okIn != 0 && (a.kind != answerOK || !a.replayed || a.window != at.okIn) {
		t.faults.add("not replayed", "id #%d was answered ok in %s; its retry was answered %s, replayed: %t, in %s",
			a.id, label(at.okIn), [...]string{"ok", "failed"}[a.kind], a.replayed, label(a.window))
	}
}

// broken takes the ids that a connection to a target was still waiting for
// when it broke; from is what record returned before they were sent, and lag
// how much longer the server may work on them (nothing if it is the server
// that closed the connection). It sets their from, if there are tokens.
func (t *truth) broken(asks []ask, from int64, lag time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	till := t.clock(time.Now()) + t.ahead + lag.Milliseconds()
	for i := range asks {
		t.doubtful(&asks[i], from, till)
	}
	t.lost += uint64(len(asks))
}

// thrown takes the answer to a request that is asked again as if there had been none. from
// is what record returned before it was sent. It returns the earliest window that can have
// counted the attempt.
func (t *truth) thrown(a ask, got answer, from int64) int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lost++
	switch got.kind {
	case answerOK:
		t.doubtful(&a, got.window, got.window)
		if at := t.attempts[a.token]; at != nil {
			at.okIn = got.window
		}
	case answerRepeat:
		t.attempt(&a, got.window)
	case answerUnplaced:
		t.doubtful(&a, from, got.window)
	}
	return a.from
}

// doubtful notes that a request may have counted. mu is held.
func (t *truth) doubtful(a *ask, from, till int64) {
	if at := t.attempt(a, from); at != nil {
		at.doubts = append(at.doubts, len(t.doubts))
	}
	t.doubts = append(t.doubts, doubt{id: a.id, from: from, till: till})
	t.doubted++
}

// attempt returns the attempt of a request, none without a token. mu is held.
func (t *truth) attempt(a *ask, from int64) *attempt {
	if a.token == 0 {
		return nil
	}
	at := t.attempts[a.token]
	if at == nil {
		at = &attempt{from: from}
		t.attempts[a.token] = at
	}
	a.from = at.from
	return at
}

// setAside gives up an attempt: its token is too old to be asked again.
func (t *truth) setAside(token uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.attempts, token)
	t.aside++
}

// pending is the number of attempts with a lost request and no answer yet.
func (t *truth) pending() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.attempts)
}

func (t *truth) newestOf(target int) int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.newest[target]
}

func (t *truth) fault(what, format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.faults.add(what, format, args...)
}

// progress is the number of answers so far, refusals included.
func (t *truth) progress() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.answers
}

// answersOf is progress of one target.
func (t *truth) answersOf(target int) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.perTarget[target]
}

// settleOld settles the windows that no answer and no doubt can reach any more,
// so that a run of hours needs the memory of seconds. It goes by the labels it
// had seen at the previous call: after a suspend of this machine one connection
// may see a new label while another still has old answers in its buffer.
func (t *truth) settleOld() {
	t.mu.Lock()
	defer t.mu.Unlock()
	limit := t.mark - t.grace.Milliseconds()
	t.mark = slices.Min(t.newest) // one instance's clock may run behind another's
	starts := t.starts()
	for i, start := range starts {
		if i+1 == len(starts) || starts[i+1]+t.span > limit { // a replay names the window before
			break
		}
		if w := t.windows[start]; !w.settled {
			t.settle(w, t.doubts[t.expired:])
			t.settled = starts[i+1]
		}
	}
	for t.expired < len(t.doubts) && t.doubts[t.expired].till < t.settled {
		t.expired++
	}
}

// finish settles what is left and returns every window in order. Nothing may
// be recorded afterwards.
func (t *truth) finish() []*windowTruth {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]*windowTruth, 0, len(t.windows))
	for _, start := range t.starts() {
		w := t.windows[start]
		if !w.settled {
			t.settle(w, t.doubts[t.expired:])
		}
		all = append(all, w)
	}
	t.aside += uint64(len(t.attempts))
	clear(t.attempts)
	return all
}

// refusedWithin returns how long the given share of the refused requests took at
// most.
func (t *truth) refusedWithin(share float64) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.waits) == 0 {
		return 0
	}
	slices.Sort(t.waits)
	return t.waits[min(len(t.waits)-1, int(share*float64(len(t.waits))))]
}

func (t *truth) starts() []int64 { return slices.Sorted(maps.Keys(t.windows)) }

// settle draws the conclusions of a window: what the requests in doubt can
// have added to it, and which `failed` answers nothing explains.
func (t *truth) settle(w *windowTruth, doubts []doubt) {
	doubtful := bitmap{}
	for _, d := range doubts {
		if !d.covers(w.start) || doubtful.set(d.id) || w.ok.has(d.id) {
			continue
		}
		_, failed := w.early[d.id]
		w.maybe++
		if failed {
			w.sure++
		}
		if t.keys != nil && !t.strict {
			k := w.of(t.keys.key(d.id))
			if k.maybe++; failed {
				k.sure++
			}
		}
	}
	for id := range w.early {
		if w.ok.has(id) {
			continue
		}
		if !t.strict && doubtful.has(id) {
			t.failed++
			continue
		}
		if t.lenient && t.refusals.has(id) {
			w.orphans++
			t.failed++
			continue // the judge decides
		}
		t.faults.add("false duplicate", "id #%d was answered failed in %s and never ok", id, label(w.start))
	}
	if t.strict {
		w.sure, w.maybe = 0, 0
	}
	w.ok, w.early, w.settled = nil, nil, true
}

// unanswered is a window that was never named in an answer: ids in doubt may have
// counted there. Called after finish.
func (t *truth) unanswered(start int64) *windowTruth {
	w := &windowTruth{start: start}
	t.settle(w, t.doubts)
	return w
}

func label(start int64) string {
	return time.UnixMilli(start).UTC().Format("2006-01-02T15:04:05.999Z07:00")
}

// maxFaultLines bounds what a broken server can make a run remember and print;
// every fault is counted.
const maxFaultLines = 20

type faults struct {
	Count uint64            `json:"count"`
	Kinds map[string]uint64 `json:"kinds,omitempty"`
	Lines []string          `json:"lines,omitempty"`
}

func (f *faults) add(what, format string, args ...any) {
	f.Count++
	if f.Kinds == nil {
		f.Kinds = make(map[string]uint64)
	}
	f.Kinds[what]++
	if len(f.Lines) < maxFaultLines {
		f.Lines = append(f.Lines, what+": "+fmt.Sprintf(format, args...))
	}
}

// bitmap is a set of id numbers: pages of bits, because the ids of a window
// are a dense stretch of the number line plus a few repeats from before it.
// Not safe for concurrent use.
type bitmap map[uint64]*bitPage

// A page spans 2^15 ids in 4 KiB: at 100,000 ids a second a window of 50 ms
// fills a sixth of one, a window of a minute 183 of them.
const pageBits = 15

type bitPage [1 << pageBits / 64]uint64

// set adds an id and reports whether it was there.
func (b bitmap) set(id uint64) bool {
	page := b[id>>pageBits]
	if page == nil {
		page = new(bitPage)
		b[id>>pageBits] = page
	}
	word, bit := &page[id%(1<<pageBits)/64], uint64(1)<<(id%64)
	was := *word&bit != 0
	*word |= bit
	return was
}

func (b bitmap) has(id uint64) bool {
	page := b[id>>pageBits]
	return page != nil && page[id%(1<<pageBits)/64]&(1<<(id%64)) != 0
}
