package server

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// httpCase is a row of testdata/http_cases.tsv.
type httpCase struct {
	name, raw       string
	opaque, uint64s string // what is expected, in words
}

// httpCases reads the rows. A request that the file shortens in its middle is
// made from its description here, and must be the one that was shortened.
func httpCases(t testing.TB) (rows []httpCase) {
	t.Helper()
	file, err := os.ReadFile("testdata/http_cases.tsv")
	if err != nil {
		t.Fatal(err)
	}
	a := strings.Repeat
	const headers = "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\n"
	long := map[string]string{
		"257-byte id":              get("id=" + a("a", 257)),
		"256 bytes after decoding": get("id=" + a("%61", 256)),
		"8 KiB query":              get("id=" + a("a", 8192)),
		"10 MiB query":             get("id=" + a("a", 10<<20)),
		"giant header 64 KiB":      headers + "X: " + a("b", 1<<16) + "\r\n\r\n",
		"header flood 5000 lines":  headers + a("A: b\r\n", 5000) + "\r\n",
		"5 MB of blank lines":      a("\r\n", 2<<20),
	}
	shortened := regexp.MustCompile(`^"(.*)…\((\d+) bytes\)…(.*)"$`)
	for line := range strings.Lines(string(file)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(f) < 4 {
			t.Fatalf("row %q", line)
		}
		if f[0] == "case" {
			continue
		}
		row := httpCase{name: f[0], opaque: f[2], uint64s: f[3]}
		if m := shortened.FindStringSubmatch(f[1]); m != nil {
			row.raw = long[row.name]
			quoted := strconv.QuoteToASCII(row.raw)
			if strconv.Itoa(len(row.raw)) != m[2] || !strings.HasPrefix(quoted, `"`+m[1]) || !strings.HasSuffix(quoted, m[3]+`"`) {
				t.Fatalf("%s: %d bytes are not the %s of the row", row.name, len(row.raw), m[2])
			}
		} else if strings.HasPrefix(f[1], `"`) {
			if row.raw, err = strconv.Unquote(f[1]); err != nil {
				t.Fatalf("%s: %v", row.name, err)
			}
		}
		rows = append(rows, row)
	}
	return rows
}

