package redis

import (
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"verve/counter"
	"verve/dedup"
)

const (
	// Lanes are the parts that the ids are spread over. Each has a batcher here and a
	// hash slot in Redis. Sixteen keep the masters of a cluster evenly busy. A single
	// server runs one script at a time anyway, and with fewer lanes the batches are
	// larger: with 16 lanes it takes half as many ids per second as with one, and
	// with 2 an id costs a tenth more CPU (BenchmarkShared).
	clusterLanes = 16
	serverLanes  = 1

	// maxSpares bounds the entries that a lane keeps for reuse.
	maxSpares = 4 * batchSize

	// layout numbers the form of all data in Redis, that of the lanes and of the ledger. It
	// counts up with every change of a key or of what is in one (DESIGN.md, "The group").
	// Instances with different layouts refuse each other: see agreedLanes.
	layout = 5

	// idsTTL is how many seconds ids live if their epoch is never sealed: a week.
	idsTTL = "604800"

	// freezeTime is how many seconds a lane takes no new ids after an instance has
	// added lost ids again: other instances may not have noticed the loss yet.
	freezeTime = "1.5"
)

// laneTags are the hash tags of the lanes. They spread the lanes evenly over the hash slots of
// a cluster: laneTags[i] has slot 512 + 1024 i.
var laneTags = [clusterLanes]string{
	"04s", "003", "pt6", "4x6", "0ay", "0e9", "4mt", "4i4",
	"265", "22u", "c0h", "6zp", "gio", "5f", "6o2", "6kr",
}

// lane has, for one part of the ids, those that wait for an answer, and the batch that
// is under way. There is one batch at a time. Each has the next sequence number of this
// session: by it Redis recognises a batch that is sent again because its reply was lost.
type lane struct {
	r        *Set
	i        int
	redisKey string // of the lane's hash; the prefix of all others
	wake     chan struct{}

	mu         sync.Mutex                        // guards what follows
	pending    map[pendingKey]*entry             // all that are not finished
	queue      []*entry                          // to be sent, oldest first
	postponed  []*entry                          // in doubt, as the batch of another session may have added them: to be sent again, a moment later
	unanswered []*entry                          // added, but all their requests got 503: to be removed
	byTime     ask                               // the head of a ring: its prev is the newest request that waits, its next the oldest
	job        *job                              // under way
	down       bool                              // attempts have failed for half of Config.Timeout: new ids are decided without Redis
	failing    int64                             // since when attempts fail, in ns since the start of the Set; 0: they do not
	lacking    []*redisEpoch                     // epochs of which Redis lacks ids that are in the log: see flush
	asked      map[*redisEpoch][]chan<- struct{} // for the next ping about an epoch: see job
	closed     bool
	want       int // the next batch lingers until this many ids wait; 0: it does not

	// Requests that are answered and not woken yet, the first and the last.
	answered, lastAnswered *ask

	// seq is the sequence number of the last batch that was done. Only run changes
	// it, with mu held, so run may read it without mu.
	seq uint64

	// Kept from batch to batch, so that the next ones allocate little.
	spare   []*entry // finished
	entries []*entry // empty
	packed  []byte

	// Only run uses these.
	lingers time.Time                       // until when the next batch lingers, at most
	rest    int                             // how many of the next batches do not linger
	missed  int                             // what rest becomes if a batch next lingers in vain
	ticked  int64                           // when the last batch was sent that noted the time
	unacked bool                            // ids of the last batch are in doubt for others
	losses  map[*redisEpoch]uint64          // noticed, not mended yet: Redis lacks what came after this sequence number; 0: all
	missing struct{ first, last time.Time } // when keys were found missing, less than missingPause apart
	timer   *time.Timer
}

type pendingKey struct {
	epoch *redisEpoch
	id    dedup.Key
}

// laneEpoch is what a lane knows of an epoch. The lane's mu guards it.
type laneEpoch struct {
	gen       string        // of the epoch in Redis, by the last reply
	n         atomic.Uint64 // ids in it, by the last reply
	sealed    bool
	retired   bool
	forgotten bool // Redis has lost ids of it that are not all added again yet
	log       idLog

	// tokens of the ids that this process has answered as new, with fail open.
	tokens map[token]struct{}

	base       uint64 // sequence number of the last batch that may have been sent before the epoch was opened
	tokensLost bool   // Redis may have lost tokens of the window before
	took       uint64 // sequence number of the last batch that took ids back
}

