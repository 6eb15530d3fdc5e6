package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"verve/internal/testproc"
	"verve/stream"
)

// fakeServer keeps the contract of verve, but for one fault. Its window turns
// after a number of answers, not with the clock, so that a run is the same on
// a slow machine and a fast one.
type fakeServer struct {
	url   string
	fault func(n int) faultStep // of the n-th request, from 0

	perWindow int // answers

	mu      sync.Mutex
	served  int
	start   time.Time
	turns   []time.Time       // when the windows began, from the second one on
	seen    map[string]string // the token with which an id was counted, by key and id
	before  map[string]string // the same of the last window
	unique  uint64
	byKey   map[string]uint64
	records []stream.Record
	keys    []stream.KeyRecord
	extra   int64 // added to the next record

	tokens tokenFault
	keyed  func(window int, r []stream.KeyRecord) []stream.KeyRecord // what becomes of the records of the keys
}

// tokenFault is what a fakeServer does wrong with tokens.
type tokenFault uint8

const (
	keepTokens    tokenFault = iota
	noTokens                 // a retry is a repeat
	countReplays             // a replay counts once more
	forgetAtTurn             // a token is good in its own window alone
	wrongWindow              // a replay names the open window
	replayForeign            // any token is taken for that of the id
)

// judge answers one id, and the window that a reply names.
func (s *fakeServer) judge(key, id, token string) (word string, start time.Time) {
	pair := key + "\x00" + id
	same := func(of map[string]string) bool {
		was, ok := of[pair]
		return ok && token != "" && (was == token || s.tokens == replayForeign) && s.tokens != noTokens
	}
	switch {
	case same(s.seen):
		if s.tokens == countReplays {
			s.unique++
		}
		return "replayed", s.start
	case same(s.before) && s.tokens != forgetAtTurn:
		if s.tokens == countReplays {
			s.unique++
		}
		if s.tokens == wrongWindow {
			return "replayed", s.start
		}
		return "replayed", s.start.Add(-time.Second)
	}
	if _, ok := s.seen[pair]; ok {
		return "duplicate", s.start
	}
	s.seen[pair] = token
	s.unique++
	if key != "" {
		s.byKey[key]++
	}
	return "ok", s.start
}

// batch answers a batch in JSON.
func (s *fakeServer) batch(w http.ResponseWriter, r *http.Request) {
	var items []struct{ ID, Key, Token string }
	if err := json.NewDecoder(r.Body).Decode(&items); err != nil {
		w.WriteHeader(400)
		return
	}
	var answer struct {
		OK        int      `json:"ok"`
		Duplicate int      `json:"duplicate"`
		Replayed  int      `json:"replayed"`
		Refused   int      `json:"refused"`
		Results   []string `json:"results"`
	}
	windows := map[string]int{}
	for _, i := range items {
		word, start := s.judge(i.Key, i.ID, i.Token)
		windows[start.Format(time.RFC3339Nano)]++
		answer.Results = append(answer.Results, word)
		switch word {
		case "ok":
			answer.OK++
		case "duplicate":
			answer.Duplicate++
		default:
			answer.Replayed++
		}
		if s.served++; s.served%s.perWindow == 0 {
			s.turn()
		}
	}
	var list []string
	for _, start := range slices.Sorted(maps.Keys(windows)) {
		list = append(list, fmt.Sprintf("%s;n=%d", start, windows[start]))
	}
	if len(list) == 1 {
		list[0], _, _ = strings.Cut(list[0], ";")
	}
	b, _ := json.Marshal(answer)
	w.Header().Set("Verve-Window", strings.Join(list, ", "))
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	_, _ = w.Write(b)
}

type faultStep uint8

const (
	behave         faultStep = iota
	okAgain                  // `ok`, whether the id is new or not, not counted
	falseDuplicate           // `failed` for whatever it is, not counted
	hangUpCounted            // count it and close the connection
	hangUp                   // close the connection
	refuse
	loseOne   // count one less in the record of this window
	doubleOne // count one more
	noWindow
	wrongBody
	lateLabel // answer for a window of a minute ago
)

// answersPerWindow is small enough that a run of a few thousand requests sees
// many turns.
const answersPerWindow = 500

func newFakeServer(t *testing.T, fault func(n int) faultStep) *fakeServer {
	t.Helper()
	s := &fakeServer{fault: fault, perWindow: answersPerWindow, start: time.Now().UTC().Truncate(time.Second)}
	s.open()
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	s.url = server.URL
	return s
}

