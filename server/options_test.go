package server

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/valyala/fasthttp"

	"verve/counter"
	"verve/dedup"
	"verve/internal/testproc"
	"verve/server/callback"
)

// attempts is a Set that knows tokens whatever the one behind it knows: those of an epoch
// and of the windows before and after it.
type attempts struct {
	dedup.Set
	mu  sync.Mutex
	won map[string]string // the token that counted an id, by window, key and id
	big bool              // the epoch's first item turns it, once
}

func (a *attempts) AddMany(e *counter.Epoch, items []dedup.Item, verdicts []dedup.Verdict) (err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.won == nil {
		a.won = map[string]string{}
	}
	for i, it := range items {
		var o dedup.Options
		if it.Options != nil {
			o = *it.Options
		}
		in := func(start time.Time) string { return fmt.Sprintf("%v %q %q", start, o.Under, it.ID) }
		if a.big && string(it.ID) == "turn" {
			a.big = false
			return err
		}
		if won, ok := a.won[in(e.Start().Add(-e.Window()))]; ok && len(o.Token) > 0 && won == string(o.Token) {
			verdicts[i] = dedup.ReplayedBefore
			continue
		}
		if won, ok := a.won[in(e.End())]; ok && len(o.Token) > 0 && won == string(o.Token) {
			verdicts[i] = dedup.ReplayedAfter
			continue
		}
		if cause := a.Set.AddMany(e, []dedup.Item{{ID: it.ID, Key: it.Key, Options: it.Options}}, verdicts[i:i+1]); err == nil {
			err = cause
		}
		now := in(e.Start())
		switch won, ok := a.won[now]; {
		case verdicts[i] == dedup.Unique && len(o.Token) > 0:
			a.won[now] = string(o.Token)
		case verdicts[i] == dedup.Repeat && len(o.Token) > 0 && ok && won == string(o.Token):
			verdicts[i] = dedup.Replayed
		}
	}
	return err
}

// newTokenSite is a site whose set knows tokens.
func newTokenSite(t testing.TB, change func(*Config)) (*site, *attempts) {
	a := new(attempts)
	return newSite(t, func(c *Config) {
		a.Set = c.Set
		c.Set = a
		if change != nil {
			change(c)
		}
	}), a
}

// getWith is get with a header.
func getWith(query, header string) string {
	return strings.Replace(get(query), "Host: x\r\n", "Host: x\r\n"+header+"\r\n", 1)
}

// TestBadKeysAndTokensAreRefused, each with its reason, whatever comes with them, and count
// nothing. Of several faults the answer names the first in the order id, endpoint, key,
// token.
func TestBadKeysAndTokensAreRefused(t *testing.T) {
	s, _ := newTokenSite(t, nil)
	type row struct{ request, reason string }
	var rows []row
	values, err := os.ReadFile("testdata/option_cases.tsv")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(values)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(f) != 3 {
			t.Fatalf("row %q", line)
		}
		value, err := strconv.Unquote(f[1])
		if err != nil {
			t.Fatal(f[1], err)
		}
		for _, name := range []string{"key", "token"} {
			if f[2] == "" || strings.Contains(f[2], name) {
				rows = append(rows, row{get("id=x&" + strings.ReplaceAll(value, "NAME", name)), "bad-" + name})
			}
		}
	}
	token := func(headers, query string) row { return row{getWith("id=x"+query, headers), "bad-token"} }
	rows = append(rows,
		token("Idempotency-Key:", ""), token("Idempotency-Key:   ", ""), token("Idempotency-Key: a\tb", ""), token("Idempotency-Key: "+strings.Repeat("t", maxTokenLen+1), ""),
		token("Idempotency-Key: a\r\nIdempotency-Key: a", ""), token("Idempotency-Key: a\r\nidempotency-key: b", ""), token("Idempotency-Key: a", "&token=b"),
		token(`Idempotency-Key: ""`, ""), token(`Idempotency-Key: "`, ""), token(`Idempotency-Key: "a`, ""), token(`Idempotency-Key: "a"b"`, ""), token(`Idempotency-Key: "a";x=y`, ""),
		token(`Idempotency-Key: "a\"`, ""), token(`Idempotency-Key: "a\b"`, ""), token(`Idempotency-Key: " a"`, ""), token(`Idempotency-Key: "`+strings.Repeat("t", maxTokenLen+1)+`"`, ""),
		token("Idempotency-Key: \xff", ""), token("Idempotency-Key: a", "&token=A"), token("Idempotency-Key: a", "&token="),
		row{get("id=&endpoint=x&key=&token="), "bad-id"}, row{get("token=&key=&endpoint=x&id="), "bad-id"},
		row{get("id=x&token=&key=&endpoint=x"), "bad-endpoint"}, row{get("id=x&token=&key=&endpoint="), "bad-endpoint"}, row{get("id=x&token=&key="), "bad-key"},
		row{get("id=x&token=&key=&endpoint=" + url.QueryEscape("http://"+s.addr+"/test")), "bad-key"}, row{getWith("id=x&key=", "Idempotency-Key:"), "bad-key"},
	)
	for _, r := range rows {
		want := "400 failed " + r.reason
		for _, method := range []string{"GET", "POST"} {
			resp, body := s.ask(strings.Replace(r.request, "GET", method, 1))
			if got := fmt.Sprint(resp.StatusCode, " ", body, " ", resp.Header.Get("Verve-Reason")); got != want {
				t.Errorf("%s of %q: got %q, want %q", method, r.request, got, want)
			}
		}
	}
	if resp, _ := s.ask(get("token=&key=&endpoint=x")); resp.Header.Get("Verve-Reason") != "bad-id" { // of a POST it is an empty batch
		t.Errorf("no id: %v", resp.Header)
	}
	e := s.cfg.Counter.Last()
	if e.Unique() != 0 || e.Repeats() != 0 || e.Keys().Len() != 0 || s.replayed.Load() != 0 || s.cfg.Callbacks.Stats().Reserved != 0 {
		t.Errorf("refused requests counted: %d unique, %d repeats, %d keys, %d replays", e.Unique(), e.Repeats(), e.Keys().Len(), s.replayed.Load())
	}
	if n := s.refused[reasonBadKey].Load(); n < 10 {
		t.Errorf("%d requests were counted as bad-key", n)
	}
}

