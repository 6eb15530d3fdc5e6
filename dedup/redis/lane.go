package redis

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"verve/counter"
	"verve/dedup"
)

const (
	// Lanes are the parts the ids are spread over, each with a batcher here and a
	// hash slot there. Sixteen keep the masters of a cluster evenly busy. One
	// server does one thing at a time anyhow, and of few lanes the batches are
	// larger: with 16 it takes half as many ids a second, and with 2 a tenth more
	// CPU an id than with one (BenchmarkShared).
	clusterLanes = 16
	serverLanes  = 1

	// batchSize bounds a batch, and so the time Redis does nothing else: 512 ids
	// take it some 0.5 ms.
	batchSize = 512

	// fewIDs bounds the batches that few of function.lua adds one id at a time. With 4 it
	// took half of what batch takes, with 8 of them somewhat more than adding all at once.
	fewIDs = 8

	// maxSpares bounds the entries that a lane keeps for reuse.
	maxSpares = 4 * batchSize

	// A batch is held for holdMost ids at most, as of larger ones an id costs hardly less,
	// and for holdTime at most. After holds in a row that were in vain 0, 1, 2, 4 and in the
	// end holdRest batches are not held.
	holdMost = 64
	holdTime = time.Millisecond
	holdRest = 32

	// ackDelay is how long the ids of a last batch may stay in doubt for others
	// when nothing follows it.
	ackDelay = 5 * time.Millisecond

	// layout numbers the form of all data in Redis, that of the lanes and of the ledger. It
	// counts up with every change of a key or of what is in one (DESIGN.md, "The group").
	// Instances with another one refuse each other: see agreedLanes.
	layout = 3

	// laneBeat is how soon a silent lane notices a loss, and says that the
	// session lives.
	laneBeat = time.Second

	// noteTime is how often a batch has Redis note when the session was heard. It
	// costs Redis a command more.
	noteTime = laneBeat / 2

	// Attempts that fail wait between these, doubling.
	minRetry = 2 * time.Millisecond
	maxRetry = 250 * time.Millisecond

	// holdRetry is the wait where Redis asks for patience.
	holdRetry = 10 * time.Millisecond

	// missingFor is how long keys may be missing before they are taken for lost:
	// longer than a slot takes to move.
	missingFor   = 5 * time.Second
	missingPause = time.Second

	// seqSkip leaves behind, after a loss, every sequence that a batch still on
	// its way can have.
	seqSkip = 1000

	// idsTTL is how many seconds ids live that nobody seals: a week.
	idsTTL = "604800"

	// refillFor is how many seconds an epoch that lost ids admits no new ones after
	// somebody has added some again: others may still have to find out.
	refillFor = "1.5"
)

// laneTags choose hash slots evenly: slot 512 + 1024 i for the i-th.
var laneTags = [clusterLanes]string{
	"04s", "003", "pt6", "4x6", "0ay", "0e9", "4mt", "4i4",
	"265", "22u", "c0h", "6zp", "gio", "5f", "6o2", "6kr",
}

// lane is one part of the ids: what of them waits for an answer, and the batch
// that is under way. One batch at a time, each with the next sequence of this
// session: a batch sent again is recognised by it, whatever became of the reply.
type lane struct {
	r    *Set
	i    int
	key  string // of the lane's hash; the prefix of all others
	wake chan struct{}

	mu      sync.Mutex // guards what follows
	pending pendingIDs
	queue   []*entry // to be sent, oldest first
	doubt   []*entry // in doubt for this session: to be sent again, a moment later
	untold  []*entry // added, but all their requests got 503: to be removed
	oldest  *ask     // those who wait, by the time they began
	newest  *ask
	job     *job // under way
	down    bool // no new ids: the last attempts failed for longer than a request waits
	failing int64
	err     error
	lost    []*redisEpoch // to be added again from the log
	asked   []*question
	closed  bool
	want    int // the next batch is held until so many ids wait

	// Requests that are answered and not woken yet, the first and the last.
	woken, lastWoken *ask

	// seq is that of the last batch that was done. run alone changes it, and so
	// may read it without mu.
	seq uint64

	// What batches leave behind for the next ones, which then allocate little.
	spare   *entry   // chained
	spares  int      // of them
	entries []*entry // empty
	packed  []byte

	// run alone uses these.
	held    time.Time                       // until when the next batch is held at most
	rest    int                             // batches that are not to be held
	missed  int                             // rest after the next hold, if it is in vain
	ticked  int64                           // when the last batch was sent that noted the time
	unacked bool                            // ids of the last batch are in doubt for others
	losses  map[*redisEpoch]uint64          // heard of, not mended yet: what came after a batch, or all
	missing struct{ first, last time.Time } // that keys were found to be, without a pause
	timer   *time.Timer
}

