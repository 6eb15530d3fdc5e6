package redis

import (
	"errors"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// batchSize bounds a batch, and so the time Redis does nothing else: 512 ids
	// take it some 0.5 ms.
	batchSize = 512

	// fewIDs bounds the batches that the function few in lane.lua adds, one id at a time.
	// With 4 ids it took half the time of the function batch. With 8, adding them one by
	// one takes somewhat longer than adding all at once.
	fewIDs = 8

	// A batch lingers (see lane.linger) until it has lingerIDs ids at most, because in a larger
	// one an id costs hardly less, and for lingerTime at most. If a batch has lingered in vain,
	// the next ones do not: at first 0 of them, then 1, 2, 4, and in the end lingerRest.
	lingerIDs  = 64
	lingerTime = time.Millisecond
	lingerRest = 32

	// ackDelay is how long the ids of a batch may stay in doubt for other instances
	// if no batch follows it.
	ackDelay = 5 * time.Millisecond

	// pingEvery is how often a lane that has no ids sends an empty batch: it shows a loss,
	// and Redis notes that the session is alive.
	pingEvery = time.Second

	// noteTime is how often a batch makes Redis note the time of the session's last batch.
	// It costs Redis one more command.
	noteTime = pingEvery / 2

	// Attempts that fail wait between these, doubling.
	minRetry = 2 * time.Millisecond
	maxRetry = 250 * time.Millisecond

	// frozenRetry is the wait after the answers frozen and missing.
	frozenRetry = 10 * time.Millisecond

	// missingFor is how long keys may be missing before they are taken for lost:
	// longer than a slot takes to move.
	missingFor   = 5 * time.Second
	missingPause = time.Second

	// seqSkip is how far the sequence number jumps after a loss: beyond any that a
	// batch still on its way can have.
	seqSkip = 1000
)

// job is a batch. Once its outcome is unknown it is sent, unchanged, until that is known.
type job struct {
	mode    string
	epoch   *redisEpoch
	entries []*entry          // by kind
	lists   lists             // of the ids of the entries, or of the log
	bytes   int               // of the log, if it restores ids
	asked   []chan<- struct{} // of callers that wait for an answer about the epoch; each has room for it
	since   int64             // when it was made, as ask.at
	unknown bool
	overdue bool // a request that waits for it will soon get 503
}

// Modes of a batch, as in lane.lua.
const (
	modeAdd     = "a" // adds ids
	modeLook    = "l" // only looks for them: the epoch is full
	modeTake    = "r" // takes back those whose requests all got 503
	modeRestore = "p" // adds again what Redis has lost
	modeLocal   = "f" // adds what was answered as new without Redis
	modePing    = "b" // has no ids
)

// run sends batches until Close, and then until nothing is left open.
func (l *lane) run() {
	l.timer = time.NewTimer(pingEvery)
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
			l.wakeAnswered(time.Since(sent))
		case !l.sleep(pause):
			return // closing took too long
		default:
			wait = min(2*wait, maxRetry)
		}
	}
	l.r.call(l.r.life, l.redisKey, "bye", l.r.cfg.session)
}

// wakeAnswered wakes the requests that a batch has answered. trip is how long that batch took.
func (l *lane) wakeAnswered(trip time.Duration) {
	l.mu.Lock()
	woken, full := l.takeAnswered(), len(l.queue) >= batchSize
	lingers := l.linger(woken, trip)
	l.mu.Unlock()
	if full {
		// The next batch is full: it is sent while these requests wake.
		l.r.running.Go(func() { wake(woken) })
		return
	}
	wake(woken)
	if lingers {
		return
	}
	// The woken requests' clients may add their next ids to the next batch, which is half as
	// large without them. If no other goroutine can run this takes no time.
	runtime.Gosched()
}

