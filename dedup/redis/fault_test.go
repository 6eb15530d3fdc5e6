package redis

import (
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"verve/counter"

	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"verve/dedup"
	"verve/internal/epochtest"
	"verve/internal/settest"
	"verve/internal/testproc"
)

// bring has callers send ids of their own, each again until it is answered, every time to
// the next instance. It returns how many were answered as repeats, and how many attempts
// failed.
func bring(t *testing.T, sets []*Set, at []settest.Epochs, callers, each int, id func(n int) string) (repeats, failures int64) {
	t.Helper()
	var repeat, failed atomic.Int64
	var group sync.WaitGroup
	for c := range callers {
		group.Go(func() {
			for n := range each {
				deadline := time.Now().Add(time.Minute)
				for i := c; ; i++ {
					v, err := at[i%len(at)].Add(t, sets[i%len(sets)], 0, id(c*each+n))
					if err == nil {
						if v != dedup.Unique {
							repeat.Add(1)
						}
						break
					}
					failed.Add(1)
					if !errors.Is(err, dedup.ErrUnavailable) || time.Now().After(deadline) {
						t.Errorf("id %s: %v", id(c*each+n), err)
						return
					}
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	group.Wait()
	return repeat.Load(), failed.Load()
}

// cutAgain cuts the connections of one proxy after the other, every other time in a reply,
// until stop is called. They stay away for so long.
func cutAgain(ways []*proxy, away time.Duration) (stop func()) {
	stopped := make(chan struct{})
	var cutting sync.WaitGroup
	cutting.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stopped:
				return
			case <-time.After(5 * time.Millisecond):
			}
			// On a busy machine nothing would be done in 5 ms: a connection has its greeting, and
			// a few answers.
			p := ways[i/2%len(ways)]
			for began := time.Now(); p.passed.Load() < 3 && time.Since(began) < time.Second; {
				time.Sleep(time.Millisecond)
			}
			p.passed.Store(0)
			if i%2 == 0 {
				p.cut(away)
			} else {
				p.cutInReply()
			}
		}
	})
	return func() {
		close(stopped)
		cutting.Wait()
	}
}

// TestRedisLostRepliesAreNoRepeats has the replies of Redis thrown away and the
// connections cut, again and again, in the middle of batches that are applied. No first
// attempt is taken for another caller's, and no id is Unique twice, also if the next
// attempt goes to the other instance.
func TestRedisLostRepliesAreNoRepeats(t *testing.T) {
	t.Parallel() // it mostly waits
	const callers = 200
	each, cuts := 300, 100
	if testing.Short() {
		each, cuts = 50, 10
	}
	for _, instances := range []int{1, 2} {
		t.Run(fmt.Sprint(instances, " instances"), func(t *testing.T) {
			server := startRedis(t)
			var sets []*Set
			var at []settest.Epochs
			var ways []*proxy
			for range instances {
				p := startProxy(t, server.Addr)
				r := newRedis(t, p.addr())
				sets, at, ways = append(sets, r), append(at, settest.NewEpochs(t, r)), append(ways, p)
			}
			stop := cutAgain(ways, time.Millisecond)
			done := func() (n int) {
				for _, p := range ways {
					p.mu.Lock()
					n += p.cuts
					p.mu.Unlock()
				}
				return n
			}
			var repeats, failures int64
			ids := 0
			// Every round sends other ids until there were enough cuts.
			for round := 0; ids < callers*each || done() < cuts; round++ {
				a, b := bring(t, sets, at, callers, each, func(n int) string { return fmt.Sprint(round, "-", n) })
				repeats, failures, ids = repeats+a, failures+b, ids+callers*each
			}
			stop()
			t.Logf("%d ids, %d cuts, %d tries failed, %d batches sent again, %d ids taken back", ids, done(), failures,
				sets[0].counts.retries.Load(), sets[0].counts.takenBack.Load())
			if repeats > 0 {
				t.Errorf("%d callers were told that somebody had brought their id before", repeats)
			}
			other := newRedis(t, server.Addr, patient)
			e := settest.NewEpochs(t, other)
			var missing atomic.Int64
			var group sync.WaitGroup
			for c := range callers {
				group.Go(func() {
					for n := range each {
						if v, err := e.Add(t, other, 0, fmt.Sprint("0-", c*each+n)); v != dedup.Repeat || err != nil {
							missing.Add(1)
						}
					}
				})
			}
			group.Wait()
			if missing.Load() > 0 {
				t.Errorf("%d ids that were answered as new are not there", missing.Load())
			}
			if n, exact := sealed(t, e, other, 0); n != uint64(ids) || !exact {
				t.Errorf("sealed %d, exact %v; want %d, true", n, exact, ids)
			}
		})
	}
}

// wantInTime adds an id to the first epoch until it is answered, as want.
func wantInTime(t *testing.T, r *Set, e settest.Epochs, id string, want dedup.Verdict) {
	t.Helper()
	testproc.Until(t, "an id is answered", func() bool {
		v, err := e.Add(t, r, 0, id)
		if err == nil && v != want {
			t.Fatalf("got %v, want %v", v, want)
		}
		return err == nil
	})
}

// TestRedisIDsNobodyWasToldAboutAreNobodys: an id is in Redis, its reply never
// came, and its caller had to be sent away. Elsewhere it is neither new nor a
// repeat as long as that is so; when its instance hears of it, it is the next
// caller's, wherever he comes.
func TestRedisIDsNobodyWasToldAboutAreNobodys(t *testing.T) {
	for _, here := range []bool{true, false} {
		t.Run(fmt.Sprint("asked again at the same instance: ", here), func(t *testing.T) {
			server, way, a, b, ea, eb := pairByProxy(t)
			wantInTime(t, a, ea, "before", dedup.Unique)

			goDeaf(t, server, way, a)
			if v, err := ea.Add(t, a, 0, "42"); !errors.Is(err, dedup.ErrUnavailable) {
				t.Fatalf("without a reply: %v, %v", v, err)
			}
			testproc.Until(t, "the id is in Redis", func() bool {
				return strings.Contains(strings.Join(server.keys(), "\n"), epochLength+":d")
			})
			if v, err := eb.Add(t, b, 0, "42"); !errors.Is(err, dedup.ErrUnavailable) {
				t.Fatalf("at the other instance: %v, %v; want ErrUnavailable, as nobody was told", v, err)
			}
			if oldest, newest, some := a.unsettled(); !some || oldest.UnixNano() != ea.At(0) || newest != oldest {
				t.Errorf("unsettled: %v to %v, %v; want the epoch", oldest, newest, some)
			}
			way.deaf.Store(false)
			way.cut(0)
			if here {
				wantInTime(t, a, ea, "42", dedup.Unique)
				wantInTime(t, b, eb, "42", dedup.Repeat)
			} else {
				wantInTime(t, b, eb, "42", dedup.Unique)
				wantInTime(t, a, ea, "42", dedup.Repeat)
			}
			untilSettled(t, a)
			if n, exact := sealed(t, eb, b, 0); n != 2 || !exact {
				t.Errorf("sealed %d, %v; want 2, true", n, exact)
			}
		})
	}
}

// TestRedisIDsInDoubtAreNoRepeatsWhenTheEpochIsFull: an instance only looks for ids then. One
// that another instance has added without an answer may yet be taken back.
func TestRedisIDsInDoubtAreNoRepeatsWhenTheEpochIsFull(t *testing.T) {
	server := startRedis(t)
	way := startProxy(t, server.Addr)
	full := func(c *Config) { c.MaxIDs = 2 }
	a, b := newRedis(t, way.addr(), full), newRedis(t, server.Addr, full)
	ea, eb := settest.NewEpochs(t, a), settest.NewEpochs(t, b)
	wantInTime(t, a, ea, "1", dedup.Unique)
	goDeaf(t, server, way, a)
	if v, err := ea.Add(t, a, 0, "42"); !errors.Is(err, dedup.ErrUnavailable) {
		t.Fatalf("without a reply: %v, %v", v, err)
	}
	testproc.Until(t, "the id is in Redis", func() bool {
		return server.do("SCARD", a.lanes[0].redisKey+":"+eb.Last().State.(*redisEpoch).name+":d") == "2"
	})
	wantInTime(t, b, eb, "1", dedup.Repeat) // from here on the epoch is full to b
	if v, err := eb.Add(t, b, 0, "42"); !errors.Is(err, dedup.ErrUnavailable) {
		t.Errorf("at the other instance: %v, %v; want ErrUnavailable", v, err)
	}
	way.deaf.Store(false)
	way.cut(0)
	untilSettled(t, a)
	wantInTime(t, b, eb, "42", dedup.Unique)
	if n, exact := sealed(t, eb, b, 0); n != 2 || !exact {
		t.Errorf("sealed %d, exact %v; want 2, true", n, exact)
	}
}

// TestRedisIDsNobodyAsksForAgainAreNotCounted: the count is that of the answers.
func TestRedisIDsNobodyAsksForAgainAreNotCounted(t *testing.T) {
	server := startRedis(t)
	way := startProxy(t, server.Addr)
	r := newRedis(t, way.addr())
	e := settest.NewEpochs(t, r)
	for _, id := range epochtest.Alike {
		wantInTime(t, r, e, id+"told", dedup.Unique)
	}
	goDeaf(t, server, way, r)
	var group sync.WaitGroup
	for i, id := range epochtest.Alike {
		group.Go(func() {
			if _, err := e.Add(t, r, 0, id); !errors.Is(err, dedup.ErrUnavailable) {
				t.Errorf("id %d without a reply: %v", i, err)
			}
		})
	}
	group.Wait()
	way.deaf.Store(false)
	way.cut(0)
	untilSettled(t, r)
	if n, exact := sealed(t, e, r, 0); n != uint64(len(epochtest.Alike)) || !exact {
		t.Errorf("sealed %d, exact %v; want %d, true", n, exact, len(epochtest.Alike))
	}
}

// leaveUnanswered has r hold an id as one that the batch seq has added and whose requests are
// all gone.
func leaveUnanswered(r *Set, e settest.Epochs, id string, seq uint64) {
	items := []dedup.Item{{ID: []byte(id)}}
	r.Keys(items)
	s, k := e.Last().State.(*redisEpoch), items[0].Key
	var enc encoded
	h := enc.encode(r.hashKey, k.IsDecimal(), []byte(id))
	l := &r.lanes[h>>r.shift]
	l.mu.Lock()
	r.pending.Add(1)
	en := l.enqueue(pendingKey{s, k}, &enc, nil)
	l.queue = l.queue[:len(l.queue)-1]
	en.phase, en.seq = unanswered, seq
	l.unanswered = append(l.unanswered, en)
	l.mu.Unlock()
	nudge(l.wake)
}

// lastSeq is the sequence of the last batch of the first lane.
func lastSeq(r *Set) uint64 {
	l := &r.lanes[0]
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seq
}

// goDeaf has the replies to r thrown away, from when no batch is under way: an id would wait
// behind it, and be refused without being sent.
func goDeaf(t *testing.T, server *redisServer, way *proxy, r *Set) {
	t.Helper()
	l := &r.lanes[0]
	testproc.Until(t, "nothing is under way", func() bool {
		if server.do("HSTRLEN", l.redisKey, "I"+r.cfg.session) != "0" {
			return false // the last ids are still to be confirmed
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.job == nil
	})
	way.deaf.Store(true)
}

func untilSettled(t *testing.T, r *Set) {
	t.Helper()
	testproc.Until(t, "all is settled", func() bool {
		_, _, some := r.unsettled()
		return !some
	})
}

// TestRedisAnIDThatIsLostBeforeAnybodyIsToldIsNewOnce: the request comes while the loss is
// known and not yet repaired.
func TestRedisAnIDThatIsLostBeforeAnybodyIsToldIsNewOnce(t *testing.T) {
	t.Parallel()
	server, way, a, b, ea, eb := pairByProxy(t)
	wantInTime(t, a, ea, "before", dedup.Unique)
	server.Kill() // nothing is saved
	leaveUnanswered(a, ea, "42", lastSeq(a))
	way.latency.Store(int64(300 * time.Millisecond))
	server.Start()
	testproc.Until(t, "the loss is known", func() bool {
		l := &a.lanes[0]
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.lacking) > 0
	})
	v, err := ea.Add(t, a, 0, "42")
	way.latency.Store(0)
	testproc.Until(t, "the id is answered", func() bool {
		if err != nil {
			v, err = ea.Add(t, a, 0, "42")
		}
		return err == nil
	})
	if v != dedup.Unique {
		t.Errorf("where nobody was told: %v", v)
	}
	untilSettled(t, a)
	testproc.Until(t, "the other instance answers", func() bool {
		v, err = eb.Add(t, b, 0, "42")
		return err == nil
	})
	if v != dedup.Repeat {
		t.Errorf("at the other instance: %v", v)
	}
	if n, exact := sealed(t, eb, b, 0); n != 2 || !exact {
		t.Errorf("sealed %d, exact %v; want 2, true", n, exact)
	}
}

// TestRedisTakesBackNothingThatOthersWereGiven: two ids were added without an answer. A
// loss takes one of them, which another instance gives before this one notices.
func TestRedisTakesBackNothingThatOthersWereGiven(t *testing.T) {
	t.Parallel()
	server, way, a, b, ea, eb := pairByProxy(t)
	wantInTime(t, a, ea, "before", dedup.Unique)
	wantInTime(t, b, eb, "left", dedup.Unique) // stands for what a batch of a has added
	saved := lastSeq(a)
	if got := server.do("SAVE"); got != "OK" {
		t.Fatal("SAVE: ", got)
	}
	wantInTime(t, a, ea, "later", dedup.Unique)
	way.refusing.Store(true)
	server.Kill()
	leaveUnanswered(a, ea, "left", saved)
	leaveUnanswered(a, ea, "lost", lastSeq(a))
	server.Start()
	testproc.Until(t, "the other instance gives it", func() bool {
		v, err := eb.Add(t, b, 0, "lost")
		if err == nil && v != dedup.Unique {
			t.Fatalf("at the other instance: %v", v)
		}
		return err == nil
	})
	way.refusing.Store(false)
	if err := a.noticeLosses(t.Context(), time.Unix(0, ea.At(0))); err != nil {
		t.Fatal(err)
	}
	untilSettled(t, a)
	if n := a.counts.takenBack.Load(); n != 1 {
		t.Errorf("%d ids were taken back, want 1", n)
	}
	if n, exact := sealed(t, eb, b, 0); n != 3 || !exact {
		t.Errorf("sealed %d, exact %v; want 3, true", n, exact)
	}
}

// TestRedisALossIsRememberedUntilItIsMended: the reply to the hello of a session
// that goes on after a loss is lost itself.
func TestRedisALossIsRememberedUntilItIsMended(t *testing.T) {
	t.Parallel() // it mostly waits
	for _, all := range []bool{true, false} {
		t.Run(fmt.Sprint("all is lost: ", all), func(t *testing.T) {
			server, way, a, b, ea, eb := pairByProxy(t)
			wantInTime(t, a, ea, "1", dedup.Unique)
			if got := server.do("SAVE"); got != "OK" {
				t.Fatal("SAVE: ", got)
			}
			wantInTime(t, a, ea, "2", dedup.Unique)
			last := lastSeq(a)
			way.refusing.Store(true)
			way.cut(0)
			server.Kill()
			server.Start()
			if all {
				server.do("FLUSHALL")
			}
			way.latency.Store(int64(300 * time.Millisecond))
			way.refusing.Store(false)
			testproc.Until(t, "the hello is done", func() bool {
				var seq uint64
				fmt.Sscan(server.do("EVAL", "return (cmsgpack.unpack(redis.call('HGET', KEYS[1], 'S' .. ARGV[1]) or cmsgpack.pack(0)))", "1", a.lanes[0].redisKey, a.cfg.session), &seq)
				return seq > last
			})
			way.cut(0) // its reply is on its way
			way.latency.Store(0)
			if err := a.noticeLosses(t.Context(), time.Unix(0, ea.At(0))); err != nil {
				t.Fatal(err)
			}
			untilSettled(t, a)
			for _, id := range []string{"1", "2"} {
				testproc.Until(t, "the other instance answers", func() bool {
					v, err := eb.Add(t, b, 0, id)
					if err == nil && v != dedup.Repeat {
						t.Errorf("id %s at the other instance: %v", id, v)
					}
					return err == nil
				})
			}
			if n, exact := sealed(t, eb, b, 0); n != 2 || !exact {
				t.Errorf("sealed %d, exact %v; want 2, true", n, exact)
			}
		})
	}
}

// TestRedisLosesAnEpochWhileIDsAreDecidedHere: those that are added late do not
// hide that the others are lost.
func TestRedisLosesAnEpochWhileIDsAreDecidedHere(t *testing.T) {
	t.Parallel() // it mostly waits
	server := startRedis(t)
	r := newRedis(t, server.Addr, patient, func(c *Config) { c.FailOpen = true })
	e := settest.NewEpochs(t, r)
	const before = 100
	for i := range before {
		e.Want(t, r, 0, fmt.Sprint("before ", i), dedup.Unique)
	}
	s, l := e.Last().State.(*redisEpoch), &r.lanes[0]
	l.mu.Lock()
	var enc encoded
	enc.encode(r.hashKey, false, []byte("late"))
	s.lanes[0].log.unsent(r, enc.bytes()) // as decide does where a request has waited for too long
	l.flush(s)
	for _, k := range server.keys() {
		if strings.Contains(k, epochLength+":") {
			server.do("DEL", k)
		}
		server.do("HDEL", l.redisKey, "E"+s.name)
	}
	l.mu.Unlock()
	if err := r.noticeLosses(t.Context(), time.Unix(0, e.At(0))); err != nil {
		t.Fatal(err)
	}
	untilSettled(t, r)
	if n, exact := sealed(t, e, r, 0); n != before+1 || !exact {
		t.Errorf("sealed %d, exact %v; want %d, true", n, exact, before+1)
	}
}

// TestRedisIDsAreTakenBackFirst: after any other batch of the instance they are no longer in
// doubt for the others, which would answer that they were there.
func TestRedisIDsAreTakenBackFirst(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	way := startProxy(t, server.Addr)
	r := newRedis(t, way.addr(), patient)
	e := settest.NewEpochs(t, r)
	wantInTime(t, r, e, "before", dedup.Unique)
	way.latency.Store(int64(500 * time.Millisecond))
	var group sync.WaitGroup
	group.Go(func() { wantInTime(t, r, e, "meanwhile", dedup.Unique) })
	l, s := &r.lanes[0], e.Last().State.(*redisEpoch)
	testproc.Until(t, "a batch is under way", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.job != nil && l.job.mode == modeAdd
	})
	leaveUnanswered(r, e, "42", lastSeq(r))
	var enc encoded
	enc.encode(r.hashKey, true, []byte("43"))
	l.mu.Lock()
	s.lanes[0].log.unsent(r, logged(&enc, nil)) // as when it was answered without Redis
	l.flush(s)
	l.mu.Unlock()
	mode := ""
	testproc.Until(t, "the next batch is under way", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.job != nil && l.job.mode != modeAdd {
			mode = l.job.mode
		}
		return mode != ""
	})
	if mode != modeTake {
		t.Errorf("the next batch has mode %q, want %q", mode, modeTake)
	}
	group.Wait()
	untilSettled(t, r)
	if n, _ := sealed(t, e, r, 0); n != 3 {
		t.Errorf("sealed %d, want 3", n)
	}
}

