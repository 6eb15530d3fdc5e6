package redis

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"verve/counter"
	"verve/dedup"
	"verve/internal/epochtest"
	"verve/internal/settest"
	"verve/internal/testproc"
)

// addAs adds an id with a key and a token, empty: none, to the n-th epoch, or a later one
// if that is open.
func addAs(t testing.TB, r *Set, e settest.Epochs, n int, id, key, token string) (dedup.Verdict, error) {
	t.Helper()
	v, _, err := addIn(t, r, e, n, id, key, token)
	return v, err
}

// addIn also returns the epoch.
func addIn(t testing.TB, r *Set, e settest.Epochs, n int, id, key, token string) (dedup.Verdict, *counter.Epoch, error) {
	t.Helper()
	in, ok := e.Enter(e.At(n), 0, 1)
	if !ok {
		t.Fatal("the counter is sealed")
	}
	o := &dedup.Options{Under: []byte(key), Token: []byte(token)}
	verdicts := [1]dedup.Verdict{dedup.Turned}
	items := []dedup.Item{{ID: []byte(id), Options: o}}
	r.Keys(items)
	err := r.AddMany(in.Epoch, items, verdicts[:])
	switch v := verdicts[0]; {
	case v == dedup.Unique:
		in.Leave(1, 0, 0)
	case v == dedup.Repeat:
		in.Leave(0, 1, 0)
	default:
		in.Leave(0, 0, 1)
	}
	return verdicts[0], in.Epoch, err
}

func wantAs(t testing.TB, r *Set, e settest.Epochs, n int, id, key, token string, want dedup.Verdict) {
	t.Helper()
	var got dedup.Verdict
	var err error
	testproc.Until(t, "an id is answered", func() bool {
		got, err = addAs(t, r, e, n, id, key, token)
		return !errors.Is(err, dedup.ErrUnavailable)
	})
	if got != want || err != nil {
		t.Fatalf("epoch %d, id %q, key %q, token %q: got %v, %v; want %v", n, id, key, token, got, err, want)
	}
}

// untilAs asks as addAs does until there is an answer, which must be want.
func untilAs(t testing.TB, r *Set, e settest.Epochs, n int, id, key, token string, want dedup.Verdict) {
	t.Helper()
	testproc.Until(t, "an attempt is answered", func() bool {
		v, err := addAs(t, r, e, n, id, key, token)
		if err == nil && v != want {
			t.Fatalf("token %q: %v, want %v", token, v, want)
		}
		return err == nil
	})
}

// pair is two instances of a group.
func pair(t *testing.T, change ...func(*Config)) (server *redisServer, a, b *Set, ea, eb settest.Epochs) {
	t.Helper()
	server = startRedis(t)
	change = append([]func(*Config){patient}, change...)
	a, b = newRedis(t, server.Addr, change...), newRedis(t, server.Addr, change...)
	return server, a, b, settest.NewEpochs(t, a), settest.NewEpochs(t, b)
}

// keysOf seals the n-th epoch and returns its counts by key, as KEY=COUNT.
func keysOf(t testing.TB, e settest.Epochs, r *Set, n int) string {
	t.Helper()
	s := counter.Span{Start: time.Unix(0, e.At(n)), Window: epochtest.Window}
	var ids sealedIDs
	var keys counter.KeyCounts
	testproc.Until(t, "the epoch is sealed", func() bool { // the first try may meet a connection that was cut
		var err error
		if ids, err = r.sealIDs(t.Context(), s, nil); err == nil {
			keys, err = r.keyCounts(t.Context(), s)
		}
		return err == nil
	})
	var text []string
	for _, k := range keys.List() {
		text = append(text, fmt.Sprintf("%s=%d", k.Key, k.Unique))
	}
	return fmt.Sprintf("%d %v %d/%d %s", ids.unique, ids.exact, keys.Unique(), ids.under, strings.Join(text, " "))
}

// TestRedisRetriesGetTheirAnswer: at both instances, within the window and in the next.
func TestRedisRetriesGetTheirAnswer(t *testing.T) {
	_, a, b, ea, eb := pair(t)
	for _, id := range []string{"42", "3f333df6-90a4-4fda-8dd3-9485d27cee36", "text", strings.Repeat("long", 20)} {
		for _, key := range []string{"", "key", strings.Repeat("k", 128)} {
			wantAs(t, a, ea, 0, id, key, "T", dedup.Unique)
			for _, at := range []struct {
				r *Set
				e settest.Epochs
			}{{a, ea}, {b, eb}} {
				wantAs(t, at.r, at.e, 0, id, key, "T", dedup.Replayed)
				wantAs(t, at.r, at.e, 0, id, key, "", dedup.Repeat)
				wantAs(t, at.r, at.e, 0, id, key, "T", dedup.Replayed)
				wantAs(t, at.r, at.e, 0, id, key, strings.Repeat("t", 64), dedup.Repeat)
				wantAs(t, at.r, at.e, 0, id, key, "t", dedup.Repeat)
			}
			wantAs(t, b, eb, 0, id+"x", key, "", dedup.Unique)
			wantAs(t, a, ea, 0, id+"x", key, "T", dedup.Repeat)
		}
	}
	if got, want := keysOf(t, ea, a, 0), "24 true 16/16 key=8 "+strings.Repeat("k", 128)+"=8"; got != want {
		t.Errorf("sealed %s, want %s", got, want)
	}
	for _, id := range []string{"42", "text"} {
		wantAs(t, b, eb, 1, id, "key", "T", dedup.ReplayedBefore)
		wantAs(t, a, ea, 1, id, "key", "U", dedup.Unique)
		wantAs(t, b, eb, 1, id, "key", "T", dedup.ReplayedBefore)
		wantAs(t, b, eb, 1, id, "key", "U", dedup.Replayed)
	}
	ea.Want(t, a, 2, "other", dedup.Unique)
	wantAs(t, a, ea, 2, "42", "key", "T", dedup.Unique) // two windows later it is forgotten
	wantAs(t, b, eb, 2, "42", "key", "U", dedup.ReplayedBefore)
}