// linger makes the next batch wait for the clients whose requests the last one has answered:
// most of them send the next id at once. Without it the clients of a few connections stay
// divided into two halves, each waiting while the batch of the other is under way. trip is how
// long the last batch took. linger reports whether the next one waits. l.mu is held.
func (l *lane) linger(answered *ask, trip time.Duration) bool {
	if l.rest > 0 {
		l.rest--
		return false
	}
	n := len(l.queue)
	for a := answered; a != nil && n <= lingerIDs; a = a.next {
		n++
	}
	if n < 2 || n > lingerIDs || answered == nil {
		return false
	}
	l.want, l.lingers = n, time.Now().Add(min(2*trip, lingerTime))
	return true
}

// idle waits for something to do. It returns false when the lane is to end.
func (l *lane) idle() bool {
	l.mu.Lock()
	select {
	case <-l.r.closing:
		lingers := l.want > 0
		l.want = 0 // ids that wait are sent now, before the lane ends
		l.mu.Unlock()
		return lingers
	default:
	}
	d := pingEvery
	switch {
	case l.want > 0:
		d = time.Until(l.lingers)
	case l.failing != 0:
		d = maxRetry
	case l.seq == 0:
		d = minRetry // Redis must have the session before the group relies on it
	case l.unacked:
		d = ackDelay
	case len(l.postponed) > 0:
		d = minRetry
	}
	lingers := l.want > 0
	l.mu.Unlock()
	l.timer.Reset(d)
	select {
	case <-l.wake:
	case <-l.r.closing:
	case <-l.timer.C:
		l.mu.Lock()
		if lingers { // in vain
			l.want, l.rest = 0, l.missed
			l.missed = min(max(1, 2*l.missed), lingerRest)
		} else if len(l.postponed) > 0 {
			l.queue = append(l.queue, l.postponed...)
			l.postponed = l.postponed[:0]
		} else if s := l.r.latest.Load(); l.job == nil && s != nil {
			l.begin(&job{mode: modePing, epoch: s})
		}
		l.mu.Unlock()
	}
	return true
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

// pick returns the batch under way or, if there is none, the next one: first the ids to be
// taken back, then those of the log that Redis lacks, then those that wait, and last a ping
// for callers that wait for an answer about an epoch. nil: none.
func (l *lane) pick() *job {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.job == nil {
		l.begin(l.choose())
	}
	return l.job
}

// begin makes j the batch under way; nil: there is none. l.mu is held.
func (l *lane) begin(j *job) {
	if l.job = j; j != nil {
		j.since = l.r.now.Load()
	}
}

// choose makes the next batch. l.mu is held.
func (l *lane) choose() *job {
	// These come first, while others take them for in doubt: the next batch of the session
	// ends that.
	if len(l.unanswered) > 0 {
		j := &job{mode: modeTake, epoch: l.unanswered[0].key.epoch}
		l.unanswered = l.fill(j, l.unanswered)
		return j
	}
	if len(l.lacking) > 0 {
		s := l.lacking[0]
		le := &s.lanes[l.i]
		if le.retired || le.sealed || !le.forgotten && len(le.log.todo) == 0 {
			l.lacking = slices.Delete(l.lacking, 0, 1)
			return l.choose()
		}
		j := &job{mode: modeLocal, epoch: s}
		if le.forgotten {
			j.mode = modeRestore
		}
		j.lists, j.bytes = le.log.next(batchSize)
		return j
	}
	if l.failing == 0 {
		l.down = false
	}
	if len(l.postponed) > 0 && len(l.queue) > 0 {
		l.queue = append(l.queue, l.postponed...)
		l.postponed = l.postponed[:0]
	}
	if len(l.queue) < l.want {
		return nil
	}
	if l.want > 0 {
		l.want, l.missed = 0, 0
	}
	if i := slices.IndexFunc(l.queue, func(en *entry) bool { return en.phase != finished }); i >= 0 {
		j := &job{mode: modeAdd, epoch: l.queue[i].key.epoch}
		l.queue = l.fill(j, l.queue)
		return j
	}
	l.queue = l.queue[:0]
	for s, asked := range l.asked {
		delete(l.asked, s)
		return &job{mode: modePing, epoch: s, asked: asked}
	}
	return nil // if the last attempt failed, idle sends a ping to see whether Redis is back
}

// fill moves entries of the job's epoch into it and returns the rest. l.mu is held.
func (l *lane) fill(j *job, from []*entry) []*entry {
	size := batchSize
	if limit := l.r.cfg.MaxIDs; limit > 0 && j.mode == modeAdd {
		// Near the limit each lane adds few ids at a time. At the limit it only looks.
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
		if en.phase != finished {
			if en.key.epoch != j.epoch {
				break
			}
			en.state, _ = en.state.on(eventSent) // which has no effects
			if en.phase == flying && len(en.asks) > 0 {
				en.named = en.asks[0].named // the request that the entry was made for may be gone
			}
			counts[kindOf(logged(&en.enc, en.named)[0])]++
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
			if id := logged(&en.enc, en.named); en.phase != finished && kindOf(id[0]) == k {
				j.entries = append(j.entries, en)
				l.packed = append(l.packed, id[1:]...)
			}
		}
		j.lists[k] = string(l.packed)
	}
	return slices.Delete(from, 0, n)
}

// perform sends the job once. It returns how long to wait before the next
// attempt, or less than 0 if the job is over: done, refused by the seal, or dissolved after
// a loss.
func (l *lane) perform(j *job, wait time.Duration) time.Duration {
	le := &j.epoch.lanes[l.i]
	l.mu.Lock()
	gen := le.gen
	if le.retired && j.mode == modePing {
		gen = "" // lost ids of it are not added again, so each ping would end in one more hello, and delay its seal
	}
	whole, tokensLost := flag(!le.log.incomplete), flag(le.tokensLost)
	l.mu.Unlock()
	if err := l.r.await(j.epoch); err != nil && j.mode == modeAdd && !j.unknown {
		return l.failed(j, errRefused{err}, wait)
	}
	l.r.counts.batches.Add(1)
	now, noting := l.r.now.Load(), "0" // whether Redis notes the time, and that ids are uncertain
	switch {
	case j.epoch.group.uncertain.Load() > 0:
		noting = "2"
	case now-l.ticked > int64(noteTime) || len(j.asked) > 0:
		noting = "1"
	}
	args := append(make([]string, 0, 19), "batch", l.r.cfg.session, strconv.FormatUint(l.seq+1, 10), j.mode, j.epoch.name, gen, idsTTL)
	if k := j.lists.only(); noting == "0" && j.mode == modeAdd && k >= 0 && len(j.entries) <= fewIDs {
		args = append(args, strconv.Itoa(k+1), j.lists[k])
	} else {
		args = append(args, freezeTime, whole, noting, j.lists[0], j.lists[1], j.lists[2], j.lists[3])
	}
	if j.lists[namedIDs] != "" {
		args = append(args, j.lists[namedIDs], j.epoch.before, j.epoch.after, strconv.Itoa(l.r.cfg.MaxKeys), tokensLost)
	}
	a, err := l.r.call(l.r.life, l.redisKey, args...)
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
		if noting != "0" {
			l.ticked = now
		}
		l.unacked = j.mode == modeAdd
		clear(l.losses) // if one was noted, a server that has not lost anything is back
		l.resolve(j, a)
		return -1
	case statusSealed:
		l.turn(j)
		return -1
	case statusGap, statusOld, statusLost:
		return l.recover(j, a, wait)
	case statusMissing:
		// In between, batches that need none of the missing keys may be answered.
		if now := time.Now(); now.Sub(l.missing.last) > missingPause {
			l.missing.first, l.missing.last = now, now
		} else if l.missing.last = now; now.Sub(l.missing.first) > missingFor {
			if _, err := l.r.call(l.r.life, l.redisKey, "reset", j.epoch.name, gen); err != nil {
				return l.failed(j, err, wait)
			}
			l.missing.first = now
		}
		l.r.health.log(l.r.cfg.Log.Warn(), "keys of the open window are missing in Redis, or on the move to another node: ids wait", "")
		l.dissolve(j)
		return frozenRetry
	case statusFrozen:
		l.r.health.log(l.r.cfg.Log.Warn(), "ids lost in Redis are being added again: new ones wait", "")
		l.dissolve(j)
		return frozenRetry
	}
	j.unknown = true
	return l.failed(j, errors.New("unexpected reply "+a.status), wait)
}

