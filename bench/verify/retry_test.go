package main

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"verve/internal/testproc"
	"verve/stream"
)

// losing makes a run lose replies, and ask again.
func losing(tokens bool) func(*flags) {
	return func(f *flags) { f.Lose, f.Tokens = 0.1, tokens }
}

func TestServerThatKeepsTokensIsFoundGood(t *testing.T) {
	for name, shape := range map[string]func(*flags){
		"single":    func(f *flags) {},
		"pipelined": func(f *flags) { f.Pipeline = 16 },
		"batches":   func(f *flags) { f.Batch, f.Requests = 40, 20_000 },
		"two targets": func(f *flags) {
			f.URL = append(f.URL, f.URL[0])
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newFakeServer(t, nil)
			if name == "batches" {
				s.perWindow *= 10
			}
			v := s.drive(t, losing(true), shape)
			if !v.Good || v.Lost == 0 || v.Replayed == 0 {
				t.Errorf("got %+v; want good, with lost replies, and replayed ones", v)
			}
			// Windows of this server take a moment each: some tokens get too old.
			if v.Aside > v.Lost/2 {
				t.Errorf("%d set aside and %d in doubt of %d lost are too many", v.Aside, v.Doubted, v.Lost)
			}
		})
	}
}

func TestEveryFaultWithTokensIsFound(t *testing.T) {
	t.Parallel() // they wait more than they work
	for name, test := range map[string]struct {
		fault tokenFault
		want  string
	}{
		"a retry is a repeat":            {noTokens, "false duplicate"},
		"a replay counts once more":      {countReplays, "too many"},
		"a token is forgotten at a turn": {forgetAtTurn, "too many|false duplicate|not replayed"},
		"a replay names another window":  {wrongWindow, "lost|not replayed"},
		"a foreign token is taken":       {replayForeign, "ok twice"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newFakeServer(t, nil)
			s.tokens = test.fault
			v := s.drive(t, losing(true), func(f *flags) { f.Lose, f.Requests = 0.5, 10_000 })
			found := false
			for want := range strings.SplitSeq(test.want, "|") {
				found = found || v.Faults.Kinds[want] > 0
				for _, row := range v.Table {
					found = found || strings.HasSuffix(row.Bad, want)
				}
			}
			if v.Good || !found {
				t.Errorf("got good=%t, %+v, %+v; want %q", v.Good, v.Table, v.Faults, test.want)
			}
		})
	}
}

// TestLostRepliesWithoutTokens: the sums hold, and the ids that got only `failed` are
// numbered.
func TestLostRepliesWithoutTokens(t *testing.T) {
	s := newFakeServer(t, nil)
	v := s.drive(t, losing(false))
	if !v.Good || v.Lost == 0 || v.OnlyFailed == 0 || v.Replayed != 0 {
		t.Errorf("got %+v; want good, with ids that were only failed", v)
	}
}

// TestAttemptIsCountedOnce pins what an answer to a retry says of the request that was
// lost: nothing else may have counted.
func TestAttemptIsCountedOnce(t *testing.T) {
	const span, window = 1000, 1_000_000
	for name, test := range map[string]struct {
		answer answer
		sums   [2]uint64 // of the window and the next, beside one id answered ok in each
		good   bool
	}{
		"ok, replayed":                {answer{window: window, kind: answerOK, replayed: true}, [2]uint64{2, 1}, true},
		"ok in the next window":       {answer{window: window + span, kind: answerOK}, [2]uint64{1, 2}, true},
		"ok there, and counted twice": {answer{window: window + span, kind: answerOK}, [2]uint64{2, 2}, false},
		"replayed, and counted twice": {answer{window: window, kind: answerOK, replayed: true}, [2]uint64{2, 2}, false},
		"failed, and counted":         {answer{window: window, kind: answerRepeat}, [2]uint64{2, 1}, false},
	} {
		truth := newTruth(1, time.Minute, false)
		truth.span = span
		truth.clock = func(time.Time) int64 { return window + 10 }
		from := truth.record(0, time.Now(), []answer{{id: 1, window: window, kind: answerOK}, {id: 1, window: window + span, kind: answerOK}})
		from = min(from, window)
		asks := []ask{{id: 2, token: 7}}
		if test.answer.kind == answerRepeat {
			asks[0].id = 1
		}
		truth.broken(asks, from, 0)
		if asks[0].from != window || truth.pending() != 1 {
			t.Errorf("%s: got %+v, %d pending; want an attempt of the window", name, asks[0], truth.pending())
		}
		test.answer.id, test.answer.token = asks[0].id, 7
		truth.record(0, time.Now(), []answer{test.answer})
		var records published
		for i, sum := range test.sums {
			records.windows = append(records.windows, stream.Record{WindowStart: time.UnixMilli(window + int64(i)*span), Unique: sum, Seq: uint64(i + 1)})
		}
		if v := judge(truth, truth.finish(), records, &flags{}); v.Good != test.good {
			t.Errorf("%s: got good=%t, %+v, %+v", name, v.Good, v.Table, v.Faults)
		}
	}
}