// TestRedisRetryAtAnInstanceThatHasNotTurned: the attempt was counted in the window behind. The
// answer names that window, also if its start is further away than MaxSkew.
func TestRedisRetryAtAnInstanceThatHasNotTurned(t *testing.T) {
	for _, skew := range []time.Duration{time.Second, 2 * time.Hour} {
		_, a, b, ea, eb := pair(t, func(c *Config) { c.MaxSkew = skew })
		wantAs(t, a, ea, 1, "42", "", "T", dedup.Unique)
		wantAs(t, b, eb, 0, "42", "", "T", dedup.ReplayedAfter)
		if got, want := eb.Last().End(), time.Unix(0, ea.At(1)); !got.Equal(want) {
			t.Errorf("counted in the window of %v, want %v", got, want)
		}
		wantAs(t, b, eb, 0, "42", "", "U", dedup.Unique)
	}
}

// TestRedisRetryAtAnInstanceThatWasNotThere: the attempt was counted at another instance in a
// window in which this one was asleep. The answer names that window.
func TestRedisRetryAtAnInstanceThatWasNotThere(t *testing.T) {
	_, a, b, ea, eb := pair(t)
	wantAs(t, b, eb, 0, "1", "", "T", dedup.Unique)
	wantAs(t, a, ea, 1, "42", "", "T", dedup.Unique)
	wantAs(t, b, eb, 2, "42", "", "T", dedup.ReplayedBefore)
	if got, want := eb.Last().Before(), time.Unix(0, eb.At(1)); !got.Equal(want) {
		t.Errorf("counted in the window of %v, want %v", got, want)
	}
}

// TestRedisOneAttemptAtOnceEverywhere: many requests of the same and of other attempts
// for one id, at two instances at once. One attempt wins, and all of its requests are
// answered so.
func TestRedisOneAttemptAtOnceEverywhere(t *testing.T) {
	t.Parallel() // it mostly waits
	_, a, b, ea, eb := pair(t)
	const attempts, requests, ids = 3, 3, 200
	sets, at := []*Set{a, b}, []settest.Epochs{ea, eb}
	for n := range ids {
		id := fmt.Sprint(n)
		var got [attempts + 1][dedup.Verdicts]atomic.Int64
		var group sync.WaitGroup
		start := make(chan struct{})
		for attempt := range attempts + 1 { // the last one without a token
			for k := range requests * 2 {
				group.Go(func() {
					token := [attempts + 1]string{"token 1", "token 2", "token 3"}[attempt]
					<-start
					v, err := addAs(t, sets[k%2], at[k%2], 0, id, []string{"", "key"}[n%2], token)
					if err != nil {
						t.Error(err)
					}
					got[attempt][v].Add(1)
				})
			}
		}
		close(start)
		group.Wait()
		winners := 0
		for attempt := range got {
			g := &got[attempt]
			unique, replayed, repeat := g[dedup.Unique].Load(), g[dedup.Replayed].Load(), g[dedup.Repeat].Load()
			switch {
			case unique == 1 && attempt < attempts && replayed == requests*2-1,
				unique == 1 && attempt == attempts && repeat == requests*2-1:
				winners++
			case repeat != requests*2:
				t.Errorf("id %s, attempt %d: %d unique, %d replayed, %d repeats", id, attempt, unique, replayed, repeat)
			}
		}
		if winners != 1 {
			t.Errorf("id %s: %d attempts won", id, winners)
		}
	}
	if got := keysOf(t, ea, a, 0); got != "200 true 100/100 key=100" {
		t.Errorf("sealed %s", got)
	}
}

// cutting is two instances whose replies are thrown away again and again, for longer than
// a request waits, until settled.
func cutting(t *testing.T) (sets []*Set, at []settest.Epochs, settled func()) {
	t.Helper()
	server := startRedis(t)
	var ways []*proxy
	for range 2 {
		p := startProxy(t, server.Addr)
		r := newRedis(t, p.addr(), func(c *Config) { c.Timeout = 20 * time.Millisecond })
		sets, at, ways = append(sets, r), append(at, settest.NewEpochs(t, r)), append(ways, p)
	}
	stop := cutAgain(ways, 30*time.Millisecond)
	return sets, at, func() {
		stop()
		for _, r := range sets {
			untilSettled(t, r)
		}
	}
}