// codeInexact follows the codes of a batch that makes the epoch inexact: tokens may be lost, or
// a retry may have been answered by the token of an id in no count.
const codeInexact = "P"

// allNew are the codes of a batch in which all ids are new.
var allNew = strings.Repeat("1", batchSize)

// failed notes that an attempt failed.
func (l *lane) failed(j *job, err error, wait time.Duration) time.Duration {
	l.r.health.failed(l.r, err)
	l.noteFailure()
	l.dissolve(j)
	return wait
}

// noteFailure notes the time of the first attempt that failed since the last that succeeded.
func (l *lane) noteFailure() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failing == 0 {
		l.failing = max(1, int64(time.Since(l.r.start)))
	}
}

func (l *lane) succeeded() {
	l.mu.Lock()
	was := l.failing != 0
	l.failing = 0
	l.mu.Unlock()
	if was {
		l.r.health.succeeded(l.r)
	}
}

// dissolve puts the entries of a job back, to be sent again. A job that may have been
// done stays as it is: its sequence number must never mean another batch.
func (l *lane) dissolve(j *job) {
	l.mu.Lock()
	defer l.unlock()
	if j.unknown {
		return
	}
	l.job = nil
	behind := l.queue
	l.queue = make([]*entry, 0, len(j.entries)+len(behind))
	l.stepAll(j.entries, eventUndone)
	l.queue = append(l.queue, behind...)
	if len(j.asked) > 0 {
		l.asked[j.epoch] = append(l.asked[j.epoch], j.asked...)
	}
}

