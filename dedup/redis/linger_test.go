package redis

import (
	"errors"
	"testing"
	"time"

	"verve/dedup"
)

// lingering returns a lane whose last batch answered some requests, while others wait.
func lingering(answered, waiting int) (l *lane, woken *ask) {
	r := &Set{lanes: make([]lane, 1), closing: make(chan struct{})}
	l = &r.lanes[0]
	l.init(r, 0)
	l.timer = time.NewTimer(time.Hour)
	for range answered {
		woken = &ask{next: woken}
	}
	come(l, waiting)
	return l, woken
}

// come has n new ids wait.
func come(l *lane, n int) {
	if l.r.latest.Load() == nil {
		l.r.latest.Store(&redisEpoch{lanes: make([]laneEpoch, 1), group: new(ledgerEpoch)})
	}
	for range n {
		var enc encoded
		enc.encode(l.r.hashKey, true, []byte("1"))
		l.enqueue(pendingKey{epoch: l.r.latest.Load()}, &enc, nil)
	}
}

func TestBatchLingersForThoseWhoAskAgain(t *testing.T) {
	l, woken := lingering(3, 1)
	if !l.linger(woken, time.Hour) {
		t.Fatal("the batch does not linger")
	}
	come(l, 2)
	if j := l.pick(); j != nil {
		t.Fatalf("a batch of %d is sent, one request is still to come", len(j.entries))
	}
	come(l, 1)
	if j := l.pick(); j == nil || len(j.entries) != 4 {
		t.Fatalf("with all of them there the batch is %+v, want one of 4", j)
	}
}

func TestBatchLingersInVainNotForLong(t *testing.T) {
	l, woken := lingering(3, 1)
	for vain, rest := range []int{0, 1, 2} {
		if !l.linger(woken, 0) {
			t.Fatalf("after %d times in vain, and a rest, the batch does not linger", vain)
		}
		if !l.idle() || l.job != nil {
			t.Fatal("the end of the lingering is taken for the end of the silence after which the lane sends a ping")
		}
		if j := l.pick(); j == nil || len(j.entries) != 1 {
			t.Fatalf("after that the batch is %+v, want the one that waits", j)
		}
		l.job = nil
		come(l, 1)
		for range rest {
			if l.linger(woken, 0) {
				t.Fatalf("after %d times in vain less than %d batches do not linger", vain+1, rest)
			}
		}
	}
}

func TestBatchThatLingersIsSentAtTheEnd(t *testing.T) {
	l, woken := lingering(3, 1)
	l.linger(woken, time.Hour)
	close(l.r.closing)
	if !l.idle() {
		t.Fatal("the lane ends before what lingers")
	}
	if j := l.pick(); j == nil || len(j.entries) != 1 {
		t.Fatalf("the batch is %+v, want the one that waits", j)
	}
	if l.job = nil; l.idle() {
		t.Error("the lane does not end")
	}
}

func TestLoneAndLargeBatchesDoNotLinger(t *testing.T) {
	for _, c := range []struct{ answered, waiting int }{{1, 0}, {0, 5}, {lingerIDs + 1, 0}, {lingerIDs, 1}} {
		if l, woken := lingering(c.answered, c.waiting); l.linger(woken, time.Hour) {
			t.Errorf("%d answered, %d waiting: the batch lingers", c.answered, c.waiting)
		}
	}
}

// TestLongQueueIsNoOutage: ids that have waited for too long are refused. Those that come are
// too only where Redis has not answered, not where many are before them: clients that ask
// again at once would else keep an instance from all work.
func TestLongQueueIsNoOutage(t *testing.T) {
	const timeout = int64(time.Second)
	l, _ := lingering(0, 2*batchSize)
	l.r.cfg.Timeout, l.r.ledger = time.Duration(timeout), new(Ledger)
	wait := func(en *entry, at int64) *ask {
		a := &ask{of: en, at: at, done: make(chan struct{}, 1)}
		l.enlist(a)
		return a
	}
	last := l.queue[len(l.queue)-1]
	first, second := wait(last, timeout), wait(last, 2*timeout)
	l.r.now.Store(2*timeout - 1)
	if j := l.pick(); j == nil {
		t.Fatal("nothing is sent")
	}
	for _, c := range []struct {
		now  int64
		late *ask
		down bool
	}{{2 * timeout, first, false}, {3 * timeout, second, true}} {
		l.expire(c.now)
		select {
		case <-c.late.done:
		default:
			t.Fatalf("after %v a request is not answered", time.Duration(c.now-c.late.at))
		}
		if !errors.Is(c.late.err, dedup.ErrUnavailable) || l.down != c.down {
			t.Errorf("a batch is under way for %v: a request that waited for longer got %v, and those that come are refused: %t, want %t",
				time.Duration(c.now-l.job.since), c.late.err, l.down, c.down)
		}
	}
}