// TestEveryPermittedKeyAndTokenIsTaken as the bytes that it stands for.
func TestEveryPermittedKeyAndTokenIsTaken(t *testing.T) {
	s, _ := newTokenSite(t, nil)
	longest := strings.Repeat("k", maxKeyLen)
	for _, c := range []struct{ query, key string }{
		{"key=campaign-7", "campaign-7"}, {"%6bey=a%2Fb+c", "a/b c"}, {"key=%C3%A9", "é"}, {"key=" + longest, longest},
		{"key=" + strings.Repeat("%6b", maxKeyLen), longest}, {"key=a=b", "a=b"}, {"key=0&Key=&keys=", "0"}, {"key=k%26", "k&"},
	} {
		if resp, body := s.ask(get("id=1&" + c.query)); body != "ok" && !(c.key == longest && resp.StatusCode == 409) {
			t.Errorf("%q: %d %q", c.query, resp.StatusCode, body)
		}
		if !slices.ContainsFunc(s.cfg.Counter.Last().Keys().Counts().List(), func(k counter.KeyCount) bool { return k.Key == c.key }) {
			t.Errorf("%q: no key %q", c.query, c.key)
		}
	}
	// The same token, in each of its spellings.
	for i, same := range [][]string{
		{"t-1", "t%2d1", "Idempotency-Key: t-1", "idempotency-key:t-1 \t", `IDEMPOTENCY-KEY: "t-1"`, "t-1|Idempotency-Key: t-1"},
		{"a%22b%5Cc", `Idempotency-Key: "a\"b\\c"`, `Idempotency-Key: a"b\c`},
		{strings.Repeat("t", maxTokenLen), "Idempotency-Key: " + strings.Repeat("t", maxTokenLen), `Idempotency-Key: "` + strings.Repeat("t", maxTokenLen) + `"`},
		{"%C3%A9", "Idempotency-Key: \u00e9"},
	} {
		for first := range same {
			id := fmt.Sprint("id=", i, "-", first)
			for again := range same {
				spelling := same[(first+again)%len(same)]
				token, header, both := strings.Cut(spelling, "|")
				raw := get(id + "&token=" + token)
				switch {
				case both:
					raw = getWith(id+"&token="+token, header)
				case strings.Contains(spelling, ":"):
					raw = getWith(id, spelling)
				}
				resp, body := s.ask(raw)
				if body != "ok" || (resp.Header.Get("Verve-Replayed") == "true") != (again > 0) || again == 0 && resp.Header.Values("Verve-Replayed") != nil {
					t.Errorf("%q, attempt %d: %d %q %v", raw, again, resp.StatusCode, body, resp.Header)
				}
			}
		}
	}
}