// TestRedisOneAttemptWinsAfterLostReplies: several attempts for each id, each sent again
// until it is answered, at either instance. One is answered ok, and stays so.
func TestRedisOneAttemptWinsAfterLostReplies(t *testing.T) {
	const ids, attempts, sendings = 600, 3, 3
	sets, at, settled := cutting(t)
	var won [ids][attempts]atomic.Int64 // answered ok
	var unique [ids]atomic.Int64
	var failed atomic.Int64
	var group sync.WaitGroup
	for c := range 20 * attempts {
		group.Go(func() {
			attempt := c % attempts
			token := fmt.Sprint("token ", attempt)
			if attempt == 2 {
				token = ""
			}
			for n := c / attempts; n < ids; n += 20 {
				deadline := time.Now().Add(60 * time.Second)
				for answers, i := 0, c; answers < sendings; i++ {
					v, err := addAs(t, sets[i%2], at[i%2], 0, fmt.Sprint(n), []string{"", "key"}[n%2], token)
					switch {
					case err != nil && errors.Is(err, dedup.ErrUnavailable):
						failed.Add(1)
						if time.Now().After(deadline) {
							t.Errorf("id %d is not answered", n)
							return
						}
						continue
					case err != nil || v == dedup.Turned:
						t.Errorf("id %d: %v, %v", n, v, err)
						return
					case v == dedup.Unique:
						unique[n].Add(1)
						won[n][attempt].Add(1)
					case v == dedup.Replayed:
						won[n][attempt].Add(1)
					}
					answers++
				}
			}
		})
	}
	group.Wait()
	settled()
	t.Logf("%d attempts failed, %d ids taken back", failed.Load(), sets[0].counts.takenBack.Load()+sets[1].counts.takenBack.Load())
	for n := range ids {
		winners := 0
		for attempt := range attempts {
			switch w := won[n][attempt].Load(); {
			case w == sendings, w == 1 && attempt == 2:
				winners++
			case w != 0:
				t.Errorf("id %d, attempt %d: %d answers are ok", n, attempt, w)
			}
		}
		if winners != 1 || unique[n].Load() != 1 {
			t.Errorf("id %d: %d attempts are ok, %d answers are new", n, winners, unique[n].Load())
		}
	}
	if got, want := keysOf(t, at[0], sets[0], 0), "600 true 300/300 key=300"; got != want {
		t.Errorf("sealed %s, want %s", got, want)
	}
}

// TestRedisRetriesAfterLostReplies: replies of Redis are thrown away, and callers give up
// and try the other instance with the same token, some also without need, and across a
// turn. Every id is answered ok, and counted once, under its key.
func TestRedisRetriesAfterLostReplies(t *testing.T) {
	sets, at, settled := cutting(t)
	const callers, each, keys = 50, 60, 7
	var turned atomic.Bool
	var counts [2][keys]atomic.Int64
	var failed, replayed atomic.Int64
	var group sync.WaitGroup
	for c := range callers {
		group.Go(func() {
			for n := range each {
				id, key := fmt.Sprint(c*each+n), n%keys
				name := ""
				if key > 0 {
					name = fmt.Sprint("key ", key)
				}
				if c == 0 && n == each/2 {
					turned.Store(true)
				}
				ok := false
				deadline := time.Now().Add(60 * time.Second)
				for i := c; ; i++ {
					// The two instances turn at different moments.
					epoch := 0
					if turned.Load() && rand.IntN(4) > 0 {
						epoch = 1
					}
					v, in, err := addIn(t, sets[i%2], at[i%2], epoch, id, name, "T")
					switch {
					case err == nil && v == dedup.Unique:
						counts[in.Start().Sub(time.Unix(0, at[0].At(0)))/epochtest.Window][key].Add(1)
						ok = true
					case err == nil && (v == dedup.Replayed || v == dedup.ReplayedBefore):
						replayed.Add(1)
						ok = true
					case err != nil && errors.Is(err, dedup.ErrUnavailable):
						failed.Add(1)
					default:
						t.Errorf("id %s: %v, %v", id, v, err)
						return
					}
					if ok && rand.IntN(3) > 0 {
						break
					}
					if time.Now().After(deadline) {
						t.Errorf("id %s is not answered", id)
						return
					}
				}
			}
		})
	}
	group.Wait()
	settled()
	t.Logf("%d attempts failed, %d were replayed, %d ids taken back", failed.Load(), replayed.Load(), sets[0].counts.takenBack.Load()+sets[1].counts.takenBack.Load())
	sum := int64(0)
	for n := range 2 {
		total, under := int64(0), int64(0)
		var text []string
		for key := range keys {
			c := counts[n][key].Load()
			total += c
			if key > 0 && c > 0 {
				under += c
				text = append(text, fmt.Sprintf("key %d=%d", key, c))
			}
		}
		sum += total
		if got, want := keysOf(t, at[0], sets[0], n), fmt.Sprintf("%d true %d/%d %s", total, under, under, strings.Join(text, " ")); got != want {
			t.Errorf("epoch %d: sealed %s, answered %s", n, got, want)
		}
	}
	if sum != callers*each {
		t.Errorf("%d ids are counted, want %d", sum, callers*each)
	}
}

