package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"verve/server/callback"
)

var errNoRoute = errors.New("no route")

// newLonelySite is a site whose callbacks reach itself and nobody else, so that
// requests made by chance do not go out into the world.
func newLonelySite(t testing.TB, change func(*Config)) *site {
	return newSiteWith(t, change, func(c *callback.Config) {
		c.Rate = 1e6
		c.Resolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) { return nil, errNoRoute }}
		c.Connect = func(ctx context.Context, d *net.Dialer, addr string) (net.Conn, error) {
			if !strings.HasPrefix(addr, "127.0.0.1:") {
				return nil, errNoRoute
			}
			return d.DialContext(ctx, "tcp", addr)
		}
	})
}

// requestSeeds are requests to begin with: the cases, the forms of smuggling,
// and one with each kind of endpoint.
func requestSeeds(t testing.TB, s *site) (seeds [][]byte) {
	for _, row := range httpCases(t) {
		if row.raw != "" && len(row.raw) < 4<<10 {
			seeds = append(seeds, []byte(row.raw))
		}
	}
	for _, raw := range smugglingForms() {
		seeds = append(seeds, []byte(raw))
	}
	endpoints, err := os.ReadFile("callback/testdata/ssrf_cases.tsv")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(endpoints)) {
		endpoint, _, _ := strings.Cut(line, "\t")
		seeds = append(seeds, []byte(get("id=1&endpoint="+url.QueryEscape(endpoint))))
	}
	for _, b := range [][3]string{
		{"text/plain", "", "1\n2\r\n\n3"}, {"", "gzip", compressed(t, "1\n2")}, {"application/json", "", `["1",2,{"id":"3","key":"k","token":"t"},null]`},
		{"application/x-ndjson", "", `{"id":"1"}` + "\n2\n"}, {"application/cloudevents-batch+json", "", `[{"specversion":"1.0","type":"t","source":"/a","id":"1"}]`},
		{"text/plain", "", strings.Repeat("12345\n", 2000)},
	} {
		raw := batchPost("", b[0], b[1], b[2])
		seeds = append(seeds, []byte(raw), []byte(strings.Replace(raw, "Host: x\r\n", "Host: x\r\nExpect: 100-continue\r\n", 1)))
	}
	seeds = append(seeds, []byte(chunkedBatch+"3\r\n1\n2\r\n2;x=y\r\n\n3\r\n0\r\nX: y\r\n\r\n"), []byte("POST "+acceptPath+"?id=1 HTTP/1.1\r\nHost: x\r\n\r\n"))
	seeds = append(seeds, []byte(get("id=1&key=k&token=t")), []byte(getWith("id=1", `Idempotency-Key: "t"`)), []byte(batchPost("?key=k&token=t", "", "", "1\n1\n")))
	return append(seeds, []byte(get("id=1&endpoint="+url.QueryEscape("http://"+s.addr+"/test"))))
}

var fragments = []string{
	"\r\n", "\n", "\r", "\r\n\r\n", "\x00", "\t", " ", "\x0b", "\xff", "\x80", ":", ";", "&", "=", "%", "%00", "%0d%0a", "%25", "+", "#", "?", "/", "//", "..",
	"GET ", "POST ", "HEAD ", "OPTIONS ", "get ", " HTTP/1.1", " HTTP/1.0", " HTTP/0.9", " HTTP/2.0", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	"/api/verve/accept?id=", "/test", "id=", "endpoint=", "&id=2", "&endpoint=http%3A%2F%2Fhooks.example.com%2F", "http://x",
	"Host: x\r\n", "Host:", "Content-Length: 5\r\n", "Content-Length: 0\r\n", "Content-Length: 65536\r\n", "Content-Length: -1\r\n", "Transfer-Encoding: chunked\r\n",
	"Transfer-Encoding: identity\r\n", "Expect: 100-continue\r\n", "Connection: close\r\n", "Connection: keep-alive\r\n", "Verve-Callback: 1\r\n", "Idempotency-Key: t\r\n", "Idempotency-Key: \"t\"\r\n", "&key=k", "&token=t", "Trailer: X\r\n", " folded\r\n",
	"0\r\n\r\n", "5\r\nhello\r\n", "ffffffffffffffff\r\n", "1;x=y\r\n", "18446744073709551615", "18446744073709551616", "99999999999999999999", "-0", "+1", "0x10",
	"Content-Type: application/json\r\n", "Content-Encoding: gzip\r\n", "Content-Type: application/x-ndjson\r\n", `["1",`, `{"id":"`, `"]`,
	"3f333df6-90a4-4fda-8dd3-9485d27cee36",
}

