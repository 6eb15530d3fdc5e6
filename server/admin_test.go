package server

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"verve/dedup"
	"verve/internal/epochtest"
)

func newAdminSite(t *testing.T, records *Records) (*site, *Admin) {
	s := newSite(t, nil)
	a := NewAdmin(AdminConfig{
		Server: s.Server, Times: NewTimes(), Records: func() Records { return *records },
		Delivered: func(time.Time) string { return "spooled" },
		Group:     "verve", Instance: "test", Version: "v1.2.3",
	})
	s.admin.Store(a)
	return s, a
}

func getPage(a *Admin, path string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	a.http.Handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w
}

// TestReadyzSaysWhyNot: a broker that is down is shown and keeps the server ready; a spool
// that cannot be written, and a stop, do not.
func TestReadyzSaysWhyNot(t *testing.T) {
	var records Records
	_, a := newAdminSite(t, &records)
	for _, c := range []struct {
		name   string
		change func()
		status int
		want   string // a part of the answer
	}{
		{"in order", func() {}, 200, `{"ready":true,"checks":{"clock":{"ok":true},"dedup":{"ok":true},"server":{"ok":true},"spool":{"ok":true}},"records_pending":0,"records_oldest_age_seconds":0}`},
		{"broker away", func() {
			records = Records{Pending: 3, Sinks: []Sink{{Name: "file"}, {Name: "kafka", Failing: "refused"}}}
		}, 200,
			`"file":{"ok":true},"kafka":{"ok":false,"reason":"refused"},`},
		{"disk full", func() { records = Records{Blocked: "disk full"} }, 503, `"spool":{"ok":false,"reason":"disk full"}`},
		{"stopping", func() { records = Records{}; a.NotReady() }, 503, `"server":{"ok":false,"reason":"shutting down"}`},
	} {
		c.change()
		w := getPage(a, "/readyz")
		if w.Code != c.status || !strings.Contains(w.Body.String(), c.want) || w.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%s: got %d %s, want %d with %s", c.name, w.Code, w.Body, c.status, c.want)
		}
		if w := getPage(a, "/healthz"); w.Code != 200 || w.Body.String() != "ok" {
			t.Errorf("%s: not alive: %d %s", c.name, w.Code, w.Body)
		}
	}
}

func TestWindowsShowTheOpenEpochAndTheLastOnes(t *testing.T) {
	s, a := newAdminSite(t, new(Records))
	s.ask(get("id=1"))
	s.ask(get("id=1"))
	type answer struct {
		Open    window   `json:"open"`
		Windows []window `json:"windows"`
	}
	var open, closed answer
	if err := json.Unmarshal(getPage(a, "/api/windows").Body.Bytes(), &open); err != nil {
		t.Fatal(err)
	}
	if o := open.Open; o.Unique != 1 || o.Duplicates != 1 || o.State != "open" || o.MS != epochtest.Window.Milliseconds() || len(open.Windows) != 0 {
		t.Errorf("got %+v", open)
	}
	s.stop()
	if err := json.Unmarshal(getPage(a, "/api/windows?limit=1").Body.Bytes(), &closed); err != nil {
		t.Fatal(err)
	}
	if len(closed.Windows) != 1 || closed.Windows[0].Unique != 1 || closed.Windows[0].State != "spooled" {
		t.Errorf("got %+v", closed)
	}
	for _, limit := range []string{"0", "-1", "x", "1441"} {
		if w := getPage(a, "/api/windows?limit="+limit); w.Code != 400 {
			t.Errorf("limit %s: got %d, want 400", limit, w.Code)
		}
	}
}

// TestRestoredWindowsHaveNoStateThatIsNotKnown: the record of a window of an
// earlier process is delivered if the spool does not have it; in a group another
// instance may.
func TestRestoredWindowsHaveNoStateThatIsNotKnown(t *testing.T) {
	_, a := newAdminSite(t, new(Records))
	group := func() dedup.GroupStats { return dedup.GroupStats{} }
	for _, c := range []struct {
		delivered string
		shared    func() dedup.GroupStats
		restored  bool
		want      string
	}{
		{"", nil, false, "sealed"},
		{"spooled", nil, false, "spooled"},
		{"", nil, true, "delivered"},
		{"spooled", nil, true, "spooled"},
		{"", group, true, "sealed"},
		{"spooled", group, true, "spooled"},
		{"delivered", group, true, "sealed"},
		{"delivered", group, false, "delivered"},
	} {
		a.cfg.Delivered = func(time.Time) string { return c.delivered }
		a.cfg.Shared = c.shared
		if got := a.state(&window{restored: c.restored}); got != c.want {
			t.Errorf("%+v: got %q", c, got)
		}
	}
}