type pendingKey struct {
	epoch *redisEpoch
	id    dedup.Key
}

// laneEpoch is what a lane knows of an epoch. The lane's mu guards it.
type laneEpoch struct {
	gen     string        // of the epoch in Redis, as last heard
	n       atomic.Uint64 // ids in it, as last heard
	sealed  bool
	retired bool
	lost    bool // to be added again
	log     replayLog

	// tokens of the ids that this process has answered as new, with fail open.
	tokens map[token]struct{}

	base       uint64 // no later batch was sent before the epoch was opened
	tokensLost bool   // Redis may have lost tokens of the window before
	took       uint64 // the last batch that took ids back
}

// entry is an id that waits for its outcome.
type entry struct {
	state
	key   pendingKey
	enc   encoded
	named *named // what the request named that it is sent for; nil: nothing
	seq   uint64 // of the batch that added it, where it is untold or taking
	asks  []*ask // those who wait, in the order in which they began; also those of another attempt
	chain *entry // of pendingIDs, or of what is spare
}

// ask is a request that waits for the outcome of an entry.
type ask struct {
	of         *entry
	named      *named
	e          *counter.Epoch
	at         int64 // ns since the start of the Set
	enough     bool  // the lane is to send what waits
	prev, next *ask  // by time; next is also the next to be woken

	verdict dedup.Verdict
	err     error
	done    chan struct{} // capacity 1; verdict and err are there
}

var asks = sync.Pool{New: func() any { return &ask{done: make(chan struct{}, 1)} }}

// question is a caller that waits for an answer of a lane about an epoch.
type question struct {
	epoch *redisEpoch
	done  chan error // with room for the answer
}

// job is a batch. Once its outcome is unknown it is sent until it is known.
type job struct {
	mode    string
	epoch   *redisEpoch
	entries []*entry // by kind
	lists   lists    // of the ids of the entries, or of the log
	bytes   int      // of the log, where it is a replay
	asked   []*question
	unknown bool
	overdue bool // a request that waits for it will soon get 503
}

// Modes of a batch, as in function.lua.
const (
	modeAdd    = "a"
	modeLook   = "l"
	modeTake   = "r"
	modeReplay = "p"
	modeLocal  = "f"
	modeBeat   = "b"
)

func (l *lane) init(r *Set, i int) {
	l.r, l.i = r, i
	l.key = "verve:{" + laneTags[i] + "}:" + r.cfg.Group + ":lane" + strconv.Itoa(layout)
	l.wake = make(chan struct{}, 1)
	l.losses = map[*redisEpoch]uint64{}
}

// nudge wakes the goroutine that receives from wake, now or next time. Its capacity is 1.
func nudge(wake chan<- struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}

