//go:build linux

package dedup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"verve/counter"
	"verve/internal/epochtest"
)

// with adds an id with a key and a token, at now.
func (p *life) with(now time.Time, id, under, token string) (Verdict, time.Time, error) {
	p.t.Helper()
	in, ok := p.c.Enter(now.UnixNano(), 0, 1)
	if !ok {
		p.t.Fatal("sealed")
	}
	v, err := addOptions(p.m, in.Epoch, id, under, token)
	leave(in, v)
	return v, in.Start(), err
}

func addOptions(m *Memory, e *counter.Epoch, id, under, token string) (Verdict, error) {
	o := &Options{Under: []byte(under), Token: []byte(token)}
	if under == "" && token == "" {
		o = nil
	}
	items, verdicts := []Item{{ID: []byte(id), Key: m.secret.keyOf([]byte(id), o), Options: o}}, []Verdict{Turned}
	err := m.AddMany(e, items, verdicts)
	return verdicts[0], err
}

// optionsModel computes the right answer for each id with options.
type optionsModel struct {
	t       *testing.T
	ledger  *fakeSpool
	tokens  map[int64]map[[2]string]string // by the start of the window, id and key: the token that it was counted with
	answers map[int64]map[string]uint64    // ids that were new, by window and key
}

func (m *optionsModel) want(start time.Time, id, under, token string, window time.Duration) Verdict {
	at := start.UnixNano()
	if m.tokens[at] == nil {
		m.tokens[at], m.answers[at] = map[[2]string]string{}, map[string]uint64{}
	}
	name := [2]string{id, under}
	if had, there := m.tokens[at-int64(window)][name]; there && token != "" && had == token {
		return ReplayedBefore
	}
	had, there := m.tokens[at][name]
	switch {
	case there && token != "" && had == token:
		return Replayed
	case there:
		return Repeat
	}
	m.tokens[at][name] = token
	m.answers[at][under]++
	return Unique
}

// check compares the records with the answers, by key.
func (m *optionsModel) check() {
	m.t.Helper()
	for start, answers := range m.answers {
		records, all := map[string]uint64{}, uint64(0)
		for _, c := range m.ledger.records[start] {
			if !c.Exact {
				m.t.Errorf("the record of %v is not exact", c.Start)
			}
			keyless := c.Unique
			once := map[string]bool{}
			for _, k := range c.Keys.List() {
				if once[k.Key] || k.Unique == 0 {
					m.t.Fatalf("a key of a record is there twice, or empty: %v", c.Keys)
				}
				once[k.Key] = true
				records[k.Key] += k.Unique
				keyless -= k.Unique
			}
			records[""] += keyless
			all += c.Unique
		}
		for under, n := range answers {
			if records[under] != n {
				m.t.Fatalf("window %v: key %q has %d in the records, %d answers", time.Unix(0, start).UTC(), under, records[under], n)
			}
		}
	}
}

// TestTokensAndKeysAgreeWithAModel runs random schedules of ids with tokens and keys, time,
// kills and stops: each id gets the answer that a map gives, over all processes, and the
// records of each window add up to the answers for each key.
func TestTokensAndKeysAgreeWithAModel(t *testing.T) {
	for seed := range uint64(60) {
		synctest.Test(t, func(t *testing.T) {
			const window = time.Minute
			rng := rand.New(rand.NewPCG(seed, 18))
			l := newFakeSpool(t)
			model := &optionsModel{t: t, ledger: l, tokens: map[int64]map[[2]string]string{}, answers: map[int64]map[string]uint64{}}
			cfg := small(t.TempDir())
			cfg.Publisher = "a"
			l.name = "a"
			p := live(t, cfg, window, l)
			for step := range 400 {
				switch n := rng.IntN(100); {
				case n < 3:
					p.kill()
					if rng.IntN(4) == 0 {
						cfg.Publisher = []string{"a", "b"}[rng.IntN(2)]
						l.rename(cfg.Publisher)
					}
					p = live(t, cfg, window, l)
				case n < 5:
					p.close()
					time.Sleep(time.Duration(rng.Int64N(int64(window))))
					p = live(t, cfg, window, l)
				case n < 12:
					time.Sleep(time.Duration(rng.Int64N(int64(window * 3 / 4))))
					synctest.Wait()
				default:
					id, under, token := fmt.Sprint(rng.IntN(30)), "", ""
					if rng.IntN(2) == 0 {
						id = "text " + id
					}
					if rng.IntN(2) == 0 {
						under = fmt.Sprint("campaign/", rng.IntN(3))
					}
					if rng.IntN(3) > 0 {
						token = fmt.Sprint("attempt ", rng.IntN(2))
					}
					v, start, err := p.with(time.Now(), id, under, token)
					if want := model.want(start, id, under, token, window); v != want || err != nil {
						t.Fatalf("seed %d, step %d: id %q under %q with %q: got %v, %v; want %v", seed, step, id, under, token, v, err, want)
					}
				}
			}
			time.Sleep(window)
			p.close()
			model.check()
		})
	}
}