// TestRedisIDsAskedForWhileTheyAreTakenBack are given once and counted, whether
// they can be taken back or not.
func TestRedisIDsAskedForWhileTheyAreTakenBack(t *testing.T) {
	t.Parallel() // it mostly waits
	for _, open := range []bool{false, true} {
		for _, refused := range []bool{false, true} {
			t.Run(fmt.Sprintf("open %v, refused %v", open, refused), func(t *testing.T) {
				server := startRedis(t)
				way := startProxy(t, server.Addr)
				// Open, a waits for less long than the reply takes.
				a := newRedis(t, way.addr(), func(c *Config) {
					if c.FailOpen = open; !open {
						patient(c)
					}
				})
				b := newRedis(t, server.Addr)
				ea, eb := settest.NewEpochs(t, a), settest.NewEpochs(t, b)
				wantInTime(t, a, ea, "before", dedup.Unique)
				wantInTime(t, b, eb, "42", dedup.Unique) // stands for what a batch of a has added
				if refused {
					server.do("CONFIG", "SET", "min-replicas-to-write", "1")
				}
				way.latency.Store(int64(500 * time.Millisecond))
				leaveUnanswered(a, ea, "42", lastSeq(a))
				testproc.Until(t, "it is being taken back", func() bool {
					l := &a.lanes[0]
					l.mu.Lock()
					defer l.mu.Unlock()
					return l.job != nil && l.job.mode == modeTake
				})
				var unique, repeat atomic.Int32
				var group sync.WaitGroup
				began := time.Now()
				for range 3 {
					group.Go(func() {
						switch v, err := ea.Add(t, a, 0, "42"); {
						case err != nil:
							t.Error(err)
						case v == dedup.Unique:
							unique.Add(1)
						default:
							repeat.Add(1)
						}
					})
				}
				group.Wait()
				if unique.Load() != 1 || repeat.Load() != 2 {
					t.Errorf("%d were told that it is new, and %d that it is not; want 1, 2", unique.Load(), repeat.Load())
				}
				if took := time.Since(began); took > a.cfg.Timeout/2 && !open {
					t.Errorf("the answers took %v", took)
				}
				way.latency.Store(0)
				server.do("CONFIG", "SET", "min-replicas-to-write", "0")
				untilSettled(t, a)
				if n, exact := sealed(t, eb, b, 0); n != 2 || !exact {
					t.Errorf("sealed %d, exact %v; want 2, true", n, exact)
				}
			})
		}
	}
}