// TestRedisAttemptsWaitForTheirOutcome: an attempt is in Redis and its request gone. Another
// attempt for the id is new, once the first is taken back.
func TestRedisAttemptsWaitForTheirOutcome(t *testing.T) {
	t.Parallel() // it mostly waits
	server := startRedis(t)
	way := startProxy(t, server.Addr)
	a, b, c := newRedis(t, way.addr()), newRedis(t, server.Addr), newRedis(t, server.Addr)
	ea, eb, ec := settest.NewEpochs(t, a), settest.NewEpochs(t, b), settest.NewEpochs(t, c)
	wantInTime(t, a, ea, "before", dedup.Unique)
	for i, other := range []string{"U", ""} {
		id := fmt.Sprint(i)
		goDeaf(t, server, way, a)
		if v, err := addAs(t, a, ea, 0, id, "key", "T"); !errors.Is(err, dedup.ErrUnavailable) {
			t.Fatalf("without a reply: %v, %v", v, err)
		}
		testproc.Until(t, "the id is in Redis", func() bool {
			return server.do("SCARD", a.lanes[0].redisKey+":"+epochName(counter.Span{Start: time.Unix(0, ea.At(0)), Window: epochtest.Window})+":k") == fmt.Sprint(i+1)
		})
		if v, err := addAs(t, b, eb, 0, id, "key", "T"); !errors.Is(err, dedup.ErrUnavailable) {
			t.Fatalf("at the other instance: %v, %v; want ErrUnavailable, as nobody was told", v, err)
		}
		if v, err := addAs(t, c, ec, 1, id, "key", "T"); !errors.Is(err, dedup.ErrUnavailable) {
			t.Fatalf("in the next window: %v, %v; want ErrUnavailable, as nobody was told", v, err)
		}
		way.deaf.Store(false)
		way.cut(0)
		testproc.Until(t, "another attempt is answered", func() bool {
			v, err := addAs(t, a, ea, 0, id, "key", other)
			if err == nil && v != dedup.Unique {
				t.Fatalf("another attempt: %v", v)
			}
			return err == nil
		})
		wantAs(t, b, eb, 0, id, "key", "T", dedup.Repeat)
		untilSettled(t, a)
	}
	if got := keysOf(t, eb, b, 0); got != "3 true 2/2 key=2" {
		t.Errorf("sealed %s", got)
	}
}

// TestRedisRetryAfterAnInstanceIsKilled: the ids of a killed instance stay, and their
// tokens. The record is not exact: nobody has seen that it answered its last batch.
func TestRedisRetryAfterAnInstanceIsKilled(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	a, b := startInstance(t, server, ""), startInstance(t, server, "")
	wantAs(t, a.r, a.e, 0, "42", "key", "T", dedup.Unique)
	a.vanish()
	untilAs(t, b.r, b.e, 0, "42", "key", "T", dedup.Replayed)
	wantAs(t, b.r, b.e, 0, "42", "key", "U", dedup.Repeat)
	wantAs(t, b.r, b.e, 1, "42", "key", "T", dedup.ReplayedBefore)
	if c := b.record(); c.Unique != 1 || c.Exact || !slices.Equal(c.Keys.List(), []counter.KeyCount{{Key: "key", Unique: 1}}) {
		t.Errorf("the record is %+v", c)
	}
}

// TestRedisTokensAndKeysComeBack: Redis loses everything, or one of its keys.
func TestRedisTokensAndKeysComeBack(t *testing.T) {
	t.Parallel()
	for _, lost := range []string{"FLUSHALL", "restart", ":k", ":x", ":n"} {
		t.Run(lost, func(t *testing.T) {
			t.Parallel()
			server := startRedis(t)
			a, b := startInstance(t, server, ""), startInstance(t, server, "")
			for n := range 50 {
				wantAs(t, a.r, a.e, 0, fmt.Sprint("a", n), fmt.Sprint("key ", n%3), "T", dedup.Unique)
				wantAs(t, b.r, b.e, 0, fmt.Sprint("b", n), fmt.Sprint("key ", n%5), "", dedup.Unique)
				wantAs(t, b.r, b.e, 0, fmt.Sprint("c", n), "", "T", dedup.Unique)
			}
			a.ok, b.ok = 50, 100
			want := a.e.Last().Keys().Counts()
			switch lost {
			case "FLUSHALL":
				server.do("FLUSHALL")
			case "restart":
				server.Kill()
				server.Start()
			default:
				for _, k := range server.keys() {
					if strings.HasSuffix(k, lost) {
						server.do("DEL", k)
					}
				}
			}
			// An instance that is later than freezeTime is not waited for: the record is then
			// not exact, as the tests of the model try.
			if err := a.r.noticeLosses(t.Context(), a.span().Start); err != nil {
				t.Fatal(err)
			}
			untilSettled(t, a.r)
			for _, x := range []struct{ id, key, token string }{{"a1", "key 1", "T"}, {"c1", "", "T"}} {
				testproc.Until(t, "the retry is answered", func() bool {
					v, err := addAs(t, b.r, b.e, 0, x.id, x.key, x.token)
					if err == nil && v != dedup.Replayed {
						t.Fatalf("id %s: %v", x.id, v)
					}
					return err == nil
				})
			}
			b.report()
			b.beat()
			c := a.record()
			keys := c.Keys.List()
			// A retry of the window before would not have been recognised.
			tokensLost := lost == "FLUSHALL" || lost == "restart"
			if c.Exact == tokensLost || c.Unique != 150 || len(keys) != 5 || keys[0].Unique != 17+10 || keys[3].Unique != 10 {
				t.Errorf("the record is %+v, a has %v", c, want)
			}
		})
	}
}