// TestAttemptsAtOnceAreCountedOnce: many attempts to count one id while the epoch turns. With
// one token, one attempt counts and all others are its replays; with two tokens, the attempts
// with one of them win everywhere.
func TestAttemptsAtOnceAreCountedOnce(t *testing.T) {
	for _, tokens := range []int{1, 2} {
		for _, dir := range []string{"", t.TempDir()} {
			m := newMemory(t, Config{Dir: dir, Heap: true})
			e := newEpochs(t, m)
			var turn atomic.Int64
			rounds := 300
			for round := range rounds {
				id := fmt.Sprint("id ", round)
				var unique, replayed [2]atomic.Int64
				var all sync.WaitGroup
				for n := range 4 {
					all.Go(func() {
						which := n % tokens
						for {
							in, ok := e.Counter.Enter(e.At(int(turn.Load())), uint64(n), 1)
							if !ok {
								t.Error("sealed")
								return
							}
							v, err := addOptions(m, in.Epoch, id, "", fmt.Sprint("token ", which))
							leave(in, v)
							switch {
							case err != nil:
								t.Error(err)
							case v == Turned:
								continue
							case v == Unique:
								unique[which].Add(1)
							case v == Replayed, v == ReplayedBefore:
								replayed[which].Add(1)
							}
							return
						}
					})
				}
				all.Go(func() { turn.Add(1) })
				all.Wait()
				if tokens == 1 && (unique[0].Load() != 1 || replayed[0].Load() != 3) {
					t.Fatalf("round %d: %d counted, %d replayed; want 1 and 3", round, unique[0].Load(), replayed[0].Load())
				}
				for which := range tokens {
					if replayed[which].Load() > 0 && unique[which].Load() == 0 {
						t.Fatalf("round %d: token %d was replayed and never counted", round, which)
					}
				}
			}
		}
	}
}

// TestTokenWithoutMemoryIsRefusedBeforeItsIDIsIn: at the memory limit an id whose token has
// no room is refused, and counted by the next attempt when there is room.
func TestTokenWithoutMemoryIsRefusedBeforeItsIDIsIn(t *testing.T) {
	m := newMemory(t, Config{MaxBytes: tableSize[narrowBucket](0) + tableSize[wideBucket](0), Heap: true})
	e := newEpochs(t, m)
	in, _ := e.Counter.Enter(e.At(0), 0, 1)
	defer in.Leave(0, 0, 1)
	if v, err := addOptions(m, in.Epoch, "1", "", "a token"); v != Full || err == nil {
		t.Fatalf("got %v, %v", v, err)
	}
	if v, err := addOptions(m, in.Epoch, "1", "", ""); v != Unique || err != nil {
		t.Fatalf("the id is in although its token had no room: got %v, %v", v, err)
	}
}

// TestWordsThatSpilledAreFound: a token for which memory ran out after a slot was found for it
// is still found later.
func TestWordsThatSpilledAreFound(t *testing.T) {
	m := newMemory(t, Config{Heap: true})
	v := (&Memory{}).newView()
	m.arena.max = m.arena.used.Load() // no level can be made
	v.tokens.add(m, 12345)
	if !v.tokens.has(12345) || v.tokens.has(12346) {
		t.Error("a word that spilled is lost, or another is found")
	}
}

