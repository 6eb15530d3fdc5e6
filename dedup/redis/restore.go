package redis

import (
	"context"
	"slices"
	"strconv"
	"time"

	"verve/dedup"
)

// idLog holds the ids of an epoch and a lane that this process has answered
// as new: those that Redis has taken, by their batch, and those that it has not or has lost.
type idLog struct {
	have       []takenIDs
	todo       []byte
	size       int  // of all of them, in bytes
	incomplete bool // not all of them could be kept, or tokens were lost
}

// takenIDs are the ids that Redis has taken in the batch seq.
type takenIDs struct {
	seq uint64
	ids []byte
}

func (g *idLog) room(r *Set) bool { return r.logBytes.Load() < r.cfg.logBytes }

// applied logs an id that Redis has taken in the batch seq.
func (le *laneEpoch) applied(r *Set, seq uint64, en *entry) {
	g, b := &le.log, logged(&en.enc, en.named)
	le.rememberToken(r, en.named)
	if le.retired {
		return
	}
	if !g.room(r) {
		g.incomplete = true
		return
	}
	g.grow(r, len(b))
	g.taken(seq, b)
}

func (g *idLog) grow(r *Set, bytes int) {
	g.size += bytes
	r.logBytes.Add(int64(bytes))
}

// taken adds ids that Redis has, by the batch seq.
func (g *idLog) taken(seq uint64, ids []byte) {
	if n := len(g.have); n == 0 {
		g.have = append(g.have, takenIDs{seq: seq})
	} else if last := &g.have[n-1]; last.seq != seq { // this batch is likely to get as large as the last
		g.have = append(g.have, takenIDs{seq, make([]byte, 0, max(len(ids), len(last.ids)))})
	}
	last := &g.have[len(g.have)-1]
	last.ids = append(last.ids, ids...)
}

// unsent adds an id that Redis does not have, even if the log is full: the caller has looked
// for room, or the id is one of a batch, which bounds how many there are.
func (g *idLog) unsent(r *Set, b []byte) {
	g.grow(r, len(b))
	g.todo = append(g.todo, b...)
}

// rewind puts the ids that were taken after the batch seq before those that are to be sent.
func (g *idLog) rewind(seq uint64) {
	i := len(g.have)
	for i > 0 && g.have[i-1].seq > seq {
		i--
	}
	var again []byte
	for _, b := range g.have[i:] {
		again = append(again, b.ids...)
	}
	g.todo = append(again, g.todo...)
	g.have = slices.Delete(g.have, i, len(g.have))
}

// countIDs counts the ids in a part of the log.
func countIDs(b []byte) (n int) {
	for ; len(b) > 0; n++ {
		b = b[len(firstLogged(b)):]
	}
	return n
}

// next returns up to n ids that are left, and how many bytes of the log they
// take.
func (g *idLog) next(n int) (ids lists, size int) {
	var packed [len(kinds) + 1][]byte
	for ; n > 0 && size < len(g.todo); n-- {
		id := firstLogged(g.todo[size:])
		k := kindOf(id[0])
		packed[k] = append(packed[k], id[1:]...)
		size += len(id)
	}
	for k, list := range packed {
		ids[k] = string(list)
	}
	return ids, size
}

// sent notes that Redis has taken the first bytes of todo, in the batch seq, and returns how
// many ids they are.
func (g *idLog) sent(seq uint64, bytes int) (n int) {
	n = countIDs(g.todo[:bytes])
	g.taken(seq, g.todo[:bytes])
	if g.todo = g.todo[bytes:]; len(g.todo) == 0 {
		g.todo = nil
	}
	return n
}