// TestRedisIDsGivenAtTheLimitAreCounted: Redis only looks for them, and takes so
// long that they are answered without it.
func TestRedisIDsGivenAtTheLimitAreCounted(t *testing.T) {
	server := startRedis(t)
	way := startProxy(t, server.Addr)
	r := newRedis(t, way.addr(), func(c *Config) { c.FailOpen, c.MaxIDs = true, 1 })
	e := settest.NewEpochs(t, r)
	e.Want(t, r, 0, "1", dedup.Unique)
	way.latency.Store(int64(500 * time.Millisecond))
	e.Want(t, r, 0, "42", dedup.Unique)
	way.latency.Store(0)
	testproc.Until(t, "it is added", func() bool { return r.counts.restored.Load() == 1 })
	if n, exact := sealed(t, e, r, 0); n != 2 || !exact {
		t.Errorf("sealed %d, exact %v; want 2, true", n, exact)
	}
}

// TestRedisSequenceIsReadWhileBatchesAreDone, as a request does after its answer. The race
// detector judges.
func TestRedisSequenceIsReadWhileBatchesAreDone(t *testing.T) {
	r := newRedis(t, startRedis(t).Addr, patient)
	e := settest.NewEpochs(t, r)
	var stop atomic.Bool
	var group sync.WaitGroup
	group.Go(func() {
		for !stop.Load() {
			lastSeq(r)
		}
	})
	for i := range 1000 {
		e.Want(t, r, 0, fmt.Sprint(i), dedup.Unique)
	}
	stop.Store(true)
	group.Wait()
}

