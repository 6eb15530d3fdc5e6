// Package browser holds the live page to what it promises, in Chromium. It is a
// module of its own, so that the server does not depend on the driver:
//
//	cd server/live/browser && go test .
//
// Without Chromium it is skipped, unless VERVE_TEST_REQUIRE names chromium. With
// VERVE_TEST_SHOTS=DIR it leaves pictures of the page there, to be looked at.
package browser

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// patience bounds what should take a moment, on a machine that is busy.
const patience = 40 * time.Second

var program string // the server

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "verve-browser")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "verve")
		build := exec.Command("go", "build", "-o", program, ".")
		build.Dir = filepath.Join("..", "..", "..")
		if out, err := build.CombinedOutput(); err != nil {
			panic(fmt.Sprintf("%v\n%s", err, out))
		}
		return m.Run()
	}())
}

// server is a verve that runs.
type server struct {
	t             *testing.T
	cmd           *exec.Cmd
	public, admin string // host:port
	dir           string
	args          []string
}

func freePort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func startServer(t *testing.T, args ...string) *server {
	t.Helper()
	s := &server{t: t, public: freePort(t), admin: freePort(t), dir: t.TempDir(), args: args}
	s.start()
	t.Cleanup(func() { s.end(syscall.SIGKILL) })
	return s
}

func (s *server) start() {
	s.t.Helper()
	s.cmd = exec.Command(program, append([]string{
		"--listen=" + s.public, "--admin-listen=" + s.admin, "--data-dir=verve-data", "--log-format=json",
		"--shutdown-timeout=2s", "--instance=host-1",
	}, s.args...)...)
	s.cmd.Dir = s.dir
	stderr, err := s.cmd.StderrPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	lines := bufio.NewScanner(stderr)
	for lines.Scan() {
		if strings.Contains(lines.Text(), `"message":"listening"`) {
			go func() { _, _ = io.Copy(io.Discard, stderr) }()
			return
		}
	}
	s.t.Fatal("the server does not start")
}

func (s *server) end(sig syscall.Signal) {
	if s.cmd.ProcessState == nil {
		_ = s.cmd.Process.Signal(sig) // may have ended
		_ = s.cmd.Wait()
	}
}

// load sends ids from several connections until stop, every third of them twice, and
// counts the answers.
type load struct {
	begun, ok, duplicate atomic.Int64
	wg                   sync.WaitGroup
	stopping             atomic.Bool
}

func (s *server) load(pause time.Duration) *load {
	l := new(load)
	for w := range 4 {
		l.wg.Go(func() {
			client := http.Client{Transport: &http.Transport{}}
			defer client.CloseIdleConnections()
			for i := 0; !l.stopping.Load(); i++ {
				id := i - i%3/2 // 0 1 1 3 4 4 6 7 7
				l.begun.Add(1)
				resp, err := client.Get(fmt.Sprintf("http://%s/api/verve/accept?id=%d-%d", s.public, w, id))
				if err != nil {
					s.t.Error(err)
					return
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				switch resp.StatusCode {
				case 200:
					l.ok.Add(1)
				case 409:
					l.duplicate.Add(1)
				default:
					s.t.Errorf("status %d", resp.StatusCode)
				}
				time.Sleep(pause)
			}
		})
	}
	return l
}

func (l *load) stop() {
	l.stopping.Store(true)
	l.wg.Wait()
}

// page is the live page in a browser.
type page struct {
	t   *testing.T
	ctx context.Context

	mu      sync.Mutex
	faults  []string // exceptions, violations of the policy, foreign requests
	offline bool     // failed requests are expected
}

func chromium(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"chromium", "chromium-headless-shell", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	if strings.Contains(os.Getenv("VERVE_TEST_REQUIRE"), "chromium") {
		t.Fatal("chromium is not installed, and VERVE_TEST_REQUIRE wants it")
	}
	t.Skip("chromium is not installed")
	return ""
}

// browse starts a browser with an empty page; seen gets its events.
func browse(t *testing.T, seen func(p *page) func(any)) *page {
	t.Helper()
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(chromium(t)), chromedp.Flag("disable-dev-shm-usage", true), chromedp.WSURLReadTimeout(patience))
	if os.Geteuid() == 0 {
		options = append(options, chromedp.NoSandbox) // which Chromium refuses to have as root
	}
	ctx, cancel := chromedp.NewExecAllocator(context.Background(), options...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	p := &page{t: t, ctx: ctx}
	if err := chromedp.Listen(ctx, seen(p)); err != nil { // starts the browser
		t.Fatal(err)
	}
	return p
}

// open shows the page of s in a window of the given width.
func open(t *testing.T, s *server, width, height int64, scheme string) *page {
	t.Helper()
	return openAs(t, s, "", width, height, scheme)
}

// openAs is open with what is before the host in the address: a user and a password.
func openAs(t *testing.T, s *server, user string, width, height int64, scheme string) *page {
	t.Helper()
	p := browse(t, func(p *page) func(any) { return p.listen("http://"+s.admin+"/", "http://"+user+s.admin+"/") })
	call(p, log.Enable, cdp.Empty{})
	call(p, network.Enable, network.EnableParams{})
	p.do(chromedp.EmulateViewport(width, height, chromedp.EmulateScale(1)))
	p.prefer(scheme)
	p.do(chromedp.Navigate("http://" + user + s.admin + "/"))
	p.until(`["live", "warn", "bad"].includes(document.getElementById("link").dataset.state)`)
	t.Cleanup(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, f := range p.faults {
			t.Errorf("in the browser: %s", f)
		}
	})
	return p
}