// TestRedisRecordsHaveTheKeysOfTheGroup: whichever instance asks, and whoever was the
// leader; until the record is delivered.
func TestRedisRecordsHaveTheKeysOfTheGroup(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	a, b := startInstance(t, server, ""), startInstance(t, server, "")
	for n := range 5000 {
		i := []*instance{a, b}[n%2]
		wantAs(t, i.r, i.e, 0, fmt.Sprint(n), fmt.Sprintf("key %04d", n/2%2000), "", dedup.Unique)
		i.ok++
	}
	if n := b.e.Last().Keys().Len(); n != 2000 {
		t.Errorf("the live page has %d keys", n)
	}
	b.report()
	c := a.record()
	sum := uint64(0)
	for i, k := range c.Keys.List() {
		sum += k.Unique
		if k.Key != fmt.Sprintf("key %04d", i) {
			t.Fatalf("key %d is %s", i, k.Key)
		}
	}
	if !c.Exact || c.Unique != 5000 || sum != 5000 || c.Keys.Len() != 2000 {
		t.Errorf("%d keys with %d ids; exact %v, %d", c.Keys.Len(), sum, c.Exact, c.Unique)
	}
	a.vanish() // before its spool has it
	late := startInstance(t, server, "")
	for _, i := range []*instance{b, late} {
		got, err := i.r.ledger.Seal(t.Context(), a.span())
		if err != nil || got.Unique != c.Unique || !got.Exact || !slices.Equal(got.Keys.List(), c.Keys.List()) {
			t.Errorf("%v, %d, %v, %d keys", err, got.Unique, got.Exact, got.Keys.Len())
		}
	}
	if err := b.r.ledger.Delivered(t.Context(), a.span()); err != nil {
		t.Fatal(err)
	}
	for _, k := range server.keys() {
		if strings.HasSuffix(k, ":n") && server.do("TTL", k) > "60" {
			t.Errorf("%s is kept for %s s", k, server.do("TTL", k))
		}
	}
}

// TestRedisKeysThatAreLostMakeTheRecordInexact: after the decision and before the spool.
func TestRedisKeysThatAreLostMakeTheRecordInexact(t *testing.T) {
	server := startRedis(t)
	a, b := startInstance(t, server, ""), startInstance(t, server, "")
	wantAs(t, a.r, a.e, 0, "42", "key", "", dedup.Unique)
	a.ok++
	b.report()
	if c := a.record(); !c.Exact || c.Keys.Len() != 1 {
		t.Fatalf("the record is %+v", c)
	}
	for _, k := range server.keys() {
		if strings.HasSuffix(k, ":n") {
			server.do("DEL", k)
		}
	}
	if c, err := b.r.ledger.Seal(t.Context(), a.span()); err != nil || c.Exact || c.Unique != 1 {
		t.Errorf("%v, %+v", err, c)
	}
}

// TestRedisMaxKeys: a further key is refused, those that are there are not, nor ids
// without one.
func TestRedisMaxKeys(t *testing.T) {
	_, a, b, ea, eb := pair(t, func(c *Config) { c.MaxKeys = 3 })
	for n := range 3 {
		wantAs(t, a, ea, 0, "42", fmt.Sprint("key ", n), "", dedup.Unique)
	}
	for _, at := range []struct {
		r *Set
		e settest.Epochs
	}{{a, ea}, {b, eb}} {
		for n := range 10 {
			if v, err := addAs(t, at.r, at.e, 0, fmt.Sprint(n), "further", []string{"", "T"}[n%2]); v != dedup.Full || !errors.Is(err, dedup.ErrTooManyKeys) {
				t.Errorf("a further key: %v, %v", v, err)
			}
		}
		wantAs(t, at.r, at.e, 0, at.r.cfg.session, "key 1", "", dedup.Unique)
		wantAs(t, at.r, at.e, 0, "42", "key 2", "", dedup.Repeat)
		wantAs(t, at.r, at.e, 0, at.r.cfg.session, "", "", dedup.Unique)
	}
	if got := keysOf(t, eb, b, 0); got != "7 true 5/5 key 0=1 key 1=3 key 2=1" {
		t.Errorf("sealed %s", got)
	}
}

// TestRedisRetryNeedsNoRoom: a retry from the window before is recognised where there is no
// room, at either instance, for its key or for further ids. Another attempt, also one that
// was sent first, is refused, and counts nothing.
func TestRedisRetryNeedsNoRoom(t *testing.T) {
	for _, c := range []struct {
		name   string
		full   error
		change func(*Config)
		taken  []string // keys, of an id each
	}{
		{"keys", dedup.ErrTooManyKeys, func(c *Config) { c.MaxKeys = 2 }, []string{"key 1", "key 2"}},
		{"ids", dedup.ErrFull, func(c *Config) { c.MaxIDs = 3 }, []string{"key 1", "key 1", "key 1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			server := startRedis(t)
			a, b := newRedis(t, server.Addr, patient, c.change), newRedis(t, server.Addr, patient, c.change)
			ea := settest.Epochs{Epochs: epochtest.NewWithin(t, a, a.cfg.MaxKeys)}
			eb := settest.Epochs{Epochs: epochtest.NewWithin(t, b, b.cfg.MaxKeys)}
			wantAs(t, a, ea, 0, "42", "first", "T", dedup.Unique)
			for i, key := range c.taken {
				wantAs(t, a, ea, 1, fmt.Sprint(i), key, "", dedup.Unique)
			}
			for _, at := range []struct {
				r *Set
				e settest.Epochs
			}{{a, ea}, {b, eb}} {
				for range 2 {
					wantAs(t, at.r, at.e, 1, "42", "first", "T", dedup.ReplayedBefore)
					for _, token := range []string{"", "U"} {
						if v, err := addAs(t, at.r, at.e, 1, "42", "first", token); v != dedup.Full || !errors.Is(err, c.full) {
							t.Errorf("token %q: got %v, %v; want %v", token, v, err, c.full)
						}
					}
				}
				in, _ := at.e.Enter(at.e.At(1), 0, 1)
				var items []dedup.Item // of one batch: they wait for each other
				for _, token := range []string{"U", "", "T", "V", "T"} {
					items = append(items, dedup.Item{ID: []byte("42"), Options: &dedup.Options{Under: []byte("first"), Token: []byte(token)}})
				}
				at.r.Keys(items)
				got := make([]dedup.Verdict, len(items))
				_ = at.r.AddMany(in.Epoch, items, got)
				in.Leave(0, 0, 1)
				if want := []dedup.Verdict{dedup.Full, dedup.Full, dedup.ReplayedBefore, dedup.Full, dedup.ReplayedBefore}; !slices.Equal(got, want) {
					t.Errorf("together: got %v, want %v", got, want)
				}
			}
			want := map[string]string{"keys": "2 true 2/2 key 1=1 key 2=1", "ids": "3 true 3/3 key 1=3"}[c.name]
			if got := keysOf(t, eb, b, 1); got != want {
				t.Errorf("sealed %s, want %s", got, want)
			}
		})
	}
}