func TestRetriesGoToAnotherTarget(t *testing.T) {
	r := newRetries(2)
	r.put(0, ask{id: 1}, ask{id: 2})
	if got := r.take(nil, 0, 5); len(got) != 0 {
		t.Errorf("the target that lost them was given %v", got)
	}
	if got := r.take(nil, 1, 1); len(got) != 1 || got[0].id != 1 || len(r.queues[0]) != 1 {
		t.Errorf("got %v, want the first", got)
	}
	r = newRetries(1)
	r.put(0, ask{id: 1})
	if got := r.take(nil, 0, 5); len(got) != 1 {
		t.Errorf("got %v, want the only target to be asked again", got)
	}
}

func TestKeysAddUp(t *testing.T) {
	for _, batch := range []int{0, 40} {
		s := newFakeServer(t, nil)
		s.perWindow = 2000
		v := s.drive(t, losing(true), func(f *flags) { f.Keys, f.Batch, f.Requests = 50, batch, 10_000 })
		if !v.Good || v.KeyCounts < 150 || v.KeyDifferences != 0 {
			t.Errorf("batches of %d: got %+v; want good, and some hundreds of counts", batch, v)
		}
	}
}

func TestEveryFaultOfKeysIsFound(t *testing.T) {
	t.Parallel() // they wait more than they work
	third := func(change func([]stream.KeyRecord) []stream.KeyRecord) func(int, []stream.KeyRecord) []stream.KeyRecord {
		return func(window int, r []stream.KeyRecord) []stream.KeyRecord {
			if window == 3 {
				return change(r)
			}
			return r
		}
	}
	for name, test := range map[string]struct {
		keyed func(int, []stream.KeyRecord) []stream.KeyRecord
		want  string
	}{
		"one less":     {third(func(r []stream.KeyRecord) []stream.KeyRecord { r[0].Unique--; return r }), "key"},
		"one more":     {third(func(r []stream.KeyRecord) []stream.KeyRecord { r[0].Unique++; return r }), "key"},
		"one missing":  {third(func(r []stream.KeyRecord) []stream.KeyRecord { return r[1:] }), "key"},
		"one too few":  {third(func(r []stream.KeyRecord) []stream.KeyRecord { r[1].Unique += r[0].Unique; return r[1:] }), "key"},
		"one twice":    {third(func(r []stream.KeyRecord) []stream.KeyRecord { return append(r, r[0]) }), "visible twice"},
		"another name": {third(func(r []stream.KeyRecord) []stream.KeyRecord { r[0].Key += "x"; return r }), "key"},
		"swapped names": {third(func(r []stream.KeyRecord) []stream.KeyRecord {
			i := most(r)
			r[i].Key, r[0].Key = r[0].Key, r[i].Key
			return r
		}), "key"},
		"none at all": {func(int, []stream.KeyRecord) []stream.KeyRecord { return nil }, "key"},
	} {
		s := newFakeServer(t, nil)
		s.keyed = test.keyed
		v := s.drive(t, func(f *flags) { f.Keys = 20 })
		if v.Good || v.Faults.Kinds[test.want] == 0 {
			t.Errorf("%s: got good=%t, %+v; want %q", name, v.Good, v.Faults, test.want)
		}
	}
}

