package server

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestLivePageIsOneFileThatItsPolicyAllows: nothing is fetched but the stream,
// and each script and style is named by its digest.
func TestLivePageIsOneFileThatItsPolicyAllows(t *testing.T) {
	_, a := newAdminSite(t, new(Records))
	w := getPage(a, "/")
	body, policy := w.Body.String(), w.Header().Get("Content-Security-Policy")
	if w.Code != 200 || w.Header().Get("Content-Type") != "text/html; charset=utf-8" {
		t.Fatalf("got %d %v", w.Code, w.Header())
	}
	for _, m := range regexp.MustCompile(`(?:src|href)="([^"]*)"`).FindAllStringSubmatch(liveHTML, -1) {
		if s := m[1]; !strings.HasPrefix(s, "data:") && !strings.HasPrefix(s, "#") && strings.Contains(s, ":") {
			t.Errorf("the page names %s", s)
		}
	}
	for _, want := range []string{"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} {
		if !strings.Contains(policy, want) {
			t.Errorf("policy %s\nwithout %s", policy, want)
		}
	}
	if strings.Contains(policy, "unsafe") {
		t.Errorf("policy %s", policy)
	}
	parts := regexp.MustCompile(`(?s)<(script|style)>(.*?)</(?:script|style)>`).FindAllStringSubmatch(body, -1)
	if len(parts) != 4 {
		t.Errorf("%d scripts and styles, want 4", len(parts))
	}
	for _, p := range parts {
		sum := sha256.Sum256([]byte(p[2]))
		if digest := base64.StdEncoding.EncodeToString(sum[:]); !regexp.MustCompile(p[1] + `-src [^;]*'sha256-` + regexp.QuoteMeta(digest)).MatchString(policy) {
			t.Errorf("the policy does not allow the %s %.40q", p[1], p[2])
		}
	}
	if regexp.MustCompile(`\s(style|on\w+)=`).MatchString(liveHTML) {
		t.Error("the page has attributes that its policy forbids")
	}

	again := httptest.NewRequest(http.MethodGet, "/", nil)
	again.Header.Set("If-None-Match", w.Header().Get("ETag"))
	if w := httptest.NewRecorder(); w.Header() != nil {
		a.http.Handler.ServeHTTP(w, again)
		if w.Code != http.StatusNotModified || w.Body.Len() != 0 {
			t.Errorf("a page that is known is sent again: %d", w.Code)
		}
	}
}

// TestPlottingLibraryIsTheOneNamed: the files are those of the release that
// their README names, and the licence is in every copy of the page.
func TestPlottingLibraryIsTheOneNamed(t *testing.T) {
	for name, f := range map[string]struct{ text, digest string }{
		"uPlot.iife.min.js": {uplotJS, "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"},
		"uPlot.min.css":     {uplotCSS, "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04"},
		"LICENSE":           {uplotLicence, "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd"},
	} {
		if sum := sha256.Sum256([]byte(f.text)); hex.EncodeToString(sum[:]) != f.digest {
			t.Errorf("%s: digest %x, want %s", name, sum, f.digest)
		}
	}
	if !strings.Contains(string(livePage().body), uplotLicence) || strings.Contains(uplotLicence, "--") {
		t.Error("the licence is not in the page")
	}
}