func (s *fakeServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	step := behave
	if s.fault != nil {
		step = s.fault(s.served)
	}
	s.served++
	if r.Method == http.MethodPost {
		s.batch(w, r)
		return
	}
	query := r.URL.Query()
	id, key, token := query.Get("id"), query.Get("key"), query.Get("token")+r.Header.Get("Idempotency-Key")
	start := s.start
	answer := func(status int, body string) {
		if step != noWindow {
			if step == lateLabel {
				start = start.Add(-time.Minute)
			}
			w.Header().Set("Verve-Window", start.Format(time.RFC3339Nano))
		}
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(status)
		fmt.Fprint(w, body)
	}
	hang := func() {
		nc, _, err := w.(http.Hijacker).Hijack()
		if err == nil {
			nc.Close()
		}
	}
	switch step {
	case okAgain:
		answer(200, "ok")
	case falseDuplicate:
		answer(409, "failed")
	case hangUpCounted:
		s.judge(key, id, token)
		hang()
	case hangUp:
		hang()
	case refuse:
		answer(503, "failed")
	case wrongBody:
		answer(200, "okay")
	default:
		if step == loseOne {
			s.extra = -1
		}
		if step == doubleOne {
			s.extra = 1
		}
		var word string
		switch word, start = s.judge(key, id, token); word {
		case "replayed":
			w.Header().Set("Verve-Replayed", "true")
			fallthrough
		case "ok":
			answer(200, "ok")
		default:
			answer(409, "failed")
		}
	}
	if s.served%s.perWindow == 0 {
		s.turn()
	}
}

func (s *fakeServer) turn() {
	s.records = append(s.records, stream.Record{
		WindowStart: s.start,
		Unique:      uint64(int64(s.unique) + s.extra),
		Scope:       stream.ScopeInstance,
		Instance:    "fake",
		Seq:         uint64(len(s.records) + 1),
		Keys:        uint64(len(s.byKey)),
	})
	var keys []stream.KeyRecord
	for _, key := range slices.Sorted(maps.Keys(s.byKey)) {
		keys = append(keys, stream.KeyRecord{WindowStart: s.start, Key: key, Unique: s.byKey[key], Scope: stream.ScopeInstance, Instance: "fake", Seq: uint64(len(s.records))})
	}
	if s.keyed != nil {
		keys = s.keyed(len(s.records), keys)
	}
	s.keys = append(s.keys, keys...)
	s.start = s.start.Add(time.Second)
	s.turns = append(s.turns, time.Now())
	s.before = s.seen
	s.open()
}

func (s *fakeServer) open() {
	s.seen, s.byKey, s.unique, s.extra = map[string]string{}, map[string]uint64{}, 0, 0
}

// clock is the window that was open at a time: this server goes by no other clock, and its
// windows turn without the lag that the driver allows for.
func (s *fakeServer) clock(at time.Time) int64 {
	at = at.Add(clockLag)
	s.mu.Lock()
	defer s.mu.Unlock()
	turned := 0 // since then
	for turned < len(s.turns) && s.turns[len(s.turns)-1-turned].After(at) {
		turned++
	}
	return s.start.Add(-time.Duration(turned) * time.Second).UnixMilli()
}

// drive sends requests to the server and judges its records.
func (s *fakeServer) drive(t *testing.T, args ...func(*flags)) verdict {
	t.Helper()
	f := flags{
		URL: []string{s.url}, Requests: 5000, Connections: 8, Pipeline: 1, Repeats: 0.3,
		IDs: idsDecimal, Seed: 1, Timeout: time.Minute, DuplicateStatus: 409,
		Window: time.Second,
	}
	for _, arg := range args {
		arg(&f)
	}
	d, err := newDriver(&f)
	if err != nil {
		t.Fatal(err)
	}
	d.truth.clock = s.clock
	d.run(t.Context())
	windows := d.truth.finish()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.turn()
	return judge(d.truth, windows, published{windows: s.records, keys: s.keys}, &f)
}

// once gives one step to the n-th request and lets the server behave otherwise.
func once(step faultStep, at int) func(int) faultStep {
	return func(n int) faultStep {
		if n == at {
			return step
		}
		return behave
	}
}

