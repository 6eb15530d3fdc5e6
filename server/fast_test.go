package server

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/valyala/fasthttp"

	"verve/counter"
	"verve/dedup"
	"verve/internal/epochtest"
	"verve/internal/testproc"
)

// witness counts how ids reach the Set: the work of the fast path has room for more
// than one.
type witness struct {
	dedup.Set
	single, together atomic.Int64
}

func (w *witness) AddMany(e *counter.Epoch, items []dedup.Item, verdicts []dedup.Verdict) error {
	if cap(items) > 1 {
		w.together.Add(int64(len(items)))
	} else {
		w.single.Add(1)
	}
	return w.Set.AddMany(e, items, verdicts)
}

// wantFast sends n requests with new ids on one connection, each after the answer to the
// one before. With fast all but the first must go the fast path, else none.
func wantFast(t *testing.T, n int, fast bool, request func(i int) string) {
	t.Helper()
	w := &witness{}
	s := newSite(t, func(c *Config) {
		w.Set = c.Set
		c.Set = w
	})
	conn, r := s.dial()
	for i := range n {
		io.WriteString(conn, request(i))
		if resp, body, err := answer(r); err != nil || resp.StatusCode != 200 || body != "ok" {
			t.Fatalf("request %d: %v %q, %v", i, resp, body, err)
		}
	}
	want := int64(0)
	if fast {
		want = int64(n - 1)
	}
	if got := w.together.Load(); got != want {
		t.Errorf("%d of %d requests went the fast path, want %d", got, n, want)
	}
}

// sendPieces writes raw in random pieces.
func sendPieces(t testing.TB, c net.Conn, rnd *rand.Rand, raw string) {
	for len(raw) > 0 {
		n := 1 + rnd.IntN(len(raw))
		if rnd.IntN(2) == 0 {
			n = min(n, 1+rnd.IntN(100))
		}
		if _, err := io.WriteString(c, raw[:n]); err != nil {
			t.Error(err)
			return
		}
		raw = raw[n:]
	}
}