// add asks the lane about an id. It returns the outcome, or an ask whose outcome is to
// be waited for: the caller then nudges the lane.
func (l *lane) add(e *counter.Epoch, s *redisEpoch, k dedup.Key, enc *encoded, m *named) (dedup.Verdict, *ask, error) {
	r := l.r
	key := pendingKey{s, k}
	now := r.now.Load()
	l.mu.Lock()
	en := l.pending.find(key)
	switch le := &s.lanes[l.i]; {
	case l.closed:
		l.mu.Unlock()
		return 0, nil, dedup.ErrUnavailable
	case le.sealed || now > s.end+int64(keepSeal(r.cfg.Window))/2:
		l.mu.Unlock()
		return dedup.Turned, nil, nil
	case en != nil && en.phase == untold && sameAttempt(en.named, m):
		l.tell(e, en)
		l.unlock()
		return dedup.Unique, nil, nil
	case en != nil && en.alone:
		l.mu.Unlock()
		return s.again(l.i, en.named, m), nil, nil
	case s.refused.Load() || r.ledger.standing.Load() == outside:
		l.mu.Unlock()
		return 0, nil, errOutside
	case l.down || r.health.refused.Load():
		v, err := l.decideAlone(e, key, en, enc, m)
		l.mu.Unlock()
		return v, nil, err
	case en == nil:
		if r.pending.Add(1) > int64(r.cfg.pending) {
			r.pending.Add(-1)
			l.mu.Unlock()
			return 0, nil, errPending
		}
		en = l.enter(key, enc, m)
	}
	a := asks.Get().(*ask)
	a.of, a.e, a.at, a.named = en, e, now, m
	l.enlist(a)
	a.enough = len(l.queue) >= l.want
	l.mu.Unlock()
	return 0, a, nil
}

// enter queues an entry for an id. l.mu is held.
func (l *lane) enter(key pendingKey, enc *encoded, m *named) *entry {
	en := l.spare
	if en != nil {
		l.spare, en.chain = en.chain, nil
		l.spares--
	} else {
		en = new(entry)
	}
	en.key, en.enc, en.named, en.state = key, *enc, m, state{}
	l.pending.add(en)
	l.queue = append(l.queue, en)
	return en
}

// reuse takes back an entry that is settled and in no list, and that nobody waits
// for. l.mu is held.
func (l *lane) reuse(en *entry) {
	if l.spares < maxSpares {
		en.key.epoch, en.named = nil, nil
		l.spare, en.chain = en, l.spare
		l.spares++
	}
}

// unlock lets go of l.mu and wakes those who were answered meanwhile. They would
// run into the lock if it were still held.
func (l *lane) unlock() {
	a := l.awake()
	l.mu.Unlock()
	wake(a)
}

// awake takes those who were answered out of the lane, to be woken. l.mu is held.
func (l *lane) awake() *ask {
	a := l.woken
	l.woken, l.lastWoken = nil, nil
	return a
}

func wake(a *ask) {
	for a != nil {
		next := a.next // a is not ours any more once it is woken
		a.done <- struct{}{}
		a = next
	}
}

var errOutside = fmt.Errorf("%w: the group uses another --window", dedup.ErrUnavailable)

var errPending = fmt.Errorf("%w: too many ids wait for Redis", dedup.ErrUnavailable)

// tell takes an entry off untold, the ids that were added while all their requests got 503:
// the request that sends it again gets Unique. l.mu is held.
func (l *lane) tell(e *counter.Epoch, en *entry) {
	i := slices.Index(l.untold, en)
	l.untold = slices.Delete(l.untold, i, i+1)
	l.step(en, eventAskedAgain, e)
}

// now is the state of the entry, with what depends on its requests.
func (en *entry) now() state {
	s := en.state
	s.token = en.named.hasToken()
	switch {
	case len(en.asks) == 0:
		s.waiting = noRequest
	case slices.ContainsFunc(en.asks, func(a *ask) bool { return sameAttempt(en.named, a.named) }):
		s.waiting = itsAttempt
	default:
		s.waiting = otherAttempts
	}
	return s
}

// step has an entry take the step that an event makes it take, and carries out the
// effects. e is the epoch of the request that the event is of; nil: of the first that
// waits. l.mu is held.
func (l *lane) step(en *entry, ev event, e *counter.Epoch) {
	r, s, was := l.r, en.key.epoch, en.state
	next, fx := en.now().on(ev)
	en.state = next
	if next.doubted && !was.doubted {
		r.ledger.uncertain(s.admission, 1)
	} else if was.doubted && !next.doubted {
		r.ledger.uncertain(s.admission, -1)
	}
	if next.phase == settled && was.phase != settled {
		l.pending.remove(en)
		r.pending.Add(-1)
	}
	switch fx.log {
	case asTaken:
		s.lanes[l.i].applied(r, l.seq, en)
	case asUnsent:
		s.lanes[l.i].log.unsent(r, logged(&en.enc, en.named))
		l.flush(s)
	}
	if fx.known {
		if e == nil {
			e = en.asks[0].e
		}
		l.known(e, en.key)
	}
	switch fx.place {
	case inQueue:
		l.queue = append(l.queue, en)
	case inDoubtful:
		l.doubt = append(l.doubt, en)
	case inUntold:
		l.untold = append(l.untold, en)
	}
	switch fx.to {
	case attemptAnswered, thereAnswered:
		l.conclude(en, fx.first, fx.then, fx.to == thereAnswered)
	case allAnswered:
		l.answerAll(en, fx.first, fx.err)
	}
}