// TestRedisFailures has Redis refuse in one way after the other. Each is said in
// the log and in the reason for not being ready, ids get ErrUnavailable, soon,
// and when it is over everything goes on and the count is right.
func TestRedisFailures(t *testing.T) {
	t.Parallel()
	set := func(s *redisServer, key, value string) {
		if got := s.do("CONFIG", "SET", key, value); got != "OK" {
			s.t.Fatalf("CONFIG SET %s %s: %s", key, value, got)
		}
	}
	for _, tt := range []struct {
		name, say  string
		begin, end func(s *redisServer)
	}{
		{"out of memory", "Redis is out of memory",
			func(s *redisServer) { set(s, "maxmemory", "1") },
			func(s *redisServer) { set(s, "maxmemory", "0") }},
		{"a replica", "this Redis is a replica",
			func(s *redisServer) { s.do("REPLICAOF", "127.0.0.1", "1") },
			func(s *redisServer) { s.do("REPLICAOF", "NO", "ONE") }},
		{"disk failed", "Redis has too few replicas",
			func(s *redisServer) { set(s, "min-replicas-to-write", "1") },
			func(s *redisServer) { set(s, "min-replicas-to-write", "0") }},
		{"killed", "Redis is unreachable",
			func(s *redisServer) { s.do("SAVE"); s.Kill() },
			func(s *redisServer) { s.Start() }},
		{"answers nothing", "Redis is unreachable",
			func(s *redisServer) { s.pause() },
			func(s *redisServer) { s.resume() }},
		{"requires a password", "Redis requires a password",
			func(s *redisServer) {
				s.do("ACL", "SETUSER", "admin", "on", ">x", "+@all", "~*")
				set(s, "requirepass", "secret")
			},
			nil},
		{"eviction", "maxmemory-policy",
			func(s *redisServer) { set(s, "maxmemory-policy", "allkeys-lru") },
			func(s *redisServer) { set(s, "maxmemory-policy", "noeviction") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			server := startRedis(t)
			var log testproc.Buffer
			// Two seconds: that an answer takes so long on a busy machine is no fault.
			r := newRedis(t, server.Addr, func(c *Config) { c.Log, c.Timeout = zerolog.New(&log), 2*time.Second })
			e := settest.NewEpochs(t, r)
			ids := 0
			for ; ids < 100; ids++ {
				wantInTime(t, r, e, fmt.Sprint(ids), dedup.Unique)
			}
			tt.begin(server)
			if tt.end == nil {
				// Present connections stay: end them.
				c, err := net.Dial("tcp", server.Addr)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				fmt.Fprint(c, "AUTH secret\r\nCLIENT KILL TYPE normal SKIPME yes\r\n")
				tt.end = func(*redisServer) {
					fmt.Fprint(c, "CONFIG SET requirepass \"\"\r\n")
				}
			}
			testproc.Until(t, "not ready, with "+tt.say+" as the reason and in the log", func() bool {
				began := time.Now()
				v, err := e.Add(t, r, 0, fmt.Sprint(ids))
				if took := time.Since(began); took > 10*r.cfg.Timeout {
					t.Fatalf("an answer took %v", took)
				}
				if err == nil {
					if v != dedup.Unique {
						t.Fatalf("id %d: %v", ids, v)
					}
					ids++
				} else if !errors.Is(err, dedup.ErrUnavailable) {
					t.Fatalf("id %d: %v", ids, err)
				}
				// That Redis does not answer is known before the attempt is given up.
				ready, reason := r.Health()
				return !ready && strings.Contains(reason, tt.say) && strings.Contains(log.String(), tt.say)
			})
			if _, err := e.Add(t, r, 0, "refused"); !errors.Is(err, dedup.ErrUnavailable) {
				t.Errorf("while not ready: %v", err)
			}
			e.Want(t, r, 0, "0", dedup.Repeat) // known here
			tt.end(server)
			testproc.Until(t, "ready again", func() bool {
				ready, _ := r.Health()
				return ready
			})
			testproc.Until(t, "ids are taken again", func() bool {
				v, err := e.Add(t, r, 0, "after")
				if err == nil && v != dedup.Unique {
					t.Fatalf("afterwards: %v", v)
				}
				return err == nil
			})
			e.Want(t, r, 0, "0", dedup.Repeat)
			untilSettled(t, r)
			if n, exact := sealed(t, e, r, 0); n != uint64(ids+1) || !exact {
				t.Errorf("sealed %d, exact %v; want %d, true", n, exact, ids+1)
			}
		})
	}
}