// serveAdmin serves a on connections without a buffer, so that a reader who does
// not read is noticed at once. It returns how to connect and how to stop.
func serveAdmin(t *testing.T, a *Admin) (dial func() net.Conn, stop func()) {
	t.Helper()
	ln := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
	done := make(chan error, 1)
	go func() { done <- a.Serve(ln) }()
	stop = sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := a.Shutdown(ctx); err != nil {
			t.Errorf("streams hold up the stop: %v", err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return func() net.Conn {
		ours, theirs := net.Pipe()
		t.Cleanup(func() { ours.Close() })
		ln.conns <- theirs
		return ours
	}, stop
}

type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { p.once.Do(func() { close(p.closed) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

// openStream asks for the stream.
func openStream(t *testing.T, c net.Conn) *http.Response {
	t.Helper()
	if _, err := io.WriteString(c, "GET /api/live HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

// events yields the data of a stream's events, and "event: NAME" for named ones.
func events(resp *http.Response) func(func(string) bool) {
	return func(yield func(string) bool) {
		for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
			line := strings.TrimPrefix(lines.Text(), "data: ")
			if line != "" && !yield(line) {
				return
			}
		}
	}
}

// TestLiveStreamTellsEverythingOnce: the first message holds all, windows and
// samples are not told twice, and the counts are those of the counter.
func TestLiveStreamTellsEverythingOnce(t *testing.T) {
	s, a := newAdminSite(t, &Records{Pending: 3, Sinks: []Sink{{Name: "kafka", Failing: "refused"}}})
	a.live.tick = time.Hour // messages are sent by hand, each when the one before was read
	s.ask(get("id=1"))
	s.ask(get("id=1"))
	s.ask(get("id="))
	dial, _ := serveAdmin(t, a)
	resp := openStream(t, dial())
	if got := resp.Header.Get("Content-Type"); resp.StatusCode != 200 || got != "text/event-stream" {
		t.Fatalf("got %d %s", resp.StatusCode, got)
	}
	n, windows, samples, last := 0, 0, 0, 0.0
	start := time.Now()
	for e := range events(resp) {
		var m liveMessage
		if err := json.Unmarshal([]byte(e), &m); err != nil {
			t.Fatalf("%v in %s", err, e)
		}
		if m.All != (n == 0) {
			t.Errorf("message %d: all is %v", n, m.All)
		}
		if n == 0 && (m.Open.Unique != 1 || m.Open.Duplicates != 1 || m.Answers[3] != resultCount{"bad_id", 1} ||
			m.Ready.Pending != 3 || m.Ready.Checks["kafka"].Reason != "refused") {
			t.Errorf("first message %s", e)
		}
		for _, r := range m.Rates {
			if r[0] <= last {
				t.Errorf("a sample of %v after one of %v", r[0], last)
			}
			samples++
			last = r[0]
		}
		if m.Windows != nil {
			if windows++; windows > 1 && len(m.Windows) == 0 {
				t.Error("windows are told without a change")
			}
		}
		if n++; n == 5 {
			s.cfg.Counter.Seal() // closes the window
		}
		if len(m.Windows) == 1 && m.Windows[0].Unique == 1 && m.Windows[0].State == "spooled" && windows == 1 {
			if samples != n-1 {
				t.Errorf("%d samples are told in %d messages behind the first, want one in each", samples, n-1)
			}
			return
		}
		if time.Since(start) > patience {
			t.Fatal("a closed window is not told")
		}
		a.live.mu.Lock()
		sample := [4]float64{float64(n)}
		a.live.rates, a.live.fresh = append(a.live.rates, sample), append(a.live.fresh, sample)
		a.live.mu.Unlock()
		a.live.broadcast(time.Now())
	}
	t.Error("the stream ended")
}

// TestLiveStreamsAreBounded: one too many is refused with the reason, and one that ends
// makes room.
func TestLiveStreamsAreBounded(t *testing.T) {
	_, a := newAdminSite(t, new(Records))
	a.live.maxStreams, a.live.tenure = 2, time.Hour
	a.live.tick = time.Hour // no message but the first, so that no reader is behind
	dial, _ := serveAdmin(t, a)
	first := dial()
	openStream(t, first)
	go io.Copy(io.Discard, first)
	second := dial()
	openStream(t, second)
	go io.Copy(io.Discard, second)
	resp := openStream(t, dial())
	if b, _ := io.ReadAll(resp.Body); resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || string(b) != liveFull+"\n" {
		t.Errorf("the third got %d %q", resp.StatusCode, b)
	}
	first.Close()
	eventually(t, "one is open, and one was refused", func() bool {
		open, _, refused := a.live.stats()
		return open == 1 && refused == 1
	})
	if resp := openStream(t, dial()); resp.StatusCode != 200 {
		t.Errorf("after one was closed got %d", resp.StatusCode)
	}
}

// TestLiveStreamDropsASlowReader: it holds up neither the others nor the server.
func TestLiveStreamDropsASlowReader(t *testing.T) {
	_, a := newAdminSite(t, new(Records))
	a.live.tick = time.Hour // messages are sent by hand, each when the quick one has the one before
	dial, _ := serveAdmin(t, a)
	openStream(t, dial()) // reads nothing more
	n := 0
	for range events(openStream(t, dial())) {
		if n++; n > 100 {
			t.Fatal("the slow reader is still there")
		}
		if open, dropped, _ := a.live.stats(); dropped == 1 && open == 1 {
			return
		}
		a.live.broadcast(time.Now())
	}
	t.Error("the quick reader was dropped")
}

// TestLiveStreamsEndWithTheServer, and say so.
func TestLiveStreamsEndWithTheServer(t *testing.T) {
	_, a := newAdminSite(t, new(Records))
	a.live.tick = time.Hour
	dial, stop := serveAdmin(t, a)
	resp := openStream(t, dial())
	stopped := make(chan struct{})
	var last []string
	for e := range events(resp) {
		if len(last) == 0 {
			a.live.broadcast(time.Now()) // is on its way at the stop
			go func() { stop(); close(stopped) }()
		}
		last = append(last[max(0, len(last)-1):], e)
	}
	if got := strings.Join(last, "|"); got != "event: end|"+liveEnded {
		t.Errorf("the stream ends with %.200s", got)
	}
	<-stopped
	if w := getPage(a, "/api/live"); w.Code != 503 {
		t.Errorf("after the stop got %d", w.Code)
	}
}

// TestRatesArePerSecond whatever the time between two samples, and as many are
// kept as a page shows.
func TestRatesArePerSecond(t *testing.T) {
	s, a := newAdminSite(t, new(Records))
	l := a.live
	at := time.Unix(1000, 0)
	l.sample(at)
	s.ask(get("id=1"))
	s.ask(get("id=2"))
	s.ask(get("id=2"))
	s.ask(get("id="))
	l.sample(at.Add(2 * time.Second))
	if want := [4]float64{1002, 1, .5, .5}; len(l.rates) != 1 || l.rates[0] != want {
		t.Errorf("got %v, want %v", l.rates, want)
	}
	for i := range 2 * liveRates {
		l.sample(at.Add(time.Duration(3+i) * time.Second))
	}
	if len(l.rates) != liveRates || l.rates[liveRates-1][0] != 1002+2*liveRates {
		t.Errorf("%d samples, the last %v", len(l.rates), l.rates[len(l.rates)-1])
	}
}