// TestRedisRetryWhileRedisIsAway: with fail open an instance recognises the attempts that it
// has answered itself; otherwise a retry waits.
func TestRedisRetryWhileRedisIsAway(t *testing.T) {
	for _, open := range []bool{false, true} {
		t.Run(fmt.Sprint("open: ", open), func(t *testing.T) {
			server := startRedis(t)
			r := newRedis(t, server.Addr, func(c *Config) { c.FailOpen = open })
			e := settest.NewEpochs(t, r)
			wantAs(t, r, e, 0, "41", "", "T", dedup.Unique)
			wantAs(t, r, e, 1, "42", "key", "T", dedup.Unique)
			server.pause()
			if !open {
				if v, err := addAs(t, r, e, 1, "42", "key", "T"); !errors.Is(err, dedup.ErrUnavailable) {
					t.Errorf("got %v, %v; want ErrUnavailable", v, err)
				}
				server.resume()
				return
			}
			for range 2 {
				wantAs(t, r, e, 1, "42", "key", "T", dedup.Replayed)
				wantAs(t, r, e, 1, "41", "", "T", dedup.ReplayedBefore)
				wantAs(t, r, e, 1, "42", "key", "U", dedup.Repeat)
			}
			wantAs(t, r, e, 1, "43", "key", "V", dedup.Unique)
			wantAs(t, r, e, 1, "43", "key", "V", dedup.Replayed)
			wantAs(t, r, e, 1, "43", "key", "", dedup.Repeat)
			server.resume()
			untilSettled(t, r)
			testproc.Until(t, "Redis answers again", func() bool { ready, reason := r.Health(); return ready && reason == "" })
			wantAs(t, r, e, 1, "43", "key", "V", dedup.Replayed)
			if got := keysOf(t, e, r, 1); got != "2 true 2/2 key=2" {
				t.Errorf("sealed %s", got)
			}
		})
	}
}

// TestRedisKeysAreBoundedWhileRedisIsAway: with fail open, an id with a token under a further
// key is refused, whoever waits for Redis and whoever does not.
func TestRedisKeysAreBoundedWhileRedisIsAway(t *testing.T) {
	server := startRedis(t)
	r := newRedis(t, server.Addr, func(c *Config) { c.FailOpen, c.MaxKeys = true, 1 })
	e := settest.Epochs{Epochs: epochtest.NewWithin(t, r, 1)}
	wantAs(t, r, e, 0, "42", "key", "T", dedup.Unique)
	server.pause()
	for n := range 3 {
		if v, err := addAs(t, r, e, 0, "42", "further", "T"); v != dedup.Full || !errors.Is(err, dedup.ErrTooManyKeys) {
			t.Errorf("attempt %d: got %v, %v; want %v", n, v, err, dedup.ErrTooManyKeys)
		}
	}
	wantAs(t, r, e, 0, "42", "key", "T", dedup.Replayed)
	wantAs(t, r, e, 0, "43", "key", "T", dedup.Unique)
	server.resume()
	untilSettled(t, r)
	if got := keysOf(t, e, r, 0); got != "2 true 2/2 key=2" {
		t.Errorf("sealed %s", got)
	}
}

// TestRedisAKeyThatGetsRoomKeepsItsIDs: an attempt is sent while its key has no room, Redis
// goes away, and the attempt is made again when the key has room. Its id is added under the
// key later.
func TestRedisAKeyThatGetsRoomKeepsItsIDs(t *testing.T) {
	server := startRedis(t)
	r := newRedis(t, server.Addr, func(c *Config) { c.FailOpen = true })
	e := settest.NewEpochs(t, r)
	wantAs(t, r, e, 0, "41", "", "", dedup.Unique)
	server.pause()
	in, _ := e.Enter(e.At(0), 0, 1)
	items := []dedup.Item{{ID: []byte("42"), Options: &dedup.Options{Under: []byte("key"), Token: []byte("T")}}}
	r.Keys(items)
	var en encoded
	h, m := r.name(&en, &items[0], true)
	_, a, err := r.lanes[h>>r.shift].add(in.Epoch, in.Epoch.State.(*redisEpoch), items[0].Key, &en, m)
	if err != nil {
		t.Fatal(err)
	}
	if <-a.done; !errors.Is(a.err, dedup.ErrTooManyKeys) {
		t.Errorf("without room: %v", a.err)
	}
	in.Leave(0, 0, 1)
	wantAs(t, r, e, 0, "42", "key", "T", dedup.Unique)
	server.resume()
	untilSettled(t, r)
	testproc.Until(t, "Redis answers again", func() bool { ready, reason := r.Health(); return ready && reason == "" })
	wantAs(t, r, e, 0, "42", "key", "T", dedup.Replayed)
	if got := keysOf(t, e, r, 0); got != "2 true 1/1 key=1" {
		t.Errorf("sealed %s", got)
	}
}