// entry is an id that waits for its outcome.
type entry struct {
	state
	key   pendingKey
	enc   encoded
	named *named // key and token of the request that it is sent for; nil: neither
	seq   uint64 // of the batch that added it, if it is unanswered or taking
	asks  []*ask // the requests that wait, in the order in which they began; also those of another attempt
}

// ask is a request that waits for the outcome of an entry.
type ask struct {
	of         *entry
	named      *named
	e          *counter.Epoch
	item       int   // index among the items of the request
	at         int64 // when it began, in ns since the start of the Set
	enough     bool  // the lane has enough ids for a batch, and is to be nudged
	prev, next *ask  // in lane.byTime, by the time they began; next is also the next to be woken

	verdict dedup.Verdict
	err     error
	done    chan struct{} // capacity 1; verdict and err are there
}

// Why ids are refused.
var (
	errOutside = fmt.Errorf("%w: the group uses another --window", dedup.ErrUnavailable)
	errPending = fmt.Errorf("%w: too many ids wait for Redis", dedup.ErrUnavailable)
	errLog     = fmt.Errorf("%w: the log of ids that Redis lacks is full", dedup.ErrUnavailable)
	errNotKept = fmt.Errorf("%w: the disk has not taken the name of the window yet", dedup.ErrUnavailable)
	errLate    = fmt.Errorf("%w: no answer of Redis in time", dedup.ErrUnavailable)
)

var asks = sync.Pool{New: func() any { return &ask{done: make(chan struct{}, 1)} }}

func (l *lane) init(r *Set, i int) {
	l.r, l.i = r, i
	l.redisKey = "verve:{" + laneTags[i] + "}:" + r.cfg.Group + ":lane" + strconv.Itoa(layout)
	l.wake = make(chan struct{}, 1)
	l.pending, l.losses = map[pendingKey]*entry{}, map[*redisEpoch]uint64{}
	l.asked = map[*redisEpoch][]chan<- struct{}{}
	l.byTime.prev, l.byTime.next = &l.byTime, &l.byTime
}

// nudge wakes the goroutine that receives from wake, now or at its next receive. wake has
// capacity 1.
func nudge(wake chan<- struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}

// add returns the verdict on an id if it needs no trip. Else it queues the id and returns an
// ask: the caller nudges the lane if ask.enough is set, and waits for ask.done.
func (l *lane) add(e *counter.Epoch, s *redisEpoch, k dedup.Key, enc *encoded, m *named) (dedup.Verdict, *ask, error) {
	r := l.r
	key := pendingKey{s, k}
	now := r.now.Load()
	l.mu.Lock()
	defer l.mu.Unlock()
	en := l.pending[key]
	switch le := &s.lanes[l.i]; {
	case l.closed:
		return 0, nil, dedup.ErrUnavailable
	case le.sealed || now > s.end+int64(keepSeal(r.cfg.Window))/2:
		return dedup.Turned, nil, nil
	case en != nil && en.phase == unanswered && sameAttempt(en.named, m):
		l.unanswered = slices.DeleteFunc(l.unanswered, func(x *entry) bool { return x == en })
		l.step(en, eventAskedAgain, e)
		wake(l.takeAnswered()) // rarely any
		return dedup.Unique, nil, nil
	case en != nil && en.alone:
		return s.again(l.i, en.named, m), nil, nil
	case s.group.refused.Load() || r.ledger.standing.Load() == outside:
		return 0, nil, errOutside
	case r.health.refused.Load() || l.down && (!r.cfg.FailOpen || isClosed(s.group.kept)): // else it waits as if Redis were slow
		v, err := l.decideAlone(e, key, en, enc, m)
		return v, nil, err
	case en == nil:
		if r.pending.Add(1) > int64(r.cfg.pending) {
			r.pending.Add(-1)
			return 0, nil, errPending
		}
		en = l.enqueue(key, enc, m)
	}
	a := asks.Get().(*ask)
	a.of, a.e, a.at, a.named = en, e, now, m
	l.enlist(a)
	a.enough = len(l.queue) >= l.want
	return 0, a, nil
}