func TestCorrectServerIsFoundGood(t *testing.T) {
	for _, ids := range []idForm{idsDecimal, idsUUID, idsString} {
		for _, pipeline := range []int{1, 16} {
			t.Run(fmt.Sprintf("%s/%d", ids, pipeline), func(t *testing.T) {
				s := newFakeServer(t, nil)
				v := s.drive(t, func(f *flags) { f.IDs, f.Pipeline = ids, pipeline })
				if !v.Good {
					t.Fatalf("got %+v, want a good verdict", v)
				}
				if v.Answers != 5000 || v.Accepted+v.Repeated != 5000 || v.Repeated == 0 || v.Doubted != 0 {
					t.Errorf("got %d answers, %d ok, %d failed, %d in doubt; want 5000, all judged, some repeats, no doubt",
						v.Answers, v.Accepted, v.Repeated, v.Doubted)
				}
				if want := 5000/answersPerWindow + 1; v.Windows != want {
					t.Errorf("got %d windows, want %d", v.Windows, want)
				}
			})
		}
	}
}

func TestEveryFaultIsFound(t *testing.T) {
	t.Parallel() // they wait more than they work
	for _, test := range []struct {
		name  string
		fault func(int) faultStep
		want  string // in the first bad window, or the kind of the fault
	}{
		{"one lost", once(loseOne, 1200), "1 lost"},
		{"one too many", once(doubleOne, 1200), "1 too many"},
		{"the last one lost", once(loseOne, 4999), "1 lost"},
		{"ok twice", func(n int) faultStep {
			// One answer may happen to go to a new id; of a hundred with 30 %
			// repeats some do not.
			if n >= 1200 && n < 1300 {
				return okAgain
			}
			return behave
		}, "ok twice"},
		{"ok that is not counted", once(okAgain, 0), "1 lost"},
		{"false duplicates", func(n int) faultStep {
			if n >= 1200 && n < 1300 {
				return falseDuplicate
			}
			return behave
		}, "false duplicate"},
		{"no window", once(noWindow, 1200), "protocol"},
		{"other body", once(wrongBody, 1200), "protocol"},
		{"wrong window", func(n int) faultStep {
			if n >= 1200 && n < 1210 {
				return lateLabel
			}
			return behave
		}, "too many"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newFakeServer(t, test.fault)
			v := s.drive(t)
			found := v.Faults.Kinds[test.want] > 0
			for _, row := range v.Table {
				found = found || row.Bad != "" && strings.HasSuffix(row.Bad, test.want)
			}
			if v.Good || !found {
				t.Errorf("got good=%t, %+v, %+v; want %q", v.Good, v.Table, v.Faults, test.want)
			}
		})
	}
}

func TestRecordsAreVisibleOnceAndWithoutGaps(t *testing.T) {
	at := time.UnixMilli(1_000_000)
	instance := func(seconds int, unique, seq uint64) stream.Record {
		return stream.Record{WindowStart: at.Add(time.Duration(seconds) * time.Second), Unique: unique, Scope: stream.ScopeInstance, Instance: "a", Seq: seq}
	}
	group := func(seconds int, unique uint64) stream.Record {
		return stream.Record{WindowStart: at.Add(time.Duration(seconds) * time.Second), Unique: unique, Scope: stream.ScopeGroup}
	}
	truth := newTruth(1, time.Minute, false)
	truth.record(0, time.Now(), []answer{{id: 1, window: at.UnixMilli(), kind: answerOK}})
	for name, test := range map[string]struct {
		records []stream.Record
		fault   string
	}{
		"in order":            {[]stream.Record{instance(0, 1, 4), instance(1, 0, 5)}, ""},
		"a partial one more":  {[]stream.Record{instance(0, 1, 4), instance(0, 0, 5)}, ""},
		"twice, adds up":      {[]stream.Record{instance(0, 1, 4), instance(1, 0, 5), instance(1, 0, 5)}, "visible twice"},
		"gap":                 {[]stream.Record{instance(0, 1, 4), instance(1, 0, 6)}, "gap in seq"},
		"order":               {[]stream.Record{instance(0, 1, 4), instance(2, 0, 5), instance(1, 0, 6)}, "order"},
		"one of a group":      {[]stream.Record{group(0, 1), group(1, 0)}, ""},
		"two of a group":      {[]stream.Record{group(0, 1), group(0, 0)}, "visible twice"},
		"older ones, ignored": {[]stream.Record{instance(-9, 7, 1), instance(0, 1, 4)}, ""},
	} {
		v := judge(truth, truth.finish(), published{windows: test.records}, &flags{})
		if test.fault == "" && !v.Good || test.fault != "" && (v.Good || v.Faults.Kinds[test.fault] != 1) {
			t.Errorf("%s: got good=%t, %+v, %+v; want fault %q", name, v.Good, v.Table, v.Faults, test.fault)
		}
	}
}