// TestTokensStayWithinTheirMemory: the first token that finds no memory is kept outside the
// table, because its id is already in; the ids of later tokens are refused, and no token whose
// id was counted is forgotten.
func TestTokensStayWithinTheirMemory(t *testing.T) {
	m := newMemory(t, Config{Expect: 1 << 20, Heap: true})
	e := newEpochs(t, m)
	in, _ := e.Counter.Enter(e.At(0), 0, 1)
	defer in.Leave(0, 0, 1)
	counted := 0
	for ; ; counted++ {
		v, err := addOptions(m, in.Epoch, fmt.Sprint(counted), "", "a token")
		if v == Full {
			break
		}
		if v != Unique || err != nil {
			t.Fatalf("id %d: got %v, %v", counted, v, err)
		}
		m.arena.max = m.arena.used.Load() // the table for tokens does not grow
	}
	if spilled := len(in.State.(*View).tokens.spilled); spilled != 1 {
		t.Errorf("%d tokens are kept beside the table, want 1", spilled)
	}
	for id := range counted {
		if v, err := addOptions(m, in.Epoch, fmt.Sprint(id), "", "a token"); v != Replayed || err != nil {
			t.Fatalf("id %d again: got %v, %v", id, v, err)
		}
	}
	if v, err := addOptions(m, in.Epoch, fmt.Sprint(counted), "", ""); v != Unique || err != nil {
		t.Errorf("the id is in although its token had no room: got %v, %v", v, err)
	}
}

// TestTokensGrowToWhatIsExpectedInSteps: a level is at most eight times as large as those
// before it, also where far more tokens may come.
func TestTokensGrowToWhatIsExpectedInSteps(t *testing.T) {
	m := newMemory(t, Config{Heap: true})
	m.cfg.Expect = 60_000_000
	e := newEpochs(t, m)
	in, _ := e.Counter.Enter(e.At(0), 0, 1)
	defer in.Leave(0, 0, 1)
	if v, err := addOptions(m, in.Epoch, "1", "", "a token"); v != Unique || err != nil {
		t.Fatal(v, err)
	}
	v := in.State.(*View)
	have := v.tokens.table.slots
	v.tokens.sample.Store(have / sampleEvery)
	v.narrowSample.Store(have / sampleEvery)
	if next := v.tokens.sizes(m)[0] * slotsPerBucket; next != 8*have {
		t.Errorf("the level behind %d slots has %d", have, next)
	}
}

// TestTokensHaveRoomForThoseOfTheWindowBefore: also right after the turn, when the epoch before
// is not retired yet.
func TestTokensHaveRoomForThoseOfTheWindowBefore(t *testing.T) {
	const tokens = 1 << 20
	m := newMemory(t, Config{Heap: true})
	e := newEpochs(t, m)
	first, _ := e.Counter.Enter(e.At(0), 0, 1)
	defer first.Leave(0, 0, 1)
	first.State.(*View).tokens.sample.Store(tokens / sampleEvery)
	in, _ := e.Counter.Enter(e.At(1), 0, 1)
	defer in.Leave(0, 0, 1)
	if v, err := addOptions(m, in.Epoch, "1", "", "a token"); v != Unique || err != nil {
		t.Fatal(v, err)
	}
	if slots := in.State.(*View).tokens.table.slots; slots < tokens {
		t.Errorf("the table has %d slots for %d tokens", slots, tokens)
	}
}