// TestMetricsKeepTheirNames holds the names that the contract fixes, and the
// form of every line.
func TestMetricsKeepTheirNames(t *testing.T) {
	s, a := newAdminSite(t, &Records{Published: 7, Pending: 2})
	s.ask(get("id=1"))
	s.ask(get("id=1"))
	s.ask(get("id="))
	s.ask(get("id=2&endpoint=nothing"))
	page := getPage(a, "/metrics").Body.String()
	for _, want := range []string{
		`verve_accept_total{result="ok"} 1`,
		`verve_accept_total{result="duplicate"} 1`,
		`verve_accept_total{result="bad_id"} 1`,
		`verve_accept_total{result="bad_endpoint"} 1`,
		`verve_accept_total{result="unavailable"} 0`,
		`verve_accept_total{result="full"} 0`,
		`verve_accept_total{result="busy"} 0`,
		`verve_accept_total{result="draining"} 0`,
		`verve_unique_ids 1`,
		`verve_records_published_total 7`,
		`verve_records_pending 2`,
		`verve_callbacks_total{result="delivered"} 0`,
		`verve_build_info{version="v1.2.3",go="go`,
		`verve_info{group="verve",instance="test",dedup="memory"} 1`,
		`verve_max_ids 0`, // neither a limit nor a bound of memory is set
	} {
		if !strings.Contains(page, "\n"+want) && !strings.HasPrefix(page, want) {
			t.Errorf("no line %s", want)
		}
	}
	line := regexp.MustCompile(`^(# .*|[a-z_]+(\{[a-zA-Z]+="[^"]*"(, ?[a-zA-Z]+="[^"]*")*\})? -?[0-9.e+-]+)$`)
	seen := map[string]bool{}
	for l := range strings.Lines(page) {
		l = strings.TrimSuffix(l, "\n")
		if !line.MatchString(l) {
			t.Errorf("not a metric: %q", l)
		}
		if name, _, ok := strings.Cut(l, " "); ok && name != "#" && seen[name] {
			t.Errorf("twice: %q", l)
		} else {
			seen[name] = true
		}
	}
}

// TestMetricsAreThoseOfTheList: dashboards and alerts of others know them by these names. A new
// one gets a line in testdata/metrics.txt; a name that goes or changes is a change for users.
func TestMetricsAreThoseOfTheList(t *testing.T) {
	list, err := os.ReadFile("testdata/metrics.txt")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("metrics.go")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range regexp.MustCompile(`"(verve_[a-z_]+)`).FindAllSubmatch(source, -1) {
		got = append(got, string(m[1]))
	}
	want := strings.Fields(string(list))
	for _, name := range got {
		if !slices.Contains(want, name) {
			t.Errorf("%s is not in testdata/metrics.txt", name)
		}
	}
	for _, name := range want {
		if !slices.Contains(got, name) {
			t.Errorf("%s is in testdata/metrics.txt, and no metric has that name", name)
		}
	}
}

// TestLabelsAreQuotedAsTheTextFormatHasIt: --group and --instance may hold any
// character but control characters and slashes, and the format knows three escapes.
func TestLabelsAreQuotedAsTheTextFormatHasIt(t *testing.T) {
	for in, want := range map[string]string{
		`verve`: `"verve"`, `a"b`: `"a\"b"`, `a\b`: `"a\\b"`, "a\nb": `"a\nb"`, "é\u200b\u00a0": "\"é\u200b\u00a0\"",
	} {
		if got := labelValue(in); got != want {
			t.Errorf("%q: got %s, want %s", in, got, want)
		}
	}
}