// TestRetryIsAnsweredAsItsFirstAttempt: the same id, key and token; with any of them
// another, or without a token, it is a repeat or new. A replay counts nothing and starts no
// callback.
func TestRetryIsAnsweredAsItsFirstAttempt(t *testing.T) {
	for _, method := range []string{"GET", "POST"} {
		s, _ := newTokenSite(t, func(c *Config) { c.DuplicateStatus = 418 })
		endpoint := "&endpoint=" + url.QueryEscape("http://"+s.addr+"/test")
		c, r := s.dial()
		for i, row := range []struct{ query, want string }{
			{"id=1&key=k&token=t" + endpoint, "200 ok "}, {"id=1&key=k&token=t" + endpoint, "200 ok true"}, {"token=t&key=k&id=1", "200 ok true"},
			{"id=1&key=k&token=u", "418 failed "}, {"id=1&key=k", "418 failed "}, {"id=1&key=k&token=t", "200 ok true"},
			{"id=1&key=l&token=t", "200 ok "}, {"id=1&token=t", "200 ok "}, {"id=1", "418 failed "}, {"id=1", "418 failed "}, {"id=2&token=t", "200 ok "},
			{"id=3", "200 ok "}, {"id=3&token=t", "418 failed "}, {"id=3&token=t", "418 failed "},
		} {
			io.WriteString(c, strings.Replace(get(row.query), "GET", method, 1))
			resp, body, err := answer(r)
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprint(resp.StatusCode, " ", body, " ", resp.Header.Get("Verve-Replayed")); got != row.want {
				t.Errorf("%s, request %d, %s: got %q, want %q", method, i, row.query, got, row.want)
			}
		}
		awaitCallbacks(t, s.cfg.Callbacks, func(st callback.Stats) bool { return st.Waiting+st.InFlight+st.Reserved == 0 })
		e := s.cfg.Counter.Last()
		if n := e.Unique(); n != 5 || e.Repeats() != 6 || s.replayed.Load() != 3 || s.sunk.Load() != 1 {
			t.Errorf("%s: %d unique, %d repeats, %d replays, %d callbacks", method, n, e.Repeats(), s.replayed.Load(), s.sunk.Load())
		}
		if got := fmt.Sprint(e.Keys().Counts().List()); got != "[{k 1} {l 1}]" {
			t.Errorf("%s: keys %s", method, got)
		}
		s.stop()
		if s.records.sum() != 5 {
			t.Errorf("the record has %d", s.records.sum())
		}
	}
}

// TestReplayNamesTheWindowThatCountedItsID: the present one, the one before, or the next one, which
// another instance has opened.
func TestReplayNamesTheWindowThatCountedItsID(t *testing.T) {
	s, a := newTokenSite(t, func(c *Config) { c.WindowHeader = true })
	first := s.cfg.Counter.Last()
	before := first.Start().Add(-first.Window())
	after := first.End().Format(time.RFC3339)
	a.won = map[string]string{fmt.Sprintf("%v %q %q", before, "", "old"): "t", fmt.Sprintf("%v %q %q", first.End(), "", "ahead"): "t"}
	for _, c := range []struct{ query, want string }{
		{"id=1&token=t", first.Start().Format(time.RFC3339)}, {"id=1&token=t", first.Start().Format(time.RFC3339)},
		{"id=old&token=t", before.Format(time.RFC3339)}, {"id=old&token=u", first.Start().Format(time.RFC3339)},
		{"id=ahead&token=t", after},
	} {
		if resp, body := s.ask(get(c.query)); body != "ok" || resp.Header.Get("Verve-Window") != c.want {
			t.Errorf("%s: %q in window %q, want %q", c.query, body, resp.Header.Get("Verve-Window"), c.want)
		}
	}
	// A batch names each window once, a replay that of its id.
	a.won[fmt.Sprintf("%v %q %q", before, "", "older")] = "t"
	resp, body := s.ask(batchPost("?token=t", "", "", "1\nolder\n2\nahead\n"))
	want := before.Format(time.RFC3339) + ";n=1, " + first.Start().Format(time.RFC3339) + ";n=2, " + after + ";n=1"
	if got := resp.Header.Get("Verve-Window"); got != want || body != "replayed\nreplayed\nok\nreplayed\n" {
		t.Errorf("got %q %q, want %q", got, body, want)
	}
	// The first attempt was in the part of a batch before the turn, its retry is behind it.
	a.mu.Lock()
	a.big = true
	a.mu.Unlock()
	resp, body = s.ask(batchPost("?token=t", "", "", "3\nturn\n3\n4\n"))
	second := s.cfg.Counter.Last()
	want = first.Start().Format(time.RFC3339) + ";n=2, " + second.Start().Format(time.RFC3339) + ";n=2"
	if got := resp.Header.Get("Verve-Window"); got != want || body != "ok\nok\nreplayed\nok\n" {
		t.Errorf("got %q %q, want %q", got, body, want)
	}
}