// most is the record with the largest count, but for the first.
func most(r []stream.KeyRecord) (at int) {
	for i := 1; i < len(r); i++ {
		if at == 0 || r[i].Unique > r[at].Unique {
			at = i
		}
	}
	return at
}

func TestKeysAreSkewedAndOneToOne(t *testing.T) {
	k := newKeys(1000, 42)
	type pair struct {
		id  uint64
		key int
	}
	seen := map[pair]bool{}
	byID, byKey := map[uint64]int{}, make([]int, len(k.names))
	for n := range uint64(100_000) {
		id, key := k.of(n)
		if seen[pair{id, key}] {
			t.Fatalf("#%d is an id and key that another number has", n)
		}
		seen[pair{id, key}] = true
		byID[id]++
		byKey[key]++
	}
	twice := 0
	for _, n := range byID {
		if n > 1 {
			twice++
		}
	}
	none, sorted := byKey[0], slices.Clone(byKey[1:])
	slices.Sort(sorted)
	if none < 10_000 || none > 15_000 || twice < 5_000 || sorted[0] == 0 || sorted[999] < 20*sorted[500] {
		t.Errorf("%d without a key, %d ids under two, keys have %d to %d, median %d", none, twice, sorted[0], sorted[999], sorted[500])
	}
}

// TestRetriesGetTheirOwnAnswersOverKills: of the server of this tree, with keys: every id
// ends with one `ok` that is counted, over kill -9, as single requests and as batches.
func TestRetriesGetTheirOwnAnswersOverKills(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds of real time")
	}
	t.Parallel() // they wait more than they work
	server := testproc.Program(t)
	for _, batch := range []int{0, 100} {
		t.Run(fmt.Sprint("batches of ", batch), func(t *testing.T) {
			t.Parallel() // they wait more than they work
			dir := t.TempDir()
			listen, data := testproc.FreeAddr(t), filepath.Join(dir, "data")
			f := &flags{
				URL: []string{"http://" + listen}, Connections: 8, Pipeline: 2, Batch: batch, IDs: idsUUID, DuplicateStatus: 409, Repeats: 0.2,
				Lose: 0.1, Tokens: true, Keys: 100, Window: time.Second,
				Rate: 5000, Duration: 2 * time.Minute, Timeout: time.Minute, Wait: time.Minute, MinAnswers: 1000,
				CountsFile: []string{filepath.Join(data, "counts.jsonl")},
				Spawn: []string{server + " --listen=" + listen + " --admin-listen=" + testproc.FreeAddr(t) +
					" --window=1s --window-header --shutdown-timeout=1m --data-dir=" + data},
				SpawnLog: filepath.Join(dir, "server.log"), Signal: "KILL", KillEvery: "300ms-1500ms", Kills: 4, StopLimit: 2 * time.Minute,
			}
			wantRetries(t, f, 4)
		})
	}
}

// TestRetriesAtAnotherInstance: the same of a group, where each retry goes to the other
// instance.
func TestRetriesAtAnotherInstance(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds of real time")
	}
	t.Parallel() // they wait more than they work
	f := groupOf(t, 2, testproc.StartRedis(t).Addr, "2s")
	f.Lose, f.Tokens, f.Keys, f.Window = 0.05, true, 100, 2*time.Second
	f.Duration, f.Rate, f.Signal, f.KillEvery, f.Kills = 2*time.Minute, 5000, "KILL", "500ms-2s", 2
	wantRetries(t, f, 4)
}

func wantRetries(t *testing.T, f *flags, kills int) {
	t.Helper()
	v, err := run(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d ok, %d failed, %d lost, %d replayed, %d set aside, %d in doubt, %d counts of keys", v.Accepted, v.Repeated, v.Lost, v.Replayed, v.Aside, v.Doubted, v.KeyCounts)
	if !v.Good || v.Kills != kills || v.Replayed == 0 || v.KeyCounts == 0 {
		t.Errorf("got good=%t, %d kills, %d replayed, %d only failed, %+v, %+v; want every window and key to add up and every attempt to get its own answer",
			v.Good, v.Kills, v.Replayed, v.OnlyFailed, v.Table, v.Faults)
	}
}