// mutate changes a request in a few places.
func mutate(r *rand.Rand, raw []byte, seeds [][]byte) []byte {
	out := bytes.Clone(raw)
	for range 1 + r.IntN(4) {
		if len(out) == 0 {
			return out
		}
		i := r.IntN(len(out))
		j := i + r.IntN(min(len(out)-i, 40)+1)
		switch r.IntN(10) {
		case 0:
			out[i] ^= 1 << r.IntN(8)
		case 1:
			out[i] = byte(r.IntN(256))
		case 2:
			out = append(out[:i], out[j:]...)
		case 3:
			out = append(out[:j], append(bytes.Clone(out[i:j]), out[j:]...)...)
		case 4, 5, 6:
			out = append(out[:i], append([]byte(fragments[r.IntN(len(fragments))]), out[i:]...)...)
		case 7:
			other := seeds[r.IntN(len(seeds))]
			out = append(out[:i], other[r.IntN(len(other)):]...)
		case 8:
			out = out[:i]
		case 9:
			out = bytes.Replace(out, []byte("\r\n"), []byte("\n"), 1+r.IntN(3))
		}
	}
	return out
}

// exchange sends raw in a few pieces, says that this was all, and returns what
// came until the server closed the connection.
func exchange(addr string, raw []byte, cut func(n int) int) ([]byte, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	for len(raw) > 0 {
		n := cut(len(raw))
		if _, err := c.Write(raw[:n]); err != nil {
			break // refused before its end
		}
		raw = raw[n:]
	}
	_ = c.(*net.TCPConn).CloseWrite() // may be closed already
	return io.ReadAll(c)
}

// countOK checks that got is a series of well-formed answers of the contract,
// and returns how many of them are ok.
func countOK(got []byte) (ok uint64, err error) {
	for len(got) > 0 {
		head, rest, whole := bytes.Cut(got, []byte("\r\n\r\n"))
		lines := strings.Split(string(head), "\r\n")
		if !whole || len(lines[0]) < len("HTTP/1.1 200 ") || !strings.HasPrefix(lines[0], "HTTP/1.1 ") {
			return ok, fmt.Errorf("not an answer: %.200q", got)
		}
		status := lines[0][9:12]
		header := map[string]string{}
		for _, line := range lines[1:] {
			k, v, found := strings.Cut(line, ": ")
			if _, twice := header[k]; !found || twice {
				return ok, fmt.Errorf("header %.100q in %.200q", line, head)
			}
			header[k] = v
		}
		body, contentType := "failed", "text/plain"
		switch status {
		case "100":
			got = rest
			continue
		case "200":
			length, err := strconv.Atoi(header["Content-Length"])
			if err != nil || length > len(rest) {
				return ok, fmt.Errorf("length: %.300q", head)
			}
			body, contentType = string(rest[:length]), header["Content-Type"]
			n, err := okIn(body, contentType)
			if err != nil {
				return ok, err
			}
			if header["Verve-Replayed"] == "" {
				ok += n
			}
		case "400", "404", "405", "408", "409", "413", "415", "431", "505":
		case "503":
			if header["Retry-After"] == "" {
				return ok, fmt.Errorf("503 without Retry-After: %.200q", head)
			}
		default:
			return ok, fmt.Errorf("status %s: %.200q", status, head)
		}
		if status == "405" && header["Allow"] == "" || header["Cache-Control"] != "no-store" || header["Content-Type"] != contentType || header["Content-Length"] != strconv.Itoa(len(body)) {
			return ok, fmt.Errorf("headers: %.300q", head)
		}
		var has bool
		if got, has = bytes.CutPrefix(rest, []byte(body)); !has {
			got = rest // an answer to HEAD: what follows must be an answer
		}
	}
	return ok, nil
}

// okIn returns how many ids the body of an answer says are new: of one request, or of
// a batch.
func okIn(body, contentType string) (n uint64, err error) {
	if contentType == "application/json" {
		var a struct {
			OK      uint64
			Results []string
		}
		if err := json.Unmarshal([]byte(body), &a); err != nil {
			return 0, fmt.Errorf("%w: %q", err, body)
		}
		for _, r := range a.Results {
			if r == "ok" {
				n++
			}
		}
		if n != a.OK {
			return 0, fmt.Errorf("%d results, ok %d", n, a.OK)
		}
		return n, nil
	}
	if body == "ok" {
		return 1, nil
	}
	for line := range strings.Lines(body) {
		switch line {
		case "ok\n":
			n++
		case "duplicate\n", "replayed\n", "bad-id\n", "bad-key\n", "bad-token\n", "full\n", "unavailable\n", "draining\n":
		default:
			return 0, fmt.Errorf("word %q", line)
		}
	}
	return n, nil
}