// TestBatchTakesKeysAndTokens in every format: those of the query and the header hold for
// each item, those of an item come first, and the faults of an item are its own.
func TestBatchTakesKeysAndTokens(t *testing.T) {
	long := strings.Repeat("x", maxKeyLen+1)
	event := func(id string) string {
		return `{"specversion":"1.0","type":"t","source":"/a","id":"` + id + `","key":"x","token":"y"}`
	}
	const lines, array, items, events = "text/plain", "application/json", "application/x-ndjson", "application/cloudevents-batch+json"
	for _, c := range []struct{ name, query, header, contentType, body, want, keys string }{
		{"lines, a key", "?key=k", "", lines, "1\n2\n1\n", "ok ok duplicate", "[{k 2}]"},
		{"lines, a token", "?token=t", "", lines, "1\n2\n1\n\n", "ok ok replayed bad-id", "[]"},
		{"lines, the header", "", "Idempotency-Key: t", lines, "1\n1\n", "ok replayed", "[]"},
		{"lines, all of them", "?token=t&key=k", `Idempotency-Key: "t"`, lines, "1\n1", "ok replayed", "[{k 1}]"},
		{"array, of the query", "?key=k&token=t", "", array, `["1",2,{"id":"1"},{"id":"3"},""]`, "ok ok replayed ok bad-id", "[{k 3}]"},
		{"array, of the items", "", "", array, `[{"id":"1","key":"k"},{"id":"1"},{"id":"1","key":"l","token":"t"},{"token":"t","key":"l","id":"1"},{"id":"1","key":"l"}]`,
			"ok ok ok replayed duplicate", "[{k 1} {l 1}]"},
		{"array, of both", "?key=k&token=t", "", array, `["1",{"id":"1","key":"l"},{"id":"1","token":"u"},{"id":"1","key":"l","token":"t"},{"id":"2","key":"l","token":"u"},"1"]`,
			"ok ok duplicate replayed ok replayed", "[{k 1} {l 2}]"},
		{"array, an item and the header differ", "", "Idempotency-Key: t", array, `[{"id":"1","token":"u"},{"id":"1","token":"u"},"1"]`, "ok replayed duplicate", "[]"},
		{"array, faults", "", "", array, `[{"id":"1","key":""},{"id":"1","token":""},{"id":"1","key":"` + long + `"},{"id":"1","token":"` + long[:maxTokenLen+1] + `"},{"id":"1","key":7},{"id":"1","key":null},
			{"id":"1","token":["t"]},{"token":"","key":"","id":""},{"token":"","key":" ","id":"1"},{"id":"1","key":"a\u0000"},{"id":"1","token":"t "},"1"]`,
			"bad-key bad-token bad-key bad-token bad-key bad-key bad-token bad-id bad-key bad-key bad-token ok", "[]"},
		{"array, faults beside those of the query", "?key=k&token=t", "", array, `[{"id":"1","key":""},{"id":"1","token":""},{"id":"1"}]`, "bad-key bad-token ok", "[{k 1}]"},
		{"array, escapes", "", "", array, `[{"id":"1","key":"\u006b","token":"\"t\""},{"id":"1","key":"k","token":"\u0022t\u0022"}]`, "ok replayed", "[{k 1}]"},
		{"items a line", "?key=k", "", items, "{\"id\":\"1\",\"token\":\"t\"}\n{\"id\":\"1\",\"token\":\"t\"}\n{\"id\":\"1\",\"key\":\"l\"}\n1\n", "ok replayed ok duplicate", "[{k 1} {l 1}]"},
		{"events have none of their own", "?key=k&token=t", "", events, "[" + event("1") + "," + event("1") + "]", "ok replayed", "[{k 1}]"},
		{"events without options", "", "", events, "[" + event("1") + "," + event("1") + "]", "ok duplicate", "[]"},
		{"one event", "?key=k", "", "application/cloudevents+json", event("1"), "ok", "[{k 1}]"},
	} {
		for _, encoding := range []string{"", "gzip"} {
			t.Run(c.name+encoding, func(t *testing.T) {
				s, _ := newTokenSite(t, nil)
				body := c.body
				if encoding != "" {
					body = compressed(t, body)
				}
				raw := batchPost(c.query, c.contentType, encoding, body)
				if c.header != "" {
					raw = strings.Replace(raw, "Host: x\r\n", "Host: x\r\n"+c.header+"\r\n", 1)
				}
				resp, got := s.ask(raw)
				if resp.StatusCode != 200 || resp.Header.Values("Verve-Replayed") != nil {
					t.Fatalf("got %d %v %q", resp.StatusCode, resp.Header, got)
				}
				words := strings.Fields(got)
				if c.contentType != lines {
					words = jsonWords(t, got)
				}
				if got := strings.Join(words, " "); got != c.want {
					t.Errorf("got %q, want %q", got, c.want)
				}
				count := func(word string) (n int) {
					for _, w := range strings.Fields(c.want) {
						if w == word {
							n++
						}
					}
					return n
				}
				e := s.cfg.Counter.Last()
				if got := fmt.Sprint(e.Keys().Counts().List()); got != c.keys || e.Unique() != uint64(count("ok")) {
					t.Errorf("%d unique, keys %s, want %s", e.Unique(), got, c.keys)
				}
				for _, r := range s.acceptResults() {
					if word := strings.ReplaceAll(r.Result, "_", "-"); int(r.Count) != count(word) {
						t.Errorf("%s was counted %d times, want %d", r.Result, r.Count, count(word))
					}
				}
				eventually(t, "no memory is held", func() bool { return s.batches.used.Load() == 0 })
			})
		}
	}
}