// TestTooManyKeysAreFull: ids under further keys are refused, and nothing else is; the
// journal does not grow by them.
func TestTooManyKeysAreFull(t *testing.T) {
	l := newFakeSpool(t)
	m, err := NewMemory(Config{Dir: t.TempDir() + "/epochs"})
	if err != nil {
		t.Fatal(err)
	}
	c, err := counter.New(counter.Config{Window: epochtest.Window, Store: m, Publisher: l, Past: m.Past(nil), MaxKeys: 3})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	in, _ := c.Enter(time.Now().UnixNano(), 0, 4)
	for i := range 3 {
		if v, err := addOptions(m, in.Epoch, "1", fmt.Sprint(i), ""); v != Unique || err != nil {
			t.Fatalf("key %d: got %v, %v", i, v, err)
		}
	}
	kept := m.journal.current.next
	for i := range 1000 {
		if v, err := addOptions(m, in.Epoch, "1", fmt.Sprint("flood ", i), "token"); v != Full || err != ErrTooManyKeys {
			t.Fatalf("got %v, %v", v, err)
		}
	}
	if grown := m.journal.current.next - kept; grown > 1 {
		t.Errorf("refused keys took %d chunks of the journal", grown)
	}
	if v, _ := addOptions(m, in.Epoch, "2", "1", ""); v != Unique {
		t.Errorf("an id under a key that is in: got %v", v)
	}
	in.Leave(4, 0, 0)
	c.Seal()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// TestLateAttemptFindsItsRetry: if an attempt is still inside an epoch when its retry was
// counted in the next one, it is judged again in the next one, and is a replay. The two epochs
// have different tables, so the attempt cannot find out from a slot that the epoch has turned.
func TestLateAttemptFindsItsRetry(t *testing.T) {
	m := newMemory(t, Config{Heap: true})
	e := newEpochs(t, m)
	late, _ := e.Counter.Enter(e.At(0), 0, 1)
	next, err := newTable[narrowBucket](0, m.arena)
	if err != nil {
		t.Fatal(err)
	}
	m.narrow.next = next
	retry, _ := e.Counter.Enter(e.At(1), 0, 1)
	want := func(in counter.Entry, want Verdict) {
		t.Helper()
		if v, err := addOptions(m, in.Epoch, "1", "", "a token"); v != want || err != nil {
			t.Errorf("got %v, %v; want %v", v, err, want)
		}
	}
	want(retry, Unique)
	want(late, Turned)
	late.Leave(0, 0, 1)
	want(retry, Replayed)
	retry.Leave(1, 0, 0)
}

// TestTokensServeInTheNextWindowOnly: if the next epoch is of a later window, it does not use
// them.
func TestTokensServeInTheNextWindowOnly(t *testing.T) {
	m := newMemory(t, Config{Heap: true})
	e := newEpochs(t, m)
	for _, tt := range []struct {
		window int
		want   Verdict
	}{{0, Unique}, {0, Replayed}, {1, ReplayedBefore}, {2, Unique}, {4, Unique}, {5, ReplayedBefore}} {
		in, _ := e.Counter.Enter(e.At(tt.window), 0, 1)
		v, err := addOptions(m, in.Epoch, "1", "a key", "a token")
		leave(in, v)
		if v != tt.want || err != nil {
			t.Errorf("window %d: got %v, %v; want %v", tt.window, v, err, tt.want)
		}
	}
}

// TestAFaultLeavesTheCountOfAKey: a fault of the journal does not lose the count of ids that
// were judged before it in the same batch.
func TestAFaultLeavesTheCountOfAKey(t *testing.T) {
	dir := t.TempDir() + "/epochs"
	m, err := NewMemory(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() }) // its error is the fault
	always := new(writer)               // where the race detector has the pool forget
	m.journal.writers.New = func() any { return always }
	e := newEpochs(t, m)
	in, _ := e.Counter.Enter(e.At(0), 0, 1)
	defer in.Leave(0, 0, 1)
	add := func(id, under, token string) {
		t.Helper()
		if v, err := addOptions(m, in.Epoch, id, under, token); v != Unique || err != nil {
			t.Fatal(v, err)
		}
	}
	add("a text", "a key", "") // its chunk is in the first page of the segment
	for i := range 4096 / 8 {
		add(fmt.Sprint("text ", i), "", "")
	}
	add("a text", "another", "token") // and that of this one is not
	if err := os.Truncate(filepath.Join(dir, segmentName(0)), 4096); err != nil {
		t.Fatal(err)
	}
	var items []Item
	for i, token := range []string{"", "", "token", ""} {
		o := &Options{Under: []byte("a key"), Token: []byte(token)}
		id := fmt.Append(nil, "new ", i)
		items = append(items, Item{ID: id, Key: m.secret.keyOf(id, o), Options: o})
	}
	verdicts := []Verdict{Turned, Turned, Turned, Turned}
	err = m.AddMany(in.Epoch, items, verdicts)
	if !errors.Is(err, ErrUnavailable) || !slices.Equal(verdicts, []Verdict{Unique, Unique, Unavailable, Unavailable}) {
		t.Errorf("got %v, %v", verdicts, err)
	}
	want := []counter.KeyCount{{Key: "a key", Unique: 3}, {Key: "another", Unique: 1}}
	if got := in.Epoch.Keys().Counts().List(); !slices.Equal(got, want) {
		t.Errorf("by key %v, want %v", got, want)
	}
}