// TestFastPathAnswersInOrder sends bursts of requests, of which some are the fast
// path's and some are not, in random pieces: every answer is the one to its
// request, and of the plain ones most do not go through fasthttp.
func TestFastPathAnswersInOrder(t *testing.T) {
	w := &witness{}
	s := newSite(t, func(c *Config) {
		w.Set = c.Set
		c.Set = w
		c.Uint64IDs = true
	})
	rnd := rand.New(rand.NewPCG(1, 2))
	c, r := s.dial()
	seen := map[int]bool{}
	plain := 0
	for range 400 {
		var burst strings.Builder
		var want []string
		for range 1 + rnd.IntN(300)*rnd.IntN(2) {
			id := rnd.IntN(3000)
			status := "200"
			switch target := fmt.Sprintf("%s?id=%d", acceptPath, id); rnd.IntN(2000) {
			case 0: // another tail, which is then the remembered one
				fmt.Fprintf(&burst, "GET %s HTTP/1.1\r\nHost: x\r\nX-Request-Id: %d\r\n\r\n", target, id)
			case 1: // a body, with something in it that looks like a request
				body := strings.Repeat(get("id=77777"), 1+rnd.IntN(200))
				fmt.Fprintf(&burst, "POST /test HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
				want = append(want, status)
				continue
			case 2:
				fmt.Fprintf(&burst, "GET %s&x=1 HTTP/1.1\r\nHost: x\r\n\r\n", target)
			case 3:
				burst.WriteString(get("id=0" + strconv.Itoa(id)))
				want = append(want, "400")
				continue
			default:
				plain++
				burst.WriteString(get("id=" + strconv.Itoa(id)))
			}
			if seen[id] {
				status = "409"
			}
			seen[id] = true
			want = append(want, status)
		}
		go sendPieces(t, c, rnd, burst.String())
		for i, want := range want {
			resp, body, err := answer(r)
			if err != nil {
				t.Fatalf("answer %d: %v", i, err)
			}
			if got := strconv.Itoa(resp.StatusCode); got != want || (want == "200") != (body == "ok") {
				t.Fatalf("answer %d: got %s %q, want %s", i, got, body, want)
			}
		}
	}
	if n := s.cfg.Counter.Stats(); n.Unique != uint64(len(seen)) {
		t.Errorf("%d ids counted, want %d", n.Unique, len(seen))
	}
	if n := int(w.together.Load()); n < plain/2 {
		t.Errorf("%d ids of %d plain requests went the fast path, and %d did not", n, plain, w.single.Load())
	}
}

// pairOfSites are a server with the fast path and one without, each with ids of
// its own and no callbacks into the world, and requests that mean the same to both.
func pairOfSites(t testing.TB, change func(*Config)) (fast, slow *site, seeds [][]byte) {
	fast = newLonelySite(t, change)
	slow = newLonelySite(t, func(c *Config) {
		if change != nil {
			change(c)
		}
		c.noFastPath = true
	})
	if fast.ln.fast == nil || slow.ln.fast != nil {
		t.Fatal("which of the two has the fast path?")
	}
	seeds = slices.DeleteFunc(requestSeeds(t, fast), func(raw []byte) bool {
		return bytes.Contains(raw, []byte(url.QueryEscape(fast.addr))) // that of the other is another
	})
	return fast, slow, seeds
}

var dateLine = regexp.MustCompile(`Date: [^\r]*\r\n`)

// proxied is a plain request with the headers that proxies add, of which some differ
// in each.
func proxied(id, trace string) string {
	return "GET " + acceptPath + "?id=" + id + " HTTP/1.1\r\nHost: x\r\nUser-Agent: test\r\nX-Forwarded-For: 10.0.0." + id +
		"\r\nX-Request-Id: " + trace + "\r\ntraceparent: 00-" + trace + "-" + id + "-01\r\nX-Empty:\r\nAccept: */*\r\n\r\n"
}

// agree sends raw to both sites, on a connection that has had the answer to first, a
// plain request whose tail it may have, and compares all that they answer.
func agree(t testing.TB, fast, slow *site, first string, raw []byte, cut func(n int) int) {
	t.Helper()
	var answers [2]string
	for i, s := range []*site{fast, slow} {
		c, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		r := bufio.NewReader(c)
		io.WriteString(c, first)
		if _, _, err := answer(r); err != nil {
			t.Fatal(err)
		}
		for rest := raw; len(rest) > 0; {
			n := cut(len(rest))
			if _, err := c.Write(rest[:n]); err != nil {
				break // refused before its end
			}
			rest = rest[n:]
		}
		if fast.ln.steadyAfter < steadyAfter { // it may take a second to see the end of a client's side
			_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		}
		_ = c.(*net.TCPConn).CloseWrite() // may be closed already
		got, err := io.ReadAll(r)
		if err != nil {
			t.Fatalf("%q: %v after %q", raw, err, got)
		}
		answers[i] = dateLine.ReplaceAllString(string(got), "")
	}
	if answers[0] != answers[1] {
		t.Fatalf("%q:\nfast %q\nslow %q", raw, answers[0], answers[1])
	}
	a, b := fast.cfg.Counter.Stats(), slow.cfg.Counter.Stats()
	if a.Unique != b.Unique || a.Repeats != b.Repeats || fast.replayed.Load() != slow.replayed.Load() {
		t.Fatalf("%q: counted %d, %d and %d on the fast path, %d, %d and %d on the slow one", raw,
			a.Unique, a.Repeats, fast.replayed.Load(), b.Unique, b.Repeats, slow.replayed.Load())
	}
	if a, b := fast.cfg.Counter.Last().Keys().Counts().List(), slow.cfg.Counter.Last().Keys().Counts().List(); !slices.Equal(a, b) {
		t.Fatalf("%q: by key %v on the fast path, %v on the slow one", raw, a, b)
	}
}

// optionParts are what may stand behind the id of a request: keys and tokens as the fast
// path takes them, and what it leaves to fasthttp.
var optionParts = []string{
	"&key=k", "&key=other", "&token=t", "&token=u", "&token=~.-_", "&key=k&token=t", "&token=t&key=k", "&key=k&key=k", "&token=t&token=u",
	"&key=", "&token=", "&", "&k", "&key", "&token", "&key=%6b", "&token=a+b", "&key=k;token=t", "&x=1", "&key=k#", "&id=1", "=", "&Key=k",
	"&key=" + strings.Repeat("k", maxKeyLen), "&key=" + strings.Repeat("k", maxKeyLen+1),
	"&token=" + strings.Repeat("t", maxTokenLen), "&token=" + strings.Repeat("t", maxTokenLen+1),
}

// FuzzFastPathAnswersAsFasthttp: whatever comes on a connection, in whatever
// pieces, the answers and the counts are those of a server without the fast path.
func FuzzFastPathAnswersAsFasthttp(f *testing.F) {
	fast, slow, seeds := pairOfSites(f, nil)
	for i, raw := range seeds {
		f.Add(raw, byte(i))
		f.Add(bytes.Join([][]byte{[]byte(get("id=1")), raw, []byte(get("id=2"))}, nil), byte(3*i))
		f.Add(bytes.Join([][]byte{[]byte(proxied("1", "a")), raw, []byte(proxied("2", "bc"))}, nil), byte(3*i))
	}
	for i, value := range []string{"", " ", "a b", "\t", "a\x00", "a\x80", "a\r", "a\n", "a\r\n b", "a\r\nConnection: close", "a\r\nHost: y", "a:b", strings.Repeat("v", maxBegun)} {
		f.Add([]byte(proxied("1", "a")+proxied("2", value)+proxied("3", "c")), byte(255-i))
	}
	for i, part := range optionParts {
		f.Add([]byte(get("id=1"+part)+get("id=1&token=t")+get("id=1"+part)+get("id=1&key=k"+part)), byte(i))
		f.Add([]byte(proxied("2"+part, "a")+getWith("id=2"+part, "Idempotency-Key: t")+proxied("2"+part, "b")), byte(255-i))
	}
	f.Fuzz(func(t *testing.T, raw []byte, split byte) {
		if len(raw) > 1<<20 {
			return
		}
		for _, first := range []string{get("id=first"), proxied("first", "0"), get("id=first&key=k&token=t")} {
			agree(t, fast, slow, first, raw, func(n int) int { return min(n, 1+int(split)) })
		}
	})
}

// TestFastPathAgreesWithFasthttp does the same with mutations that are likely to
// concern it: of series of plain requests.
func TestFastPathAgreesWithFasthttp(t *testing.T) {
	rounds := 1500
	if testing.Short() || raceEnabled || !testproc.Thorough() {
		rounds = 300
	}
	if n, err := strconv.Atoi(os.Getenv("VERVE_TEST_ROUNDS")); err == nil {
		rounds = n
	}
	for name, change := range map[string]func(*Config){
		"default": nil,
		"uint64, window header, duplicates as 200": func(c *Config) {
			c.Uint64IDs, c.WindowHeader, c.DuplicateStatus = true, true, 200
		},
		"new connections": nil,
	} {
		t.Run(name, func(t *testing.T) {
			fast, slow, seeds := pairOfSites(t, change)
			if name == "new connections" {
				fast.ln.steadyAfter = steadyAfter
			}
			rnd := rand.New(rand.NewPCG(3, 4))
			for range rounds {
				first := get("id=first")
				differ := rnd.IntN(2) == 0
				if differ {
					first = proxied("first", "0")
				}
				var raw []byte
				for range rnd.IntN(40) {
					id := strconv.Itoa(rnd.IntN(1 << rnd.IntN(20)))
					if rnd.IntN(50) == 0 {
						id = strings.Repeat("7", maxIDLen-2+rnd.IntN(5))
					}
					for rnd.IntN(3) == 0 {
						id += optionParts[min(rnd.IntN(len(optionParts)), rnd.IntN(len(optionParts)))]
					}
					if differ && rnd.IntN(20) > 0 {
						trace := strconv.FormatUint(rnd.Uint64()>>rnd.IntN(64), 36)
						if rnd.IntN(200) == 0 {
							trace = strings.Repeat(trace, rnd.IntN(600))
						}
						raw = append(raw, proxied(id, trace)...)
					} else {
						raw = append(raw, get("id="+id)...)
					}
				}
				if len(raw) > 0 && rnd.IntN(4) > 0 {
					raw = mutate(rnd, raw, seeds)
				}
				if rnd.IntN(20) == 0 { // so that retries find tokens of the window before
					for _, s := range []*site{fast, slow} {
						s.cfg.Counter.TurnFrom(s.cfg.Counter.Last())
					}
				}
				agree(t, fast, slow, first, raw, func(n int) int {
					if rnd.IntN(2) == 0 {
						return n
					}
					return 1 + rnd.IntN(min(n, 200))
				})
			}
			if fast.replayed.Load() == 0 {
				t.Error("no attempt was repeated")
			}
		})
	}
}

// TestFastPathRemembersOnlyWhatKeepsTheConnection: requests after which
// something else follows than after a plain one are no model for others.
func TestFastPathRemembersOnlyWhatKeepsTheConnection(t *testing.T) {
	t.Parallel()
	for _, tail := range []string{
		" HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n",
		" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
		" HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n",
		" HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", maxTail) + "\r\n\r\n",
		"&x=1 HTTP/1.1\r\nHost: x\r\n\r\n",
		" HTTP/1.1\r\nHost: x\r\nIdempotency-Key: t\r\n\r\n",
		"&key=k HTTP/1.1\r\nHost: x\r\nIdempotency-Key: t\r\n\r\n",
	} {
		w := &witness{}
		s := newSite(t, func(c *Config) {
			w.Set = c.Set
			c.Set = w
		})
		c, r := s.dial()
		for i := range 3 {
			if _, err := fmt.Fprintf(c, "GET %s?id=%d%s", acceptPath, i, tail); err != nil {
				break // closed
			}
			if _, _, err := answer(r); err != nil {
				break
			}
		}
		if n := w.together.Load(); n > 0 {
			t.Errorf("%q was taken for plain", tail)
		}
		s.stop()
	}
}