// TestAdminTokenIsAskedForEverythingButProbes: probes get no reasons.
func TestAdminTokenIsAskedForEverythingButProbes(t *testing.T) {
	t.Parallel()
	s, _ := newAdminSite(t, new(Records))
	a := NewAdmin(AdminConfig{
		Server: s.Server, Times: NewTimes(), Records: func() Records { return Records{} }, Delivered: func(time.Time) string { return "" },
		Token: "open sesame",
	})
	ask := func(path string, header ...string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(http.MethodGet, path, nil)
		for _, h := range header {
			r.Header.Set("Authorization", h)
		}
		w := httptest.NewRecorder()
		a.http.Handler.ServeHTTP(w, r)
		return w
	}
	basic := func(user, password string) string {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.SetBasicAuth(user, password)
		return r.Header.Get("Authorization")
	}
	for _, path := range []string{"/", "/readyz/", "/metrics", "/api/windows", "/debug/pprof/", "/debug/pprof/cmdline", "/nowhere", "/healthz/", "/x/../healthz", "//healthz"} {
		for _, bad := range [][]string{nil, {""}, {"Bearer"}, {"Bearer "}, {"Bearer open"}, {"Bearer open sesame "}, {"Bearer Open Sesame"}, {"open sesame"}, {basic("open sesame", "")}, {basic("", "x")}} {
			w := ask(path, bad...)
			if w.Code != http.StatusUnauthorized || len(w.Header()["Www-Authenticate"]) != 2 {
				t.Errorf("%s with %q: got %d %v, want 401", path, bad, w.Code, w.Header())
			}
		}
		for _, good := range []string{"Bearer open sesame", "bearer open sesame", "BEARER   open sesame", basic("me", "open sesame"), strings.Replace(basic("me", "open sesame"), " ", "  ", 1)} {
			if w := ask(path, good); w.Code == http.StatusUnauthorized {
				t.Errorf("%s with %q: got 401", path, good)
			}
		}
	}
	if w := ask("/healthz"); w.Code != 200 || w.Body.String() != "ok" {
		t.Errorf("/healthz without a token: got %d", w.Code)
	}
	if w := ask("/readyz"); w.Code != 200 || w.Body.String() != `{"ready":true}`+"\n" {
		t.Errorf("/readyz without a token: got %d %s", w.Code, w.Body)
	}
	if w := ask("/readyz", "Bearer open sesame"); w.Code != 200 || !strings.Contains(w.Body.String(), `"spool"`) {
		t.Errorf("/readyz with the token: got %d %s", w.Code, w.Body)
	}
	a.NotReady()
	if w := ask("/readyz"); w.Code != 503 || w.Body.String() != `{"ready":false}`+"\n" {
		t.Errorf("/readyz without a token while stopping: got %d %s", w.Code, w.Body)
	}
}

// TestReadinessTellsWhatBlocksFromWhatFails: the page shows the first in red and the
// second in amber, and a fault of Redis once.
func TestReadinessTellsWhatBlocksFromWhatFails(t *testing.T) {
	var records Records
	_, a := newAdminSite(t, &records)
	var group dedup.GroupStats
	for _, c := range []struct {
		name              string
		change            func()
		blocking, failing string
	}{
		{"in order", func() {}, "", ""},
		{"a sink", func() { records.Sinks = []Sink{{Name: "kafka", Failing: "refused"}, {Name: "file"}} }, "", "kafka"},
		{"a sink and the spool", func() { records.Blocked = "disk full" }, "spool", "kafka"},
		{"Redis, while ids are answered without it", func() {
			records = Records{}
			a.cfg.Shared = func() dedup.GroupStats { return group }
			group = dedup.GroupStats{Away: "unreachable", Ready: true}
		}, "", "redis"},
		{"Redis", func() { group.Ready = false }, "redis", ""},
		{"the stop", func() { a.NotReady() }, "redis,server", ""},
	} {
		c.change()
		r := a.readiness()
		if blocking, failing := strings.Join(r.blocking, ","), strings.Join(r.failing, ","); blocking != c.blocking || failing != c.failing || r.Ready != (blocking == "") {
			t.Errorf("%s: ready %v, blocked by %q, failing %q, want %q, %q", c.name, r.Ready, blocking, failing, c.blocking, c.failing)
		}
	}
}
