package server

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"verve/counter"
	"verve/dedup"
	"verve/internal/epochtest"
	"verve/internal/testproc"
	"verve/server/callback"
)

func TestMain(m *testing.M) {
	testproc.Setup()
	os.Exit(m.Run())
}

// published collects what the counter publishes.
type published struct {
	mu     sync.Mutex
	counts []counter.Count
}

func (p *published) Publish(_ context.Context, c counter.Count) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.counts = append(p.counts, c)
	return nil
}

func (p *published) sum() (n uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.counts {
		n += c.Unique
	}
	return n
}

// site is a server on loopback with what is behind it.
type site struct {
	*Server
	t       testing.TB
	addr    string
	records *published
	admin   atomic.Pointer[Admin] // gets the closed windows
	closed  chan error            // of the counter's Run
	done    chan error            // of Serve
	stopped bool
}

func newSite(t testing.TB, change func(*Config)) *site { return newSiteWith(t, change, nil) }

// newSiteWith is newSite with a change to the callbacks before they run.
func newSiteWith(t testing.TB, change func(*Config), calls func(*callback.Config)) *site {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	set, err := dedup.NewMemory(dedup.Config{Heap: true})
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, addr: ln.Addr().String(), records: &published{}, closed: make(chan error, 1), done: make(chan error, 1)}
	count, err := counter.New(counter.Config{Window: epochtest.Window, Store: set, Publisher: s.records,
		OnClose: func(c counter.Count, _ time.Duration, err error) {
			if a := s.admin.Load(); a != nil && err == nil {
				a.WindowClosed(c)
			}
		}})
	if err != nil {
		t.Fatal(err)
	}
	go func() { s.closed <- count.Run(context.Background()) }()
	cfg := Config{Counter: count, Set: set, Log: zerolog.Nop(), SlowTimeout: patience} // a busy machine is no slow client
	if change != nil {
		change(&cfg)
	}
	live := func() (time.Time, uint64) { return count.Last().Start(), count.Last().Unique() }
	callbackCfg := callback.Config{
		SelfAddr: netip.MustParseAddrPort(s.addr), SelfPath: SinkPath, Group: "verve", Instance: "test", Live: live, Log: zerolog.Nop(),
		Timeout: patience,
	}
	if cfg.TLS != nil {
		callbackCfg.SelfTLS = cfg.TLS.OwnConfig
	}
	if calls != nil {
		calls(&callbackCfg)
	}
	callbacks, err := callback.New(callbackCfg)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Callbacks = callbacks
	if s.Server, err = New(cfg, ln); err != nil {
		t.Fatal(err)
	}
	s.ln.steadyAfter = 1 // tests send few requests
	ctx, stop := context.WithCancel(context.Background())
	var sending sync.WaitGroup
	sending.Go(func() { callbacks.Run(ctx) })
	go func() { s.done <- s.Serve() }()
	t.Cleanup(func() {
		s.stop()
		stop()
		sending.Wait()
		set.Close()
	})
	return s
}

// patience is how long a test waits for what must happen, and longer than any of that
// takes on a busy machine; no assertion depends on how soon it does.
const patience = time.Minute

// seldomSlow is a limit that a test waits for, and that the requests beside it must keep:
// no machine is so busy that a client needs as long between two steps.
const seldomSlow = 5 * time.Second

func awaitCallbacks(t testing.TB, s *callback.Sender, done func(callback.Stats) bool) {
	t.Helper()
	for start := time.Now(); !done(s.Stats()); time.Sleep(time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("waited in vain for callbacks: %+v", s.Stats())
		}
	}
}

// stop goes the way main goes.
func (s *site) stop() {
	if s.stopped {
		return
	}
	s.stopped = true
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s.cfg.Counter.Seal()
	if err := s.Shutdown(ctx); err != nil {
		s.t.Error(err)
	}
	if err := <-s.closed; err != nil {
		s.t.Error(err)
	}
	if err := <-s.done; err != nil {
		s.t.Error(err)
	}
}

func (s *site) dial() (net.Conn, *bufio.Reader) {
	s.t.Helper()
	c, err := net.Dial("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience)) // a hang is a failure
	return c, bufio.NewReader(c)
}

// socketPair is a client of no site yet, and the other end, which a test serves by hand.
func socketPair(t testing.TB) (client net.Conn, r *bufio.Reader, there *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if client, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	client.SetDeadline(time.Now().Add(patience))
	nc, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return client, bufio.NewReader(client), nc.(*net.TCPConn)
}

// answer reads one response.
func answer(r *bufio.Reader) (*http.Response, string, error) {
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return nil, "", err
	}
	body, err := io.ReadAll(resp.Body)
	return resp, string(body), err
}