// TestMutatedRequests: whatever is sent, the server answers by the contract,
// closes the connection, keeps nothing of it, and what was counted was answered.
// VERVE_TEST_MUTATIONS sets how many requests, VERVE_TEST_SEED which.
func TestMutatedRequests(t *testing.T) {
	setting := func(name string, otherwise int) int {
		n, err := strconv.Atoi(os.Getenv(name))
		if err != nil {
			return otherwise
		}
		return n
	}
	mutations := int64(setting("VERVE_TEST_MUTATIONS", 20_000))
	seed := setting("VERVE_TEST_SEED", int(time.Now().UnixNano()))
	t.Logf("VERVE_TEST_SEED=%d", seed)
	s := newLonelySite(t, nil)
	seeds := requestSeeds(t, s)
	s.ask(get("id=warm"))
	descriptors, goroutines := openFiles(t), runtime.NumGoroutine()

	var sent atomic.Int64
	var told atomic.Uint64
	told.Store(1) // the first one
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(seed), uint64(w)))
			for !t.Failed() && sent.Load() < mutations {
				var raw []byte
				n := 1 + r.IntN(3)
				for range n {
					raw = append(raw, mutate(r, seeds[r.IntN(len(seeds))], seeds)...)
				}
				sent.Add(int64(n))
				got, err := exchange(s.addr, raw, func(n int) int {
					if r.IntN(3) > 0 {
						return n
					}
					return 1 + r.IntN(n)
				})
				if err != nil {
					t.Errorf("%q: %v after %q", raw, err, got)
					return
				}
				ok, err := countOK(got)
				if err != nil {
					t.Errorf("%q: %v", raw, err)
				}
				told.Add(ok)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	awaitCallbacks(t, s.cfg.Callbacks, func(st callback.Stats) bool { return st.Waiting+st.InFlight == 0 })
	counted := s.cfg.Counter.Stats().Unique + s.sunk.Load() - s.cfg.Callbacks.Stats().Ended[callback.Delivered]
	if told := told.Load(); counted != told {
		t.Errorf("%d counted, %d told ok", counted, told)
	}
	// Those who do not wait for an answer, or for anything.
	r := rand.New(rand.NewPCG(uint64(seed), 99))
	for range 500 {
		c, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write(mutate(r, seeds[r.IntN(len(seeds))], seeds))
		_ = c.(*net.TCPConn).SetLinger(0) // a reset
		_ = c.Close()
	}
	settled := func() bool {
		// One connection is idle in the pool of callbacks, with both ends here.
		return openFiles(t) <= descriptors+2 && runtime.NumGoroutine() <= goroutines+4
	}
	for start := time.Now(); !settled(); time.Sleep(10 * time.Millisecond) {
		if time.Since(start) > patience {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d descriptors and %d goroutines, %d and %d before:\n%.5000s", openFiles(t), runtime.NumGoroutine(), descriptors, goroutines, buf[:runtime.Stack(buf, true)])
		}
	}
	if n := s.refused[reasonPanic].Load(); n != 0 {
		t.Errorf("%d panics", n)
	}
	if resp, _ := s.ask(get("id=after")); resp.StatusCode != 200 {
		t.Errorf("after all that: got %v", resp)
	}
	t.Logf("%d requests, %d of them ok", sent.Load(), told.Load())
}

// openFiles counts the descriptors of this process.
func openFiles(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0 // not Linux: the goroutines tell, too
	}
	return len(entries)
}

// FuzzConnection is TestMutatedRequests with the fuzzer's idea of a mutation.
func FuzzConnection(f *testing.F) {
	s := newLonelySite(f, nil)
	for i, raw := range requestSeeds(f, s) {
		f.Add(raw, byte(i))
	}
	var told atomic.Uint64
	f.Fuzz(func(t *testing.T, raw []byte, split byte) {
		got, err := exchange(s.addr, raw, func(n int) int { return min(n, 1+int(split)) })
		if err != nil {
			t.Fatalf("%v after %q", err, got)
		}
		ok, err := countOK(got)
		if err != nil {
			t.Fatal(err)
		}
		told.Add(ok)
		if n := s.refused[reasonPanic].Load(); n != 0 {
			t.Fatalf("%d panics", n)
		}
		if st := s.cfg.Counter.Stats(); st.Unique+s.sunk.Load() < told.Load() {
			t.Fatalf("%d told ok, %d counted", told.Load(), st.Unique+s.sunk.Load())
		}
	})
}