// decideAlone answers without Redis: with fail open from Local, else with a refusal. en is
// what is under way for the id, or nil.
// l.mu is held.
func (l *lane) decideAlone(e *counter.Epoch, key pendingKey, en *entry, enc *encoded, m *named) (dedup.Verdict, error) {
	r, s := l.r, key.epoch
	if !r.cfg.FailOpen {
		if en != nil {
			l.step(en, eventRefusal, nil)
		}
		return dedup.Repeat, r.unavailable()
	}
	if v, known := s.replayed(l.i, m); known {
		return v, nil
	}
	le := &s.lanes[l.i]
	switch {
	case !le.log.room(r):
		return dedup.Repeat, errLog
	case en != nil && en.phase != queued && en.phase != settled && !sameAttempt(en.named, m) && !r.cfg.Local.Knows(s.view, key.id):
		return dedup.Repeat, r.unavailable() // another attempt is under way, which may count the id
	}
	v, err := r.cfg.Local.Learn(e, s.view, key.id)
	switch {
	case err != nil || v != dedup.Unique:
		return v, err
	case en == nil:
		le.log.unsent(r, logged(enc, m))
		l.flush(s)
	default:
		if en.phase == queued {
			en.named = m
		}
		l.step(en, eventAnsweredAlone, nil)
	}
	le.answered(r, m)
	return dedup.Unique, nil
}

var errLog = fmt.Errorf("%w: the log of ids that Redis lacks is full", dedup.ErrUnavailable)

// known makes a repeat of the id cost no trip. l.mu is held, so that a request that no
// longer finds the id pending finds it in Local.
func (l *lane) known(e *counter.Epoch, key pendingKey) {
	_, _ = l.r.cfg.Local.Learn(e, key.epoch.view, key.id) // an id without room takes a trip next time
}

// enlist adds a to those who wait. l.mu is held.
func (l *lane) enlist(a *ask) {
	a.next, a.prev = nil, l.newest
	if l.newest != nil {
		l.newest.next = a
	} else {
		l.oldest = a
	}
	l.newest = a
	a.of.asks = append(a.of.asks, a)
}

// answer ends the waiting of a when unlock releases l.mu. Its entry no longer refers to
// it. l.mu is held.
func (l *lane) answer(a *ask, v dedup.Verdict, err error) {
	if a.prev != nil {
		a.prev.next = a.next
	} else {
		l.oldest = a.next
	}
	if a.next != nil {
		a.next.prev = a.prev
	} else {
		l.newest = a.prev
	}
	a.verdict, a.err = v, err
	a.next, a.prev = nil, nil
	if l.lastWoken != nil {
		l.lastWoken.next = a
	} else {
		l.woken = a
	}
	l.lastWoken = a
}

// answerAll answers every request that waits for en, also those of other attempts. l.mu
// is held.
func (l *lane) answerAll(en *entry, v dedup.Verdict, err error) {
	for _, a := range en.asks {
		l.answer(a, v, err)
	}
	en.asks = en.asks[:0]
}

// conclude answers the attempt that en, which is settled, was sent for: the first request
// that waits with first, and the others with then. there: the id is in the epoch, so a
// request without a token is a repeat. Other attempts are sent on their own. l.mu is held.
func (l *lane) conclude(en *entry, first, then dedup.Verdict, there bool) {
	v := first
	var others []*ask
	for _, a := range en.asks {
		switch {
		case sameAttempt(en.named, a.named):
			l.answer(a, v, nil)
			v = then
		case there && !a.named.hasToken():
			l.answer(a, dedup.Repeat, nil)
		default:
			others = append(others, a)
		}
	}
	en.asks = en.asks[:0]
	if len(others) == 0 {
		return
	}
	l.r.pending.Add(1)
	on := l.enter(en.key, &en.enc, others[0].named)
	on.asks = others
	for _, a := range others {
		a.of = on
	}
	nudge(l.wake)
}