// TestRedisABatchThatFailsLeavesNothing: a set is gone, so the batch is given up after it
// has written.
func TestRedisABatchThatFailsLeavesNothing(t *testing.T) {
	server := startRedis(t)
	r := newRedis(t, server.Addr, patient)
	e := settest.NewEpochs(t, r)
	wantAs(t, r, e, 0, "1", "key", "T", dedup.Unique)
	wantAs(t, r, e, 0, "2", "key", "T", dedup.Unique)
	prefix := r.lanes[0].redisKey + ":" + epochName(counter.Span{Start: time.Unix(0, e.At(0)), Window: epochtest.Window}) + ":"
	renamed := time.Now()
	server.do("RENAME", prefix+"x", "verve:saved")
	state := func() string {
		return strings.Join([]string{server.do("HGETALL", prefix+"n"), server.do("SCARD", prefix+"k"), server.do("SCARD", prefix+"x"), server.do("EXISTS", prefix+"t")}, "/")
	}
	before := state()
	var group sync.WaitGroup
	for n, key := range []string{"key", "other", ""} {
		group.Go(func() { wantAs(t, r, e, 0, fmt.Sprint("text ", n), key, "T", dedup.Unique) })
	}
	for range 20 {
		time.Sleep(10 * time.Millisecond)
		got := state()
		if time.Since(renamed) > missingFor {
			break // the epoch may have been begun again
		}
		if got != before {
			t.Errorf("got %q, want %q", got, before)
			break
		}
	}
	server.do("RENAME", "verve:saved", prefix+"x")
	group.Wait()
	if got := keysOf(t, e, r, 0); got != "5 true 4/4 key=3 other=1" {
		t.Errorf("sealed %s", got)
	}
}

// TestRedisTokensOfTheWindowBeforeAreLost: their retries are new, so the record of their
// window says that it is not exact; the next one is.
func TestRedisTokensOfTheWindowBeforeAreLost(t *testing.T) {
	t.Parallel() // it mostly waits
	server := startRedis(t)
	r := newRedis(t, server.Addr, patient)
	e := settest.NewEpochs(t, r)
	wantAs(t, r, e, 0, "42", "", "T", dedup.Unique)
	e.Want(t, r, 1, "first", dedup.Unique)
	testproc.Until(t, "the first window is retired", func() bool {
		s := e.Last().State.(*redisEpoch).previous.Load()
		l := &r.lanes[0]
		l.mu.Lock()
		defer l.mu.Unlock()
		return s != nil && s.lanes[0].retired
	})
	server.do("FLUSHALL")
	testproc.Until(t, "the retry is answered", func() bool {
		v, err := addAs(t, r, e, 1, "42", "", "T")
		if err == nil && v != dedup.Unique {
			t.Fatalf("got %v", v)
		}
		return err == nil
	})
	e.Want(t, r, 2, "second", dedup.Unique)
	if n, exact := sealed(t, e, r, 1); n != 2 || exact {
		t.Errorf("sealed %d, exact %v; want 2, false", n, exact)
	}
	if n, exact := sealed(t, e, r, 2); n != 1 || !exact {
		t.Errorf("sealed %d, exact %v; want 1, true", n, exact)
	}
}

// TestRedisRetryWhileItsWindowIsBegunAgain: keys of a window that has ended were lost, so all
// of it is dropped and added again. A retry that comes in between, in the next window, counts
// again, and the record of that says that it is not exact.
func TestRedisRetryWhileItsWindowIsBegunAgain(t *testing.T) {
	server := startRedis(t)
	r := newRedis(t, server.Addr, patient)
	e := settest.NewEpochs(t, r)
	wantAs(t, r, e, 0, "42", "", "T", dedup.Unique)
	s := e.Last().State.(*redisEpoch)
	e.Want(t, r, 1, "first", dedup.Unique)
	if _, err := r.call(t.Context(), r.lanes[0].redisKey, "reset", s.name, s.lanes[0].gen); err != nil {
		t.Fatal(err)
	}
	wantAs(t, r, e, 1, "42", "", "T", dedup.Unique)
	if n, exact := sealed(t, e, r, 1); n != 2 || exact {
		t.Errorf("sealed %d, exact %v; want 2, false", n, exact)
	}
}

// TestRedisAKeyIsLostBeforeAnInstanceStarts: all who knew the generation of the epoch are gone. It
// is begun again even so; ids waited until its end.
func TestRedisAKeyIsLostBeforeAnInstanceStarts(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	a := startInstance(t, server, "")
	wantInTime(t, a.r, a.e, "42", dedup.Unique)
	a.vanish()
	for _, k := range server.keys() {
		if strings.HasSuffix(k, ":d") {
			server.do("DEL", k)
		}
	}
	r := newRedisAway(t, server.Addr)
	e := settest.NewEpochs(t, r)
	testproc.Until(t, "an id is answered", func() bool {
		v, err := e.Add(t, r, 0, "43")
		if err == nil && v != dedup.Unique {
			t.Fatalf("got %v", v)
		}
		return err == nil
	})
}