// TestBatchWithABadQueryCountsNothing, before its body is judged.
func TestBatchWithABadQueryCountsNothing(t *testing.T) {
	s, _ := newTokenSite(t, nil)
	for _, c := range []struct{ query, header, reason string }{
		{"?key=", "", "bad-key"}, {"?key=a&key=a", "", "bad-key"}, {"?token=", "", "bad-token"}, {"?token=a", "Idempotency-Key: b", "bad-token"}, {"", "Idempotency-Key:", "bad-token"},
		{"?token=&key=", "", "bad-key"}, {"?key=&endpoint=x", "", "bad-endpoint"}, {"?key=&id=", "", "bad-id"},
	} {
		for _, body := range []string{"1\n2\n", "", "\n", strings.Repeat("1\n", DefaultMaxBatchIDs+1)} {
			raw := batchPost(c.query, "", "", body)
			if c.header != "" {
				raw = strings.Replace(raw, "Host: x\r\n", "Host: x\r\n"+c.header+"\r\n", 1)
			}
			if resp, _ := s.ask(raw); resp.StatusCode != 400 || resp.Header.Get("Verve-Reason") != c.reason {
				t.Errorf("%s %s, %d bytes: %d %s", c.query, c.header, len(body), resp.StatusCode, resp.Header.Get("Verve-Reason"))
			}
		}
	}
	if e := s.cfg.Counter.Last(); e.Unique() != 0 || e.Keys().Len() != 0 || s.batches.used.Load() != 0 {
		t.Errorf("%d unique, %d keys, %d bytes held", e.Unique(), e.Keys().Len(), s.batches.used.Load())
	}
}

// TestBatchTablesAreUsedAgainWithoutTheirOptions: a batch without keys and tokens has none of
// the batch before it.
func TestBatchTablesAreUsedAgainWithoutTheirOptions(t *testing.T) {
	s, _ := newTokenSite(t, nil)
	c, r := s.dial()
	for i := range 50 {
		for _, b := range [][4]string{
			{"?key=k&token=t", "application/json", `["%[1]d",{"id":"%[1]d","key":"l"},{"id":"%[1]d","token":"u"},"%[1]d"]`, `["ok","ok","duplicate","replayed"]`},
			{"", "application/json", `["%[1]d",{"id":"%[1]d"}]`, `["ok","duplicate"]`}, {"", "", "x%[1]d\nx%[1]d\n", "ok\nduplicate\n"},
		} {
			io.WriteString(c, batchPost(b[0], b[1], "", fmt.Sprintf(b[2], i)))
			if _, body, err := answer(r); err != nil || !strings.Contains(body, b[3]) {
				t.Fatalf("round %d, %v: %s %v", i, b, body, err)
			}
		}
	}
	if got := fmt.Sprint(s.cfg.Counter.Last().Keys().Counts().List()); got != "[{k 50} {l 50}]" {
		t.Errorf("keys %s", got)
	}
}

// TestLargestBatchWithOptionsFits into the least memory that batches may have.
func TestLargestBatchWithOptionsFits(t *testing.T) {
	s, _ := newTokenSite(t, func(c *Config) { c.limits.BatchMemory = batchNeeds(DefaultMaxBatchBytes, DefaultMaxBatchIDs) })
	var items []string
	for i := range DefaultMaxBatchIDs {
		items = append(items, fmt.Sprintf(`{"id":"%032d","key":"k%d","token":"%030d"}`, i, i%1000, i))
	}
	body := "[" + strings.Join(items, ",") + "]"
	if len(body) > DefaultMaxBatchBytes {
		t.Fatal(len(body))
	}
	for name, raw := range map[string]string{
		"plain": batchPost("?key=q", "application/json", "", body), "escaped": batchPost("", "application/json", "gzip", compressed(t, strings.Replace(body, "k0", `\u006b0`, 1))),
	} {
		if resp, got := s.ask(raw); resp.StatusCode != 200 {
			t.Errorf("%s: %d %v %q", name, resp.StatusCode, resp.Header, got)
		}
	}
	if e := s.cfg.Counter.Last(); e.Unique() != DefaultMaxBatchIDs || e.Keys().Len() != 1000 {
		t.Errorf("%d unique, %d keys", e.Unique(), e.Keys().Len())
	}
}

// TestFastPathLeavesKeysAndTokensAlone: a request with one is never judged as if it had none,
// and its headers are no model for others.
func TestFastPathLeavesKeysAndTokensAlone(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, query, header, want string }{
		{"key", "&key=k", "", "200 200 409 200 409 409 409 409 "}, {"token", "&token=t", "", "200 200 200true 409 200true 409 200true 200true "},
		{"header", "", "Idempotency-Key: t", "200 200 200true 409 200true 409 200true 200true "},
		{"all", "&key=k&token=t", "idempotency-key: t", "200 200 200true 200 200true 409 200true 200true "},
	} {
		s, _ := newTokenSite(t, nil)
		conn, r := s.dial()
		for id := range 50 {
			with := get(fmt.Sprint("id=", id, c.query))
			if c.header != "" {
				with = getWith(fmt.Sprint("id=", id, c.query), c.header)
			}
			plain := get(fmt.Sprint("id=", id))
			got := ""
			for _, raw := range []string{get(fmt.Sprint("id=", id+1000)), with, with, plain, with, plain + with + with} {
				io.WriteString(conn, raw)
				for range strings.Count(raw, "GET ") {
					resp, _, err := answer(r)
					if err != nil {
						t.Fatal(err)
					}
					got += fmt.Sprint(resp.StatusCode, resp.Header.Get("Verve-Replayed"), " ")
				}
			}
			if got != c.want {
				t.Fatalf("%s: got %q, want %q", c.name, got, c.want)
			}
		}
		s.stop()
	}
}

