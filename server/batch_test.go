package server

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"verve/dedup"
	"verve/server/callback"
)

// batchPost is a request with a batch.
func batchPost(query, contentType, encoding, body string) string {
	headers := ""
	if contentType != "" {
		headers += "Content-Type: " + contentType + "\r\n"
	}
	if encoding != "" {
		headers += "Content-Encoding: " + encoding + "\r\n"
	}
	return fmt.Sprintf("POST %s%s HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n%s", acceptPath, query, headers, len(body), body)
}

func compressed(t testing.TB, body string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := io.WriteString(w, body); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// batchAnswer is the body of an answer in JSON.
type batchAnswer struct {
	OK, Duplicate, Replayed, Refused int
	Results                          []string
}

// TestBatchHasAVerdictForEachItem in every format, in order, and each item judged on
// its own.
func TestBatchHasAVerdictForEachItem(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", maxIDLen+1)
	for _, c := range []struct {
		name, contentType, body string
		want                    string // words
		uint64IDs               string // words where only decimals are ids; empty: the same
	}{
		{"lines", "text/plain", "1\n2\n1\n", "ok ok duplicate", ""},
		{"no type", "", "1\n2", "ok ok", ""},
		{"type with a parameter, in capitals", "Text/Plain; charset=utf-8", "1", "ok", ""},
		{"CRLF, and none at the end", "text/plain", "1\r\n2\r\n1", "ok ok duplicate", ""},
		{"CR without LF, which ends no line", "text/plain", "1\r2\n1\r", "bad-id bad-id", ""},
		{"an empty line", "text/plain", "1\n\n2\n", "ok bad-id ok", ""},
		{"one empty line", "text/plain", "\n", "bad-id", ""},
		{"raw bytes: nothing is decoded", "text/plain", "a%20b\na b\na+b\na%20b", "ok ok ok duplicate", "bad-id bad-id bad-id bad-id"},
		{"bad ids", "text/plain", " 1\n2 \n3\t\n\xff\n" + long + "\n4", "bad-id bad-id bad-id bad-id bad-id ok", ""},
		{"texts and UUIDs", "text/plain", "a\n3f333df6-90a4-4fda-8dd3-9485d27cee36\na", "ok ok duplicate", "bad-id bad-id bad-id"},
		{"numbers that are alike", "text/plain", "42\n042\n42", "ok ok duplicate", "ok bad-id duplicate"},
		{"an array of strings", "application/json", `["1", "2", "1"]`, "ok ok duplicate", ""},
		{"numbers", "application/json", `[1, 2, 1, "2", 18446744073709551615]`, "ok ok duplicate duplicate ok", ""},
		{"numbers that are no canonical decimals", "application/json", `[1.0, 1e0, -1, 0.5]`, "bad-id bad-id bad-id bad-id", ""},
		{"escapes", "application/json", `["a\u00e9\n", "a\u00e9", "a\u00E9", "aé"]`, "bad-id ok duplicate duplicate", "bad-id bad-id bad-id bad-id"},
		{"half of a surrogate pair", "application/json", `["1", "\ud83d", "\udc00x", "\ud83d\ude00", {"id":"2","\ud83d":1}, "3"]`, "ok bad-id bad-id ok ok ok", "ok bad-id bad-id bad-id ok ok"},
		{"a member twice", "application/json", `["1", {"id":"2","id":"3"}, {"id":"2","\u0069d":"2"}, {"id":"4","key":"k","key":"k"}, {"id":"4","token":"t","token":"t"}, {"id":"5","x":1,"x":2,"y":{"id":1,"id":2}}]`,
			"ok bad-id bad-id bad-key bad-token ok", ""},
		{"a member of an event twice", "application/cloudevents-batch+json",
			`[{"specversion":"1.0","type":"t","source":"/a","id":"1","id":"1"},{"specversion":"1.0","specversion":"1.0","type":"t","source":"/a","id":"1"},
			{"specversion":"1.0","type":"t","source":"/a","id":"1","data":1,"data":2}]`, "bad-id bad-id ok", "bad-id bad-id bad-id"},
		{"other values", "application/json", `[null, true, [1], {}, ["1"], "1"]`, "bad-id bad-id bad-id bad-id bad-id ok", ""},
		{"objects", "application/json", `[{"id":"1"}, {"id":2}, "1", {"other":{"id":"3"}}, {"id":"3","other":[1,{"a":2}]}]`, "ok ok duplicate bad-id ok", ""},
		{"an empty array", "application/json", " [ ] ", "", ""},
		{"items a line", "application/x-ndjson", "\"1\"\n2\n{\"id\":\"1\"}\n\n3", "ok ok duplicate ok", ""},
		{"events", "application/cloudevents-batch+json",
			`[{"specversion":"1.0","type":"t","source":"/a","id":"1"},{"specversion":"1.0","type":"t","source":"/b","id":"1","data":{"id":"x"}},
			{"id":"1","source":"/a","type":"u","specversion":"1.0"},{"type":"t","source":"/a","id":"2"},{"specversion":"1.0","type":"t","id":"2"},"1"]`,
			"ok ok duplicate bad-id bad-id bad-id", "bad-id bad-id bad-id bad-id bad-id bad-id"},
		{"events whose source and id are divided by another space", "application/cloudevents-batch+json",
			`[{"specversion":"1.0","type":"t","source":"/a","id":"b c"},{"specversion":"1.0","type":"t","source":"/a b","id":"c"},
			{"specversion":"1.0","type":"t","source":"/a\u0020b","id":"d"},{"specversion":"1.0","type":"t","source":"/a","id":"b c"}]`,
			"ok bad-id bad-id duplicate", "bad-id bad-id bad-id bad-id"},
		{"an event with escapes", "application/cloudevents+json", `{"specv\u0065rsion":"1\u002e0","type":"t","source":"/\u0061","id":"1"}`, "ok", "bad-id"},
		{"one event", "application/cloudevents+json; charset=UTF-8", `{"specversion":"1.0","type":"t","source":"/a","id":"1"}`, "ok", "bad-id"},
	} {
		for _, uint64IDs := range []bool{false, true} {
			for _, encoding := range []string{"", "gzip", "identity", ", GZIP ,", "gzip\r\nContent-Encoding:"} {
				t.Run(fmt.Sprint(c.name, uint64IDs, encoding), func(t *testing.T) {
					s := newSite(t, func(cfg *Config) { cfg.Uint64IDs = uint64IDs })
					body := c.body
					if strings.Contains(strings.ToLower(encoding), "gzip") {
						body = compressed(t, body)
					}
					want := c.want
					if uint64IDs && c.uint64IDs != "" {
						want = c.uint64IDs
					}
					resp, got := s.ask(batchPost("", c.contentType, encoding, body))
					if resp.StatusCode != 200 || resp.Header.Get("Cache-Control") != "no-store" || resp.Close {
						t.Fatalf("got %d %v %q", resp.StatusCode, resp.Header, got)
					}
					words := strings.Fields(got)
					if resp.Header.Get("Content-Type") == "application/json" {
						words = jsonWords(t, got)
					} else if got != strings.Join(append(words, ""), "\n") {
						t.Errorf("got %q, want a word a line", got)
					}
					if !slices.Equal(words, strings.Fields(want)) {
						t.Errorf("got %q, want %q", words, want)
					}
					s.stop()
					n := uint64(0)
					for _, word := range strings.Fields(want) {
						if word == "ok" {
							n++
						}
					}
					if s.records.sum() != n {
						t.Errorf("the record says %d, want %d", s.records.sum(), n)
					}
				})
			}
		}
	}
}

// jsonWords returns the results of an answer, whose sums must be theirs.
func jsonWords(t *testing.T, body string) []string {
	t.Helper()
	var a batchAnswer
	if err := json.Unmarshal([]byte(body), &a); err != nil {
		t.Fatalf("%v: %q", err, body)
	}
	n := map[string]int{}
	for _, r := range a.Results {
		n[r]++
	}
	if n["ok"] != a.OK || n["duplicate"] != a.Duplicate || n["replayed"] != a.Replayed || len(a.Results)-n["ok"]-n["duplicate"]-n["replayed"] != a.Refused {
		t.Errorf("the sums are not those of the results: %s", body)
	}
	return a.Results
}

// TestBatchThatIsRefusedCountsNothing: the whole body is parsed before the first id is
// judged.
func TestBatchThatIsRefusedCountsNothing(t *testing.T) {
	s := newSite(t, func(c *Config) { c.MaxBatchIDs, c.MaxBatchBytes = 10, 1000 })
	eleven := strings.Repeat("1\n", 11)
	big := strings.Repeat("x", 999) + "\n\n"
	for _, c := range []struct {
		name, query, contentType, encoding, body string
		status                                   int
	}{
		{"too many ids", "", "text/plain", "", eleven, 413},
		{"too many items", "", "application/json", "", "[" + strings.Repeat("1,", 10) + "1]", 413},
		{"too many bytes", "", "text/plain", "", big, 413},
		{"too many bytes, packed", "", "text/plain", "gzip", compressed(t, big), 413},
		{"an unknown type", "", "application/xml", "", "<a/>", 415},
		{"two headers of a type", "", "application/json\r\nContent-Type: text/plain", "", `["1"]`, 415},
		{"an unknown encoding", "", "text/plain", "br", "1", 415},
		{"two encodings", "", "text/plain", "gzip, gzip", "1", 415},
		{"one encoding over the other", "", "text/plain", "gzip, identity", compressed(t, "1"), 415},
		{"an encoding twice", "", "text/plain", "gzip\r\nContent-Encoding: gzip", compressed(t, "1"), 415},
		{"two headers of an encoding", "", "text/plain", "identity\r\nContent-Encoding: br", "1", 415},
		{"one encoding over another", "", "text/plain", "identity\r\ncontent-encoding: gzip", compressed(t, "1"), 415},
		{"no gzip", "", "text/plain", "gzip", "1\n2", 400},
		{"gzip that is cut off", "", "text/plain", "gzip", compressed(t, "1\n2")[:15], 400},
		{"nothing in gzip", "", "text/plain", "gzip", compressed(t, ""), 400},
		{"no array", "", "application/json", "", `"1"`, 400},
		{"an object", "", "application/json", "", `{"id":"1"}`, 400},
		{"cut off", "", "application/json", "", `["1","2"`, 400},
		{"something behind", "", "application/json", "", `["1"]["2"]`, 400},
		{"a comma too many", "", "application/json", "", `["1",]`, 400},
		{"bytes that are no UTF-8", "", "application/json", "", "[\"1\",\"\xff\"]", 400},
		{"a leading zero", "", "application/json", "", `["1",01]`, 400},
		{"a bad line", "", "application/x-ndjson", "", "\"1\"\n{", 400},
		{"two events", "", "application/cloudevents+json", "", `{"id":"1"}{"id":"2"}`, 400},
		{"no event", "", "application/cloudevents+json", "", " \n", 400},
		{"an event that is no object", "", "application/cloudevents-batch+json", "", `{}`, 400},
		{"an id in the query as well", "?id=1", "text/plain", "", "1\n2", 400},
		{"a bad id in the query as well", "?id=", "text/plain", "", "1\n2", 400},
		{"a bad endpoint", "?endpoint=x", "text/plain", "", "1\n2", 400},
	} {
		t.Run(c.name, func(t *testing.T) {
			resp, body := s.ask(batchPost(c.query, c.contentType, c.encoding, c.body))
			if resp.StatusCode != c.status || body != "failed" {
				t.Errorf("got %d %q, want %d", resp.StatusCode, body, c.status)
			}
		})
	}
	if n := s.cfg.Counter.Stats().Unique; n != 0 {
		t.Errorf("%d ids were counted", n)
	}
	if resp, body := s.ask(batchPost("", "text/plain", "", strings.Repeat("1\n", 10))); resp.StatusCode != 200 || !strings.HasPrefix(body, "ok\nduplicate\n") {
		t.Errorf("as many as allowed: %d %q", resp.StatusCode, body)
	}
}

// TestBatchStartsOneCallback, if at least one of its ids is new.
func TestBatchStartsOneCallback(t *testing.T) {
	s := newSite(t, nil)
	for i, want := range []uint64{1, 1, 2} { // after each batch
		body := []string{"1\n2\n3", "1\n2", "3\n4"}[i]
		if resp, got := s.ask(batchPost("?endpoint=http://"+s.addr+"/test", "", "", body)); resp.StatusCode != 200 {
			t.Fatalf("%d %q", resp.StatusCode, got)
		}
		awaitCallbacks(t, s.cfg.Callbacks, func(st callback.Stats) bool { return st.Waiting+st.InFlight+st.Reserved == 0 })
		if n := s.sunk.Load(); n != want {
			t.Errorf("batch %d: %d callbacks, want %d", i, n, want)
		}
	}
}

// TestBatchWithoutRoomForItsCallbackCountsNothing, and the metric has each of its ids.
func TestBatchWithoutRoomForItsCallbackCountsNothing(t *testing.T) {
	s := newSite(t, nil)
	s.cfg.Callbacks.Drain(t.Context()) // has no room from now on
	resp, got := s.ask(batchPost("?endpoint=http://"+s.addr+"/test", "", "", "1\n2\n3"))
	if resp.StatusCode != 503 || got != "failed" || resp.Header.Get("Verve-Reason") != "busy" || resp.Header.Get("Retry-After") == "" {
		t.Errorf("%d %v %q", resp.StatusCode, resp.Header, got)
	}
	if n := s.refused[reasonBusy].Load(); n != 3 {
		t.Errorf("%d ids are counted as busy, want 3", n)
	}
	if _, got := s.ask(batchPost("", "", "", "1\n2\n3")); got != "ok\nok\nok\n" {
		t.Errorf("afterwards %q", got)
	}
}

// TestBatchAtTheLimitAndTheStop: what cannot be judged has a word of its own, and if
// that is so of all ids, the answer is 503. Items that are bad do not change that: a
// client that sends again what was answered 503 would lose the others.
func TestBatchAtTheLimitAndTheStop(t *testing.T) {
	set, err := dedup.NewMemory(dedup.Config{Heap: true, MaxIDs: 2})
	if err != nil {
		t.Fatal(err)
	}
	s := newSite(t, func(c *Config) { replaceSet(t, c, set) })
	if _, got := s.ask(batchPost("", "", "", "1\n2\n3\n1")); got != "ok\nok\nfull\nduplicate\n" {
		t.Errorf("full: %q", got)
	}
	s.cfg.Counter.Seal()
	for _, body := range []string{"1\n2", "1\n\n", "\n1\n"} {
		resp, got := s.ask(batchPost("", "", "", body))
		if resp.StatusCode != 503 || got != "failed" || resp.Header.Get("Verve-Reason") != "draining" || resp.Header.Get("Retry-After") == "" {
			t.Errorf("draining, %q: %d %v %q", body, resp.StatusCode, resp.Header, got)
		}
	}
	if resp, got := s.ask(batchPost("", "", "", "\n\n")); resp.StatusCode != 200 || got != "bad-id\nbad-id\n" {
		t.Errorf("draining, bad ids alone: %d %q", resp.StatusCode, got)
	}
}

// TestBatchNamesItsWindows: one by itself; two, where the window turned, with the ids
// judged in each.
func TestBatchNamesItsWindows(t *testing.T) {
	s := newSite(t, func(c *Config) {
		c.WindowHeader = true
		c.Set = &halting{Set: c.Set}
	})
	first := string(s.cfg.Counter.Last().Label())
	resp, _ := s.ask(batchPost("", "", "", "1\n2\n\n1"))
	if got := resp.Header.Get("Verve-Window"); got != first {
		t.Errorf("got %q, want %q", got, first)
	}
	resp, body := s.ask(batchPost("", "", "", "3\n4\nturn\n3\n"))
	second := string(s.cfg.Counter.Last().Label())
	if got, want := resp.Header.Get("Verve-Window"), first+";n=2, "+second+";n=2"; got != want || body != "ok\nok\nok\nok\n" {
		t.Errorf("got %q %q, want %q", got, body, want)
	}
	if resp, _ := s.ask(batchPost("", "", "", "\n")); len(resp.Header.Values("Verve-Window")) != 0 {
		t.Errorf("no id was judged, and the window is %q", resp.Header.Get("Verve-Window"))
	}
}

// TestBatchesAndSingleRequestsCountAsOne: side by side, chunked and not, each id is new
// once, and the record is the number of ok answers.
func TestBatchesAndSingleRequestsCountAsOne(t *testing.T) {
	const clients, rounds, ids = 6, 60, 500
	s := newSite(t, nil)
	var mu sync.Mutex
	ok := map[string]int{}
	var group sync.WaitGroup
	for client := range clients {
		c, r := s.dial()
		group.Go(func() {
			for round := range rounds {
				var lines []string
				for i := range 40 {
					lines = append(lines, fmt.Sprint((round*17+i*client)%ids))
				}
				raw := batchPost("", "", "", strings.Join(lines, "\n"))
				switch client % 3 {
				case 1:
					raw = fmt.Sprintf("POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", acceptPath)
					for _, l := range lines {
						raw += fmt.Sprintf("%x\r\n%s\n\r\n", len(l)+1, l)
					}
					raw += "0\r\n\r\n"
				case 2:
					lines = lines[:1]
					raw = get("id=" + lines[0])
				}
				if _, err := io.WriteString(c, raw); err != nil {
					t.Error(err)
					return
				}
				resp, body, err := answer(r)
				if err != nil || resp.StatusCode != 200 && resp.StatusCode != 409 {
					t.Errorf("%v %v", resp, err)
					return
				}
				mu.Lock()
				for i, word := range strings.Fields(body) {
					if word == "ok" {
						ok[lines[i]]++
					}
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()
	s.stop()
	for id, n := range ok {
		if n != 1 {
			t.Errorf("id %s was ok %d times", id, n)
		}
	}
	if got := s.records.sum(); got != uint64(len(ok)) {
		t.Errorf("the record says %d, want %d", got, len(ok))
	}
}

// TestBatchMemoryIsBounded: clients that announce much and send little hold nothing of
// it, those that send much and stop get 503 before memory runs out, and small batches
// are answered beside them.
func TestBatchMemoryIsBounded(t *testing.T) {
	const memory = 8 << 20
	s := newSite(t, func(c *Config) { c.limits.BatchMemory = memory })
	head := fmt.Sprintf("POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", acceptPath, 1<<20)
	for range 50 {
		c, _ := s.dial()
		if _, err := io.WriteString(c, head+strings.Repeat("1\n", 6000)); err != nil {
			t.Fatal(err)
		}
	}
	// These hold what bodies may have.
	most := head + strings.Repeat("1\n", 1<<19-1)
	var refused atomic.Int32
	for range 16 {
		c, r := s.dial()
		go func() {
			if _, err := io.WriteString(c, most); err != nil {
				refused.Add(1) // answered and closed while it sent
			} else if resp, _, err := answer(r); err == nil && resp.StatusCode == http.StatusServiceUnavailable && resp.Header.Get("Verve-Reason") == "busy" {
				refused.Add(1)
			}
		}()
	}
	eventually(t, "half of the 16 are refused, and half of the memory is held", func() bool {
		return refused.Load() >= 8 && s.batches.used.Load() >= memory/2
	})
	if used := s.batches.used.Load(); used > s.batches.bodies() {
		t.Errorf("%d bytes are held, want %d at most", used, s.batches.bodies())
	}
	if resp, _ := s.ask(get("id=1")); resp.StatusCode != 200 {
		t.Errorf("a single request beside them: %d", resp.StatusCode)
	}
	for _, small := range []string{
		batchPost("", "", "", strings.Repeat("1\n", 1000)), batchPost("", "application/json", "", "["+strings.Repeat("1,", 999)+"1]"),
		batchPost("", "", "gzip", compressed(t, strings.Repeat("1\n", 1000))),
	} {
		if resp, body := s.ask(small); resp.StatusCode != 200 {
			t.Errorf("a small batch beside them: %d %q", resp.StatusCode, body)
		}
	}
}

// TestLargestBatchFits into the least memory that batches may have, in every format.
func TestLargestBatchFits(t *testing.T) {
	s := newSite(t, func(c *Config) { c.limits.BatchMemory = batchNeeds(DefaultMaxBatchBytes, DefaultMaxBatchIDs) })
	var ids []string
	for i := range DefaultMaxBatchIDs {
		ids = append(ids, fmt.Sprintf("%099d", i))
	}
	lines, list := strings.Join(ids, "\n"), `["`+strings.Join(ids, `","`)+`"]`
	var pack bytes.Buffer
	w, _ := gzip.NewWriterLevel(&pack, gzip.NoCompression) // longer than what is in it
	_, _ = io.WriteString(w, lines+strings.Repeat("\r", DefaultMaxBatchBytes-len(lines)))
	_ = w.Close()
	if pack.Len() <= DefaultMaxBatchBytes {
		t.Fatalf("%d bytes in gzip", pack.Len())
	}
	for name, raw := range map[string]string{
		"lines": batchPost("", "", "", lines), "list": batchPost("", "application/json", "", list), "escaped": batchPost("", "application/json", "", strings.Replace(list, "0", `\u0030`, 1)),
		"list in gzip": batchPost("", "application/json", "gzip", compressed(t, list)), "lines in stored gzip": batchPost("", "", "gzip", pack.String()),
	} {
		if resp, body := s.ask(raw); resp.StatusCode != 200 {
			t.Errorf("%s: %d %v %q", name, resp.StatusCode, resp.Header, body)
		}
	}
}

// eventually polls for what other goroutines do.
func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for start := time.Now(); !done(); time.Sleep(time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// TestBatchMemoryIsGivenBack after every kind of outcome.
func TestBatchMemoryIsGivenBack(t *testing.T) {
	s := newSite(t, func(c *Config) { c.MaxBatchBytes = 1000 })
	for _, raw := range []string{
		batchPost("", "", "", "1\n2"), batchPost("", "application/json", "", "["), batchPost("", "", "gzip", compressed(t, "1\n2")),
		batchPost("", "", "", strings.Repeat("1\n", 600)), batchPost("", "application/json", "gzip", compressed(t, strings.Repeat("[", 2000))),
	} {
		s.ask(raw)
	}
	c, _ := s.dial()
	if _, err := io.WriteString(c, batchPost("", "", "", "1\n2\n3")[:60]); err != nil {
		t.Fatal(err)
	}
	_ = c.(*net.TCPConn).SetLinger(0)
	_ = c.Close()
	eventually(t, "no memory is held", func() bool { return s.batches.used.Load() == 0 })
}

// TestBatchOfLinesAllocatesNothingPerID from the socket to the answer: a batch of 10,000
// costs what one of 100 costs.
func TestBatchOfLinesAllocatesNothingPerID(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	s := newSite(t, nil)
	c, r := s.dial()
	send := func(raw []byte, want int) {
		if _, err := c.Write(raw); err != nil {
			t.Fatal(err)
		}
		for {
			line, err := r.ReadSlice('\n')
			if err != nil {
				t.Fatal(err)
			}
			if len(line) == 2 {
				break
			}
		}
		if n, err := r.Discard(want); err != nil || n != want {
			t.Fatal(n, err)
		}
	}
	per := func(n int) float64 {
		raw := []byte(batchPost("", "text/plain", "", strings.Repeat("1234567\n3f333df6-90a4-4fda-8dd3-9485d27cee36\n", n/2)))
		answer := n * len("duplicate\n")
		first := len("ok\nok\n") + answer - 2*len("duplicate\n")
		if s.cfg.Counter.Stats().Unique > 0 {
			first = answer
		}
		send(raw, first)
		return testing.AllocsPerRun(100, func() { send(raw, answer) })
	}
	if few, many := per(100), per(10_000); many > few+3 { // a pool may be emptied meanwhile
		t.Errorf("%v allocations for a batch of 10,000, %v for one of 100", many, few)
	}
}

// TestRefusedBatchLeavesNothingToTheNext: a body with more items than lines is refused, and the
// memory of its tables is used again.
func TestRefusedBatchLeavesNothingToTheNext(t *testing.T) {
	s := newSite(t, nil)
	for n := range 200 {
		lines := strings.Repeat("1\n", n%20)
		for _, body := range []string{lines + "1 1", lines + `{"id":1,"key":"a"}{"id":2,"key":"b"}`} {
			if resp, _ := s.ask(batchPost("", "application/x-ndjson", "", body)); resp.StatusCode != 400 {
				t.Fatalf("%q: got %d, want 400", body, resp.StatusCode)
			}
		}
		if resp, got := s.ask(batchPost("", "application/x-ndjson", "", fmt.Sprint(n))); resp.StatusCode != 200 || !strings.Contains(got, `["ok"]`) {
			t.Fatalf("got %d %s, want 200 and ok", resp.StatusCode, got)
		}
	}
}

// FuzzBatch: no body makes the parser panic, and what it takes is well formed.
func FuzzBatch(f *testing.F) {
	for _, body := range []string{
		"1\n2\r\n", "\n", "a b\n\xff\n", `["1",2,{"id":"3","key":"k","token":"t"}]`, `{"id":1}` + "\n2", "1 2", "{\n}", "[]", "[\"\\ud800\"]", "[1e400]", "[-0,1.0]",
		`[{"specversion":"1.0","type":"t","source":"/a","id":"1"}]`, `{"specversion":"1.0","type":"t","source":"\u002fa","id":"\n","data":{"a":[{"a":1}]}}`,
		`[{"id":"1","id":"2"}]`, `["\u00e9","\u0000"," 1"]`, strings.Repeat("[", 100), `[{"key":null,"token":7,"id":"x"}]`,
		`[{"id":"1","key":"a"},{"id":"1","token":"b"},"1",{"id":"2","key":"","token":""}]`, `{"key":"\u006b","token":"\"","id":1}`,
	} {
		for kind := range uint8(formatUnknown) {
			f.Add(kind, []byte(body))
		}
	}
	s := newSite(f, func(c *Config) { c.MaxBatchIDs = 1000 })
	f.Fuzz(func(t *testing.T, kind uint8, body []byte) {
		if len(body) == 0 {
			return // refused before
		}
		b := &batch{owner: s.batches}
		defer b.release()
		shared := &dedup.Options{Under: []byte("shared")}
		kind %= uint8(formatUnknown)
		if b.parse(format(kind), body, shared) != nil {
			return
		}
		good := 0
		for _, w := range b.words {
			if w == wordOK {
				good++
			}
		}
		if good != len(b.work.items) || len(b.words) > 1000 {
			t.Errorf("%d of %d words, and %d ids", good, len(b.words), len(b.work.items))
		}
		for _, it := range b.work.items {
			if !validText(it.ID) || !validID(it.ID) {
				t.Errorf("%q is no id", it.ID)
			}
			if o := it.Options; o == nil || !validKey(o.Under) || o.Token != nil && !validToken(o.Token) {
				t.Errorf("%q has options %+v", it.ID, o)
			}
		}
		if format(kind) == formatJSON {
			var items []json.RawMessage
			if err := json.Unmarshal(body, &items); err != nil || len(items) != len(b.words) {
				t.Errorf("%q: %v, %d items, %d words", body, err, len(items), len(b.words))
			}
		}
	})
}

// TestCORS: a page may read answers, and a preflight succeeds, only if its origin is on
// the list.
func TestCORS(t *testing.T) {
	for _, c := range []struct {
		allowed        []string
		origin         string
		want           string // Access-Control-Allow-Origin
		preflightWorks bool
	}{
		{nil, "https://a.example", "", false},
		{[]string{"https://a.example"}, "https://a.example", "https://a.example", true},
		{[]string{"https://a.example", "http://b.example:8000"}, "http://b.example:8000", "http://b.example:8000", true},
		{[]string{"https://a.example"}, "https://b.example", "", false},
		{[]string{"https://a.example"}, "https://a.example.evil", "", false},
		{[]string{"*"}, "https://b.example", "*", true},
	} {
		s := newSite(t, func(cfg *Config) { cfg.CORSOrigins = c.allowed })
		for _, raw := range []string{
			get("id=1"), get("id="), batchPost("", "", "", "1"),
		} {
			for range 2 { // the second may go the fast path
				raw := strings.Replace(raw, "Host: x\r\n", "Host: x\r\nOrigin: "+c.origin+"\r\n", 1)
				if resp, _ := s.ask(raw); resp.Header.Get("Access-Control-Allow-Origin") != c.want {
					t.Errorf("%v, %s: got %v", c.allowed, c.origin, resp.Header)
				}
			}
		}
		resp, _ := s.ask("OPTIONS " + acceptPath + " HTTP/1.1\r\nHost: x\r\nOrigin: " + c.origin + "\r\nAccess-Control-Request-Method: POST\r\n\r\n")
		if works := resp.StatusCode == 204 && resp.Header.Get("Access-Control-Allow-Methods") == "GET, POST"; works != c.preflightWorks || !works && resp.StatusCode != 405 {
			t.Errorf("%v, preflight of %s: %d %v", c.allowed, c.origin, resp.StatusCode, resp.Header)
		}
		s.stop()
	}
}

// TestOriginsThatNoBrowserSendsAreRefused: they would never be allowed, without a word.
func TestOriginsThatNoBrowserSendsAreRefused(t *testing.T) {
	for _, bad := range []string{
		"", "a.example", "https://a.example/", "https://a.example/x", "null", "HTTPS://a.example",
		"https://*.a.example", "https://*", "chrome-extension://*", "https://A.example", "https://bücher.example",
		"https://a.example:443", "http://a.example:80", "https://a.example:", "https://a.example:0", "https://a.example:08443", "https://a.example:65536",
	} {
		if checkOrigin(bad) == nil {
			t.Errorf("%q is taken for an origin", bad)
		}
	}
	for _, good := range []string{
		"*", "https://a.example", "http://a.example:443", "https://a.example:80", "http://localhost:3000", "https://[::1]:8443",
		"https://xn--bcher-kva.example", "chrome-extension://abcdefgh", "safari-web-extension://3F33-A",
	} {
		if err := checkOrigin(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
}