// listen notes what a page that needs nothing but its server never does.
func (p *page) listen(origins ...string) func(any) {
	fault := func(format string, args ...any) {
		p.faults = append(p.faults, fmt.Sprintf(format, args...))
	}
	return func(event any) {
		p.mu.Lock()
		defer p.mu.Unlock()
		switch e := event.(type) {
		case *runtime.EventExceptionThrown:
			fault("%s", e.ExceptionDetails.Text)
			if thrown := e.ExceptionDetails.Exception; thrown != nil {
				fault("%s", thrown.Description)
			}
		case *runtime.EventConsoleAPICalled:
			fault("console.%s %s", e.Type, e.Args[0].Value)
		case *log.EventEntryAdded:
			if !p.offline || e.Entry.Source != log.EntrySourceNetwork {
				fault("%s: %s", e.Entry.Level, e.Entry.Text)
			}
		case *network.EventRequestWillBeSent:
			its := func(origin string) bool { return strings.HasPrefix(e.Request.URL, origin) }
			if !slices.ContainsFunc(origins, its) && !its("data:") {
				fault("asks for %s", e.Request.URL)
			}
		}
	}
}

// connectionMayFail allows failed requests from here on.
func (p *page) connectionMayFail() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.offline = true
}

// run returns what an action gives on the page.
func run[T any](p *page, action chromedp.Action[T]) T {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	v, err := chromedp.Run(ctx, action)
	if err != nil {
		p.t.Fatal(err)
	}
	return v
}

// call runs a command of the protocol.
func call[P, R any](p *page, command cdp.Command[P, R], params P) R {
	p.t.Helper()
	return run(p, func(ctx context.Context, t *chromedp.Target) (R, error) {
		return cdp.Call(ctx, t, command, params)
	})
}

func (p *page) do(actions ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	run(p, chromedp.Steps(actions...))
}

// prefer sets the colour scheme that the reader prefers.
func (p *page) prefer(scheme string) {
	p.t.Helper()
	call(p, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
	})
}

// until waits for a condition on the page.
func (p *page) until(condition string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	poll := chromedp.Poll[chromedp.Void](condition, chromedp.WithPollingInterval(50*time.Millisecond), chromedp.WithPollingTimeout(0))
	if _, err := chromedp.Run(ctx, poll); err != nil {
		text, _ := chromedp.Run(p.ctx, chromedp.Evaluate[string](`document.body.innerText`))
		p.t.Fatalf("not so: %s: %v\n%s", condition, err, text)
	}
}

// value is what an expression gives on the page.
func value[T any](p *page, expression string) T {
	p.t.Helper()
	return run(p, chromedp.Evaluate[T](expression))
}

// number is an element's text as a number.
func (p *page) number(selector string) int64 {
	p.t.Helper()
	s := value[string](p, `document.querySelector(`+strconv.Quote(selector)+`).textContent`)
	n, err := strconv.ParseInt(strings.ReplaceAll(s, ",", ""), 10, 64)
	if err != nil {
		p.t.Fatalf("%s shows %q, which is no number", selector, s)
	}
	return n
}

// shot keeps a picture, if pictures are wanted.
func (p *page) shot(name string) {
	p.t.Helper()
	dir := os.Getenv("VERVE_TEST_SHOTS")
	if dir == "" {
		return
	}
	png := run(p, chromedp.FullScreenshot(100))
	if err := os.WriteFile(filepath.Join(dir, name+".png"), png, 0o644); err != nil {
		p.t.Fatal(err)
	}
}

// closedWindow is one of /api/windows.
type closedWindow struct {
	Start      time.Time `json:"window_start"`
	Unique     uint64    `json:"unique"`
	Duplicates uint64    `json:"duplicates"`
	WholeGroup *struct {
		Unique uint64 `json:"unique"`
	} `json:"whole_group"`
}

// windowsOf is what /api/windows says of closed windows, by the time of day.
func (s *server) windowsOf() map[string]closedWindow {
	s.t.Helper()
	resp, err := http.Get("http://" + s.admin + "/api/windows")
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	var answer struct{ Windows []closedWindow }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		s.t.Fatal(err)
	}
	out := map[string]closedWindow{}
	for _, w := range answer.Windows {
		out[w.Start.Format("15:04:05")] = w
	}
	return out
}