// TestFastPathTakesRequestsWhoseHeadersDiffer in what decides nothing, and no other:
// of a burst whose headers differ in each request all but those that learn go into the
// set together, and where a header that decides something differs, none.
func TestFastPathTakesRequestsWhoseHeadersDiffer(t *testing.T) {
	const burst = 20
	for _, c := range []struct {
		name, first, then string // headers; %d is another number in each request
		fast              bool
	}{
		{"a request id", "X-Request-Id: 1", "X-Request-Id: a-%d", true},
		{"several", "traceparent: 00-1-2-03\r\nCookie: a=b\r\nForwarded: for=x", "traceparent: 00-%[1]d-2-03\r\nCookie: a=%[1]d; b=c\r\nForwarded: for=\"%[1]d\"", true},
		{"a value that was empty", "X:", "X: %d", true},
		{"a value that is empty", "X: 1", "X:\r\nY: %d", false},
		{"a name", "X: 1", "Y: %d", false},
		{"the case of a name", "X-A: 1", "x-a: %d", false},
		{"one more header", "X: 1", "X: %[1]d\r\nY: %[1]d", false},
		{"bytes above ASCII", "X: \u00e9", "X: \u00e9%d", false},
		{"a tab", "X: a\tb", "X: a\tb%d", false},
		{"a line that ends with LF", "X: 1\nY: 0", "X: 1\nY: %d", false},
		{"Connection", "Connection: TE", "Connection: x%d", false},
		{"Expect", "Expect: x", "Expect: x%d", false},
		{"TE", "TE: x", "TE: x%d", false},
		{"Upgrade", "upgrade: x", "upgrade: x%d", false},
		{"Idempotency-Key", "Idempotency-Key: x", "Idempotency-Key: x%d", false},
		{"Proxy-Connection", "Proxy-Connection: x", "Proxy-Connection: x%d", false},
		{"Content-Type", "Content-Type: x", "Content-Type: x%d", false},
		{"Verve-Callback", "Verve-Callback: x", "Verve-Callback: x%d", false},
		{"Origin", "Origin: http://x", "Origin: http://x%d", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			wantFast(t, burst, c.fast, func(i int) string {
				headers := c.first
				if i%2 == 1 {
					headers = fmt.Sprintf(c.then, i)
				}
				return fmt.Sprintf("GET %s?id=%d HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n", acceptPath, i, headers)
			})
		})
	}
}