// enqueue queues an entry for an id. l.mu is held.
func (l *lane) enqueue(key pendingKey, enc *encoded, m *named) *entry {
	var en *entry
	if n := len(l.spare); n > 0 {
		en, l.spare = l.spare[n-1], l.spare[:n-1]
	} else {
		en = new(entry)
	}
	en.key, en.enc, en.named, en.state = key, *enc, m, state{}
	l.pending[key] = en
	l.queue = append(l.queue, en)
	return en
}

// unlock releases l.mu, and then wakes the requests that were answered meanwhile. If they woke
// earlier, they would wait for the lock.
func (l *lane) unlock() {
	a := l.takeAnswered()
	l.mu.Unlock()
	wake(a)
}

// takeAnswered takes the requests that were answered out of the lane, to be woken. l.mu is held.
func (l *lane) takeAnswered() *ask {
	a := l.answered
	l.answered, l.lastAnswered = nil, nil
	return a
}

func wake(a *ask) {
	for a != nil {
		next := a.next // a is not ours any more once it is woken
		a.done <- struct{}{}
		a = next
	}
}

// now returns the state of the entry, with the fields that depend on its waiting requests.
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

// step changes the state of an entry as an event requires, and carries out the effects. e
// is the epoch of the request that caused the event; nil: of the first request that waits.
// l.mu is held.
func (l *lane) step(en *entry, ev event, e *counter.Epoch) {
	r, s, was := l.r, en.key.epoch, en.state
	next, fx := en.now().on(ev)
	en.state = next
	if next.uncertain && !was.uncertain {
		r.ledger.addUncertain(s.group, 1)
	} else if was.uncertain && !next.uncertain {
		r.ledger.addUncertain(s.group, -1)
	}
	switch {
	case next.phase == was.phase:
	case next.phase == queued && ev == eventInDoubt:
		l.postponed = append(l.postponed, en)
	case next.phase == queued:
		l.queue = append(l.queue, en)
	case next.phase == unanswered:
		l.unanswered = append(l.unanswered, en)
	case next.phase == finished:
		delete(l.pending, en.key)
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
		// l.mu is held, so a request that no longer finds the id pending finds it in Local. An
		// id without room there takes a trip next time.
		_, _ = r.cfg.Local.Learn(e, s.view, en.key.id)
	}
	if fx.to != noneAnswered {
		l.conclude(en, fx)
	}
}

// mayAnswerAlone reports whether ids are answered without Redis. That takes FailOpen, and that the
// group knows this instance: until then nothing makes the records of the others inexact that lack
// what is answered here. The exception is a Redis that is down when this instance starts: while
// its only server refuses connections, no instance reaches it. When it is back the others wait
// for this one before they seal an epoch (Ledger.awaitOthers). It may be killed before that: see
// Ledger.noteAbsence.
func (r *Set) mayAnswerAlone() bool {
	known := r.ledger.standing.Load() == inside && r.form.Load() != formOther
	return r.cfg.FailOpen && (known || r.ledger.absent.Load())
}

// decideAlone answers without Redis: with fail open from Local, else with a refusal. en is
// the entry of the id, or nil if it has none. l.mu is held.
func (l *lane) decideAlone(e *counter.Epoch, key pendingKey, en *entry, enc *encoded, m *named) (dedup.Verdict, error) {
	r, s := l.r, key.epoch
	if en != nil && en.alone { // answered as new to another request
		return s.again(l.i, en.named, m), nil
	}
	if !r.mayAnswerAlone() {
		if en != nil {
			l.step(en, eventRefused, nil)
		}
		return dedup.Repeat, r.unavailable()
	}
	if v, known := s.recognise(l.i, m); known {
		return v, nil
	}
	le := &s.lanes[l.i]
	switch {
	case !isClosed(s.group.kept):
		return dedup.Repeat, errNotKept // should all instances be killed, the window would have no record
	case m != nil && m.full:
		return dedup.Repeat, dedup.ErrTooManyKeys
	case !le.log.room(r):
		return dedup.Repeat, errLog
	case en != nil && en.phase != queued && en.phase != finished && !sameAttempt(en.named, m) && !r.cfg.Local.Knows(s.view, key.id):
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
		if en.phase == queued || en.named != nil && en.named.full { // there is room now
			en.named = m
		}
		l.step(en, eventAnsweredAlone, nil)
	}
	le.rememberToken(r, m)
	return dedup.Unique, nil
}