// ask sends one request on a connection of its own.
func (s *site) ask(raw string) (*http.Response, string) {
	s.t.Helper()
	c, r := s.dial()
	defer c.Close()
	if _, err := io.WriteString(c, raw); err != nil {
		s.t.Fatal(err)
	}
	resp, body, err := answer(r)
	if err != nil {
		s.t.Fatalf("%.100q: %v", raw, err)
	}
	return resp, body
}

func get(query string) string {
	return "GET /api/verve/accept?" + query + " HTTP/1.1\r\nHost: x\r\n\r\n"
}

// TestEachKindOfRequestIsAnsweredAsTheContractSays sends requests of each class
// over TCP, in one piece and split at random places. After an answer that keeps
// the connection the next request on it must be answered for itself: no byte
// of a request may be taken for the next one.
func TestEachKindOfRequestIsAnsweredAsTheContractSays(t *testing.T) {
	t.Parallel()
	const host = "Host: x\r\n\r\n"
	post := func(headers, body string) string {
		return "POST /test HTTP/1.1\r\nHost: x\r\n" + headers + "\r\n" + body
	}
	a := strings.Repeat
	// want is the statuses in their order, alternatives after "|"; "close" at
	// the end says that the connection must then be closed. An empty uint64 is
	// the same as opaque.
	for _, c := range []struct{ name, raw, want, uint64 string }{
		{"no query", "GET /api/verve/accept HTTP/1.1\r\n" + host, "400", ""},
		{"empty query", get(""), "400", ""},
		{"id without =", get("id"), "400", ""},
		{"empty id", get("id="), "400", ""},
		{"id twice", get("id=1&id=2"), "400", ""},
		{"id twice the same", get("id=1&id=1"), "400", ""},
		{"id key encoded", get("%69%64=7"), "200", ""},
		{"id and its encoded twin", get("id=1&%69d=2"), "400", ""},
		{"key with bad encoding", get("id=1&%zz=2"), "200", ""},
		{"unknown parameters", get("id=7&utm=1&x="), "200", ""},
		{"upper-case key", get("ID=7"), "400", ""},
		{"NUL", get("id=a%00b"), "400", ""},
		{"NUL only", get("id=%00"), "400", ""},
		{"CRLF", get("id=1%0d%0aX-Evil:1"), "400", ""},
		{"ESC", get("id=%1b%5b31m"), "400", ""},
		{"DEL", get("id=a%7f"), "400", ""},
		{"truncated %", get("id=abc%"), "400", ""},
		{"truncated %4", get("id=abc%4"), "400", ""},
		{"bad %zz", get("id=%zz"), "400", ""},
		{"percent-encoded once only", get("id=%2541"), "200", "400"},
		{"overlong UTF-8", get("id=%c0%af"), "400", ""},
		{"surrogate", get("id=%ed%a0%80"), "400", ""},
		{"lone continuation byte", get("id=a%80"), "400", ""},
		{"leading plus", get("id=+42"), "400", ""},
		{"trailing encoded space", get("id=42%20"), "400", ""},
		{"inner space", get("id=a+b"), "200", "400"},
		{"encoded plus", get("id=%2B42"), "200", "400"},
		{"leading zero", get("id=042"), "200", "400"},
		{"zero", get("id=0"), "200", ""},
		{"minus", get("id=-1"), "200", "400"},
		{"2^63-1", get("id=9223372036854775807"), "200", ""},
		{"2^64-1", get("id=18446744073709551615"), "200", ""},
		{"2^64", get("id=18446744073709551616"), "200", "400"},
		{"21 digits", get("id=184467440737095516150"), "200", "400"},
		{"hexadecimal", get("id=0x10"), "200", "400"},
		{"underscore", get("id=1_000"), "200", "400"},
		{"exponent", get("id=1e3"), "200", "400"},
		{"Arabic digits", get("id=%D9%A1%D9%A2"), "200", "400"},
		{"decomposed letter", get("id=e%CC%81"), "200", "400"},
		{"raw UTF-8", get("id=\u00e9"), "400", ""},
		{"257 bytes", get("id=" + a("a", 257)), "400", ""},
		{"256 bytes", get("id=" + a("a", 256)), "200", "400"},
		{"256 bytes after decoding", get("id=" + a("%61", 256)), "200", "400"},
		{"257 bytes after decoding", get("id=" + a("%61", 257)), "400", ""},
		{"8 KiB query", get("id=" + a("a", 8192)), "431 close|414 close", ""},
		{"1 MiB query", get("id=" + a("a", 1<<20)), "431 close|414 close", ""},
		{"semicolon", get("id=1;id=2"), "400", ""},
		{"ampersands", get("&&&id=1&&"), "200", ""},
		{"= in value", get("id=a=b"), "200", "400"},
		{"fragment", get("id=1#frag"), "400", ""},
		{"second question mark", get("id=1?x=2"), "200", "400"},
		{"tab in target", get("id=1\t2"), "400 close|400", ""},
		{"trailing slash", "GET /api/verve/accept/?id=1 HTTP/1.1\r\n" + host, "404", ""},
		{"double slashes", "GET //api//verve//accept?id=1 HTTP/1.1\r\n" + host, "404", ""},
		{"dot segments", "GET /api/x/../verve/accept?id=1 HTTP/1.1\r\n" + host, "404", ""},
		{"encoded slash", "GET /api%2Fverve/accept?id=1 HTTP/1.1\r\n" + host, "404", ""},
		{"upper-case path", "GET /API/VERVE/ACCEPT?id=1 HTTP/1.1\r\n" + host, "404", ""},
		{"path parameters", "GET /api/verve/accept;jsessionid=1?id=1 HTTP/1.1\r\n" + host, "404", ""},
		{"root", "GET / HTTP/1.1\r\n" + host, "404", ""},
		{"PUT accept", "PUT /api/verve/accept?id=1 HTTP/1.1\r\nContent-Length: 0\r\n" + host, "405", ""},
		{"OPTIONS", "OPTIONS /api/verve/accept HTTP/1.1\r\n" + host, "405", ""},
		{"OPTIONS *", "OPTIONS * HTTP/1.1\r\n" + host, "404", ""},
		{"TRACE", "TRACE /api/verve/accept?id=1 HTTP/1.1\r\n" + host, "405", ""},
		{"CONNECT", "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n", "404", ""},
		{"lower-case method", "get /api/verve/accept?id=1 HTTP/1.1\r\n" + host, "405", ""},
		{"unknown method", "BREW /api/verve/accept?id=1 HTTP/1.1\r\n" + host, "405", ""},
		{"HTTP/0.9", "GET /api/verve/accept?id=1\r\n\r\n", "400 close", ""},
		{"HTTP/1.0", "GET /api/verve/accept?id=1 HTTP/1.0\r\n\r\n", "200 close", ""},
		{"TLS hello", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "408 close|400 close", ""},
		{"no Host", "GET /api/verve/accept?id=1 HTTP/1.1\r\n\r\n", "400 close", ""},
		{"two Hosts", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", "400 close", ""},
		{"bad Host", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: a b/c\r\n\r\n", "400 close", ""},
		{"GET with a body", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello" + get("id=2"), "400 close", ""},
		{"GET with chunks", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400 close", ""},
		{"GET with an empty body", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", "200", ""},
		{"body with a large length", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n\r\n" + a("x", 70000), "400 close", ""},
		{"body with a larger length than any", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 70000000\r\n\r\n" + a("x", 70000), "413 close", ""},
		{"length with a sign", post("Content-Length: +5\r\n", "hello"), "400 close", ""},
		{"length list", post("Content-Length: 5,5\r\n", "hello"), "400 close", ""},
		{"length in hexadecimal", post("Content-Length: 0x5\r\n", "hello"), "400 close", ""},
		{"length overflow", post("Content-Length: 18446744073709551617\r\n", "hello"), "400 close|413 close", ""},
		{"lengths that differ", post("Content-Length: 5\r\nContent-Length: 6\r\n", "hello!"), "400 close", ""},
		{"length and chunks", post("Content-Length: 6\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\nGGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"), "400 close", ""},
		{"chunks and length", post("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", "5c\r\nGPOST / HTTP/1.1\r\nContent-Length: 15\r\n\r\nx=1\r\n0\r\n\r\n"), "400 close|408 close", ""},
		{"length and identity", post("Content-Length: 2\r\nTransfer-Encoding: identity\r\n", "hi"), "400 close", ""},
		{"xchunked", post("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n"), "400 close", ""},
		{"space before the colon", post("Transfer-Encoding : chunked\r\n", "0\r\n\r\n"), "400 close", ""},
		{"encoding twice", post("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", "0\r\n\r\n"), "400 close", ""},
		{"encoding list", post("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n"), "400 close", ""},
		{"encoding after a vertical tab", post("Transfer-Encoding:\vchunked\r\n", "0\r\n\r\n"), "400 close", ""},
		{"chunks in HTTP/1.0", "POST /test HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400 close", ""},
		{"bad chunk size", post("Transfer-Encoding: chunked\r\n", "zz\r\nhello\r\n0\r\n\r\n"), "400 close", ""},
		{"chunk size overflow", post("Transfer-Encoding: chunked\r\n", "ffffffffffffffff1\r\nhello\r\n0\r\n\r\n"), "400 close|413 close", ""},
		{"chunk extension with a bare LF", post("Transfer-Encoding: chunked\r\n", "5;a\nhello\r\n0\r\n\r\n"), "400 close", ""},
		{"chunks", post("Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n"), "200", ""},
		{"NUL in a header", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n", "400 close", ""},
		{"header with no colon", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nGarbage\r\n\r\n", "400 close", ""},
		{"empty header name", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\n: v\r\n\r\n", "400 close", ""},
		{"64 KiB header", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nX: " + a("b", 1<<16) + "\r\n\r\n", "431 close", ""},
		{"5000 headers", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\n" + a("A: b\r\n", 5000) + "\r\n", "431 close", ""},
		{"leading blank lines", "\r\n\r\n" + get("id=1"), "200", ""},
		{"Expect 100 without a body", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n", "200 close", ""},
		{"Expect 100 with a body", "POST /test HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi", "100 200", ""},
		{"unknown Expect", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nExpect: 200-ok\r\n\r\n", "200|417", ""},
		{"three pipelined", get("id=1") + get("id=2") + get("id=3"), "200 200 200", ""},
		{"good, bad, good", get("id=1") + "BAD\r\n\r\n" + get("id=3"), "200 400 close", ""},
		{"close, then more", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" + get("id=2"), "200 close", ""},
		{"half a second request", get("id=1") + "GET /api/verve/accept?id=2 HT", "200 408 close", ""},
		{"upgrade", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n", "200", ""},
		{"Range", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nRange: bytes=0-0\r\n\r\n", "200", ""},
		{"Accept-Encoding", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip, br\r\n\r\n", "200", ""},
		{"multipart that is none", post("Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 30\r\n", a("-", 30)), "200", ""},
		{"GET /test", "GET /test HTTP/1.1\r\n" + host, "405", ""},
		{"POST /test", post("Content-Length: 2\r\n", "{}"), "200", ""},
		{"64 KiB to /test", post("Content-Length: 65536\r\n", a("x", 1<<16)), "200", ""},
		{"more than 64 KiB to /test", post("Content-Length: 65537\r\n", a("x", 1<<16+1)), "413 close", ""},
		{"endpoint without scheme", get("id=1&endpoint=hooks.example.com"), "400", ""},
		{"endpoint on loopback", get("id=1&endpoint=http://127.0.0.1:9/"), "400", ""},
		{"endpoint twice", get("id=1&endpoint=http://a.example.com/&endpoint=http://a.example.com/"), "400", ""},
		{"endpoint empty", get("id=1&endpoint="), "400", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			for _, format := range []string{"opaque", "uint64"} {
				want := c.want
				if format == "uint64" && c.uint64 != "" {
					want = c.uint64
				}
				s := newSite(t, func(cfg *Config) {
					cfg.Uint64IDs = format == "uint64"
					cfg.SlowTimeout = slowTimeoutFor(want)
				})
				for round := range 3 {
					got := s.converse(c.raw, want, round > 0)
					if !oneOf(got, want) {
						t.Errorf("%s, round %d: got %q, want %q", format, round, got, want)
					}
				}
			}
		})
	}
}

// slowTimeoutFor is short where an answer to a slow request is wanted, and elsewhere so
// long that no busy machine makes a request slow.
func slowTimeoutFor(want string) time.Duration {
	if strings.Contains(want, "408") {
		return time.Second
	}
	return patience
}

func oneOf(got, want string) bool {
	for alternative := range strings.SplitSeq(want, "|") {
		// In the second and third round the id is known already.
		if got == alternative || strings.ReplaceAll(got, "409", "200") == alternative {
			return true
		}
	}
	return false
}

// converse sends raw and returns the statuses that came, and whether the
// connection was closed then. Where want does not end in close, it asks on the
// same connection for an id of its own and must get its answer.
func (s *site) converse(raw, want string, split bool) string {
	s.t.Helper()
	c, r := s.dial()
	defer c.Close()
	go func() {
		for split && len(raw) > 0 && len(raw) < 1<<14 {
			n := 1 + rand.IntN(len(raw))
			if _, err := io.WriteString(c, raw[:n]); err != nil {
				return // refused before its end
			}
			raw = raw[n:]
		}
		_, _ = io.WriteString(c, raw) // may be refused before its end
	}()
	var got []string
	for range strings.Count(strings.Split(want, "|")[0]+" ", " ") {
		resp, body, err := answer(r)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return strings.Join(append(got, "close"), " ")
			}
			return strings.Join(append(got, err.Error()), " ")
		}
		got = append(got, fmt.Sprint(resp.StatusCode))
		if resp.StatusCode == http.StatusContinue {
			continue
		}
		wantBody := "failed"
		if resp.StatusCode == 200 {
			wantBody = "ok"
			if lines := strings.Fields(body); len(lines) > 1 { // of a batch
				wantBody = strings.Join(lines, "\n") + "\n"
			}
		}
		if body != wantBody || resp.Header.Get("Content-Type") != "text/plain" {
			s.t.Errorf("status %d with body %q, type %q", resp.StatusCode, body, resp.Header.Get("Content-Type"))
		}
		if strings.HasSuffix(want, "close") && resp.Close {
			break
		}
	}
	if strings.Contains(want, "close") {
		if b, err := r.ReadByte(); err != nil {
			return strings.Join(append(got, "close"), " ")
		} else {
			return strings.Join(append(got, fmt.Sprintf("then %q", b)), " ")
		}
	}
	probe := fmt.Sprint(rand.Uint64())
	if _, err := io.WriteString(c, get("id="+probe)); err != nil {
		return strings.Join(append(got, err.Error()), " ")
	}
	if resp, _, err := answer(r); err != nil || resp.StatusCode != 200 {
		return strings.Join(append(got, "out of step"), " ")
	}
	return strings.Join(got, " ")
}

func TestRefusalsSayWhy(t *testing.T) {
	s := newSite(t, nil)
	if resp, _ := s.ask(get("id=seen")); resp.StatusCode != 200 || resp.Header.Get("Verve-Reason") != "" {
		t.Fatalf("got %v", resp)
	}
	for _, c := range []struct {
		raw    string
		status int
		header map[string]string
	}{
		{get("id=seen"), 409, map[string]string{"Verve-Reason": "duplicate"}},
		{get("id="), 400, map[string]string{"Verve-Reason": "bad-id"}},
		{get("id=1&endpoint=x"), 400, map[string]string{"Verve-Reason": "bad-endpoint"}},
		{"HEAD /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405, map[string]string{"Verve-Reason": "method", "Allow": "GET, POST"}},
		{"PUT /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 405, map[string]string{"Verve-Reason": "method", "Allow": "GET, POST"}},
		{"GET /test HTTP/1.1\r\nHost: x\r\n\r\n", 405, map[string]string{"Verve-Reason": "method", "Allow": "POST"}},
		{"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n", 404, map[string]string{"Verve-Reason": "not-found"}},
		{"GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", 400, map[string]string{"Verve-Reason": "bad-request"}},
	} {
		c2, r := s.dial()
		io.WriteString(c2, c.raw)
		resp, err := http.ReadResponse(r, &http.Request{Method: strings.Fields(c.raw)[0]})
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != c.status {
			t.Errorf("%q: got %d, want %d", c.raw, resp.StatusCode, c.status)
		}
		for k, v := range c.header {
			if got := resp.Header.Get(k); got != v {
				t.Errorf("%q: %s is %q, want %q", c.raw, k, got, v)
			}
		}
	}
	s.cfg.Counter.Seal()
	resp, _ := s.ask(get("id=late"))
	if resp.StatusCode != 503 || resp.Header.Get("Verve-Reason") != "draining" || resp.Header.Get("Retry-After") != "1" || !resp.Close {
		t.Errorf("while stopping: got %v", resp)
	}
}

func TestRefusedRequestsCountNothing(t *testing.T) {
	s := newSite(t, nil)
	for _, q := range []string{"id=", "id=a&id=b", "id=c%zz", "id=d&endpoint=ftp://x.example.com/", "id=e&endpoint="} {
		if resp, _ := s.ask(get(q)); resp.StatusCode != 400 {
			t.Errorf("%q: got %d", q, resp.StatusCode)
		}
	}
	for _, id := range []string{"a", "c", "d", "e"} {
		if resp, _ := s.ask(get("id=" + id)); resp.StatusCode != 200 {
			t.Errorf("id %q: got %d, want 200: an earlier refusal has counted it", id, resp.StatusCode)
		}
	}
	s.stop()
	if got := s.records.sum(); got != 4 {
		t.Errorf("records say %d, want 4", got)
	}
}

func TestWindowHeaderNamesTheWindowOfTheAnswer(t *testing.T) {
	s := newSite(t, func(c *Config) { c.WindowHeader = true })
	want := s.cfg.Counter.Last().Start().Format(time.RFC3339)
	for _, status := range []int{200, 409} {
		resp, _ := s.ask(get("id=1"))
		if got := resp.Header.Get("Verve-Window"); got != want || resp.StatusCode != status {
			t.Errorf("got %d in window %q, want %d in %q", resp.StatusCode, got, status, want)
		}
	}
}

func TestDuplicateStatusCanBeSet(t *testing.T) {
	s := newSite(t, func(c *Config) { c.DuplicateStatus = 200 })
	s.ask(get("id=1"))
	if resp, body := s.ask(get("id=1")); resp.StatusCode != 200 || body != "failed" || resp.Header.Get("Verve-Reason") != "duplicate" {
		t.Errorf("got %d %q %v", resp.StatusCode, body, resp.Header)
	}
}

// TestAcceptPostsTheCountToTheEndpoint is the demonstration of the README: this
// server's own /test receives the callback.
func TestAcceptPostsTheCountToTheEndpoint(t *testing.T) {
	s := newSite(t, nil)
	resp, _ := s.ask(get("id=1&endpoint=http%3A%2F%2F" + s.addr + "%2Ftest"))
	if resp.StatusCode != 200 {
		t.Fatalf("got %d", resp.StatusCode)
	}
	s.ask(get("id=1&endpoint=http%3A%2F%2F" + s.addr + "%2Ftest")) // a repeat: no callback
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if dropped := s.cfg.Callbacks.Drain(ctx); dropped != 0 {
		t.Errorf("%d dropped", dropped)
	}
	if got := s.sunk.Load(); got != 1 {
		t.Errorf("/test received %d POSTs, want 1", got)
	}
}

// TestLoopOverTwoServersEndsAtDepthOne: a callback that names the accept of a
// server, with a callback back in it, is a POST with an id and a
// body, which is refused; and what bears the mark of a callback starts none.
func TestLoopOverTwoServersEndsAtDepthOne(t *testing.T) {
	b := newSite(t, nil)
	a := newSiteWith(t, nil, func(c *callback.Config) { c.Allow = []string{b.addr, c.SelfAddr.String()} })
	back := "http://" + a.addr + "/api/verve/accept?id=2&endpoint=" + url.QueryEscape("http://"+b.addr+"/api/verve/accept?id=3")
	resp, _ := a.ask(get("id=1&endpoint=" + url.QueryEscape("http://"+b.addr+"/api/verve/accept?id=1&endpoint="+url.QueryEscape(back))))
	if resp.StatusCode != 200 {
		t.Fatalf("got %v", resp)
	}
	awaitCallbacks(t, a.cfg.Callbacks, func(s callback.Stats) bool { return s.Ended[callback.FailedStatus] == 1 })
	if n := b.refused[reasonBadRequest].Load() + b.refused[reasonBadEndpoint].Load(); n != 1 {
		t.Errorf("the other server refused %d POSTs, want 1", n)
	}
	if s := b.cfg.Callbacks.Stats(); s.Reserved+s.InFlight != 0 || s.Ended[callback.Delivered]+s.Ended[callback.FailedConnect]+s.Ended[callback.FailedRefused]+s.Ended[callback.FailedStatus] != 0 {
		t.Errorf("the other server started callbacks: %+v", s)
	}
	if a.cfg.Counter.Stats().Unique != 1 || b.cfg.Counter.Stats().Unique != 0 {
		t.Error("a callback has counted an id")
	}
	// Its own accept is not even dialled, by whatever name.
	self := "http://" + a.addr + "/api/verve/accept?id=9"
	if resp, _ := a.ask(get("id=4&endpoint=" + url.QueryEscape(self))); resp.StatusCode != 200 {
		t.Fatalf("got %v", resp)
	}
	awaitCallbacks(t, a.cfg.Callbacks, func(s callback.Stats) bool { return s.Ended[callback.FailedRefused] == 1 })
}

// TestCallbacksDoNotStartCallbacks: a loop over two servers ends at depth one.
func TestCallbacksDoNotStartCallbacks(t *testing.T) {
	s := newSite(t, nil)
	resp, _ := s.ask("GET /api/verve/accept?id=1&endpoint=http%3A%2F%2F" + s.addr + "%2Ftest HTTP/1.1\r\nHost: x\r\nVerve-Callback: 1\r\n\r\n")
	if resp.StatusCode != 200 {
		t.Fatalf("got %d", resp.StatusCode)
	}
	if st := s.cfg.Callbacks.Stats(); st.Waiting+st.InFlight+int(st.Ended[callback.Delivered]) != 0 {
		t.Errorf("a callback was started: %+v", st)
	}
}

// panicky is a Set that fails the hard way for one id.
type panicky struct{ dedup.Set }

func (p panicky) AddMany(e *counter.Epoch, items []dedup.Item, verdicts []dedup.Verdict) error {
	switch string(items[0].ID) {
	case "panic":
		panic("a bug in the set")
	case "error":
		verdicts[0] = dedup.Unavailable
		return errors.New("out of reach")
	}
	return p.Set.AddMany(e, items, verdicts)
}

func TestPanicCostsOneRequestAndTheEpochIsStillSealed(t *testing.T) {
	s := newSite(t, func(c *Config) { c.Set = panicky{c.Set} })
	if resp, _ := s.ask(get("id=panic&endpoint=http://" + s.addr + "/test")); resp.StatusCode != 500 {
		t.Errorf("got %d", resp.StatusCode)
	}
	if st := s.cfg.Callbacks.Stats(); st.Reserved != 0 {
		t.Errorf("%d places for callbacks were not given back", st.Reserved)
	}
	if resp, body := s.ask(get("id=panic")); resp.StatusCode != 500 || body != "failed" || !resp.Close {
		t.Errorf("got %d %q", resp.StatusCode, body)
	}
	if resp, _ := s.ask(get("id=error")); resp.StatusCode != 503 || resp.Header.Get("Verve-Reason") != "unavailable" {
		t.Errorf("got %d %v", resp.StatusCode, resp.Header)
	}
	if resp, _ := s.ask(get("id=1")); resp.StatusCode != 200 {
		t.Errorf("after a panic: got %d", resp.StatusCode)
	}
	s.stop() // hangs if an entry was not left
	if got := s.records.sum(); got != 1 {
		t.Errorf("records say %d, want 1", got)
	}
}

// TestStopAnswersWhatItCounted stops servers under pipelined load: the records have
// exactly the answers that the clients got.
func TestStopAnswersWhatItCounted(t *testing.T) {
	t.Parallel()
	const clients, depth = 8, 16
	for round := range 10 {
		s := newSite(t, nil)
		var ok [clients]uint64
		var loading, started sync.WaitGroup
		started.Add(clients)
		for i := range clients {
			c, r := s.dial()
			loading.Go(func() {
				first := true
				for n := 0; ; n++ {
					var batch bytes.Buffer
					for d := range depth {
						batch.WriteString(get(fmt.Sprintf("id=%d-%d-%d", i, n, d)))
					}
					if _, err := c.Write(batch.Bytes()); err != nil {
						return
					}
					for range depth {
						resp, body, err := answer(r)
						if err != nil {
							return
						}
						if resp.StatusCode == 200 && body == "ok" {
							ok[i]++
						}
						if first {
							first = false
							started.Done()
						}
						if resp.Close {
							return
						}
					}
				}
			})
		}
		started.Wait()
		s.stop()
		loading.Wait()
		var answered uint64
		for _, n := range ok {
			answered += n
		}
		if got := s.records.sum(); got != answered {
			t.Fatalf("round %d: records say %d, clients were told %d", round, got, answered)
		}
	}
}

func TestSlowAndIdleConnectionsAreEnded(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) {
		c.SlowTimeout, c.IdleTimeout = seldomSlow, seldomSlow
	})
	ended := func(name string, r *bufio.Reader, want string) {
		t.Helper()
		b, err := io.ReadAll(r) // until the server closes; the deadline of dial bounds it
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !strings.HasPrefix(string(b), want) || want == "" && len(b) > 0 {
			t.Errorf("%s: got %q, want %q...", name, b, want)
		}
	}
	_, silent := s.dial()
	dripping, slow := s.dial()
	drip := make(chan struct{})
	go func() {
		defer close(drip)
		for _, b := range []byte(strings.Repeat("GET ", 5000)) {
			if _, err := dripping.Write([]byte{b}); err != nil {
				return
			}
			time.Sleep(20 * time.Millisecond) // the slowness under test
		}
	}()
	used, idle := s.dial()
	io.WriteString(used, get("id=1"))
	if _, _, err := answer(idle); err != nil {
		t.Fatal(err)
	}
	// Side by side: what a client has not read yet is lost if it goes on sending to a
	// connection that the server has closed for good.
	var both sync.WaitGroup
	both.Go(func() { ended("silent", silent, "HTTP/1.1 408") })
	both.Go(func() { ended("dripping", slow, "HTTP/1.1 408") })
	both.Wait()
	<-drip
	ended("idle", idle, "")
	if n := s.cfg.Counter.Stats().Unique; n != 1 {
		t.Errorf("%d ids counted, want 1", n)
	}
	if s.ln.slowClosed.Load() != 2 || s.ln.idleClosed.Load() != 1 {
		t.Errorf("ended %d slow and %d idle, want 2 and 1", s.ln.slowClosed.Load(), s.ln.idleClosed.Load())
	}
}

// TestClientThatDoesNotReadIsEnded fills the answer's way until the server
// cannot write, and must lose the connection.
func TestClientThatDoesNotReadIsEnded(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.SlowTimeout = 300 * time.Millisecond })
	c, _ := s.dial()
	c.(*net.TCPConn).SetReadBuffer(4096)
	batch := []byte(strings.Repeat(get("id="), 1000))
	for {
		if _, err := c.Write(batch); err != nil {
			break // reset by the server, or the deadline of dial
		}
	}
	if s.ln.slowClosed.Load() != 1 {
		t.Error("the connection was not ended by the server")
	}
}

func TestConnectionsOverTheLimitGet503(t *testing.T) {
	s := newSite(t, func(c *Config) { c.MaxConns = 2 })
	var held []net.Conn
	for i := range 2 {
		c, r := s.dial()
		io.WriteString(c, get(fmt.Sprint("id=", i)))
		if resp, _, err := answer(r); err != nil || resp.StatusCode != 200 {
			t.Fatalf("got %v, %v", resp, err)
		}
		held = append(held, c)
	}
	resp, body := s.ask("")
	if resp.StatusCode != 503 || body != "failed" || resp.Header.Get("Retry-After") == "" || !resp.Close {
		t.Errorf("got %v %q", resp, body)
	}
	held[0].Close()
	eventually(t, "room after a connection was closed", func() bool {
		c, r := s.dial()
		defer c.Close()
		io.WriteString(c, get("id=again"))
		resp, _, err := answer(r)
		return err == nil && resp.StatusCode != 503
	})
}

// TestAnswersBeforeAnIncompleteRequestAreSent: what was counted is answered,
// also when the next request of the client ends in the middle with its
// connection.
func TestAnswersBeforeAnIncompleteRequestAreSent(t *testing.T) {
	s := newSite(t, nil)
	for i, incomplete := range []string{
		"\r\n", "G", "GET /api/verve/accept?id=2 HTTP/1.1\r\nHost: x\r\n",
		"POST /test HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n",
		"POST /test HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhe",
		"POST /test HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
		"POST /test HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
		"POST /test HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n",
	} {
		for _, before := range []int{0, 1, 3} {
			var raw string
			for n := range before {
				raw += get(fmt.Sprintf("id=%d-%d-%d", i, before, n))
			}
			got, err := exchange(s.addr, []byte(raw+incomplete), func(n int) int { return n })
			if err != nil {
				t.Errorf("%q: %v", incomplete, err)
			}
			ok, err := countOK(got)
			if err != nil || ok != uint64(before) {
				t.Errorf("%d requests and %q: %d answers of ok, %v: %q", before, incomplete, ok, err, got)
			}
		}
	}
	if _, err := exchange(s.addr, nil, nil); err != nil {
		t.Error(err)
	}
	before := s.refused[reasonBadRequest].Load()
	if got, err := exchange(s.addr, nil, nil); err != nil || len(got) > 0 || s.refused[reasonBadRequest].Load() != before {
		t.Errorf("a connection for nothing, as of a probe, got %q, %v", got, err)
	}
}

// TestConnectionsOfOneAddressAreLimited: one client does not take the places of
// all; the others go on.
func TestConnectionsOfOneAddressAreLimited(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.MaxConns, c.MaxConnsPerAddress = 100, 3 })
	from := func(ip string) (net.Conn, *bufio.Reader) {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
		c, err := d.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(patience))
		return c, bufio.NewReader(c)
	}
	status := func(c net.Conn, r *bufio.Reader) int {
		t.Helper()
		if _, err := io.WriteString(c, get(fmt.Sprint("id=", rand.Uint64()))); err != nil {
			t.Fatal(err)
		}
		resp, _, err := answer(r)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode
	}
	var greedy []net.Conn
	for range 3 {
		c, r := from("127.0.0.2")
		if got := status(c, r); got != 200 {
			t.Fatalf("within the limit: got %d", got)
		}
		greedy = append(greedy, c)
	}
	if got := status(from("127.0.0.2")); got != 503 {
		t.Errorf("over the limit: got %d, want 503", got)
	}
	if got := status(from("127.0.0.3")); got != 200 {
		t.Errorf("another address: got %d, want 200", got)
	}
	greedy[0].Close()
	for start := time.Now(); status(from("127.0.0.2")) != 200; {
		if time.Since(start) > patience {
			t.Fatal("no room after a connection was closed")
		}
	}
	for _, c := range greedy {
		c.Close()
	}
	s.stop()
	if n := len(s.ln.perAddr); n != 0 {
		t.Errorf("%d addresses are still counted", n)
	}
	if s.ln.rejectedAddr.Load() == 0 || s.ln.rejected.Load() != 0 {
		t.Errorf("rejected %d by address, %d in all", s.ln.rejectedAddr.Load(), s.ln.rejected.Load())
	}
}

func TestCallerIsAnAddressOrANetwork(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.7": "192.0.2.7", "::ffff:192.0.2.7": "192.0.2.7",
		"2001:db8:1:2:3:4:5:6": "2001:db8:1:2::", "fe80::1": "fe80::",
	} {
		if got := caller(&net.TCPAddr{IP: net.ParseIP(addr), Port: 9}).String(); got != want {
			t.Errorf("%s: got %s, want %s", addr, got, want)
		}
	}
}

func TestHalfClosedRequestIsAnswered(t *testing.T) {
	s := newSite(t, nil)
	c, r := s.dial()
	io.WriteString(c, get("id=1"))
	c.(*net.TCPConn).CloseWrite()
	if resp, _, err := answer(r); err != nil || resp.StatusCode != 200 {
		t.Errorf("got %v, %v", resp, err)
	}
}