// TestPageShowsTheTrueNumbersUnderLoad: while requests come, the count climbs and is never
// more than was asked; when they stop it equals the answers that callers got.
func TestPageShowsTheTrueNumbersUnderLoad(t *testing.T) {
	s := startServer(t, "--window=1h")
	p := open(t, s, 1280, 900, "light")
	if hint := value[string](p, `document.querySelector("#hint").innerText`); !strings.Contains(hint, "http://"+s.public+"/api/verve/accept?id=42") {
		t.Errorf("before the first id the page says %q, and not how to send one", hint)
	}
	p.shot("rest")
	if resp, err := http.Get("http://" + s.public + "/api/verve/accept?id="); err != nil || resp.StatusCode != 400 {
		t.Fatal(resp, err)
	}
	l := s.load(time.Millisecond)
	var last int64
	for climbed := 0; climbed < 5; {
		n := p.number("#unique")
		if begun := l.begun.Load(); n > begun {
			t.Fatalf("the page shows %d unique ids of %d requests", n, begun)
		}
		if n < last {
			t.Fatalf("the page shows %d unique ids after %d", n, last)
		}
		if n > last {
			climbed++
		}
		last = n
	}
	p.until(`parseFloat(document.querySelector("#rate-unique").textContent) > 0 && parseFloat(document.querySelector("#rate-duplicate").textContent) > 0`)
	l.stop()
	number := func(selector string, want int64) {
		t.Helper()
		text := strconv.FormatInt(want, 10)
		p.until(fmt.Sprintf(`document.querySelector(%q)?.textContent.replaceAll(",", "") === %q`, selector, text))
	}
	number("#unique", l.ok.Load())
	number("#duplicates", l.duplicate.Load())
	number(`#answers tr[data-result="ok"] td`, l.ok.Load())
	number(`#answers tr[data-result="duplicate"] td`, l.duplicate.Load())
	number(`#answers tr[data-result="bad_id"] td`, 1)
	number("#rate-unique", 0)
	number("#rate-duplicate", 0)
	if hidden := value[bool](p, `document.querySelector("#hint").hidden`); !hidden {
		t.Error("the page still says that nothing has been counted")
	}
	if title := value[string](p, `document.title`); strings.ReplaceAll(title, ",", "") != fmt.Sprint(l.ok.Load(), " · Verve") {
		t.Errorf("title %q", title)
	}
}

// TestPageShowsEachWindowWithItsState: closed windows are there with their
// counts, and with their state in words.
func TestPageShowsEachWindowWithItsState(t *testing.T) {
	s := startServer(t, "--window=1s")
	p := open(t, s, 1280, 900, "dark")
	p.do(chromedp.Click(chromedp.CSS("summary")))
	l := s.load(time.Millisecond)
	p.until(`[...document.querySelectorAll("#table tbody tr")].filter(r => r.cells[3].textContent === "delivered").length >= 4`)
	l.stop()
	truth := s.windowsOf()
	rows := value[[][]string](p, `[...document.querySelectorAll("#table tbody tr")].map(r => [...r.cells].map(c => c.textContent))`)
	compared := 0
	for _, r := range rows[1:] {
		want, ok := truth[r[0][len(r[0])-len("15:04:05"):]] // with the date, just after midnight
		if !ok {
			continue // older or newer than the wanted one
		}
		compared++
		if got := strings.ReplaceAll(r[1], ",", ""); got != fmt.Sprint(want.Unique) {
			t.Errorf("window %s: the page shows %s, want %d", r[0], got, want.Unique)
		}
	}
	if compared < 3 {
		t.Errorf("%d windows of the page are those of the server: %v, %v", compared, rows, truth)
	}
	if rows[0][3] != "open" {
		t.Errorf("the newest window is %s, want open", rows[0][3])
	}
}

// TestPageSaysWhatFails: a broker that is down is a warning with its reason, and the
// windows that wait for it are spooled.
func TestPageSaysWhatFails(t *testing.T) {
	s := startServer(t, "--window=1s", "--kafka-brokers="+freePort(t))
	p := open(t, s, 1280, 900, "light")
	p.until(`document.querySelector('[data-check="kafka"]')?.dataset.light === "warn"`)
	if why := value[string](p, `document.querySelector('[data-check="kafka"]').innerText`); !strings.Contains(why, "Kafka\nfailing") || !strings.Contains(why, "connect") {
		t.Errorf("the page says of Kafka: %q", why)
	}
	p.until(`+document.querySelector('.legend [data-state="spooled"] span').textContent >= 2`)
	if got := value[string](p, `[document.querySelector("#link").dataset.state, document.querySelector("#link").innerText, document.title.replace(/ · .*/, ""), document.querySelector("#alarm").dataset.level, document.querySelector("#alarm-what").textContent].join("|")`); got != "warn|Kafka failing|Kafka failing|warn|Kafka failing. This instance is ready, and its records wait in the spool." {
		t.Errorf("the head of the page says %q", got)
	}
	if target := value[string](p, `document.querySelector('[data-check="kafka"] .target').textContent`); !strings.HasPrefix(target, "Records go to topic verve.unique-ids at 127.0.0.1:") {
		t.Errorf("the page says %q", target)
	}
	p.until(`/records wait in the spool/.test(document.querySelector("#records").textContent)`)
	p.shot("kafka-away")
}

// redis is a server that the instances of a group share.
type redis struct {
	t             *testing.T
	path, address string
	cmd           *exec.Cmd
}

// newRedis has an address, and does not run until start.
func newRedis(t *testing.T) *redis {
	t.Helper()
	path, err := exec.LookPath("redis-server")
	if err != nil {
		if strings.Contains(os.Getenv("VERVE_TEST_REQUIRE"), "redis") {
			t.Fatal("redis-server is not installed, and VERVE_TEST_REQUIRE wants it")
		}
		t.Skip("redis-server is not installed")
	}
	r := &redis{t: t, path: path, address: freePort(t)}
	t.Cleanup(r.end)
	return r
}

func (r *redis) start() {
	r.t.Helper()
	host, port, _ := net.SplitHostPort(r.address)
	r.cmd = exec.Command(r.path, "--bind", host, "--port", port, "--save", "", "--dir", r.t.TempDir())
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *redis) end() {
	if r.cmd != nil {
		_ = r.cmd.Process.Kill()
		_ = r.cmd.Wait()
		r.cmd = nil
	}
}