// expire answers those who have waited for too long, and notices that the job
// under way has.
func (l *lane) expire(now int64) {
	l.mu.Lock()
	defer l.unlock()
	if j := l.job; j != nil && !j.overdue && l.oldest != nil && now-l.oldest.at >= int64(l.r.cfg.Timeout)/2 {
		j.overdue = true // the group is to know before the first is refused
		l.stepAll(j.entries, eventOverdue)
	}
	for a := l.oldest; a != nil && now-a.at >= int64(l.r.cfg.Timeout); a = l.oldest {
		en := a.of
		if l.failing == 0 && l.job != nil {
			l.failing = a.at // no error yet, and no answer either
		}
		en.asks = en.asks[1:] // a is the first of them: they began in this order
		v, err, what := dedup.Repeat, error(nil), eventAnsweredBeside
		if en.alone { // answered as new to another request
			v = en.key.epoch.again(l.i, en.named, a.named)
		} else if l.r.cfg.FailOpen {
			v, err = l.decideAlone(a.e, en.key, en, &en.enc, a.named)
		} else {
			err, what = l.r.unavailable(), eventRefusal
		}
		l.answer(a, v, err)
		if l.step(en, what, nil); en.phase == settled { // decided here: for the others it is a repeat
			for _, b := range en.asks {
				l.answer(b, en.key.epoch.again(l.i, a.named, b.named), nil)
			}
			en.asks = en.asks[:0]
		}
	}
	if l.failing != 0 && now-l.failing >= int64(l.r.cfg.Timeout)/2 {
		l.down = true
	}
}

// refuseAll answers everybody, at the end.
func (l *lane) refuseAll() {
	l.mu.Lock()
	defer l.unlock()
	l.closed = true
	for l.oldest != nil {
		en := l.oldest.of
		l.answerAll(en, dedup.Repeat, dedup.ErrUnavailable)
	}
	for _, q := range l.asked {
		q.done <- dedup.ErrUnavailable
	}
	l.asked = nil
}

// run sends batches until Close, and then until nothing is left open.
func (l *lane) run() {
	l.timer = time.NewTimer(laneBeat)
	defer l.timer.Stop()
	wait := minRetry
	for {
		j := l.pick()
		if j == nil {
			if !l.idle() {
				break
			}
			continue
		}
		sent := time.Now()
		switch pause := l.perform(j, wait); {
		case pause < 0: // done
			wait = minRetry
			l.rouse(time.Since(sent))
		case !l.sleep(pause):
			return // closing took too long
		default:
			wait = min(2*wait, maxRetry)
		}
	}
	l.r.call(l.r.life, l.key, "bye", l.r.cfg.session)
}

// rouse wakes those whom a batch has answered that took trip.
func (l *lane) rouse(trip time.Duration) {
	l.mu.Lock()
	woken, full := l.awake(), len(l.queue) >= batchSize
	held := l.hold(woken, trip)
	l.mu.Unlock()
	if full {
		// The next batch will not get larger: Redis is to have it meanwhile.
		l.r.running.Go(func() { wake(woken) })
		return
	}
	wake(woken)
	if held {
		return
	}
	// They come first, with their next ids: the next batch is half as large without.
	// Where nothing else is to be run this takes no time.
	runtime.Gosched()
}

// hold has the next batch wait for those whom this one has answered, which took trip: most
// clients ask again at once. Without it those of a few connections stay divided in two
// halves, each waiting while the other is under way. l.mu is held.
func (l *lane) hold(answered *ask, trip time.Duration) bool {
	if l.rest > 0 {
		l.rest--
		return false
	}
	n := len(l.queue)
	for a := answered; a != nil && n <= holdMost; a = a.next {
		n++
	}
	if n < 2 || n > holdMost || answered == nil {
		return false
	}
	l.want, l.held = n, time.Now().Add(min(2*trip, holdTime))
	return true
}

