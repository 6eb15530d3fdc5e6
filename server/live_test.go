package server

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestLivePageIsOneFileThatItsPolicyAllows: nothing is fetched but its figures,
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

}

// TestLivePageIsSentOnceInEachEncoding, however a client spells what it has and what it takes.
func TestLivePageIsSentOnceInEachEncoding(t *testing.T) {
	_, a := newAdminSite(t, new(Records))
	ask := func(header ...string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		for i := 0; i < len(header); i += 2 {
			r.Header.Add(header[i], header[i+1])
		}
		w := httptest.NewRecorder()
		a.http.Handler.ServeHTTP(w, r)
		if got := w.Header().Get("Cache-Control"); got != "no-cache" {
			t.Errorf("%q: Cache-Control: %s", header, got)
		}
		return w
	}
	plain, packed := ask(), ask("Accept-Encoding", "gzip")
	tag, packedTag := plain.Header().Get("ETag"), packed.Header().Get("ETag")
	if tag == packedTag || plain.Header().Get("Content-Encoding") != "" || packed.Header().Get("Content-Encoding") != "gzip" || packed.Body.Len() >= plain.Body.Len()/2 {
		t.Errorf("%d bytes as %s, in gzip %d as %s", plain.Body.Len(), tag, packed.Body.Len(), packedTag)
	}
	for _, accept := range []string{"GZIP", "br, gzip;q=0.5", "gzip; q=1", "deflate,gzip"} {
		if got := ask("Accept-Encoding", accept).Header().Get("Content-Encoding"); got != "gzip" {
			t.Errorf("to %q the page is sent as %q", accept, got)
		}
	}
	for _, accept := range []string{"", "identity", "gzip;q=0", "gzip; q=0.00, br", "gzipped", "br"} {
		if w := ask("Accept-Encoding", accept); w.Header().Get("Content-Encoding") != "" || w.Body.String() != plain.Body.String() {
			t.Errorf("to %q the page is sent in an encoding: %v", accept, w.Header())
		}
	}
	if got := ask("Accept-Encoding", "br", "Accept-Encoding", "gzip").Header().Get("Content-Encoding"); got != "gzip" {
		t.Errorf("to two lines the page is sent as %q", got)
	}
	for _, has := range []string{tag, "W/" + tag, `"x", ` + tag, "*"} {
		if w := ask("If-None-Match", has); w.Code != http.StatusNotModified || w.Body.Len() != 0 || w.Header().Get("ETag") != tag {
			t.Errorf("If-None-Match: %s: got %d with %d bytes, %v", has, w.Code, w.Body.Len(), w.Header())
		}
	}
	if w := ask("If-None-Match", packedTag, "Accept-Encoding", "gzip"); w.Code != http.StatusNotModified {
		t.Errorf("the packed page is sent again: %d", w.Code)
	}
	if w := ask("If-None-Match", packedTag); w.Code != http.StatusOK {
		t.Errorf("a client that has the packed page alone gets %d to a request for the other", w.Code)
	}
}

// TestNoCacheKeepsAnAdminAnswer: what is not there now may be there in a moment.
func TestNoCacheKeepsAnAdminAnswer(t *testing.T) {
	_, a := newAdminSite(t, new(Records))
	for _, path := range []string{"/healthz", "/readyz", "/metrics", "/api/live", "/api/windows", "/api/windows?limit=x", "/api/windows/2001-01-01T00:00:00Z/keys", "/nowhere", "/debug/pprof/nothing"} {
		if w := getPage(a, path); w.Header().Get("Cache-Control") != "no-store" {
			t.Errorf("%s: %d %v", path, w.Code, w.Header())
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

// TestLiveAnswersHaveEverythingOnce: the first answer has all, later ones neither windows nor
// samples that the page has, and the counts are those of the counter.
func TestLiveAnswersHaveEverythingOnce(t *testing.T) {
	s, a := newAdminSite(t, &Records{Pending: 3, Sinks: []Sink{{Name: "kafka", Failing: "refused"}}})
	s.ask(get("id=1"))
	s.ask(get("id=1"))
	s.ask(get("id="))
	has := ""
	ask := func() (m liveAnswer) {
		t.Helper()
		w := getPage(a, "/api/live?has="+has)
		if err := json.Unmarshal(w.Body.Bytes(), &m); w.Code != 200 || err != nil {
			t.Fatalf("got %d, %v in %s", w.Code, err, w.Body)
		}
		has = m.Has
		return m
	}
	second := time.Unix(1000, 0)
	sample := func(n int) {
		for range n {
			a.live.sample(second)
			second = second.Add(time.Second)
		}
	}
	sample(4) // of which the first only begins
	m := ask()
	if !m.All || m.Open.Unique != 1 || m.Open.Duplicates != 1 || m.Answers[3] != (resultCount{"bad_id", 1}) ||
		m.Ready.Pending != 3 || m.Ready.Checks["kafka"].Reason != "refused" || len(m.Rates) != 3 {
		t.Errorf("first answer %+v", m)
	}
	for n := range 3 {
		sample(n)
		if m := ask(); m.All || len(m.Rates) != n || n > 0 && m.Rates[n-1][0] != float64(second.Unix()-1) {
			t.Errorf("after %d more samples: %+v", n, m)
		}
	}
	s.cfg.Counter.Seal() // closes the window
	eventually(t, "a closed window is shown", func() bool {
		m := ask()
		return len(m.Windows) == 1 && m.Windows[0].Unique == 1 && m.Windows[0].State == "spooled"
	})
	if m := ask(); m.Windows != nil {
		t.Errorf("windows are sent again without a change: %+v", m.Windows)
	}
	a.cfg.Delivered = func(time.Time) string { return "delivered" }
	if m := ask(); len(m.Windows) != 1 || m.Windows[0].State != "delivered" {
		t.Errorf("after the delivery: %+v", m.Windows)
	}
	sample(2 * liveRates)
	if m := ask(); m.All || len(m.Rates) != liveRates {
		t.Errorf("after more samples than are kept: %d, all is %v", len(m.Rates), m.All)
	}
	// What a page has of an earlier process, or of none, is nothing.
	for _, has = range []string{"1" + has, "x", "0-0-0", strings.Replace(has, "-2", "-9", 1)} {
		if m := ask(); !m.All || len(m.Windows) != 1 || len(m.Rates) != liveRates {
			t.Errorf("to a page that has something else: %+v", m)
		}
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