// TestTooManyKeysAreRefused with a reason that the log explains; keys that are there, and ids
// without one, are counted.
func TestTooManyKeysAreRefused(t *testing.T) {
	var log testproc.Buffer
	s := newSite(t, func(c *Config) { c.Log = zerolog.New(&log) })
	for i := range counter.DefaultMaxKeys - 2 {
		s.cfg.Counter.Last().Keys().Add(rand.Uint64(), strconv.AppendInt(nil, int64(i), 10))
	}
	for _, c := range []struct{ query, want string }{
		{"id=1&key=a", "200 "}, {"id=1&key=b", "200 "}, {"id=1&key=c", "503 full"}, {"id=2&key=a", "200 "}, {"id=1", "200 "}, {"id=1&key=a", "409 duplicate"},
	} {
		resp, _ := s.ask(get(c.query))
		if got := fmt.Sprint(resp.StatusCode, " ", resp.Header.Get("Verve-Reason")); got != c.want || resp.StatusCode == 503 && resp.Header.Get("Retry-After") == "" {
			t.Errorf("%s: got %q, want %q", c.query, got, c.want)
		}
	}
	if _, got := s.ask(batchPost("?key=c", "", "", "1\n2\n")); got != "full\nfull\n" {
		t.Errorf("a batch: %q", got)
	}
	if lines := refusals(t, &log)["full"]; len(lines) != 1 || !strings.Contains(lines[0].Error, "too many keys") {
		t.Errorf("the log has %+v", lines)
	}
}

// FuzzTokenOf: what it takes for a string of Structured Fields is one, and the others are
// taken as they are.
func FuzzTokenOf(f *testing.F) {
	for _, s := range []string{"", "a", ` "a" `, `"a\"b\\"`, `"`, `""`, `"a"b"`, `"a\`, "a\r", "\"\xff\""} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		token := tokenOf(value)
		trimmed := strings.Trim(strings.TrimSuffix(string(value), "\r"), " \t")
		if !strings.HasPrefix(trimmed, `"`) {
			if string(token) != trimmed {
				t.Errorf("%q: %q", value, token)
			}
			return
		}
		if token == nil {
			return
		}
		if again := `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(string(token)) + `"`; again != trimmed {
			t.Errorf("%q: %q, which is written %q", value, token, again)
		}
	})
}

// TestKeysOfAWindow, open and closed, the largest first.
func TestKeysOfAWindow(t *testing.T) {
	s, a := newAdminSite(t, new(Records))
	read := func(path string) (w windowKeys, status int) {
		t.Helper()
		page := getPage(a, path)
		if err := json.Unmarshal(page.Body.Bytes(), &w); err != nil {
			t.Fatalf("%v: %s", err, page.Body)
		}
		return w, page.Code
	}
	start := s.cfg.Counter.Last().Start()
	path := "/api/windows/" + start.Format(time.RFC3339) + "/keys"
	if got := getPage(a, path).Body.String(); !strings.Contains(got, `"keys":0,"unique":0,"results":[]`) {
		t.Errorf("without a key: %s", got)
	}
	if got := getPage(a, "/api/windows").Body.String(); strings.Contains(got, "keys") {
		t.Errorf("without a key: %s", got)
	}
	s.ask(batchPost("?key=b", "", "", "1\n2\n3\n4\n"))
	s.ask(batchPost("?key=a", "", "", "1\n2\n3\n4\n"))
	s.ask(batchPost("?key=c", "", "", "1\n2\n3\n4\n5\n6\n"))
	s.ask(batchPost("", "", "", "1\n2\n"))
	open := getPage(a, path).Body.String()
	if want := `{"window_start":"` + start.Format(time.RFC3339) + `","scope":"instance","keys":3,"unique":16,"results":[{"key":"c","unique":6,"share":0.375},{"key":"a","unique":4,"share":0.25},{"key":"b","unique":4,"share":0.25}]}` + "\n"; open != want {
		t.Errorf("got %s, want %s", open, want)
	}
	if got := getPage(a, "/metrics").Body.String(); !strings.Contains(got, "\nverve_keys 3\n") {
		t.Error("no verve_keys 3")
	}
	if w, _ := read(path + "?limit=1"); len(w.Results) != 1 || w.Results[0].Key != "c" || w.Keys != 3 {
		t.Errorf("limit 1: %+v", w)
	}
	for target, status := range map[string]int{
		path + "?limit=0": 400, path + "?limit=1001": 400, path + "?limit=x": 400, path + "?limit=-1": 400, path + "?limit=1000": 200,
		path + "?limit=5;": 400, path + "?limit=%zz": 400, path + "?limit=5&limit=5": 400, path + "?limit=": 200, "/api/windows?limit=5;": 400,
		"/api/windows/now/keys": 400, "/api/windows//keys": 404, "/api/windows/2026-11-22/keys": 400, "/api/windows/2001-01-01T00:00:00Z/keys": 404,
		"/api/windows/" + start.In(time.FixedZone("", 3600)).Format(time.RFC3339) + "/keys": 200,
	} {
		if page := getPage(a, target); page.Code != status && !(target == "/api/windows//keys" && page.Code == 301 || page.Code == 307) {
			t.Errorf("%s: got %d %s, want %d", target, page.Code, page.Body, status)
		}
	}
	s.stop()
	if closed := getPage(a, path).Body.String(); closed != open {
		t.Errorf("closed: got %s, want %s", closed, open)
	}
	if got := getPage(a, "/api/windows").Body.String(); strings.Count(got, `"keys":3`) != 2 { // open until another one opens
		t.Errorf("got %s", got)
	}
}