// TestKeysThatTheSpoolLostAreNotGuessed: if the spool has lost what it published by key, the
// rest of the window has no keys, and is not exact.
func TestKeysThatTheSpoolLostAreNotGuessed(t *testing.T) {
	for _, tt := range []struct {
		name      string
		published func(start time.Time) counter.Published
		exact     bool
		keys      int
	}{
		{"nothing published", func(time.Time) counter.Published { return counter.Published{} }, true, 1},
		{"one of two published", func(at time.Time) counter.Published {
			return counter.Published{Last: at, Unique: 1, Keys: counter.KeyCountsOf([]counter.KeyCount{{Key: "a", Unique: 1}}...)}
		}, true, 1},
		{"lost", func(at time.Time) counter.Published { return counter.Published{Last: at, Unique: 1, KeysLost: true} }, false, 0},
		{"lost without a word", func(at time.Time) counter.Published { return counter.Published{Last: at, Unique: 1} }, false, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newFakeSpool(t)
				cfg := small(t.TempDir())
				p := live(t, cfg, time.Minute, l)
				for _, id := range []string{"1", "2"} {
					if v, _, err := p.with(time.Now(), id, "a", ""); v != Unique || err != nil {
						t.Fatal(v, err)
					}
				}
				start := p.c.Last().Start()
				p.kill()
				m, err := NewMemory(cfg)
				if err != nil {
					t.Fatal(err)
				}
				defer abandon(m)
				left := m.Past(map[string]counter.Published{"": tt.published(start)}).Recovered
				if len(left) != 1 || left[0].Exact != tt.exact || left[0].Keys.Len() != tt.keys {
					t.Errorf("got %+v; want exact %t and %d keys", left, tt.exact, tt.keys)
				}
			})
		})
	}
}

// TestTokensServeAfterAChangeOfWindow: the windows became shorter, and the window that counted
// the id is not over; or they became longer, and the next window has lasted longer than that
// one.
func TestTokensServeAfterAChangeOfWindow(t *testing.T) {
	for _, tt := range []struct {
		at, before, after, sleep time.Duration
	}{
		{0, 5 * time.Second, time.Second, 2 * time.Second}, {0, 5 * time.Second, time.Second, 0},
		{0, time.Second, 2 * time.Second, 1500 * time.Millisecond}, {3500 * time.Millisecond, 500 * time.Millisecond, 4 * time.Second, 2 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			time.Sleep(tt.at)
			l := newFakeSpool(t)
			cfg := small(t.TempDir())
			cfg.Window = tt.before
			p := live(t, cfg, tt.before, l)
			v, counted, err := p.with(time.Now(), "1", "", "a token")
			if v != Unique || err != nil {
				t.Fatal(v, err)
			}
			p.kill()
			time.Sleep(tt.sleep)
			cfg.Window = tt.after
			p = live(t, cfg, tt.after, l)
			e := p.c.Last()
			v, _, err = p.with(time.Now(), "1", "", "a token")
			at := e.Start()
			if v == ReplayedBefore {
				at = e.Before()
			}
			if v != Replayed && v != ReplayedBefore || err != nil || !at.Equal(counted) {
				t.Errorf("%v to %v: got %v, %v of %v; want a replay of %v", tt.before, tt.after, v, err, at, counted)
			}
			p.close()
		})
	}
}

// TestNameOfAKeyThatWasChangedIsDamage: an id is not published under the name of another key.
func TestNameOfAKeyThatWasChangedIsDamage(t *testing.T) {
	s := newSecret()
	record := nameRecord(s.name([]byte("kk1")), []byte("kk1"))
	if err := newKeyed().read(&s, nameKind, record[:]); err != nil {
		t.Error(err)
	}
	bytesOf(record[2:])[2] ^= 8
	if err := newKeyed().read(&s, nameKind, record[:]); err == nil {
		t.Error("a name whose hash is that of another was taken")
	}
}