// recover goes on after a loss: Redis lacks the last batches of this session, or an
// epoch. The lost ids are to be added again before any others. If the job was done, that is
// lost as well, so it is dissolved and its ids are sent again.
func (l *lane) recover(j *job, a reply, wait time.Duration) time.Duration {
	r := l.r
	seq := l.seq + seqSkip
	for {
		l.lose(j.epoch, a)
		h, err := r.call(r.life, l.redisKey, "hello", r.cfg.session, strconv.FormatUint(a.n, 10), strconv.FormatUint(seq, 10), idsTTL, freezeTime)
		if err != nil {
			return l.failed(j, err, wait)
		}
		if h.status == statusOK {
			break
		}
		a = h // lost more meanwhile
	}
	epochs := r.opened()
	l.mu.Lock()
	l.seq = seq
	for _, s := range epochs {
		le := &s.lanes[l.i]
		kept, some := l.losses[s]
		if !some || le.sealed || le.retired {
			continue
		}
		le.log.rewind(kept)
		// Ids that were taken back may be there again, and those of a batch without a reply,
		// or not yet taken back, may come back with an older state. They are uncertain for good.
		if kept < le.took || j.unknown && j.mode == modeAdd && j.epoch == s {
			r.ledger.addUncertain(s.group, 1)
			le.took = 0
		}
		if kept == 0 {
			le.gen = ""
		}
		le.forgotten = true
		l.flush(s)
	}
	// An unanswered id is in no log. If it is lost, removing it would remove it from the
	// instance that has given it since.
	gone := func(en *entry) bool {
		kept, some := l.losses[en.key.epoch]
		lost := some && en.seq > kept
		if lost {
			r.ledger.addUncertain(en.key.epoch.group, 1)
			l.step(en, eventGone, nil)
		}
		return lost
	}
	l.unanswered = slices.DeleteFunc(l.unanswered, gone)
	if j.mode == modeTake {
		j.entries = slices.DeleteFunc(j.entries, gone)
	}
	clear(l.losses)
	// What the job did is lost with the rest: its ids are as good as new.
	j.unknown = false
	l.mu.Unlock()
	l.dissolve(j)
	r.health.log(r.cfg.Log.Warn(), "Redis has lost ids of the open window (FLUSHALL, a restart or a failover): they are added again from memory", "")
	return -1
}

// lose notes the loss that a reply about the epoch s reports. statusOld means only that
// an earlier hello succeeded and its reply was lost; what it reported is already in
// losses. If writes from before an epoch was opened are lost, so may be tokens of the window
// before, which no instance adds again.
func (l *lane) lose(s *redisEpoch, a reply) {
	switch a.status {
	case statusLost:
		l.losses[s] = 0
	case statusGap:
		for _, s := range l.r.opened() {
			if kept, some := l.losses[s]; !some || a.n < kept {
				l.losses[s] = a.n
			}
			l.mu.Lock()
			if le := &s.lanes[l.i]; a.n <= le.base {
				le.tokensLost = true
			}
			l.mu.Unlock()
		}
	}
}

// opened returns the epochs that are opened and not retired, oldest first.
func (r *Set) opened() []*redisEpoch {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.epochs)
}

// retire releases the log of an epoch and the tokens of the one before. It returns how many
// ids of the epoch that were answered ok Redis lacks.
func (l *lane) retire(s *redisEpoch) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	le := &s.lanes[l.i]
	le.retired = true
	unsent := 0
	if !le.forgotten || le.sealed {
		unsent = countIDs(le.log.todo)
	}
	l.r.logBytes.Add(-int64(le.log.size))
	le.log = idLog{}
	if before := s.previous.Load(); before != nil {
		l.r.logBytes.Add(-tokenBytes * int64(len(before.lanes[l.i].tokens)))
		before.lanes[l.i].tokens = nil
	}
	return unsent
}

// unsettled returns the starts of the oldest and the newest epoch with ids that are under way:
// waiting for Redis, answered ok but possibly missing there, or added without an answer.
func (r *Set) unsettled() (oldest, newest time.Time, some bool) {
	see := func(s *redisEpoch) {
		if !some || s.start.Before(oldest) {
			oldest = s.start
		}
		if !some || s.start.After(newest) {
			newest = s.start
		}
		some = true
	}
	for i := range r.lanes {
		l := &r.lanes[i]
		l.mu.Lock()
		if l.job != nil && l.job.mode != modePing && l.job.mode != modeLook {
			see(l.job.epoch)
		}
		for _, s := range l.lacking {
			if le := &s.lanes[i]; !le.sealed && !le.retired {
				see(s)
			}
		}
		for _, list := range [][]*entry{l.unanswered, l.queue, l.postponed} {
			for _, en := range list {
				if en.phase != finished {
					see(en.key.epoch)
				}
			}
		}
		l.mu.Unlock()
	}
	return oldest, newest, some
}

// noticeLosses asks every lane of Redis about the epoch that starts at start, so that a
// loss that no reply has shown yet is noticed. unsettled, called after it, includes those
// losses.
func (r *Set) noticeLosses(ctx context.Context, start time.Time) error {
	epochs := r.opened()
	at := slices.IndexFunc(epochs, func(s *redisEpoch) bool { return s.start.Equal(start) })
	if at < 0 {
		return nil // never opened here: there is nothing to be lost
	}
	done := make(chan struct{}, len(r.lanes))
	for i := range r.lanes {
		l := &r.lanes[i]
		l.mu.Lock()
		l.asked[epochs[at]] = append(l.asked[epochs[at]], done)
		l.mu.Unlock()
		nudge(l.wake)
	}
	for range r.lanes {
		select {
		case <-done:
		case <-ctx.Done():
			return ctx.Err()
		case <-r.life.Done():
			return dedup.ErrUnavailable
		}
	}
	return nil
}