// idle waits for something to do. It returns false when the lane is to end.
func (l *lane) idle() bool {
	l.mu.Lock()
	select {
	case <-l.r.closing:
		held := l.want > 0
		l.want = 0 // what waits is sent first
		l.mu.Unlock()
		return held
	default:
	}
	d := laneBeat
	switch {
	case l.want > 0:
		d = time.Until(l.held)
	case l.failing != 0:
		d = maxRetry
	case l.seq == 0:
		d = minRetry // Redis is to have the session before the group counts on it
	case l.unacked:
		d = ackDelay
	case len(l.doubt) > 0:
		d = minRetry
	}
	held := l.want > 0
	l.mu.Unlock()
	l.timer.Reset(d)
	select {
	case <-l.wake:
	case <-l.r.closing:
	case <-l.timer.C:
		l.mu.Lock()
		if held { // in vain
			l.want, l.rest = 0, l.missed
			l.missed = min(max(1, 2*l.missed), holdRest)
		} else if len(l.doubt) > 0 {
			l.queue = append(l.queue, l.doubt...)
			l.doubt = l.doubt[:0]
		} else if l.job == nil {
			l.job = l.beat()
		}
		l.mu.Unlock()
	}
	return true
}

// beat is the batch that says that the session lives. l.mu is held.
func (l *lane) beat() *job {
	s := l.r.latest.Load()
	if s == nil {
		return nil
	}
	return &job{mode: modeBeat, epoch: s}
}

// sleep waits for d. It returns false if Close has given up waiting.
func (l *lane) sleep(d time.Duration) bool {
	l.timer.Reset(d)
	select {
	case <-l.timer.C:
		return true
	case <-l.r.life.Done():
		return false
	}
}

// pick returns the next batch: first the one under way, then what a loss makes
// necessary, then what must be taken back, then whatever waits.
func (l *lane) pick() *job {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.job == nil {
		l.job = l.choose()
	}
	return l.job
}

// choose makes the next batch. l.mu is held.
func (l *lane) choose() *job {
	if len(l.lost) > 0 {
		s := l.lost[0]
		le := &s.lanes[l.i]
		if le.retired || le.sealed || !le.lost && le.log.left() == 0 {
			l.lost = slices.Delete(l.lost, 0, 1)
			return l.choose()
		}
		j := &job{mode: modeLocal, epoch: s}
		if le.lost {
			j.mode = modeReplay
		}
		j.lists, j.bytes = le.log.next(batchSize)
		return j
	}
	if len(l.untold) > 0 {
		j := &job{mode: modeTake, epoch: l.untold[0].key.epoch}
		l.untold = l.fill(j, l.untold, eventWithdrawn, taking)
		return j
	}
	if l.failing == 0 {
		l.down = false
	}
	if len(l.doubt) > 0 && len(l.queue) > 0 {
		l.queue = append(l.queue, l.doubt...)
		l.doubt = l.doubt[:0]
	}
	if len(l.queue) < l.want {
		return nil
	}
	if l.want > 0 {
		l.want, l.missed = 0, 0
	}
	if i := slices.IndexFunc(l.queue, func(en *entry) bool { return en.phase != settled }); i >= 0 {
		j := &job{mode: modeAdd, epoch: l.queue[i].key.epoch}
		l.queue = l.fill(j, l.queue, eventSent, flying)
		return j
	}
	l.queue = l.queue[:0]
	if len(l.asked) > 0 {
		j := &job{mode: modeBeat, epoch: l.asked[0].epoch}
		l.asked = slices.DeleteFunc(l.asked, func(q *question) bool {
			if q.epoch == j.epoch {
				j.asked = append(j.asked, q)
			}
			return q.epoch == j.epoch
		})
		return j
	}
	return nil // where the last attempt failed, idle sends a beat to find out
}