// accept sends an id, again if Redis was too slow for an answer, and returns
// whether the answer was ok.
func (s *server) accept(id string) bool {
	s.t.Helper()
	for range 400 {
		resp, err := http.Get("http://" + s.public + "/api/verve/accept?id=" + id)
		if err != nil {
			s.t.Fatal(err)
		}
		resp.Body.Close()
		switch resp.StatusCode {
		case 200:
			return true
		case 409:
			return false
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.t.Fatalf("id %s is not answered", id)
	return false
}

// TestPageSaysThatTheInstanceIsNotReady, and why, where it is seen at once: in the
// header, in a banner that is announced, in the title and in the icon. All of it is
// over when /readyz answers 200 again.
func TestPageSaysThatTheInstanceIsNotReady(t *testing.T) {
	r := newRedis(t)
	s := startServer(t, "--window=1h", "--dedup=redis", "--redis-url=redis://"+r.address)
	p := open(t, s, 1280, 900, "light")
	ready := value[string](p, `document.querySelector("#icon").href`)
	type header struct{ State, Pill, Title, Alarm, Role, Icon string }
	shown := func() header {
		return value[header](p, `(() => {
			const alarm = document.querySelector("#alarm"), r = alarm.getBoundingClientRect();
			return {
				State: document.querySelector("#link").dataset.state, Pill: document.querySelector("#link").innerText, Title: document.title,
				Alarm: alarm.checkVisibility() && r.top >= 0 && r.bottom <= innerHeight && scrollY === 0 ? alarm.innerText : "",
				Role: document.querySelector("#alarm-what").getAttribute("role"), Icon: document.querySelector("#icon").href,
			};
		})()`)
	}
	p.until(`document.querySelector("#link").dataset.state === "bad"`)
	h := shown()
	for what, got := range map[string]string{"the header": h.Pill, "the title": h.Title, "the banner": h.Alarm} {
		if !strings.Contains(got, "not ready: Redis") || strings.Contains(got, "live") {
			t.Errorf("while Redis is down %s says %q", what, got)
		}
	}
	if h.Role != "alert" || !strings.Contains(h.Alarm, "Redis: ") {
		t.Errorf("the banner has role %q and says %q", h.Role, h.Alarm)
	}
	if !strings.Contains(h.Icon, "b3203a") {
		t.Errorf("the icon is %s", h.Icon)
	}
	if light := value[string](p, `document.querySelector('[data-check="redis"]').dataset.light`); light != "bad" {
		t.Errorf("the dependency is shown as %q", light)
	}
	for _, bad := range value[[]string](p, contrasts) {
		t.Errorf("too little contrast: %s", bad)
	}
	p.shot("not-ready")
	r.start()
	p.until(`document.querySelector("#link").dataset.state === "live"`)
	if h := shown(); h.Pill != "live" || h.Alarm != "" || h.Title != "0 · Verve" || strings.Contains(h.Icon, "b3203a") {
		t.Errorf("with Redis back the page shows %+v, before %s", h, ready)
	}
	r.end()
	p.until(`document.querySelector("#link").dataset.state === "bad" && !document.querySelector("#alarm").hidden`)
}

// TestPageTellsTheGroupsFiguresFromItsOwn: each figure of a group's page has a label
// that says whose it is, and those of closed windows are what the group counted.
func TestPageTellsTheGroupsFiguresFromItsOwn(t *testing.T) {
	r := newRedis(t)
	r.start()
	flags := []string{"--window=2s", "--dedup=redis", "--redis-url=redis://" + r.address}
	one := startServer(t, flags...)
	other := startServer(t, append(flags, "--instance=host-2")...)
	for _, s := range []*server{one, other} {
		waitReady(t, s)
	}
	p := open(t, one, 1280, 900, "light")
	p.do(chromedp.Click(chromedp.CSS("summary")))
	unlabelled := value[[]string](p, `[...document.querySelectorAll("h2, dt")].filter(e => {
		const scope = e.querySelector(".scope");
		return !(scope && scope.checkVisibility()) && !e.closest(".rates") && e.nextElementSibling?.id !== "length" && !e.closest("[hidden]");
	}).map(e => e.textContent)`)
	if len(unlabelled) > 0 {
		t.Errorf("it is not said whose these are: %q", unlabelled)
	}
	p.until(`document.querySelector("#table thead th")`)
	if head := value[string](p, `document.querySelector("#table thead").innerText`); strings.Join(strings.Fields(head), " ") != "window (UTC) unique, whole group unique, this instance duplicates, this instance record notes" {
		t.Errorf("the table is headed %q", head)
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop.Store(true)
	for i, s := range []*server{one, other} {
		wg.Go(func() {
			for n := 0; !stop.Load(); n++ {
				s.accept(fmt.Sprint(i, "-", n))
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	// Closed windows that both have counted in.
	const both = `[...document.querySelectorAll("#table tbody tr")].slice(1).map(r => [...r.cells].map(c => c.textContent.replaceAll(",", ""))).filter(r => +r[1] > +r[2] && +r[2] > 0)`
	p.until(both + `.length >= 3`)
	truth := one.windowsOf()
	compared := 0
	for _, row := range value[[][]string](p, both) {
		w, ok := truth[row[0][len(row[0])-len("15:04:05"):]]
		if !ok || w.WholeGroup == nil {
			continue
		}
		compared++
		if row[1] != fmt.Sprint(w.WholeGroup.Unique) || row[2] != fmt.Sprint(w.Unique) {
			t.Errorf("the page shows %v, want %d and %d", row, w.WholeGroup.Unique, w.Unique)
		}
		if told := other.windowsOf()[row[0][len(row[0])-len("15:04:05"):]]; told.WholeGroup != nil && *told.WholeGroup != *w.WholeGroup {
			t.Errorf("the instances tell %+v and %+v of one window", told.WholeGroup, w.WholeGroup)
		}
	}
	if compared == 0 {
		t.Error("no window of the page is one of the server's")
	}
	p.until(`(() => {
		const last = [...document.querySelectorAll("#table tbody tr")][1].cells[1].textContent;
		return last !== "–" && document.querySelector("#last").textContent === last;
	})()`)
	p.do(chromedp.Focus(chromedp.CSS("#windows")), chromedp.KeyEvent(kb.Home))
	if said := value[string](p, `document.querySelector("#windows").getAttribute("aria-valuetext")`); !strings.Contains(said, " unique in the whole group; by this instance ") {
		t.Errorf("the chart says %q", said)
	}
}

// TestPageShowsTheGroup: where instances count as one, the count is the group's,
// and the page says how much of it is this instance's.
func TestPageShowsTheGroup(t *testing.T) {
	r := newRedis(t)
	r.start()
	flags := []string{"--window=1h", "--dedup=redis", "--redis-url=redis://" + r.address}
	one := startServer(t, flags...)
	other := startServer(t, append(flags, "--instance=host-2")...)
	for _, s := range []*server{one, other} {
		waitReady(t, s)
	}
	p := open(t, one, 1280, 900, "light")
	// accept returns how many callers got ok.
	accept := func(s *server, id string) int64 {
		if s.accept(id) {
			return 1
		}
		return 0
	}
	var told int64
	for i := range 60 {
		told += accept(one, fmt.Sprint("shared-", i))
		told += accept(other, fmt.Sprint("shared-", i))
		told += accept(other, fmt.Sprint("other-", i))
	}
	if told != 120 {
		t.Fatalf("%d callers were told ok, want 120", told)
	}
	// The ids are in parts; of each this instance hears when it adds to it.
	for i := 0; p.number("#unique") != told; i++ {
		if i > 200 {
			t.Fatalf("the page shows %d, %d callers were told ok", p.number("#unique"), told)
		}
		told += accept(one, fmt.Sprint("more-", i))
		time.Sleep(300 * time.Millisecond)
	}
	p.until(`/2 instances count as one/.test(document.querySelector("#shared").textContent)`)
	p.until(`document.querySelector('[data-check="redis"]')?.dataset.light === "good"`)
	p.shot("group")
}

// TestPageShowsTheRoomThatIsLeft, where records go, and how long a window is.
func TestPageShowsTheRoomThatIsLeft(t *testing.T) {
	s := startServer(t, "--window=1h", "--max-ids=200")
	p := open(t, s, 1280, 900, "light")
	room := func(percent int, light string) {
		t.Helper()
		p.until(fmt.Sprintf(`document.querySelector("#room-text").textContent === "%d %% of 200 (--max-ids)" && document.querySelector("#room").dataset.light === %q`, percent, light))
		if width := value[float64](p, `document.querySelector("#room div").getBoundingClientRect().width / document.querySelector("#room").clientWidth * 100`); math.Abs(width-float64(percent)) > 1 {
			t.Errorf("the bar is at %v %%, want %d", width, percent)
		}
	}
	room(0, "good")
	for i := range 200 {
		s.accept(fmt.Sprint(i))
		if i == 99 {
			room(50, "good")
		}
	}
	room(100, "bad")
	if resp, err := http.Get("http://" + s.public + "/api/verve/accept?id=one-too-many"); err != nil || resp.StatusCode != 503 {
		t.Fatal(resp, err)
	}
	for selector, want := range map[string]string{
		"#length":                            "1 h",
		`[data-check="file"] .target`:        "Records go to verve-data/counts.jsonl",
		`#answers tr[data-result="full"] th`: "full",
	} {
		p.until(fmt.Sprintf(`document.querySelector(%q)?.textContent === %q`, selector, want))
	}
	if memory := value[string](p, `document.querySelector("#memory").textContent`); !strings.Contains(memory, " MB") || !strings.Contains(memory, " for ids") {
		t.Errorf("memory is shown as %q", memory)
	}
}

// TestPageShowsTheLargestKeys of the open window with their share, whatever text they are, and
// nothing of keys while none is used. They fit a phone.
func TestPageShowsTheLargestKeys(t *testing.T) {
	s := startServer(t, "--window=1h", "--data-dir=none", "--counts-file=off")
	p := open(t, s, 360, 740, "light")
	count := func(key string, ids int) {
		t.Helper()
		var lines strings.Builder
		for i := range ids {
			fmt.Fprintln(&lines, i)
		}
		resp, err := http.Post("http://"+s.public+"/api/verve/accept?key="+url.QueryEscape(key), "text/plain", strings.NewReader(lines.String()))
		if err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
		resp.Body.Close()
	}
	s.accept("no-key")
	p.until(`document.querySelector("#unique").textContent === "1"`)
	if !value[bool](p, `document.querySelector("#keys-card").hidden`) {
		t.Error("keys are shown and none was used")
	}
	long := strings.Repeat("k", 128)
	for i, key := range []string{"<b>bold</b>", "a\u202eb", long, "campaign-7", "1", "2", "3", "4", "5", "6", "7", "8"} {
		count(key, 100-i)
	}
	p.until(`document.querySelectorAll("#keys tr").length === 10 && document.querySelector("#keys-more").textContent === "and 2 more keys"`)
	for _, row := range value[[][]string](p, `[...document.querySelectorAll("#keys tr")].map(r => [...r.cells].map(c => c.textContent))`) {
		if len(row) != 3 || row[1] == "0" || !strings.HasSuffix(row[2], " %") {
			t.Errorf("row %q", row)
		}
	}
	if value[bool](p, `document.querySelector("#keys b") !== null`) {
		t.Error("a key is read as HTML")
	}
	if w := value[int](p, `document.scrollingElement.scrollWidth`); w > 360 {
		t.Errorf("the page is %d pixels wide", w)
	}
	p.shot("keys")
}

// TestPageShowsTheWindowsOfEarlierRuns, and the first bars stand at the left of
// the chart, not at the far end of an empty one.
func TestPageShowsTheWindowsOfEarlierRuns(t *testing.T) {
	s := startServer(t, "--window=1s")
	p := open(t, s, 1280, 900, "light")
	p.do(chromedp.Click(chromedp.CSS("summary")))
	l := s.load(time.Millisecond)
	p.until(`[...document.querySelectorAll("#table tbody tr")].slice(1).filter(r => r.cells[1].textContent > "0").length >= 1`)
	// The first bar that reaches a tenth of the height, which is 1.06 times the largest count,
	// and where it begins there, both as the place of a window in a chart that has room for
	// twelve, or for all if there are more: a busy machine may have been slow to open the page.
	const firstBar = `(() => {
		const c = document.querySelector("#windows canvas"), plot = document.querySelector("#windows .u-over");
		const scale = c.width / c.clientWidth, left = plot.offsetLeft * scale, width = Math.floor(plot.clientWidth * scale);
		const y = Math.floor((plot.offsetTop + plot.clientHeight * .9) * scale), row = c.getContext("2d").getImageData(left, y, width, 1).data;
		const counts = [...document.querySelectorAll("#table tbody tr")].map(r => +r.cells[1].textContent.replaceAll(",", "")).reverse();
		const coloured = (x) => row[4 * x + 3] > 100 && Math.max(...row.slice(4 * x, 4 * x + 3)) - Math.min(...row.slice(4 * x, 4 * x + 3)) > 60;
		let x = 0;
		while (x < width && !coloured(x)) x++;
		return [counts.findIndex(n => n > Math.max(...counts) * .106), x / width * Math.max(12, counts.length), counts.length];
	})()`
	if at := value[[3]float64](p, firstBar); at[1] < at[0]-.5 || at[1] > at[0]+1 {
		t.Errorf("the bar of window %v of %v begins at place %.2f", at[0], at[2], at[1])
	}
	p.until(`document.querySelectorAll("#table tbody tr").length >= 5`)
	l.stop()
	p.connectionMayFail()
	before := s.windowsOf()
	s.end(syscall.SIGKILL)
	p.until(`!document.querySelector("#lost").hidden`)
	s.start()
	p.until(`document.querySelector("#lost").hidden`)
	shown := map[string][]string{}
	for _, r := range value[[][]string](p, `[...document.querySelectorAll("#table tbody tr")].slice(1).map(r => [...r.cells].map(c => c.textContent.replaceAll(",", "")))`) {
		shown[r[0][len(r[0])-len("15:04:05"):]] = r
	}
	for at, w := range before {
		if r := shown[at]; r == nil || r[1] != fmt.Sprint(w.Unique) || r[2] != fmt.Sprint(w.Duplicates) || r[3] != "delivered" {
			t.Errorf("after the restart window %s is shown as %v, want %+v", at, r, w)
		}
	}
}

func waitReady(t *testing.T, s *server) {
	t.Helper()
	for range 400 {
		resp, err := http.Get("http://" + s.admin + "/readyz")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode == 200 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatal("the server does not get ready")
}

// TestPageTakesTheTokenFromItsAddress: people keep http://user:TOKEN@host/ as a bookmark.
func TestPageTakesTheTokenFromItsAddress(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("open-sesame\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := startServer(t, "--admin-token-file="+token)
	p := openAs(t, s, "anyone:open-sesame@", 1280, 900, "light")
	p.until(`document.getElementById("who").textContent === "verve / host-1"`)
}

// TestPageSaysWhenTheConnectionIsLost, keeps the last figures marked as old, and
// connects again by itself.
func TestPageSaysWhenTheConnectionIsLost(t *testing.T) {
	s := startServer(t, "--window=1h", "--shutdown-delay=1s")
	l := s.load(time.Millisecond)
	p := open(t, s, 1280, 900, "light")
	l.stop()
	want := l.ok.Load()
	p.until(fmt.Sprintf(`document.querySelector("#unique").textContent.replaceAll(",", "") === "%d"`, want))
	p.connectionMayFail()

	s.end(syscall.SIGKILL)
	p.until(`!document.querySelector("#lost").hidden && /Connection lost/.test(document.querySelector("#lost-why").textContent)`)
	if got := value[string](p, `document.querySelector("#lost-when").textContent`); !strings.Contains(got, "The figures below are those of ") {
		t.Errorf("the page says %q", got)
	}
	if got := value[string](p, `document.querySelector("#link").innerText + document.title`); !strings.Contains(got, "not connected") || strings.Contains(got, "live") {
		t.Errorf("the page says %q", got)
	}
	if got := p.number("#unique"); got != want || !value[bool](p, `document.querySelector("main").classList.contains("stale")`) {
		t.Errorf("the last count was %d and is now shown as %d, or not marked as old", want, got)
	}
	p.shot("lost")
	s.start()
	p.until(`document.querySelector("#lost").hidden && document.querySelector("#link").dataset.state === "live"`)
	if value[bool](p, `document.querySelector("main").classList.contains("stale")`) {
		t.Error("the figures are still marked as old")
	}
	// The ids are still known: the page shows what the new process counts.
	if got := p.number("#unique"); got != 0 && got != want {
		t.Errorf("after the restart the page shows %d", got)
	}

	s.end(syscall.SIGTERM)
	p.until(`!document.querySelector("#lost").hidden && /The server is stopping/.test(document.querySelector("#lost-why").textContent)`)
	// The button spares the wait.
	s.start()
	p.do(chromedp.Click(chromedp.CSS("#again")))
	p.until(`document.querySelector("#lost").hidden`)
}

// TestPageFitsAPhone: nothing is cut off or scrolled sideways at 360 pixels.
func TestPageFitsAPhone(t *testing.T) {
	s := startServer(t, "--window=1s", "--group=a-group-of-a-rather-long-name", "--kafka-brokers="+freePort(t))
	l := s.load(2 * time.Millisecond)
	defer l.stop()
	p := open(t, s, 360, 740, "dark")
	p.until(`document.querySelectorAll(".checks p").length > 0`)
	p.until(`+document.querySelector('.legend [data-state="spooled"] span').textContent >= 5`)
	p.do(chromedp.Click(chromedp.CSS("summary")))
	p.shot("phone")
	check := func() {
		t.Helper()
		if w := value[int](p, `document.scrollingElement.scrollWidth`); w > 360 {
			t.Errorf("the page is %d pixels wide", w)
		}
		for _, e := range value[[]string](p, `[...document.querySelectorAll("body *")].filter(e => {
			const r = e.getBoundingClientRect();
			return r.width > 0 && r.right > 360.5 && !e.closest(".scroll, .sr, svg, .u-over, .skip");
		}).map(e => e.tagName + "#" + e.id + "." + e.className)`) {
			t.Errorf("%s is cut off", e)
		}
	}
	check()
	// The largest count there is still fits.
	p.do(chromedp.Evaluate[chromedp.Void](`document.querySelector("#unique").classList.add("long"); document.querySelector("#unique").textContent = "9,999,999,999"`))
	check()
	for _, e := range value[[]string](p, `[...document.querySelectorAll("a, button, summary")].filter(e => {
		const r = e.getBoundingClientRect();
		return r.width > 0 && r.height < 24 && !e.closest(".skip");
	}).map(e => e.textContent)`) {
		t.Errorf("%q is too low for a finger", e)
	}
}

// contrasts lists text that stands out too little (WCAG 2.2, 1.4.3), and marks
// whose colour does (1.4.11).
const contrasts = `(() => {
	const rgb = (s) => { const m = s.match(/[\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
	const lum = (c) => { const f = c.slice(0, 3).map((v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * f[0] + .7152 * f[1] + .0722 * f[2]; };
	const ratio = (a, b) => { const [x, y] = [lum(a), lum(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
	const behind = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] > .99) return c; } return [255, 255, 255]; };
	const bad = [];
	for (const e of document.querySelectorAll("body *")) {
		const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
		if (!own || !e.checkVisibility() || e.closest(".sr, script, noscript, .skip")) continue;
		const back = behind(e), page = behind(document.body), ink = rgb(getComputedStyle(e).color);
		let opacity = 1;
		for (let a = e; a; a = a.parentElement) opacity *= getComputedStyle(a).opacity;
		const over = (c) => c.slice(0, 3).map((v, i) => v * opacity + page[i] * (1 - opacity));
		const r = ratio(over(ink), over(back));
		if (r < 4.5) bad.push(e.tagName + " " + e.textContent.trim().slice(0, 30) + " " + r.toFixed(2));
	}
	const card = rgb(getComputedStyle(document.querySelector(".card")).backgroundColor);
	const probe = document.body.appendChild(document.createElement("b"));
	for (const name of ["open", "sealed", "spooled", "delivered", "unique", "duplicate", "refused", "good", "warn", "bad", "accent"]) {
		probe.style.color = "var(--" + name + ")";
		const r = ratio(rgb(getComputedStyle(probe).color), card);
		if (r < 3) bad.push(name + " " + r.toFixed(2));
	}
	probe.remove();
	return bad;
})()`

// TestPageReadsInDarkAndLight: every text has enough contrast, also while the
// connection is lost, and the two are not the same page.
func TestPageReadsInDarkAndLight(t *testing.T) {
	s := startServer(t, "--window=1s", "--kafka-brokers="+freePort(t))
	l := s.load(2 * time.Millisecond)
	var light, dark *page
	backgrounds := map[string]bool{}
	for scheme, p := range map[string]**page{"light": &light, "dark": &dark} {
		*p = open(t, s, 1280, 900, scheme)
		(*p).until(`document.querySelector('[data-check="kafka"]')?.dataset.light === "warn"`)
		for _, bad := range value[[]string](*p, contrasts) {
			t.Errorf("%s: too little contrast: %s", scheme, bad)
		}
		backgrounds[value[string](*p, `getComputedStyle(document.body).backgroundColor`)] = true
	}
	if len(backgrounds) != 2 {
		t.Errorf("dark and light have the same background: %v", backgrounds)
	}
	l.stop()
	dark.connectionMayFail()
	light.connectionMayFail()
	s.end(syscall.SIGKILL)
	for _, p := range []*page{light, dark} {
		p.until(`!document.querySelector("#lost").hidden`)
		for _, bad := range value[[]string](p, contrasts) {
			t.Errorf("lost: too little contrast: %s", bad)
		}
	}
	// A change while the page is open is followed, by the charts too.
	ink := func() string { return value[string](light, `getComputedStyle(document.body).color`) }
	before := ink()
	light.prefer("dark")
	light.until(`getComputedStyle(document.body).color !== ` + strconv.Quote(before))
	if n := value[int](light, `document.querySelectorAll(".uplot").length`); n != 2 {
		t.Errorf("%d charts after the change", n)
	}
}

// TestPageNeedsNoMouse: all of it is reached by the keyboard, seen when it is,
// and named for those who do not see it.
func TestPageNeedsNoMouse(t *testing.T) {
	s := startServer(t, "--window=1s")
	l := s.load(time.Millisecond)
	defer l.stop()
	p := open(t, s, 1280, 900, "light")
	p.until(`+document.querySelector('.legend [data-state="delivered"] span').textContent >= 4`)

	var order []string
	for range 20 {
		p.do(chromedp.KeyEvent(kb.Tab))
		at := value[string](p, `document.activeElement.id || document.activeElement.textContent`)
		if at == "" || len(order) > 0 && at == order[0] || value[bool](p, `document.activeElement === document.body`) {
			break
		}
		order = append(order, at)
		if outline := value[string](p, `getComputedStyle(document.activeElement).outlineStyle`); outline == "none" {
			t.Errorf("%s does not show that it has the focus", at)
		}
	}
	want := "Skip to the figures|rates|windows|Show these windows as a table|windows|readiness|metrics|profiles"
	if got := strings.Join(order, "|"); got != want {
		t.Errorf("the keys lead to\n%s\nwant\n%s", got, want)
	}

	for _, id := range []string{"windows", "rates"} {
		p.do(chromedp.Focus(chromedp.CSS("#" + id)))
		said := func() string {
			return value[string](p, `document.querySelector("#`+id+`").getAttribute("aria-valuetext")`)
		}
		p.do(chromedp.KeyEvent(kb.Home))
		first := said()
		p.do(chromedp.KeyEvent(kb.ArrowRight))
		second := said()
		if first == second || !strings.Contains(first, " unique, ") {
			t.Errorf("%s: the arrow leads from %q to %q", id, first, second)
		}
	}
	p.do(chromedp.Focus(chromedp.CSS("summary")), chromedp.KeyEvent(kb.Enter))
	p.until(`document.querySelectorAll("#table tbody tr").length > 3`)

	sliders := 0
	for _, n := range call(p, accessibility.GetFullAXTree, accessibility.GetFullAXTreeParams{}).Nodes {
		var role, name string
		if n.Role != nil {
			_ = json.Unmarshal(n.Role.Value, &role)
		}
		if n.Name != nil {
			_ = json.Unmarshal(n.Name.Value, &name)
		}
		switch role {
		case "slider":
			sliders++
			fallthrough
		case "button", "link", "region", "table", "progressbar", "navigation":
			if name == "" && role != "table" && !n.Ignored {
				t.Errorf("a %s has no name", role)
			}
		}
	}
	if sliders != 2 {
		t.Errorf("%d charts for who does not see them, want 2", sliders)
	}
	if lang := value[string](p, `document.documentElement.lang`); lang != "en" {
		t.Errorf("language %q", lang)
	}
}

// TestPictures makes those of the documentation: an hour's worth of windows of a
// second under a load that varies, with callbacks.
func TestPictures(t *testing.T) {
	if os.Getenv("VERVE_TEST_SHOTS") == "" {
		t.Skip("no pictures are wanted")
	}
	s := startServer(t, "--window=1s", "--max-ids=10000")
	var stop atomic.Bool
	var wg sync.WaitGroup
	defer func() { stop.Store(true); wg.Wait() }()
	for w := range 8 {
		wg.Go(func() {
			client := http.Client{Transport: &http.Transport{}}
			defer client.CloseIdleConnections()
			for i := 0; !stop.Load(); i++ {
				id := i - i%(5+w)/3
				url := fmt.Sprintf("http://%s/api/verve/accept?id=%d%06d", s.public, w, id)
				if i%50 == 0 {
					url += "&endpoint=http://" + s.public + "/test"
				}
				if resp, err := client.Get(url); err == nil {
					_, _ = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
				swell := 1.6 + math.Sin(float64(time.Now().UnixMilli())/9000) + .3*math.Sin(float64(time.Now().UnixMilli())/1700)
				time.Sleep(time.Duration(swell * float64(time.Millisecond)))
			}
		})
	}
	time.Sleep(62 * time.Second)
	for scheme, size := range map[string][2]int64{"light": {1280, 900}, "dark": {1280, 900}} {
		p := open(t, s, size[0], size[1], scheme)
		p.until(`document.querySelectorAll(".uplot").length === 2`)
		time.Sleep(1500 * time.Millisecond)
		p.shot("load-" + scheme)
	}
	p := open(t, s, 360, 740, "dark")
	time.Sleep(1500 * time.Millisecond)
	p.shot("load-phone")
	p = open(t, s, 800, 900, "light")
	time.Sleep(1500 * time.Millisecond)
	p.shot("load-tablet")
}