// TestFastPathTakesKeysAndTokens of plain bytes that stand behind the id, whether the
// request that left its tail had any or not, and nothing else.
func TestFastPathTakesKeysAndTokens(t *testing.T) {
	const burst = 20
	for _, c := range []struct {
		first, then string // behind the id; %d is another number in each request
		fast        bool
	}{
		{"", "&key=k", true},
		{"", "&token=t-%d", true},
		{"", "&key=k.%d&token=t", true},
		{"&token=t&key=k", "", true},
		{"&key=k&token=t", "&token=t&key=k~%d", true},
		{"&key=" + strings.Repeat("k", maxKeyLen), "&token=" + strings.Repeat("t", maxTokenLen), true},
		{"", "&key=a%%20%d", false},
		{"", "&x=%d", false},
		{"", "&key=k&x=%d", false},
		{"&x=1", "&x=%d", false},
	} {
		t.Run(c.first+" then "+c.then, func(t *testing.T) {
			wantFast(t, burst, c.fast, func(i int) string {
				options := c.first
				if i > 0 {
					options = strings.ReplaceAll(strings.ReplaceAll(c.then, "%d", strconv.Itoa(i)), "%%", "%")
				}
				return get("id=" + strconv.Itoa(i) + options)
			})
		})
	}
}