// fill moves entries of the job's epoch into it and returns the rest. They enter the phase
// by the event, which has no effects. l.mu is held.
func (l *lane) fill(j *job, from []*entry, ev event, to phase) []*entry {
	size := batchSize
	if limit := l.r.cfg.MaxIDs; limit > 0 && j.mode == modeAdd {
		// Near the limit the lanes add little at a time, at it they only look.
		left := limit - min(limit, j.epoch.live())
		if left == 0 {
			j.mode = modeLook
		}
		size = int(min(uint64(size), max(1, left/uint64(len(l.r.lanes)))))
	}
	var counts [len(kinds) + 1]int
	n, taken := 0, 0
	for n < len(from) && taken < size {
		en := from[n]
		if en.phase != settled {
			if en.key.epoch != j.epoch {
				break
			}
			if en.state, _ = en.state.on(ev); to == flying && len(en.asks) > 0 {
				en.named = en.asks[0].named // the request that it was made for may be gone
			}
			counts[en.list()]++
			taken++
		}
		n++
	}
	j.entries, l.entries = l.entries, nil
	for k, count := range counts {
		if count == 0 {
			continue
		}
		l.packed = l.packed[:0]
		for _, en := range from[:n] {
			if en.phase == to && en.list() == k {
				j.entries = append(j.entries, en)
				l.packed = appendPacked(l.packed, logged(&en.enc, en.named))
			}
		}
		j.lists[k] = string(l.packed)
	}
	return slices.Delete(from, 0, n)
}

// perform sends the job once. It returns how long to wait before the next
// attempt, or less than 0 where the job is done or given up.
func (l *lane) perform(j *job, wait time.Duration) time.Duration {
	le := &j.epoch.lanes[l.i]
	l.mu.Lock()
	gen := le.gen
	whole, tokensLost := flag(!le.log.cut), flag(le.tokensLost)
	l.mu.Unlock()
	if err := l.r.await(j.epoch); err != nil && j.mode == modeAdd && !j.unknown {
		return l.failed(j, errRefused{err}, wait)
	}
	l.r.counts.batches.Add(1)
	now, tick := l.r.now.Load(), "0"
	switch {
	case j.epoch.doubts.Load() > 0:
		tick = "2"
	case now-l.ticked > int64(noteTime) || len(j.asked) > 0:
		tick = "1"
	}
	args := append(make([]string, 0, 19), opBatch, l.r.cfg.session, strconv.FormatUint(l.seq+1, 10), j.mode, j.epoch.key, gen, idsTTL)
	if k := j.lists.only(); tick == "0" && j.mode == modeAdd && k >= 0 && len(j.entries) <= fewIDs {
		args = append(args, kindNumbers[k:k+1], j.lists[k])
	} else {
		args = append(args, refillFor, whole, tick, j.lists[0], j.lists[1], j.lists[2], j.lists[3])
	}
	if j.lists[namedIDs] != "" {
		args = append(args, j.lists[namedIDs], j.epoch.before, j.epoch.after, strconv.Itoa(l.r.cfg.MaxKeys), tokensLost)
	}
	a, err := l.r.call(l.r.life, l.key, args...)
	if err != nil {
		l.r.counts.retries.Add(1)
		var refused errRefused
		if !errors.As(err, &refused) {
			j.unknown = true
		}
		return l.failed(j, err, wait)
	}
	l.succeeded()
	if a.status == statusNew {
		a.status, a.codes, a.gen = statusOK, allNew[:len(j.entries)], gen
	}
	switch a.status {
	case statusOK:
		if tick != "0" {
			l.ticked = now
		}
		l.unacked = j.mode == modeAdd
		clear(l.losses) // where there was one, a server without it has come back
		l.resolve(j, a)
		return -1
	case statusSealed:
		l.turn(j)
		return -1
	case statusGap, statusOld, statusLost:
		return l.recover(j, a, wait)
	case statusMissing:
		// Batches that need none of those keys are answered in between.
		if now := time.Now(); now.Sub(l.missing.last) > missingPause {
			l.missing.first, l.missing.last = now, now
		} else if l.missing.last = now; now.Sub(l.missing.first) > missingFor {
			if _, err := l.r.call(l.r.life, l.key, "reset", j.epoch.key, gen); err != nil {
				return l.failed(j, err, wait)
			}
			l.missing.first = now
		}
		l.r.health.note(l.r, "keys of the open window are missing in Redis, or on the move to another node: ids wait")
		l.dissolve(j)
		return holdRetry
	case statusHold:
		l.r.health.note(l.r, "ids lost in Redis are being added again: new ones wait")
		l.dissolve(j)
		return holdRetry
	}
	j.unknown = true
	return l.failed(j, errors.New("unexpected answer "+a.status), wait)
}