// TestUnansweredRequestsMayCountOrNot breaks connections under load, with the
// request counted and not: both are within the contract, a record that is off
// by more than that is not.
func TestUnansweredRequestsMayCountOrNot(t *testing.T) {
	breaking := func(n int) faultStep {
		switch n % 50 {
		case 7:
			return hangUp
		case 33:
			return hangUpCounted
		}
		return behave
	}
	for _, pipeline := range []int{1, 16} {
		s := newFakeServer(t, breaking)
		v := s.drive(t, func(f *flags) { f.Pipeline = pipeline })
		if !v.Good || v.Doubted == 0 || v.Recovered == 0 || v.Recovered >= v.Doubted {
			t.Errorf("pipeline %d: got %+v; want good, with some of the requests in doubt counted", pipeline, v)
		}
	}
	s := newFakeServer(t, func(n int) faultStep {
		if n == 1200 {
			return doubleOne
		}
		return once(hangUp, 600)(n)
	})
	if v := s.drive(t); v.Good {
		t.Errorf("got a good verdict for a window with one id too many, long after the doubt")
	}
}

func TestStrictAllowsNoDoubt(t *testing.T) {
	for _, test := range []struct {
		step faultStep
		good bool
	}{{hangUp, true}, {hangUpCounted, false}} {
		s := newFakeServer(t, once(test.step, 1200))
		v := s.drive(t, func(f *flags) { f.Strict, f.Repeats = true, 0 })
		if v.Good != test.good {
			t.Errorf("step %d: got good=%t, %+v, %+v; want %t", test.step, v.Good, v.Table, v.Faults, test.good)
		}
	}
}

// TestRetryTellsWhatBecameOfTheRequest pins the sharper half of the interval:
// a request in doubt whose id is then refused as a duplicate has counted, and
// a record that lacks it is short although it equals the `ok` answers.
func TestRetryTellsWhatBecameOfTheRequest(t *testing.T) {
	truth := newTruth(1, time.Minute, false)
	const window = 1_000_000
	truth.clock = func(time.Time) int64 { return window + 10 }
	from := truth.record(0, time.Now(), []answer{{id: 1, window: window, kind: answerOK}})
	truth.broken([]ask{{id: 2}, {id: 3}, {id: 4}}, from, 0)
	truth.record(0, time.Now(), []answer{{id: 2, window: window, kind: answerRepeat}, {id: 3, window: window, kind: answerOK}})
	windows := truth.finish()
	for sum, good := range map[uint64]bool{1: false, 2: false, 3: true, 4: true, 5: false} {
		v := judge(truth, windows, published{windows: []stream.Record{{WindowStart: time.UnixMilli(window), Unique: sum, Seq: 1}}}, &flags{})
		if v.Good != good {
			t.Errorf("sum %d: got good=%t, %+v; want %t", sum, v.Good, v.Table, good)
		}
	}
}

// TestFailedBeforeOKIsOnlyARace: the two answers may be read in the wrong
// order, but a request sent after `failed` was read cannot be the first one.
func TestFailedBeforeOKIsOnlyARace(t *testing.T) {
	for _, later := range []bool{false, true} {
		truth := newTruth(1, time.Minute, false)
		sent := time.Now()
		truth.record(0, sent, []answer{{id: 1, window: 1000, kind: answerRepeat}})
		if later {
			sent = time.Now().Add(time.Second)
		}
		truth.record(0, sent, []answer{{id: 1, window: 1000, kind: answerOK}})
		truth.finish()
		if got := truth.faults.Kinds["false duplicate"] == 1; got != later {
			t.Errorf("ok to a request sent later: %t; got faults %+v", later, truth.faults)
		}
	}
}

func TestRefusedRequestsCountNothing(t *testing.T) {
	s := newFakeServer(t, func(n int) faultStep {
		if n%10 == 3 {
			return refuse
		}
		return behave
	})
	v := s.drive(t)
	if !v.Good || v.Refused != 500 {
		t.Errorf("got good=%t with %d refused, %+v; want good with 500", v.Good, v.Refused, v.Faults)
	}
}

func TestOldWindowsAreSettledAndReleased(t *testing.T) {
	truth := newTruth(1, 10*time.Second, false)
	var clock int64
	truth.clock = func(time.Time) int64 { return clock }
	id := uint64(0)
	for window := int64(0); window < 100; window++ {
		clock = 1000 * window
		truth.marked = time.Time{} // long ago
		truth.record(0, time.Now(), []answer{{id: id, window: clock, kind: answerOK}, {id: id, window: clock, kind: answerRepeat}})
		id++
	}
	open := 0
	for _, w := range truth.windows {
		if !w.settled {
			open++
		}
	}
	if open > 15 {
		t.Errorf("got %d windows in memory, want at most 15: grace of 10, and the calls that trail", open)
	}
	if truth.faults.Count != 0 {
		t.Errorf("got faults %+v, want none", truth.faults)
	}
	truth.record(0, time.Now(), []answer{{id: id, window: 1000, kind: answerOK}})
	if truth.faults.Kinds["late answer"] != 1 {
		t.Errorf("got faults %+v, want one late answer", truth.faults)
	}
}

