package browser

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
)

// visit shows an empty page of an origin of its own.
func visit(t *testing.T, p *page) (origin string) {
	t.Helper()
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, "<!doctype html><title>a page</title><link rel=icon href='data:,'>")
	}))
	t.Cleanup(site.Close)
	p.do(chromedp.Navigate(site.URL))
	return site.URL
}

// counted waits until s has answered so many ids as new and as duplicates.
func (s *server) counted(ok, duplicate int) {
	s.t.Helper()
	want := []string{fmt.Sprintf("verve_accept_total{result=\"ok\"} %d\n", ok), fmt.Sprintf("verve_accept_total{result=\"duplicate\"} %d\n", duplicate)}
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		resp, err := http.Get("http://" + s.admin + "/metrics")
		if err != nil {
			s.t.Fatal(err)
		}
		page, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			s.t.Fatal(err)
		}
		if strings.Contains(string(page), want[0]) && strings.Contains(string(page), want[1]) {
			return
		}
		if time.Since(start) > patience {
			s.t.Fatalf("not counted: %q", want)
		}
	}
}

// TestBeaconOfAnotherOriginIsCounted: navigator.sendBeacon sends text/plain without a
// preflight, which this server would refuse.
func TestBeaconOfAnotherOriginIsCounted(t *testing.T) {
	s := startServer(t, "--window=1h")
	p := browse(t, func(*page) func(any) { return func(any) {} })
	visit(t, p)
	accept := "http://" + s.public + "/api/verve/accept"
	if !value[bool](p, `navigator.sendBeacon("`+accept+`", "view-1\nview-2\nview-1")`) {
		t.Fatal("the beacon is not sent")
	}
	s.counted(2, 1)
	// The last chance of a page.
	p.do(chromedp.Evaluate[chromedp.Void](`addEventListener("pagehide", () => navigator.sendBeacon("` + accept + `", "view-1\nview-3"))`))
	visit(t, p)
	s.counted(3, 2)
	live := open(t, s, 1200, 900, "light")
	live.until(`document.getElementById("batches").textContent.includes("2 batches")`)
}

// TestPageReadsAnswersOnlyIfItsOriginIsAllowed: what needs a preflight is not even sent
// by a page of another origin.
func TestPageReadsAnswersOnlyIfItsOriginIsAllowed(t *testing.T) {
	p := browse(t, func(*page) func(any) { return func(any) {} })
	origin := visit(t, p)
	const send = `delete window.answer; fetch("http://%s/api/verve/accept", {method: "POST", headers: {"Content-Type": "%s"}, body: %q})
		.then(r => r.text()).then(text => { window.answer = text }, error => { window.answer = String(error) }); 0`
	for _, c := range []struct {
		name, flag, contentType, body string
		readable                      bool
		ok                            int
	}{
		{"a preflight of an allowed origin", "--cors-origin=" + origin, "application/json", `["1","2"]`, true, 2},
		{"a preflight where all are allowed", "--cors-origin=*", "application/json", `["1","2"]`, true, 2},
		{"a preflight of another origin", "--cors-origin=https://shop.example", "application/json", `["1","2"]`, false, 0},
		{"no preflight, an allowed origin", "--cors-origin=" + origin, "text/plain", "1\n2", true, 2},
		{"no preflight, another origin", "--cors-origin=https://shop.example", "text/plain", "1\n2", false, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := startServer(t, "--window=1h", c.flag)
			_ = value[int](p, fmt.Sprintf(send, s.public, c.contentType, c.body))
			p.until(`window.answer !== undefined`)
			got := value[string](p, `window.answer`)
			if readable := strings.Contains(got, "ok"); readable != c.readable {
				t.Errorf("the page reads %q", got)
			}
			s.counted(c.ok, 0)
		})
	}
}
