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
	marked  time.Time              // when that was
	ahead   int64                  // by how many milliseconds the server's clock is seen to lead

	// attempts are those with a lost request and no answer yet, by the number of their token.
	attempts map[uint64]*attempt
	span     int64 // length of a window, milliseconds: a token is good in the one that counted it and the next; 0: there are no tokens
	keys     *keys // under which ids are counted; nil: there are no keys

	grace     time.Duration
	strict    bool
	lenient   bool                  // a window whose record is not exact may not add up, or have an id ok twice
	clock     func(time.Time) int64 // the driver's, where it is not a test's: Unix milliseconds
	perTarget []uint64              // answers
	refusals  bitmap                // ids that were refused, if lenient
	totals    totals
	faults    faults

	// waits are how long the first maxWaits refused requests took, of those that
	// were sent one at a time, ms.
	waits []float64
}

// totals are the sums over a run.
type totals struct {
	Answers    uint64 `json:"answers"`
	Refused    uint64 `json:"refused"`
	Doubted    uint64 `json:"in_doubt"`    // requests that were never answered
	Lost       uint64 `json:"lost"`        // replies that were not read, thrown away, or broken off
	Replayed   uint64 `json:"replayed"`    // of ok, answers to retries
	Aside      uint64 `json:"set_aside"`   // attempts whose token was too old before they had an answer
	OnlyFailed uint64 `json:"only_failed"` // ids of a window that were answered `failed`, never `ok`, and may have counted
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
		marked:    time.Now(),
		refusals:  bitmap{},
	}
}

// tally is what the answers say of a count: of a window, or of a key in it.
type tally struct {
	Accepted uint64 `json:"ok"`

	// Set when the window is settled. An id in doubt that was answered `failed` and never
	// `ok` must have been counted; one that was never answered may have been.
	Sure  uint64 `json:"in_doubt_and_counted"`
	Maybe uint64 `json:"in_doubt"`
}

// doubt adds an id of which a request is in doubt.
func (t *tally) doubt(failed bool) {
	if t.Maybe++; failed {
		t.Sure++
	}
}

func (t tally) least() uint64 { return t.Accepted + t.Sure }

func (t tally) most() uint64 { return t.Accepted + t.Maybe }

func (t tally) allows(count uint64) bool { return t.least() <= count && count <= t.most() }

// windowTruth is one window, according to the answers.
type windowTruth struct {
	tally
	Repeated uint64 `json:"failed"`

	start   int64
	twice   uint64 // of Accepted, ids that were accepted before
	orphans uint64 // ids answered `failed`, never `ok`, of which a request was refused: its instance may have been killed

	// Released when the window is settled. An answer `failed` may be read
	// before the `ok` that explains it, which another connection has yet to
	// read; early keeps when that happened, and there are few of them.
	ok    bitmap
	early map[uint64]time.Time

	settled bool

	keys map[int]*tally // by key; 0: ids without one. nil: there are no keys
}

// ofKey is the tally of an id's key.
func (w *windowTruth) ofKey(keys *keys, id uint64) *tally {
	_, key := keys.of(id)
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
	from, till int64 // none if from is the later one: the answer to a retry has settled it
}

// attempt is one with a token, of which requests were lost.
type attempt struct {
	doubts []int // in truth.doubts
	from   int64 // the earliest window that can have counted it
	okIn   int64 // an `ok` that was thrown away named this window; 0: none was
}

func (d doubt) covers(start int64) bool { return d.from <= start && start <= d.till }

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

// record takes the answers, if any, that one connection to a target got to a batch that it had
// sent no earlier than the time given. It returns the latest window that this target has
// answered in: no request sent from now on can be judged in an earlier one.
func (t *truth) record(target int, sent time.Time, batch []answer) int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.perTarget[target] += uint64(len(batch))
	for _, a := range batch {
		t.totals.Answers++
		if a.kind != answerRefused {
			t.judged(target, sent, a)
			continue
		}
		t.totals.Refused++
		if t.lenient {
			t.refusals.set(a.id)
		}
		if len(batch) == 1 && len(t.waits) < maxWaits {
			t.waits = append(t.waits, float64(time.Since(sent))/float64(time.Millisecond))
		}
	}
	if time.Since(t.marked) > settleEvery {
		t.settleOld()
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
		w.Repeated++
		if !early && !w.ok.has(a.id) {
			if w.early == nil {
				w.early = make(map[uint64]time.Time)
			}
			w.early[a.id] = time.Now()
		}
		return
	}
	w.Accepted++
	if a.replayed {
		t.totals.Replayed++
	}
	if t.keys != nil {
		w.ofKey(t.keys, a.id).Accepted++
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
		t.totals.Aside++ // a retry was judged after its token was good: it may have counted twice
		return
	}
	next := a.window + t.span
	if a.kind == answerOK {
		next += t.span
	}
	for _, i := range at.doubts {
		d := &t.doubts[i]
		if d.from = max(d.from, next); d.from > d.till {
			t.totals.Doubted--
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
	t.totals.Lost += uint64(len(asks))
}

// thrown takes the answer to a request that is asked again as if there had been none. from
// is what record returned before it was sent. It returns the earliest window that can have
// counted the attempt.
func (t *truth) thrown(a ask, got answer, from int64) int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.totals.Lost++
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
	t.totals.Doubted++
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
	t.totals.Aside++
}

// pending is the number of attempts with a lost request and no answer yet.
func (t *truth) pending() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.attempts)
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
	return t.totals.Answers
}

// answersOf is progress of one target.
func (t *truth) answersOf(target int) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.perTarget[target]
}

// settleEvery is how often the windows are looked through for old ones.
const settleEvery = time.Second

// settleOld settles the windows that no answer and no doubt can reach any more,
// so that a run of hours needs the memory of seconds. It goes by the labels it
// had seen at the previous call: after a suspend of this machine one connection
// may see a new label while another still has old answers in its buffer. The caller
// holds mu.
func (t *truth) settleOld() {
	limit := t.mark - t.grace.Milliseconds()
	t.mark, t.marked = slices.Min(t.newest), time.Now() // one instance's clock may run behind another's
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
	t.totals.Aside += uint64(len(t.attempts))
	clear(t.attempts)
	return all
}

func (t *truth) starts() []int64 { return slices.Sorted(maps.Keys(t.windows)) }

// settle draws the conclusions of a window: what the requests in doubt can
// have added to it, and which `failed` answers nothing explains.
func (t *truth) settle(w *windowTruth, doubts []doubt) {
	if t.strict {
		doubts = nil
	}
	doubtful := bitmap{}
	for _, d := range doubts {
		if !d.covers(w.start) || doubtful.set(d.id) || w.ok.has(d.id) {
			continue
		}
		_, failed := w.early[d.id]
		w.doubt(failed)
		if t.keys != nil {
			w.ofKey(t.keys, d.id).doubt(failed)
		}
	}
	for id := range w.early {
		switch {
		case w.ok.has(id): // which explains it
		case doubtful.has(id):
			t.totals.OnlyFailed++
		case t.lenient && t.refusals.has(id): // the judge decides
			w.orphans++
			t.totals.OnlyFailed++
		default:
			t.faults.add("false duplicate", "id #%d was answered failed in %s and never ok", id, label(w.start))
		}
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