// TestRedisTokensThatAreLostAreRememberedIfMoreIsLost: a retry was counted again, as the tokens
// of the window before were lost. That its window is not exact for that is in Redis, and known
// to who counted it, should Redis lose that, too.
func TestRedisTokensThatAreLostAreRememberedIfMoreIsLost(t *testing.T) {
	t.Parallel() // it mostly waits
	server := startRedis(t)
	r := newRedis(t, server.Addr, patient)
	e := settest.NewEpochs(t, r)
	wantAs(t, r, e, 0, "42", "", "T", dedup.Unique)
	e.Want(t, r, 1, "first", dedup.Unique)
	before := e.Last().State.(*redisEpoch).before
	server.do("DEL", r.lanes[0].redisKey+":"+before+":x")
	wantAs(t, r, e, 1, "42", "", "T", dedup.Unique)
	server.do("DEL", r.lanes[0].redisKey)
	e.Want(t, r, 1, "second", dedup.Unique) // which no token is looked up for
	if n, exact := sealed(t, e, r, 1); n != 3 || exact {
		t.Errorf("sealed %d, exact %v; want 3, false", n, exact)
	}
}

// TestRedisRetriesAfterALoss: Redis loses everything again and again, under load. The ids
// that are answered ok stay so, and the record has them, under their keys.
func TestRedisRetriesAfterALoss(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	a, b := startInstance(t, server, ""), startInstance(t, server, "")
	at := []*instance{a, b}
	stop := make(chan struct{})
	var losses sync.WaitGroup
	losses.Go(func() {
		for i := range 3 {
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
			}
			if i%2 == 0 {
				server.do("FLUSHALL")
			} else {
				server.Kill()
				server.Start()
			}
		}
	})
	const callers = 30
	var ok [2]atomic.Uint64
	var counts [3]atomic.Uint64
	var group sync.WaitGroup
	var ids [callers]int
	deadline := time.Now().Add(8 * time.Second)
	send := func(i *instance, c, n int, want ...dedup.Verdict) {
		for {
			key := ""
			if n%3 > 0 {
				key = fmt.Sprint("key ", n%3)
			}
			v, err := addAs(t, i.r, i.e, 0, fmt.Sprintf("%d-%d", c, n), key, "T")
			if err == nil && !slices.Contains(want, v) || err != nil && !errors.Is(err, dedup.ErrUnavailable) {
				t.Errorf("id %d-%d: %v, %v", c, n, v, err)
			}
			if err == nil && v == dedup.Unique {
				ok[slices.Index(at, i)].Add(1)
				counts[n%3].Add(1)
			}
			if err == nil {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}
	for c := range callers {
		group.Go(func() {
			for ; time.Now().Before(deadline) && ids[c] < 1000; ids[c]++ {
				send(at[ids[c]%2], c, ids[c], dedup.Unique)
				send(at[c%2], c, ids[c], dedup.Replayed)
				if ids[c] > 100 {
					send(at[ids[c]%2], c, ids[c]-100, dedup.Replayed)
				}
			}
		})
	}
	group.Wait()
	close(stop)
	losses.Wait()
	for c := range callers {
		for n := range ids[c] {
			if n%20 == c%20 {
				send(at[n/2%2], c, n, dedup.Replayed)
			}
		}
	}
	a.ok, b.ok = ok[0].Load(), ok[1].Load()
	b.report()
	b.beat()
	record := a.record()
	want := []counter.KeyCount{{Key: "key 1", Unique: counts[1].Load()}, {Key: "key 2", Unique: counts[2].Load()}}
	if record.Unique != a.ok+b.ok || !slices.Equal(record.Keys.List(), want) {
		t.Errorf("%d ids and keys %v, the record is %+v", a.ok+b.ok, want, record)
	}
	t.Logf("%d ids; exact %v", record.Unique, record.Exact)
}

// TestRedisABelievedDoubtIsNotExact: an instance is cut off after it has added an id without
// an answer, until a retry elsewhere is answered ok. No instance reports that answer.
func TestRedisABelievedDoubtIsNotExact(t *testing.T) {
	t.Parallel()
	server, way, a, b, ea, eb := pairByProxy(t)
	wantInTime(t, a, ea, "before", dedup.Unique)
	goDeaf(t, server, way, a)
	if v, err := addAs(t, a, ea, 0, "42", "", "T"); !errors.Is(err, dedup.ErrUnavailable) {
		t.Fatalf("without a reply: %v, %v", v, err)
	}
	testproc.Until(t, "the id is in Redis", func() bool {
		return server.do("SISMEMBER", a.lanes[0].redisKey+":"+epochName(counter.Span{Start: time.Unix(0, ea.At(0)), Window: epochtest.Window})+":d", "42") == "1"
	})
	way.refusing.Store(true)
	way.cut(0)
	untilAs(t, b, eb, 0, "42", "", "T", dedup.Replayed)
	way.deaf.Store(false)
	way.refusing.Store(false)
	untilSettled(t, a)
	if n, exact := sealed(t, eb, b, 0); n != 2 || exact {
		t.Errorf("sealed %d, exact %v; want 2, false", n, exact)
	}
}