// TestRedisLosesItsData: what this instance has answered as new is added again,
// from memory, before anything else, and the count is right. No id is new for a
// second time.
func TestRedisLosesItsData(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		lose func(s *redisServer)
	}{
		{"FLUSHALL", func(s *redisServer) { s.do("FLUSHALL") }},
		{"restart", func(s *redisServer) { s.Kill(); s.Start() }},
		{"scripts", func(s *redisServer) { s.do("SCRIPT", "FLUSH") }},
		{"an epoch", func(s *redisServer) {
			s.do(append([]string{"DEL"}, slices.DeleteFunc(s.keys(), func(k string) bool { return strings.HasSuffix(k, ":lane5") })...)...)
		}},
		{"the hashes of lanes, and no sets", func(s *redisServer) {
			s.do(append([]string{"DEL"}, slices.DeleteFunc(s.keys(), func(k string) bool { return !strings.HasSuffix(k, ":lane5") })...)...)
		}},
		{"some keys", func(s *redisServer) {
			s.do(append([]string{"DEL"}, slices.DeleteFunc(s.keys(), func(k string) bool { return !strings.HasSuffix(k, ":t") })...)...)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			server := startRedis(t)
			a, b := newRedis(t, server.Addr), newRedis(t, server.Addr)
			ea, eb := settest.NewEpochs(t, a), settest.NewEpochs(t, b)
			const each = 600
			add := func(e settest.Epochs, r *Set, from int) {
				var group sync.WaitGroup
				for w := range 20 {
					group.Go(func() {
						for n := w; n < each; n += 20 {
							id := fmt.Sprint(from + n)
							if n%2 == 0 {
								id = "text " + id
							}
							testproc.Until(t, "id "+id+" is answered", func() bool {
								v, err := e.Add(t, r, 0, id)
								if err == nil && v != dedup.Unique {
									t.Errorf("id %s: %v", id, v)
								}
								return err == nil
							})
						}
					})
				}
				group.Wait()
			}
			add(ea, a, 0)
			add(eb, b, each)
			tt.lose(server)
			add(ea, a, 2*each)
			for _, x := range []struct {
				r *Set
				e settest.Epochs
			}{{a, ea}, {b, eb}} {
				if err := x.r.noticeLosses(t.Context(), time.Unix(0, x.e.At(0))); err != nil {
					t.Fatal(err)
				}
				testproc.Until(t, "all is settled", func() bool {
					_, _, some := x.r.unsettled()
					return !some
				})
			}
			for n := range each {
				if id := fmt.Sprint(n); n%2 == 1 {
					testproc.Until(t, "id "+id+" is answered", func() bool {
						v, err := eb.Add(t, b, 0, id)
						if err == nil && v != dedup.Repeat {
							t.Errorf("id %s of the other instance: %v", id, v)
						}
						return err == nil
					})
				}
			}
			if n, exact := sealed(t, ea, a, 0); n != 3*each || !exact {
				t.Errorf("sealed %d, exact %v; want %d, true", n, exact, 3*each)
			}
		})
	}
}