// TestEveryHTTPCase sends each row over TCP in both id formats: in one piece, and split at
// random places. The test wants one of the choices that the row leaves. The probe that
// converse sends afterwards shows whether an earlier answer belongs to its request.
func TestEveryHTTPCase(t *testing.T) {
	t.Parallel()
	// The statuses in their order; alternatives after "|", "close" at the end.
	// After ";" what uint64 wants, if it is not the same.
	want := map[string]string{
		"empty query": "400", "id without =": "400", "id twice different": "400", "id key percent-encoded": "200",
		"id + encoded key twin": "400", "unknown params": "200", "percent NUL": "400", "percent NUL only": "400", "percent CRLF": "400",
		"percent DEL/ESC": "400", "bad percent truncated %": "400", "overlong UTF-8": "400", "leading plus number": "400",
		"encoded +42": "200;400", "2^63-1": "200", "2^64-1": "200", "hex": "200;400", "underscore digits": "200;400", "arabic-indic digits": "200;400",
		"unicode NFD e-acute": "200;400", "raw UTF-8 in target": "400", "257-byte id": "400", "256 bytes after decoding": "200;400",
		"8 KiB query": "431 close", "10 MiB query": "431 close", "semicolon separator": "400", "ampersand run": "200", "equals in value": "200;400",
		"fragment in target": "400", "second question mark": "200;400", "tab in target": "400 close", "trailing slash": "404", "dot segments": "404",
		"upper-case path": "404", "path params": "404", "root": "404", "POST accept": "200", "POST batch": "200", "POST batch of no known type": "415 close", "POST batch broken": "400 close",
		"POST batch empty": "400", "HTTP/2.0 request line": "505 close", "absolute-form": "200", "OPTIONS": "405", "OPTIONS *": "404", "TRACE": "405",
		"CONNECT": "404", "lower-case method": "405", "unknown method": "405", "HTTP/0.9": "400 close", "HTTP/1.9": "505 close",
		"TLS hello to plain port": "400 close|408 close", "no Host 1.1": "400 close", "bad Host": "400 close", "GET with CL body": "400 close",
		"CL plus sign": "400 close", "CL list 5,5": "400 close", "CL hex": "400 close", "CL overflow": "400 close", "CL twice differing": "400 close",
		"CL.TE": "400 close", "TE.CL": "400 close|408 close", "TE.TE obfuscated xchunked": "400 close", "TE space before colon": "400 close",
		"TE twice": "400 close", "TE list gzip, chunked": "400 close", "TE vertical tab": "400 close", "TE in HTTP/1.0": "400 close",
		"bad chunk size": "400 close", "chunk size overflow": "400 close", "chunk ext bare LF": "400 close",
		"obs-fold":            "400 close",
		"NUL in header value": "400 close", "header with no colon": "400 close", "empty header name": "400 close", "giant header 64 KiB": "431 close",
		"header flood 5000 lines": "431 close", "leading blank lines": "200", "5 MB of blank lines": "close", "Expect 100 no body": "200 close",
		"Expect unknown": "200", "pipelined 3": "200 200 200", "pipelined good+bad": "200 400 close", "pipelined + partial tail": "200 408 close",
		"Connection: close + pipelined": "200 close", "Upgrade h2c": "200", "Range header": "200", "gzip Accept": "200",
		"multipart POST /test bomb": "200", "GET /test": "405",
	}
	// Rows that are no requests have tests of their own.
	elsewhere := map[string]func(*testing.T){
		"slowloris header 10 B/s":                TestSlowAndIdleConnectionsAreEnded,
		"connect, send nothing":                  TestSlowAndIdleConnectionsAreEnded,
		"half-close after request":               TestHalfClosedRequestIsAnswered,
		"connection beyond Server.Concurrency":   TestConnectionsOverTheLimitGet503,
		"handler panic":                          TestPanicCostsOneRequestAndTheEpochIsStillSealed,
		"8 MiB of header in 1-byte TCP segments": TestHeaderByteByByteIsRefusedAtTheBuffersEnd,
	}
	status := regexp.MustCompile(`\b[1-5]\d\d\b`)
	rows := httpCases(t)
	if len(rows) != len(want)+len(elsewhere) {
		t.Errorf("%d rows, %d known", len(rows), len(want)+len(elsewhere))
	}
	for _, row := range rows {
		if test := elsewhere[row.name]; test != nil {
			t.Run(row.name, test)
			continue
		}
		both, ok := want[row.name]
		if !ok {
			t.Errorf("%s: an unknown row", row.name)
			continue
		}
		opaque, uint64s, two := strings.Cut(both, ";")
		if !two {
			uint64s = opaque
		}
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			for format, want := range map[string]string{"opaque": opaque, "uint64": uint64s} {
				// Ours is one of the row's choices. (The row that leaves a choice
				// does not repeat it for the other format.)
				allowed := status.FindAllString(row.opaque+" "+row.uint64s, -1)
				for _, s := range status.FindAllString(want, -1) {
					if !slices.Contains(allowed, s) && !strings.Contains(row.opaque, "close") {
						t.Errorf("%s: %s is not among %q", format, s, allowed)
					}
				}
				s := newSite(t, func(cfg *Config) {
					cfg.Uint64IDs = format == "uint64"
					cfg.SlowTimeout = slowTimeoutFor(want)
				})
				for round := range 4 {
					if got := s.converse(row.raw, want, round > 0); !oneOf(got, want) {
						t.Errorf("%s, round %d: got %q, want %q", format, round, got, want)
					}
				}
			}
		})
	}
}

// TestEveryFormOfARequestIsUnderstoodOrRefused sends the rows of probe_cases.tsv: what
// a conformance suite tries, legal spellings of a header or a target, and queries
// with other parameters. Each is a name, the bytes and the answers.
func TestEveryFormOfARequestIsUnderstoodOrRefused(t *testing.T) {
	t.Parallel()
	file, err := os.ReadFile("testdata/probe_cases.tsv")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(file)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(f) != 3 {
			t.Fatalf("row %q", line)
		}
		raw, err := strconv.Unquote(f[1])
		if err != nil {
			t.Fatalf("%s: %v", f[0], err)
		}
		t.Run(f[0], func(t *testing.T) {
			t.Parallel()
			for _, split := range []bool{false, true} {
				s := newSite(t, func(cfg *Config) { cfg.SlowTimeout = slowTimeoutFor(f[2]) })
				if got := s.converse(raw, f[2], split); got != f[2] {
					t.Errorf("split %v: got %q, want %q", split, got, f[2])
				}
			}
		})
	}
}

// TestPrefaceOfHTTP2BehindARequestIsBad, in whatever pieces the two come: HTTP/2 begins a
// connection or is none.
func TestPrefaceOfHTTP2BehindARequestIsBad(t *testing.T) {
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	for _, apart := range []bool{false, true} {
		for _, fast := range []bool{false, true} {
			c, r := newSite(t, func(cfg *Config) { cfg.noFastPath = !fast }).dial()
			first, second := get("id=1")+get("id=2")+preface, ""
			if apart {
				first, second = get("id=1")+get("id=2"), preface
			}
			for i, want := range []int{200, 200, 400} {
				if text := map[int]string{0: first, 2: second}[i]; text != "" {
					if _, err := io.WriteString(c, text); err != nil {
						t.Fatal(err)
					}
				}
				if resp, _, err := answer(r); err != nil || resp.StatusCode != want {
					t.Errorf("apart %t, fast %t: answer %d is %v, %v; want %d", apart, fast, i, resp, err, want)
					break
				}
			}
		}
	}
}