func (l *lane) stepAll(entries []*entry, ev event) {
	for _, en := range entries {
		l.step(en, ev, nil)
	}
}

// flush makes run add the ids of s that are in the log and not in Redis. l.mu is held.
func (l *lane) flush(s *redisEpoch) {
	if !slices.Contains(l.lacking, s) {
		l.lacking = append(l.lacking, s)
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
	l.unanswered = slices.DeleteFunc(l.unanswered, func(en *entry) bool {
		if en.key.epoch == j.epoch {
			l.step(en, eventSealed, nil)
		}
		return en.phase == finished
	})
	for _, done := range j.asked {
		done <- struct{}{}
	}
}

// resolve answers the entries of a job that was done. wakeAnswered wakes their requests.
func (l *lane) resolve(j *job, a reply) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.job = nil
	l.seq++
	le := &j.epoch.lanes[l.i]
	le.gen = a.gen
	le.n.Store(a.n)
	le.log.incomplete = le.log.incomplete || strings.HasSuffix(a.codes, codeInexact)
	switch j.mode {
	case modeRestore, modeLocal:
		if !le.retired {
			l.r.counts.restored.Add(uint64(le.log.sent(l.seq, j.bytes)))
			l.r.counts.twice.Add(uint64(strings.Count(a.codes, "0")))
			le.forgotten = le.forgotten && len(le.log.todo) > 0
		}
	case modeTake:
		le.took = l.seq
		for i, en := range j.entries {
			if i < len(a.codes) && a.codes[i] == '5' {
				l.step(en, eventBelieved, nil)
				continue
			}
			l.step(en, eventGone, nil)
			l.r.counts.takenBack.Add(1)
		}
	case modeAdd, modeLook:
		for i, en := range j.entries {
			ev := eventInDoubt
			if i < len(a.codes) {
				ev = eventOf[a.codes[i]]
			}
			en.seq = l.seq
			if l.step(en, ev, nil); en.phase == finished && len(l.spare) < maxSpares {
				en.key.epoch, en.named = nil, nil
				l.spare = append(l.spare, en)
			}
		}
		clear(j.entries)
		l.entries = j.entries[:0]
	}
	for _, done := range j.asked {
		done <- struct{}{}
	}
}