// TestRedisSaysWhatItMayHaveGivenTwice: after a loss another instance takes an
// id as new before the one that had answered for it can add it again.
func TestRedisSaysWhatItMayHaveGivenTwice(t *testing.T) {
	t.Parallel() // it mostly waits
	server := startRedis(t)
	way := startProxy(t, server.Addr)
	a := newRedis(t, way.addr())
	ea := settest.NewEpochs(t, a)
	wantInTime(t, a, ea, "42", dedup.Unique)
	way.refusing.Store(true)
	way.cut(0)
	server.do("FLUSHALL")
	b := newRedis(t, server.Addr) // knows nothing of a loss
	eb := settest.NewEpochs(t, b)
	wantInTime(t, b, eb, "42", dedup.Unique)
	way.refusing.Store(false)
	if err := a.noticeLosses(t.Context(), time.Unix(0, ea.At(0))); err != nil {
		t.Fatal(err)
	}
	untilSettled(t, a)
	if n, exact := sealed(t, eb, b, 0); n != 1 || exact {
		t.Errorf("sealed %d, exact %v; want 1, false", n, exact)
	}
}

// TestInstanceThatTheGroupDoesNotKnowAnswersNothingAlone: one with fail open starts and does not
// reach Redis. The others do, and nothing would make their records inexact.
func TestInstanceThatTheGroupDoesNotKnowAnswersNothingAlone(t *testing.T) {
	t.Parallel()
	way := startProxy(t, startRedis(t).Addr)
	way.refusing.Store(true)
	way.cut(0)
	r := newRedisAway(t, way.addr(), func(c *Config) { c.FailOpen, c.Log = true, zerolog.Nop() })
	e := settest.NewEpochs(t, r)
	for began := time.Now(); time.Since(began) < 2*r.cfg.Timeout; time.Sleep(tick) {
		if v, err := e.Add(t, r, 0, "42"); !errors.Is(err, dedup.ErrUnavailable) {
			t.Fatalf("before it has reached Redis: %v, %v; want ErrUnavailable", v, err)
		}
	}
	if ready, reason := r.Health(); ready || reason == "" {
		t.Errorf("before it has reached Redis: ready %v, %q", ready, reason)
	}
	way.refusing.Store(false)
	testproc.Until(t, "the store is ready", func() bool { ready, _ := r.Health(); return ready })
	wantInTime(t, r, e, "42", dedup.Unique)
	way.refusing.Store(true)
	way.cut(0)
	testproc.Until(t, "ids are judged here", func() bool { _, away := r.Health(); return away != "" })
	wantInTime(t, r, e, "43", dedup.Unique)
}