// TestFastPathAnswersRetriesAsFasthttp: repeats and replays of this window and the one
// before, with the window that counted the id.
func TestFastPathAnswersRetriesAsFasthttp(t *testing.T) {
	t.Parallel()
	fast, slow, _ := pairOfSites(t, func(c *Config) { c.WindowHeader = true })
	attempts := get("id=1&token=t") + get("id=1&token=u") + get("id=1") + get("id=2&key=k&token=t") + get("id=2&token=t&key=k") + get("id=1&token=t")
	for range 3 {
		agree(t, fast, slow, get("id=first"), []byte(attempts), func(n int) int { return n })
		for _, s := range []*site{fast, slow} {
			s.cfg.Counter.TurnFrom(s.cfg.Counter.Last())
		}
	}
	// In the second window the token u counts the id 1, in the third one t again.
	if n := fast.replayed.Load(); n != 2+4+3 {
		t.Errorf("%d replays, want 9", n)
	}
}

// halting is a Set that stops in the middle of a batch: at some ids it says that
// something is wrong, as often as it is asked, or once that the epoch turned.
type halting struct {
	dedup.Set
	turned atomic.Bool
}

func (h *halting) AddMany(e *counter.Epoch, items []dedup.Item, verdicts []dedup.Verdict) (err error) {
	for i, it := range items {
		switch string(it.ID) {
		case "panic":
			panic("a bug in the set")
		case "error":
			verdicts[i], err = dedup.Unavailable, errors.New("out of reach")
			continue
		case "turn":
			if !h.turned.Swap(true) {
				return err
			}
		}
		if cause := h.Set.AddMany(e, items[i:i+1], verdicts[i:i+1]); cause != nil {
			return cause
		}
	}
	return err
}

// TestFastPathGoesOnWhereABatchEnds: ids before an error, a panic or a turn are
// answered and counted in their epoch, the one it happened to as the handler
// would, and those after it, too.
func TestFastPathGoesOnWhereABatchEnds(t *testing.T) {
	s := newSite(t, func(c *Config) {
		c.Set = &halting{Set: c.Set}
		c.WindowHeader = true
	})
	ask := func(ids ...string) (got []string, windows []string) {
		c, r := s.dial()
		var raw strings.Builder
		for _, id := range ids {
			raw.WriteString(get("id=" + id))
		}
		io.WriteString(c, get("id=1")) // for its tail
		if _, _, err := answer(r); err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, raw.String())
		for range ids {
			resp, _, err := answer(r)
			if err != nil {
				break
			}
			got = append(got, fmt.Sprint(resp.StatusCode, " ", resp.Header.Get("Verve-Reason")))
			windows = append(windows, resp.Header.Get("Verve-Window"))
			if resp.Close {
				break
			}
		}
		return got, windows
	}
	first := string(s.cfg.Counter.Last().Label())
	if got, _ := ask("a", "b", "error", "a", "c"); fmt.Sprint(got) != "[200  200  503 unavailable 409 duplicate 200 ]" {
		t.Errorf("error: %q", got)
	}
	if got, _ := ask("d", "panic", "e"); fmt.Sprint(got) != "[200  500 ]" {
		t.Errorf("panic: %q", got)
	}
	got, windows := ask("f", "turn", "f")
	second := string(s.cfg.Counter.Last().Label())
	if fmt.Sprint(got) != "[200  200  200 ]" || fmt.Sprint(windows) != fmt.Sprint([]string{first, second, second}) || first == second {
		t.Errorf("turn: %q in %q, from %s to %s", got, windows, first, second)
	}
	s.stop()
	if got := s.records.sum(); got != 8 { // 1, a to d and f; then turn and f again
		t.Errorf("records say %d, want 8", got)
	}
}

// replaceSet makes set, and a counter for it, those of a site.
func replaceSet(t testing.TB, c *Config, set *dedup.Memory) {
	c.Counter.Seal() // that of the other set
	count, err := counter.New(counter.Config{Window: epochtest.Window, Store: set, Publisher: &published{}})
	if err != nil {
		t.Fatal(err)
	}
	c.Set, c.Counter = set, count
	closed := make(chan error, 1)
	go func() { closed <- count.Run(context.Background()) }()
	t.Cleanup(func() {
		if err := <-closed; err != nil {
			t.Error(err)
		}
		set.Close()
	})
}