// enlist adds a to the requests that wait. l.mu is held.
func (l *lane) enlist(a *ask) {
	a.prev, a.next = l.byTime.prev, &l.byTime
	a.prev.next, a.next.prev = a, a
	a.of.asks = append(a.of.asks, a)
}

// answer sets the answer of a; unlock then wakes it. The caller removes a from the requests
// of its entry. l.mu is held.
func (l *lane) answer(a *ask, v dedup.Verdict, err error) {
	a.prev.next, a.next.prev = a.next, a.prev
	a.verdict, a.err = v, err
	a.next, a.prev = nil, nil
	if l.lastAnswered != nil {
		l.lastAnswered.next = a
	} else {
		l.answered = a
	}
	l.lastAnswered = a
}

// conclude answers the requests of en, which is finished, as far as fx.to includes them. The
// first request of the attempt that en was sent for gets fx.verdict. The others of that attempt
// get the same or, if it is Unique, the verdict on a retry. With thereAnswered, a request of
// another attempt gets Repeat if it has no token. All of them get fx.err. The remaining
// requests become an entry of their own, to be sent. l.mu is held.
func (l *lane) conclude(en *entry, fx effects) {
	v := fx.verdict
	var others []*ask
	for _, a := range en.asks {
		switch {
		case fx.to == allAnswered:
			l.answer(a, v, fx.err)
		case sameAttempt(en.named, a.named):
			if l.answer(a, v, fx.err); v == dedup.Unique {
				v = en.retried()
			}
		case fx.to == thereAnswered && !a.named.hasToken():
			l.answer(a, dedup.Repeat, fx.err)
		default:
			others = append(others, a)
		}
	}
	en.asks = en.asks[:0]
	if len(others) == 0 {
		return
	}
	l.r.pending.Add(1)
	on := l.enqueue(en.key, &en.enc, others[0].named)
	on.asks = others
	for _, a := range others {
		a.of = on
	}
	nudge(l.wake)
}

// expire answers, without Redis, the requests that have waited for Config.Timeout. When one has
// waited for half of it, the ids of the job under way become uncertain: see
// Ledger.addUncertain. It also notices that the lane is down.
func (l *lane) expire(now int64) {
	l.mu.Lock()
	defer l.unlock()
	if j, a := l.job, l.byTime.next; j != nil && !j.overdue && a != &l.byTime && now-a.at >= int64(l.r.cfg.Timeout)/2 {
		j.overdue = true // the group is to know before the first is refused
		l.stepAll(j.entries, eventRefused)
	}
	for a := l.byTime.next; a != &l.byTime && now-a.at >= int64(l.r.cfg.Timeout); a = l.byTime.next {
		en := a.of
		if j := l.job; l.failing == 0 && j != nil && now-j.since >= int64(l.r.cfg.Timeout)/2 {
			l.failing = a.at // no error yet, but the job is slow: a did not just wait behind many others
		}
		en.asks = en.asks[1:] // a is the first of them, as they are in the order in which they began
		v, err := l.decideAlone(a.e, en.key, en, &en.enc, a.named)
		l.answer(a, v, err)
		if l.step(en, eventAnsweredBeside, nil); en.phase == finished { // decided here: for the others it is a repeat
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

// refuseAll refuses every request that waits, and all later ones: the Set is closed.
func (l *lane) refuseAll() {
	l.mu.Lock()
	defer l.unlock()
	l.closed = true
	for l.byTime.next != &l.byTime {
		l.conclude(l.byTime.next.of, effects{to: allAnswered, verdict: dedup.Repeat, err: dedup.ErrUnavailable})
	}
}