// TestInstanceThatStartsBeforeItsRedisAnswersAlone: with fail open, if the server refuses
// connections. The ids are in the group's count when Redis is there.
func TestInstanceThatStartsBeforeItsRedisAnswersAlone(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	server.Kill()
	r := newRedisAway(t, server.Addr, func(c *Config) { c.FailOpen, c.Log = true, zerolog.Nop() })
	e := settest.NewEpochs(t, r)
	wantInTime(t, r, e, "42", dedup.Unique)
	if v, err := e.Add(t, r, 0, "42"); v != dedup.Repeat || err != nil {
		t.Errorf("again: %v, %v; want a repeat", v, err)
	}
	if ready, reason := r.Health(); !ready || reason == "" {
		t.Errorf("health: %v, %q; want ready, and a reason", ready, reason)
	}
	server.Start()
	wantInTime(t, r, e, "43", dedup.Unique)
	testproc.Until(t, "Redis has both", func() bool { return r.Live(e.Last().Start()) == 2 })
	if n, exact := sealed(t, e, r, 0); n != 2 || !exact {
		t.Errorf("sealed %d, exact %v; want 2, true", n, exact)
	}
}

// TestRedisFailOpen: while Redis is unreachable each instance judges alone, and the record
// says so if an id was given twice.
func TestRedisFailOpen(t *testing.T) {
	t.Parallel() // it mostly waits
	for _, same := range []bool{false, true} {
		t.Run(fmt.Sprint("the same ids at both: ", same), func(t *testing.T) {
			server := startRedis(t)
			open := func(c *Config) { c.FailOpen = true }
			sets := []*Set{newRedis(t, server.Addr, open), newRedis(t, server.Addr, open)}
			var at []settest.Epochs
			for i, r := range sets {
				at = append(at, settest.NewEpochs(t, r))
				at[i].Want(t, r, 0, fmt.Sprint("before ", i), dedup.Unique)
			}
			server.do("SAVE")
			server.Kill()
			const ids = 1000
			for i, r := range sets {
				for n := range ids {
					id := fmt.Sprint(i, "-", n)
					if same && n == 500 {
						id = "500"
					}
					at[i].Want(t, r, 0, id, dedup.Unique)
				}
				for n := range ids / 2 {
					at[i].Want(t, r, 0, fmt.Sprint(i, "-", n), dedup.Repeat)
				}
				if ready, reason := r.Health(); !ready || reason == "" {
					t.Errorf("health while open: %v, %q", ready, reason)
				}
				if _, _, some := r.unsettled(); !some {
					t.Error("nothing is unsettled")
				}
			}
			server.Start()
			for _, r := range sets {
				untilSettled(t, r)
			}
			want := uint64(2*ids + 2)
			if same {
				want--
			}
			if n, exact := sealed(t, at[0], sets[0], 0); n != want || exact == same {
				t.Errorf("sealed %d, exact %v; want %d, %v", n, exact, want, !same)
			}
		})
	}
}

// TestWindowIsOnTheDiskBeforeItsFirstAnswer: an instance opens a window while Redis does not answer, and
// its heartbeat waits for that. Before it answers an id of the window alone, the window is on its
// disk, so that the next process in its place has it published, whatever becomes of this one.
func TestWindowIsOnTheDiskBeforeItsFirstAnswer(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	file := filepath.Join(t.TempDir(), "answers.json")
	r := newRedis(t, server.Addr, func(c *Config) { c.FailOpen, c.File = true, file })
	e := settest.NewEpochs(t, r)
	e.Want(t, r, 0, "before", dedup.Unique)
	server.pause()
	defer server.resume()
	waits := make(chan error, 1)
	go func() { waits <- r.ledger.beat(t.Context()) }()
	testproc.Until(t, "the heartbeat is under way", func() bool {
		if !r.ledger.beating.TryLock() {
			return true
		}
		r.ledger.beating.Unlock()
		return false
	})
	testproc.Until(t, "an id is answered without Redis", func() bool {
		v, err := e.Add(t, r, 1, "42")
		return err == nil && v == dedup.Unique
	})
	next := openLedger(Config{Group: "test", File: file}, "next", nil)
	span := counter.Span{Start: time.Unix(0, e.At(1)).UTC(), Window: epochtest.Window}
	if next.find(span) == nil {
		t.Error("the next process does not know of the window")
	}
	select {
	case err := <-waits:
		if err == nil {
			t.Error("Redis has answered")
		}
	default:
	}
}