// TestFastPathAtTheLimitAndTheStop: what the set has no room for is refused, and
// so is what comes when nothing is counted any more.
func TestFastPathAtTheLimitAndTheStop(t *testing.T) {
	set, err := dedup.NewMemory(dedup.Config{Heap: true, MaxIDs: 5})
	if err != nil {
		t.Fatal(err)
	}
	s := newSite(t, func(c *Config) { replaceSet(t, c, set) })
	c, r := s.dial()
	want := func(status int, reason string) {
		t.Helper()
		resp, _, err := answer(r)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != status || resp.Header.Get("Verve-Reason") != reason {
			t.Errorf("got %d %q, want %d %q", resp.StatusCode, resp.Header.Get("Verve-Reason"), status, reason)
		}
	}
	io.WriteString(c, get("id=0")) // for its tail
	want(200, "")
	for i := 1; i < 8; i++ {
		io.WriteString(c, get("id="+strconv.Itoa(i)))
	}
	io.WriteString(c, get("id=2"))
	for range 4 {
		want(200, "")
	}
	for range 3 {
		want(503, "full")
	}
	want(409, "duplicate")
	if n, m := s.refused[reasonFull].Load(), set.Stats().Full; n != 3 || m != 3 {
		t.Errorf("%d refusals counted, %d by the set, want 3", n, m)
	}
	s.cfg.Counter.Seal()
	io.WriteString(c, get("id=2"))
	want(503, "draining")
}