// TestHostIsCheckedInEveryFormOfTarget, also where the target has a host of its own (RFC 9112,
// section 3.2): what is refused in one form is in the other.
func TestHostIsCheckedInEveryFormOfTarget(t *testing.T) {
	s := newSite(t, nil)
	for host, good := range map[string]bool{
		"x": true, "x:": true, "x:80": true, "a.b-c_d:8080": true, "[::1]": true, "[::1]:80": true, "[::ffff:1.2.3.4]": true,
		"": false, "x:8a": false, "x:-1": false, "x:80:80": false, "::1": false, "[::1": false, "::1]": false, "[::1]80": false, "[::1]:8a": false,
		"[zz]": false, "[]": false, "a[b]": false, "u@h": false, "x/y": false, "x y": false, "x\xe9": false, "x%2": false,
	} {
		want := map[bool]string{true: "200 404", false: "400"}[good] // which closes
		for i, target := range []string{"", "http://h", "HTTPS://[::1]:443"} {
			raw := fmt.Sprintf("GET %s%s?id=%d-%x HTTP/1.1\r\nHost: %s\r\n\r\n", target, acceptPath, i, host, host)
			if got := s.statuses(raw+"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n", 0); got != want {
				t.Errorf("Host %q, target %q: got %s, want %s", host, target, got, want)
			}
		}
	}
}

// TestHeaderByteByByteIsRefusedAtTheBuffersEnd: nothing more is read than fits
// the buffer, and the time of the server, which looks at what it has with each
// byte, goes with the square of that and no more.
func TestHeaderByteByByteIsRefusedAtTheBuffersEnd(t *testing.T) {
	s := newSite(t, nil)
	c, r := s.dial()
	go func() {
		header := []byte("GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nX: ")
		for i := range 8 << 20 {
			b := []byte{'b'}
			if i < len(header) {
				b[0] = header[i]
			}
			if _, err := c.Write(b); err != nil {
				return // closed
			}
		}
		t.Error("8 MiB of header were taken")
	}()
	resp, body, err := answer(r)
	if err != nil || resp.StatusCode != 431 || body != "failed" || !resp.Close {
		t.Fatalf("got %v %q, %v", resp, body, err)
	}
	if n := s.cfg.Counter.Stats().Unique; n != 0 {
		t.Errorf("%d ids counted", n)
	}
}

// TestOversizedRequestsAreNotBuffered: what does not fit is refused while it
// comes, at the price of a buffer.
func TestOversizedRequestsAreNotBuffered(t *testing.T) {
	s := newSite(t, func(c *Config) { c.SlowTimeout = time.Second })
	s.ask(get("id=1")) // the first request pays for what all use
	const size = 16 << 20
	for name, text := range map[string]string{
		"query":        get("id=" + strings.Repeat("a", size)),
		"blank lines":  strings.Repeat("\r\n", size/2),
		"header":       "GET / HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("b", size) + "\r\n\r\n",
		"header lines": "GET / HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("A: b\r\n", size/6) + "\r\n",
		"method":       strings.Repeat("A", size),
		"body":         fmt.Sprintf("POST /test HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", size, strings.Repeat("x", size)),
		"chunk":        fmt.Sprintf("POST /test HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s", size, strings.Repeat("x", size)),
		"many chunks":  "POST /test HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("4\r\nxxxx\r\n", size/9),
		"extension":    "POST /test HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;" + strings.Repeat("x", size),
		"trailer":      "POST /test HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n0\r\n" + strings.Repeat("X: y\r\n", size/6),
	} {
		t.Run(name, func(t *testing.T) {
			raw := []byte(text)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			c, r := s.dial()
			go c.Write(raw) // refused before its end
			resp, _, err := answer(r)
			switch {
			case name == "blank lines": // closed without an answer: there is no request
				if err == nil {
					t.Errorf("got %v", resp)
				}
			case err != nil || resp.StatusCode/100 != 4 || !resp.Close:
				t.Errorf("got %v, %v, want a refusal", resp, err)
			}
			c.Close()
			runtime.ReadMemStats(&after)
			if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
				t.Errorf("%d bytes allocated for a request of %d", n, len(raw))
			}
		})
	}
	if resp, _ := s.ask(get("id=2")); resp.StatusCode != http.StatusOK {
		t.Errorf("after all that: got %d", resp.StatusCode)
	}
}