// TestRedisAnswersSoonWhileItIsAway: waiting is bounded, and once Redis is known
// to be away there is none.
func TestRedisAnswersSoonWhileItIsAway(t *testing.T) {
	server := startRedis(t)
	r := newRedis(t, server.Addr, func(c *Config) { c.pending = 1000 })
	e := settest.NewEpochs(t, r)
	wantInTime(t, r, e, "1", dedup.Unique)
	server.pause()
	defer server.resume()
	var group sync.WaitGroup
	for i := range 2000 { // more than may wait
		group.Go(func() {
			if v, err := e.Add(t, r, 0, fmt.Sprint("x", i)); !errors.Is(err, dedup.ErrUnavailable) {
				t.Errorf("id %d: %v, %v", i, v, err)
			}
		})
	}
	group.Wait()
	testproc.Until(t, "it is known", func() bool {
		ready, _ := r.Health()
		e.Add(t, r, 0, "2")
		return !ready
	})
	began := time.Now()
	for range 1000 {
		if _, err := e.Add(t, r, 0, "2"); !errors.Is(err, dedup.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	if took := time.Since(began); took > r.cfg.Timeout*10 {
		t.Errorf("a thousand refusals took %v", took)
	}
	if n := r.pending.Load(); n > 1000 {
		t.Errorf("%d ids wait", n)
	}
}

// TestRedisKeysGoAway: ids at the seal, sessions at the end, the rest by itself.
func TestRedisKeysGoAway(t *testing.T) {
	server := startRedis(t)
	r := newRedis(t, server.Addr, patient)
	e := settest.NewEpochs(t, r)
	for i, id := range epochtest.Alike {
		e.Want(t, r, 0, id, dedup.Unique)
		e.Want(t, r, 0, fmt.Sprint(1000+i), dedup.Unique)
		e.Want(t, r, 0, strings.Repeat(id, 50), dedup.Unique)
	}
	ids := regexp.MustCompile(`^verve:\{[0-9a-z]{2,3}\}:test:lane5:\d+` + epochLength + `:(d|u|t|h|k|x|n)$`)
	rest := regexp.MustCompile(`^verve:\{[0-9a-z]{2,3}\}:test:(lane5|lanes|lane5:rights)$`)
	kinds := map[byte]bool{}
	for _, k := range server.keys() {
		if strings.HasPrefix(k, "verve:{test}:") {
			continue // the ledger's
		}
		if !ids.MatchString(k) && !rest.MatchString(k) {
			t.Errorf("key %q", k)
		}
		if ids.MatchString(k) {
			kinds[k[strings.LastIndexByte(k, ':')+1]] = true
		}
		if server.do("TTL", k) == "-1" {
			t.Errorf("key %q stays for ever", k)
		}
	}
	if len(kinds) != 4 {
		t.Errorf("kinds of keys: %v", kinds)
	}
	sealed(t, e, r, 0)
	for _, k := range server.keys() {
		if ids.MatchString(k) {
			t.Errorf("key %q is there after the seal", k)
		}
	}
	for _, k := range server.keys() {
		if strings.HasSuffix(k, ":lane5") {
			// The answer to the session, its ids in doubt, the sessions with some, whose
			// data these are, since when, whether there are replicas, what is sealed, and for whom.
			if n := server.do("HLEN", k); n != "8" {
				t.Errorf("%s fields in %s, want those of one session and of what is sealed: %s", n, k, server.do("HKEYS", k))
			}
		}
	}
}

// TestRedisCloseEndsEverything: goroutines, connections and the session.
func TestRedisCloseEndsEverything(t *testing.T) {
	server := startRedis(t)
	before := goleak.IgnoreCurrent()
	local, err := dedup.NewMemory(dedup.Config{Heap: true})
	if err != nil {
		t.Fatal(err)
	}
	r, err := New(Config{URLs: []string{"redis://" + server.Addr}, Group: "test", Window: epochtest.Window, Local: local})
	if err != nil {
		t.Fatal(err)
	}
	c, err := counter.New(counter.Config{Window: epochtest.Window, Store: r, Publisher: epochtest.Nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	testproc.Until(t, "an id is taken", func() bool {
		in, _ := c.Enter(c.Last().Start().UnixNano(), 0, 1)
		defer in.Leave(0, 0, 1)
		_, err := settest.AddTo(r, in.Epoch, []byte("42"))
		return err == nil
	})
	c.Seal()
	if err := c.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for _, k := range server.keys() {
		if strings.HasSuffix(k, ":lane5") && strings.Contains(server.do("HKEYS", k), "I"+r.cfg.session) {
			t.Errorf("ids in doubt are left in %s", k)
		}
	}
	var left error
	for start := time.Now(); time.Since(start) < time.Minute; { // some end a moment later
		if left = goleak.Find(before); left == nil {
			break
		}
	}
	if left != nil {
		t.Error(left)
	}
}

func TestRedisConfig(t *testing.T) {
	good := Config{URLs: []string{"redis://127.0.0.1:1"}, Group: "g", Window: time.Minute, Local: new(dedup.Memory)}
	for _, tt := range []struct {
		change func(*Config)
		want   string // in the error
	}{
		{func(c *Config) { c.URLs = nil }, "redis-url"},
		{func(c *Config) { c.URLs = []string{"http://h:1"} }, "scheme"},
		{func(c *Config) { c.URLs = []string{"redis://u:pass word@h:x"} }, "malformed"},
		{func(c *Config) { c.URLs = []string{"redis://u:secret@"} }, "host"},
		{func(c *Config) { c.URLs = []string{"redis-sentinel://u:secret@h:1"} }, "master_set"},
		{func(c *Config) { c.URLs = []string{"redis://u:secret@h:1/x"} }, "database"},
		{func(c *Config) { c.Group = "" }, "group"},
		{func(c *Config) { c.Window = time.Millisecond }, "window"},
		{func(c *Config) { c.Local = nil }, "Local"},
		{func(c *Config) { c.Timeout = -1 }, "Timeout"},
	} {
		c := good
		tt.change(&c)
		r, err := New(c)
		if err == nil {
			r.Close()
			t.Errorf("%+v is taken", c)
			continue
		}
		if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %q, want %q in it", err, tt.want)
		}
		if strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "pass word") {
			t.Errorf("the password is in %q", err)
		}
	}
}

// TestRedisInstancesMustAgreeOnTheLanes: with ids spread in two ways, each could
// be new twice.
func TestRedisInstancesMustAgreeOnTheLanes(t *testing.T) {
	server := startRedis(t)
	a := newRedis(t, server.Addr, patient, func(c *Config) { c.FailOpen = true })
	ea := settest.NewEpochs(t, a)
	ea.Want(t, a, 0, "42", dedup.Unique)
	server.do("SET", "verve:{"+laneTags[0]+"}:test:lanes", "5016")
	testproc.Until(t, "not ready", func() bool {
		ready, reason := a.Health()
		return !ready && strings.Contains(reason, "over 16 parts")
	})
	if v, err := ea.Add(t, a, 0, "43"); !errors.Is(err, dedup.ErrUnavailable) {
		t.Errorf("got %v, %v; want ErrUnavailable", v, err)
	}
}