// TestFastPathEndsSlowRequests: a plain request that stops in the middle is
// ended as any other, behind the answers to those before it.
func TestFastPathEndsSlowRequests(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.SlowTimeout = time.Second })
	for _, rest := range []string{"GET /api", get("id=3")[:28], get("id=3")[:40]} {
		t.Run(rest, func(t *testing.T) {
			t.Parallel()
			c, r := s.dial()
			io.WriteString(c, get("id=1"))
			if _, _, err := answer(r); err != nil {
				t.Fatal(err)
			}
			io.WriteString(c, get("id=1")+rest)
			got, err := io.ReadAll(r)
			if err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 409") || !strings.Contains(string(got), "HTTP/1.1 408") {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

// TestFastPathLeavesASlowRequestNoMoreTime than fasthttp would: one that begins
// like a plain one, and goes on as another before its time is over. On a busy machine
// the answer may come late, so one of many attempts is enough: none would be in time
// if the time began again.
func TestFastPathLeavesASlowRequestNoMoreTime(t *testing.T) {
	t.Parallel()
	const slow = 2 * time.Second
	s := newSite(t, func(c *Config) { c.SlowTimeout = slow })
	for range 20 {
		c, r := s.dial()
		io.WriteString(c, get("id=1"))
		if _, _, err := answer(r); err != nil {
			t.Fatal(err)
		}
		io.WriteString(c, "GET /api/verve/accept?i")
		time.Sleep(slow / 2) // the slowness under test
		io.WriteString(c, "x")
		late := time.Now()
		resp, _, err := answer(r)
		if err != nil || resp.StatusCode != 408 {
			t.Fatal(resp, err)
		}
		if time.Since(late) < slow {
			return
		}
	}
	t.Errorf("each time the request had %v from its last byte on", slow)
}

// TestFastPathTakesNoTailThatIsReadByWhatFollows: fasthttp looks for the end of
// headers behind two bare line feeds, too, if there is more.
func TestFastPathTakesNoTailThatIsReadByWhatFollows(t *testing.T) {
	t.Parallel()
	fast, slow, _ := pairOfSites(t, nil)
	var got [2]string
	for i, s := range []*site{fast, slow} {
		c, r := s.dial()
		io.WriteString(c, "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\n\nGET /nope HTTP/1.1\r\nHost: x\r\n\r\n")
		for range 2 {
			if _, _, err := answer(r); err != nil {
				t.Fatal(err)
			}
		}
		io.WriteString(c, "GET /api/verve/accept?id=2 HTTP/1.1\r\nHost: x\n\n")
		_ = c.(*net.TCPConn).CloseWrite() // fails where ReadAll does
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		got[i] = dateLine.ReplaceAllString(string(b), "")
	}
	if got[0] != got[1] {
		t.Errorf("fast %q, slow %q", got[0], got[1])
	}
}

// countedConn counts the reads that look whether there is something.
type countedConn struct {
	*net.TCPConn
	looks atomic.Int64
}

func (c *countedConn) Read(b []byte) (int, error) {
	c.looks.Add(1)
	return c.TCPConn.Read(b)
}

// TestSteadyConnectionIsReadWhenThereIsSomething, not before.
func TestSteadyConnectionIsReadWhenThereIsSomething(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	c, r, raw := socketPair(t)
	there := &countedConn{TCPConn: raw}
	served := &conn{Conn: there, raw: there, owner: s.ln}
	served.socket, _ = raw.SyscallConn()
	go func() { _ = s.http.ServeConn(served) }()
	const requests = 100
	for i := range requests {
		io.WriteString(c, get("id="+strconv.Itoa(i)))
		if _, _, err := answer(r); err != nil {
			t.Fatal(err)
		}
	}
	if n := there.looks.Load(); edgeTriggered && n > requests/10 {
		t.Errorf("%d looks for %d requests", n, requests)
	}
}

// TestSteadyConnectionReadsOnWhereABufferIsFull, at once and not when it is parked. A busy
// machine may have it parked anyway, but not each time.
func TestSteadyConnectionReadsOnWhereABufferIsFull(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	request := get("id=" + strings.Repeat("1", 64-len(get("id="))))
	burst := strings.Repeat(request, 4*readBuffer/len(request)) // so that a full buffer ends with a whole one
	for range 10 {
		c, r := s.dial()
		before := s.ln.parked.Load()
		io.WriteString(c, get("id=1")+get("id=1"))
		answer(r)
		answer(r)
		go io.WriteString(c, burst)
		for range strings.Count(burst, "GET") {
			if _, _, err := answer(r); err != nil {
				t.Fatal(err)
			}
		}
		c.Close()
		if s.ln.parked.Load() == before {
			return
		}
	}
	t.Error("each time the rest was read when the connection was parked")
}

// TestSteadyConnectionSeesTheEnd of its client's side, though it came with the last requests,
// and long before the idle timeout.
func TestSteadyConnectionSeesTheEnd(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.IdleTimeout = 10 * patience })
	for _, last := range []string{get("id=3"), get("id=4") + get("id=5"), get("id=6") + "GET /api", ""} {
		c, r := s.dial()
		for range 3 {
			io.WriteString(c, get("id=1"))
			answer(r)
		}
		io.WriteString(c, last)
		_ = c.(*net.TCPConn).CloseWrite() // fails where ReadAll does
		got, err := io.ReadAll(r)
		if n := strings.Count(string(got), "HTTP/1.1 200"); err != nil || n != strings.Count(last, "HTTP") {
			t.Errorf("after %q: %q, %v", last, got, err)
		}
	}
}

// BenchmarkSteady is a request and its answer on one connection of TCP, with the client's part
// in it: on a steady connection and on one that never is.
func BenchmarkSteady(b *testing.B) {
	for name, after := range map[string]int{"steady": steadyAfter, "new": math.MaxInt} {
		b.Run(name, func(b *testing.B) {
			s := newSite(b, nil)
			s.ln.steadyAfter = after
			c, _ := s.dial()
			c.SetDeadline(time.Time{})
			var in [1 << 10]byte
			for i := range b.N {
				if _, err := io.WriteString(c, get("id="+strconv.Itoa(1e10+i))); err != nil {
					b.Fatal(err)
				}
				if _, err := c.Read(in[:]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// pipe is a connection that sends the same requests over and over, with ids that count up,
// until it has sent enough.
type pipe struct {
	net.Conn
	requests []byte
	ids      []int // where the ids are in it
	depth    int
	id, left int
}

const pipeID = "10000000000"

// newPipe sends so many requests at once. A number in options, which stand behind the ids,
// is that of the id.
func newPipe(depth int, options string) *pipe {
	p := &pipe{id: 1e10}
	for range depth {
		request := get("id=" + pipeID + options)
		for at := 0; strings.Contains(request[at:], pipeID); at += len(pipeID) {
			at += strings.Index(request[at:], pipeID)
			p.ids = append(p.ids, len(p.requests)+at)
		}
		p.requests = append(p.requests, request...)
	}
	p.depth = depth
	return p
}

func (p *pipe) Read(b []byte) (int, error) {
	if p.left <= 0 {
		return 0, io.EOF
	}
	for i, at := range p.ids {
		if i%(len(p.ids)/p.depth) == 0 {
			p.id++
		}
		strconv.AppendInt(p.requests[at:at], int64(p.id), 10)
	}
	p.left -= p.depth
	return copy(b, p.requests), nil
}

func (p *pipe) Write(b []byte) (int, error) { return len(b), nil }
func (p *pipe) Close() error                { return nil }
func (p *pipe) RemoteAddr() net.Addr        { return &net.TCPAddr{} }
func (p *pipe) LocalAddr() net.Addr         { return &net.TCPAddr{} }

// BenchmarkServer is what a new id costs without the kernel: on the fast path, by
// fasthttp and the handler alone, and, as the limit of that, by fasthttp with a
// handler that answers ok to everything. With a token, or under a key, it is what
// those cost.
func BenchmarkServer(b *testing.B) {
	for _, depth := range []int{1, 16} {
		for _, way := range []string{"fast", "fasthttp", "bare"} {
			b.Run(fmt.Sprintf("%s/depth=%d", way, depth), func(b *testing.B) { benchmarkServer(b, way, newPipe(depth, "")) })
		}
		for name, options := range map[string]string{"token": "&token=t-" + pipeID, "key": "&key=campaign-1"} {
			b.Run(fmt.Sprintf("%s/depth=%d", name, depth), func(b *testing.B) { benchmarkServer(b, name, newPipe(depth, options)) })
		}
	}
}

func benchmarkServer(b *testing.B, way string, p *pipe) {
	cfg := dedup.Config{Expect: 10_000_000}
	if way == "key" {
		cfg = dedup.Config{ExpectWide: 10_000_000}
	}
	set, err := dedup.NewMemory(cfg)
	if err != nil {
		b.Fatal(err)
	}
	s := newSite(b, func(c *Config) {
		replaceSet(b, c, set)
		if way == "fasthttp" {
			c.noFastPath = true
		}
	})
	http := &s.http
	if way == "bare" {
		http = &fasthttp.Server{Handler: func(ctx *fasthttp.RequestCtx) { ctx.SetBodyString("ok") }}
	}
	p.left = b.N
	var c net.Conn = &conn{Conn: p, raw: p, owner: s.ln, number: 1}
	if way == "bare" {
		c = p
	}
	b.ReportAllocs()
	if err := http.ServeConn(c); err != nil {
		b.Fatal(err)
	}
}

// TestFastPathAllocatesNothing but once a second, for the Date of the answers.
func TestFastPathAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	s := newSite(t, nil)
	for _, options := range []string{"", "&key=k&token=t-" + pipeID} {
		p := newPipe(16, options)
		p.left = 1
		c := &conn{Conn: p, raw: p, owner: s.ln}
		if err := s.http.ServeConn(c); err != nil || len(c.tail.bytes) == 0 {
			t.Fatalf("%v, tail %q", err, c.tail.bytes)
		}
		requests := bytes.Clone(p.requests)
		least := 1e9
		for range 5 { // a second may begin in some
			least = min(least, testing.AllocsPerRun(200, func() {
				if rest, like, err := s.ln.fast.serve(c, requests); len(rest) > 0 || like != begun || err != nil {
					t.Fatal(string(rest), like, err)
				}
			}))
		}
		if least != 0 {
			t.Errorf("a read of 16 requests with %q allocates %v times, want 0", options, least)
		}
	}
}

// TestFastPathAnswersLookLikeFasthttps: byte by byte, but for the second.
func TestFastPathAnswersLookLikeFasthttps(t *testing.T) {
	s := newSite(t, nil)
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	r := bufio.NewReader(c)
	head := func(id string) string {
		io.WriteString(c, get("id="+id))
		var b strings.Builder
		resp, err := http.ReadResponse(bufio.NewReader(io.TeeReader(r, &b)), nil)
		if err != nil {
			t.Fatal(err)
		}
		if date, err := http.ParseTime(resp.Header.Get("Date")); err != nil || time.Since(date).Abs() > patience {
			t.Errorf("Date %q, %v", resp.Header.Get("Date"), err)
		}
		return dateLine.ReplaceAllString(b.String(), "Date: x\r\n")
	}
	first, second := head("1"), head("2")
	if first != second || !strings.Contains(first, "Date: x") || !strings.HasSuffix(first, "\r\n\r\nok") {
		t.Errorf("fasthttp answers %q, the fast path %q", first, second)
	}
}