// TestKeysOfAGroupAreThoseOfItsRecord, if that has any.
func TestKeysOfAGroupAreThoseOfItsRecord(t *testing.T) {
	_, a := newAdminSite(t, new(Records))
	start := time.Unix(60, 0).UTC()
	whole := counter.Count{Unique: 10, Complete: true, Exact: true, Keys: counter.KeyCountsOf([]counter.KeyCount{{Key: "a", Unique: 2}, {Key: "b", Unique: 5}}...)}
	a.cfg.Sealed = func(counter.Span) (counter.Count, bool) { return whole, true }
	a.WindowClosed(counter.Count{Start: start, Window: time.Minute, Unique: 3, Keys: counter.KeyCountsOf([]counter.KeyCount{{Key: "b", Unique: 1}}...)})
	got := getPage(a, "/api/windows/1970-01-01T00:01:00Z/keys").Body.String()
	if want := `"scope":"group","keys":2,"unique":10,"results":[{"key":"b","unique":5,"share":0.5},{"key":"a","unique":2,"share":0.2}]`; !strings.Contains(got, want) {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := getPage(a, "/api/windows").Body.String(); !strings.Contains(got, `"whole_group":{"unique":10,"keys":2,`) || !strings.Contains(got, `"unique":3,"duplicates":0,"keys":1,`) {
		t.Errorf("got %s", got)
	}
}

// TestKeysThatAreNotInMemoryAreGone: a process that was started later names the reason
// instead of an empty list, also where it has counted a part of the window itself; a
// window without keys has none.
func TestKeysThatAreNotInMemoryAreGone(t *testing.T) {
	_, a := newAdminSite(t, new(Records))
	path := filepath.Join(t.TempDir(), "windows.jsonl")
	a.history = openHistory(path, "", "", zerolog.Nop())
	keys := []counter.KeyCount{{Key: "a", Unique: 2}}
	closed := func(minute int64, keys []counter.KeyCount) {
		a.WindowClosed(counter.Count{Start: time.Unix(60*minute, 0).UTC(), Window: time.Minute, Unique: 3, Keys: counter.KeyCountsOf(keys...)})
	}
	closed(1, keys)
	closed(2, nil)
	closed(3, keys)
	restarted := func() {
		t.Helper()
		a.history = openHistory(path, "", "", zerolog.Nop())
	}
	restarted()
	closed(3, keys)
	closed(4, keys)
	for minute, want := range map[int]string{1: "410 gone", 2: `200 "keys":0,"unique":3,"results":[]`, 3: "410 gone", 4: `200 "keys":1,"unique":3,"results":[{"key":"a"`} {
		page := getPage(a, fmt.Sprintf("/api/windows/1970-01-01T00:%02d:00Z/keys", minute))
		status, part, _ := strings.Cut(strings.Replace(want, "gone", "the keys of this window are not in memory any more", 1), " ")
		if fmt.Sprint(page.Code) != status || !strings.Contains(page.Body.String(), part) {
			t.Errorf("window %d: got %d %s, want %s", minute, page.Code, page.Body, want)
		}
	}
	restarted()
	a.cfg.Sealed = func(counter.Span) (counter.Count, bool) {
		return counter.Count{Unique: 9, Keys: counter.KeyCountsOf(keys...)}, true
	}
	closed(4, keys)
	if page := getPage(a, "/api/windows/1970-01-01T00:04:00Z/keys"); page.Code != 200 || !strings.Contains(page.Body.String(), `"scope":"group","keys":1,"unique":9`) {
		t.Errorf("with the keys of the whole group: got %d %s", page.Code, page.Body)
	}
}

// TestKeysOfTheOpenWindowOutliveTheProcess: a process that is started again within a window
// adds what it counts to what its predecessors have, however many they were.
func TestKeysOfTheOpenWindowOutliveTheProcess(t *testing.T) {
	s, a := newAdminSite(t, new(Records))
	open := s.cfg.Counter.Last()
	path := filepath.Join(t.TempDir(), "windows.jsonl")
	restarted := func() {
		t.Helper()
		a.history = openHistory(path, "", "", zerolog.Nop())
	}
	restarted()
	odd := "<é\u2028\">"
	for range 3 {
		a.WindowClosed(counter.Count{Start: open.Start(), Window: open.Window(), Unique: 3, Keys: counter.KeyCountsOf(
			counter.KeyCount{Key: "a", Unique: 2}, counter.KeyCount{Key: odd, Unique: 1})})
		restarted()
	}
	if lines, err := os.ReadFile(path); err != nil || bytes.Count(lines, []byte("\n")) != 1 {
		t.Errorf("the parts of one window are kept apart: %s, %v", lines, err)
	}
	s.ask(batchPost("?key=a", "", "", "1\n"))
	s.ask(batchPost("?key=b", "", "", "1\n2\n"))
	var w windowKeys
	page := getPage(a, "/api/windows/"+open.Start().Format(time.RFC3339)+"/keys")
	if err := json.Unmarshal(page.Body.Bytes(), &w); err != nil {
		t.Fatalf("%v: %s", err, page.Body)
	}
	want := []keyShare{{"a", 7, 7. / 12}, {odd, 3, 3. / 12}, {"b", 2, 2. / 12}}
	if !slices.Equal(w.Results, want) || w.Keys != 3 || w.Unique != 12 {
		t.Errorf("got %+v", w)
	}
	if m := a.live.everything(time.Now()); !slices.Equal(m.Keys, want) || m.Open.Keys != 3 || m.Open.Unique != 12 {
		t.Errorf("the live page shows %+v of %+v", m.Keys, m.Open)
	}
	if got := getPage(a, "/metrics").Body.String(); !strings.Contains(got, "\nverve_keys 3\n") {
		t.Error("no verve_keys 3")
	}
	s.stop() // the last part is closed, too
	if closed := getPage(a, "/api/windows/"+open.Start().Format(time.RFC3339)+"/keys").Body.String(); closed != page.Body.String() {
		t.Errorf("at the stop: got %s, want %s", closed, page.Body)
	}
	// A window before the open one is not gone on with, whatever this clock makes of its end:
	// its keys are not kept in the file.
	a.WindowClosed(counter.Count{Start: open.Start().Add(-time.Minute), Window: 2 * open.Window(), Keys: counter.KeyCountsOf(counter.KeyCount{Key: "old", Unique: 1})})
	if lines, err := os.ReadFile(path); err != nil || bytes.Contains(lines, []byte("old")) {
		t.Errorf("got %s, %v", lines, err)
	}
}

// TestLivePageHasTheLargestKeys of the open window with their share.
func TestLivePageHasTheLargestKeys(t *testing.T) {
	s, a := newAdminSite(t, new(Records))
	now := time.Now()
	if m := a.live.everything(now); len(m.Keys) > 0 {
		t.Errorf("without a key: %+v", m.Keys)
	}
	for i := range liveKeys + 5 {
		s.ask(batchPost(fmt.Sprint("?key=k", i), "", "", strings.Repeat("1\n2\n3\n4\n5\n", 1)[:2*(1+i%5)]))
	}
	if m := a.live.everything(now); len(m.Keys) != 0 {
		t.Error("the keys were looked for twice in a moment")
	}
	m := a.live.everything(now.Add(time.Hour))
	if len(m.Keys) != liveKeys || m.Keys[0] != (keyShare{"k14", 5, 5. / 45}) || m.Open.Keys != liveKeys+5 {
		t.Errorf("got %+v of %d", m.Keys, m.Open.Keys)
	}
}

// TestRequestsWithOptionsAllocateNothing between the header and the verdict.
func TestRequestsWithOptionsAllocateNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	s := newSite(t, nil)
	for _, raw := range []string{get("id=42"), get("id=42&key=k&token=t"), getWith("id=42&key=k", "Idempotency-Key: t"), getWith("id=42", `Idempotency-Key: "t"`)} {
		var ctx fasthttp.RequestCtx
		if err := ctx.Request.Header.Read(bufio.NewReader(strings.NewReader(raw))); err != nil {
			t.Fatal(err)
		}
		n := testing.AllocsPerRun(500, func() {
			ctx.Response.Reset()
			lines, ok := inspect(&ctx.Request.Header)
			_, query, _ := splitTarget(ctx.Request.Header.RequestURI())
			var a asked
			err := s.parse(&a, &ctx.Request.Header, query, lines, true)
			w := works.Get().(*work)
			if !ok || err != nil || s.count(&ctx, w, &a) != nil {
				t.Fatal(ok, err)
			}
			works.Put(w)
		})
		if n >= 1 { // a pool may be emptied
			t.Errorf("%q: %v allocations", raw, n)
		}
	}
}