// allNew are the codes of a batch in which all ids are new.
var allNew = strings.Repeat("1", batchSize)

// failed notes that an attempt failed.
func (l *lane) failed(j *job, err error, wait time.Duration) time.Duration {
	l.r.health.failed(l.r, err)
	l.noteFailure(err)
	l.dissolve(j)
	return wait
}

// noteFailure notes why nothing reaches Redis, and since when.
func (l *lane) noteFailure(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
	if l.failing == 0 {
		l.failing = max(1, int64(time.Since(l.r.start)))
	}
}

func (l *lane) succeeded() {
	l.mu.Lock()
	was := l.failing != 0
	l.failing, l.err = 0, nil
	l.mu.Unlock()
	if was {
		l.r.health.succeeded(l.r)
	}
}

// dissolve puts the entries of a job back, unless it may have been done: then
// it stays as it is, for its sequence must never mean anything else.
func (l *lane) dissolve(j *job) {
	l.mu.Lock()
	defer l.unlock()
	if j.unknown {
		return
	}
	l.job = nil
	switch j.mode {
	case modeAdd, modeLook:
		behind := l.queue
		l.queue = make([]*entry, 0, len(j.entries)+len(behind))
		l.stepAll(j.entries, eventUndone)
		l.queue = append(l.queue, behind...)
	case modeTake:
		l.stepAll(j.entries, eventUndone)
	}
	l.asked = append(l.asked, j.asked...)
}

func (l *lane) stepAll(entries []*entry, ev event) {
	for _, en := range entries {
		l.step(en, ev, nil)
	}
}

// flush has what the log of s holds, and Redis does not, added. l.mu is held.
func (l *lane) flush(s *redisEpoch) {
	if !slices.Contains(l.lost, s) {
		l.lost = append(l.lost, s)
	}
}

// turn answers the entries of a job whose epoch is sealed.
func (l *lane) turn(j *job) {
	l.mu.Lock()
	defer l.unlock()
	l.job = nil
	le := &j.epoch.lanes[l.i]
	le.sealed = true
	l.stepAll(j.entries, eventSealed)
	l.untold = slices.DeleteFunc(l.untold, func(en *entry) bool {
		if en.key.epoch == j.epoch {
			l.step(en, eventSealed, nil)
		}
		return en.phase == settled
	})
	for _, q := range j.asked {
		q.done <- nil
	}
}

// resolve answers the entries of a job that was done. It is for rouse to wake them.
func (l *lane) resolve(j *job, a answer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.job = nil
	l.seq++
	le := &j.epoch.lanes[l.i]
	le.gen = a.gen
	le.n.Store(a.n)
	switch j.mode {
	case modeReplay, modeLocal:
		l.replayed(le, j, a)
	case modeTake:
		le.took = l.seq
		for i, en := range j.entries {
			if i < len(a.codes) && a.codes[i] == '5' {
				l.step(en, eventBelieved, nil)
				continue
			}
			l.step(en, eventRemoved, nil)
			l.r.counts.untold.Add(1)
		}
	case modeAdd, modeLook:
		for i, en := range j.entries {
			code := byte('3')
			if i < len(a.codes) {
				code = a.codes[i]
			}
			en.seq = l.seq
			if l.step(en, l.found(en, code), nil); en.phase == settled {
				l.reuse(en)
			}
		}
		clear(j.entries)
		l.entries = j.entries[:0]
	}
	for _, q := range j.asked {
		q.done <- nil
	}
}

// found is the event that the code of a batch that adds makes known to an entry.
func (l *lane) found(en *entry, code byte) event {
	switch code {
	case '1':
		return eventAdded
	case '0':
		return eventThere
	case '6':
		return eventThereAs
	case '4':
		return eventFull
	case '9':
		return eventKeysFull
	case '7':
		return eventBefore
	case '8':
		return l.behind(en.key.epoch)
	}
	return eventInDoubt
}