func TestNumbersAndIDsAreOneToOne(t *testing.T) {
	for _, form := range []idForm{idsDecimal, idsUUID, idsString} {
		seen := make(map[string]bool)
		for n := range uint64(100_000) {
			seen[string(form.append(nil, 42, n))] = true
		}
		if len(seen) != 100_000 {
			t.Errorf("%s: got %d texts for 100000 numbers", form, len(seen))
		}
	}
	got := string(appendUUID(nil, 0x0123456789abcdef, 0xffffffffffffffff))
	if want := "01234567-89ab-4def-bfff-fffffffffffc"; got != want {
		t.Errorf("got UUID %s, want %s", got, want)
	}
}

func TestServerThatComesBackIsMetAgain(t *testing.T) {
	s := newFakeServer(t, nil)
	// The listener comes to where the driver looks only after its first tries.
	addr := testproc.FreeAddr(t)
	var f = flags{URL: []string{"http://" + addr}, Requests: 100, Connections: 4, Pipeline: 1, Seed: 1, IDs: idsDecimal, Timeout: time.Minute, DuplicateStatus: 409}
	d, err := newDriver(&f)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan struct{})
	go func() { d.run(ctx); close(done) }()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: s}
	go server.Serve(l)
	defer server.Close()
	<-done
	if got := d.truth.progress(); got != 100 {
		t.Errorf("got %d answers, want 100", got)
	}
}

// TestSecondRecordsOfAGroup: the same record in the files of two instances counts once. Another
// record of the window is a fault, unless one is not exact and that is allowed; an exact one
// must be right by itself.
func TestSecondRecordsOfAGroup(t *testing.T) {
	record := func(unique uint64, exact bool) stream.Record {
		return stream.Record{WindowStart: time.UnixMilli(1000).UTC(), WindowMS: 1000, Unique: unique, Scope: stream.ScopeGroup, Group: "g", Exact: exact}
	}
	for name, tt := range map[string]struct {
		records []stream.Record
		lenient bool
		good    bool
	}{
		"one":                       {[]stream.Record{record(3, true)}, false, true},
		"the same twice":            {[]stream.Record{record(3, true), record(3, true)}, false, true},
		"another":                   {[]stream.Record{record(3, true), record(2, true)}, true, false},
		"another that is inexact":   {[]stream.Record{record(3, true), record(2, false)}, true, true},
		"that may not be":           {[]stream.Record{record(3, true), record(2, false)}, false, false},
		"a wrong one that is exact": {[]stream.Record{record(2, true), record(3, false)}, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			truth := newTruth(1, time.Second, false)
			truth.lenient = tt.lenient
			truth.record(0, time.Now(), []answer{{id: 1, window: 1000}, {id: 2, window: 1000}, {id: 3, window: 1000}})
			p := published{windows: tt.records}
			p.dedupe()
			if v := judge(truth, truth.finish(), p, &flags{}); v.Good != tt.good {
				t.Errorf("good is %t: %+v", v.Good, v)
			}
		})
	}
}

// TestARefusedIDThatIsOnlyAnsweredFailed: its instance may have been killed before it took the id
// back; then the record is not exact. An id that was never refused is a fault in any case.
func TestARefusedIDThatIsOnlyAnsweredFailed(t *testing.T) {
	for name, tt := range map[string]struct{ refused, exact, good bool }{
		"refused, inexact": {true, false, true},
		"refused, exact":   {true, true, false},
		"never refused":    {false, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			truth := newTruth(1, time.Second, false)
			truth.lenient = true
			answers := []answer{{id: 1, window: 1000}, {id: 2, window: 1000, kind: answerRepeat}}
			if tt.refused {
				answers = append(answers, answer{id: 2, kind: answerRefused})
			}
			truth.record(0, time.Now(), answers)
			p := published{windows: []stream.Record{{
				WindowStart: time.UnixMilli(1000).UTC(), WindowMS: 1000, Unique: 1, Scope: stream.ScopeGroup, Group: "g", Exact: tt.exact,
			}}}
			if v := judge(truth, truth.finish(), p, &flags{}); v.Good != tt.good {
				t.Errorf("good is %t: %+v", v.Good, v)
			}
		})
	}
}
