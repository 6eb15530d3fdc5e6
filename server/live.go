package server

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"verve/counter"
)

const (
	// liveRate is how often the rates are sampled, and liveRates how many samples
	// are kept for a page that is opened later.
	liveRate  = time.Second
	liveRates = 120

	liveWindows = 60
)

// The parts of the page. They are put together once, so that one file is sent that
// needs nothing else.
var (
	//go:embed live/index.html
	liveHTML string
	//go:embed live/live.css
	liveCSS string
	//go:embed live/live.js
	liveJS string
	//go:embed live/uplot/uPlot.iife.min.js
	uplotJS string
	//go:embed live/uplot/uPlot.min.css
	uplotCSS string
	//go:embed live/uplot/LICENSE
	uplotLicence string
)

// page is a document with its headers.
type page struct {
	body, gzipped []byte
	policy, tag   string // Content-Security-Policy, and the ETag of body
}

// livePage puts the page together. Its policy names the scripts and styles in it by their
// digests, so that nothing else can run in it.
var livePage = sync.OnceValue(func() page {
	styles, stylesPolicy := inline("style", uplotCSS, liveCSS)
	scripts, scriptsPolicy := inline("script", uplotJS, liveJS)
	licence := "<!-- The charts are drawn by uPlot, https://github.com/leeoniya/uPlot\n\n" + uplotLicence + "-->\n"
	body := []byte(strings.NewReplacer("<!--styles-->", licence+styles, "<!--scripts-->", scripts).Replace(liveHTML))
	var gz bytes.Buffer
	z, _ := gzip.NewWriterLevel(&gz, gzip.BestCompression) // the level is valid
	_, _ = z.Write(body)
	_ = z.Close() // memory takes everything
	sum := sha256.Sum256(body)
	return page{
		body: body, gzipped: gz.Bytes(),
		policy: "default-src 'none'; script-src " + scriptsPolicy + "; style-src " + stylesPolicy +
			"; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
		tag: base64.RawURLEncoding.EncodeToString(sum[:12]),
	}
})

// inline returns the elements for parts and their digests for the policy.
func inline(element string, parts ...string) (html, policy string) {
	var digests []string
	for _, p := range parts {
		sum := sha256.Sum256([]byte(p))
		digests = append(digests, "'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+"'")
		html += "<" + element + ">" + p + "</" + element + ">\n"
	}
	return html, strings.Join(digests, " ")
}

// index answers the live page.
func (a *Admin) index(w http.ResponseWriter, r *http.Request) {
	p := livePage()
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", p.policy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cache-Control", "no-cache") // a browser may keep it, but checks each time whether it has changed
	h.Set("Vary", "Accept-Encoding")
	body, tag := p.body, p.tag
	if acceptsGzip(r.Header) {
		h.Set("Content-Encoding", "gzip")
		body, tag = p.gzipped, tag+"-gzip" // other bytes, another tag (RFC 9110, section 8.8.3.3)
	}
	h.Set("ETag", `"`+tag+`"`)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body)) // or 304, if the client has it
}

// acceptsGzip reports whether a client accepts gzip: it names gzip without a weight, or with one
// that is not zero (RFC 9110, section 12.5.3).
func acceptsGzip(h http.Header) bool {
	for item := range strings.SplitSeq(strings.Join(h.Values("Accept-Encoding"), ","), ",") {
		coding, weight, _ := strings.Cut(item, ";")
		if strings.EqualFold(strings.TrimSpace(coding), "gzip") {
			_, q, given := strings.Cut(weight, "=")
			return !given || strings.Trim(q, " \t0.") != ""
		}
	}
	return false
}

// liveAnswer is what the live page shows, less what the page has already.
type liveAnswer struct {
	recentWindows // no Windows if the page has them, in their present state

	Time       int64     `json:"time"` // Unix ms; the page's own clock may be wrong
	Version    string    `json:"version"`
	Started    int64     `json:"started"` // Unix ms
	PublicPort int       `json:"public_port,omitempty"`
	PublicTLS  bool      `json:"public_tls,omitempty"`
	Ready      readiness `json:"ready"`

	// Has is what the page has after this answer. It sends it back with its next request,
	// as the parameter of that name. All: this answer depends on no earlier one.
	Has string `json:"has"`
	All bool   `json:"all,omitempty"`

	// Blocking are the checks because of which /readyz answers 503, Failing the
	// others that fail.
	Blocking []string `json:"blocking,omitempty"`
	Failing  []string `json:"failing,omitempty"`

	// Shared is there if the group counts as one.
	Shared *liveGroup `json:"shared,omitempty"`

	// Keys are the largest keys of the open window; missing if no key was used in it.
	Keys []keyShare `json:"keys,omitempty"`

	// Rates are samples that the page does not have: Unix s, then unique,
	// duplicate and refused requests per second.
	Rates     [][4]float64 `json:"rates,omitempty"`
	RatesKept int          `json:"rates_kept"`

	// Sinks are where the records go.
	Sinks []Sink `json:"sinks"`

	// MaxIDs is how many ids the open window can hold, 0 if that is not known.
	MaxIDs          uint64 `json:"max_ids"`
	MaxIDsEstimated bool   `json:"max_ids_estimated,omitempty"`
	IDBytes         uint64 `json:"id_bytes"`
	MaxIDBytes      uint64 `json:"max_id_bytes,omitempty"`
	Resident        uint64 `json:"resident_bytes,omitempty"` // memory of the process; 0 if the system does not report it

	Answers           []resultCount `json:"answers"`
	Batches           uint64        `json:"batches"`
	Callbacks         []resultCount `json:"callbacks"`
	CallbacksWaiting  int           `json:"callbacks_waiting"`
	CallbacksInFlight int           `json:"callbacks_in_flight"`
	BreakersOpen      int           `json:"breakers_open"`
	Connections       int           `json:"connections"`
}

// liveGroup is what an instance knows of its group.
type liveGroup struct {
	Members int  `json:"members"`
	Leading bool `json:"leading"` // this instance publishes the records
}

// live answers /api/live. Each open page requests that several times a second.
type live struct {
	admin   *Admin
	started time.Time

	// mu guards what follows.
	mu      sync.Mutex
	rates   [][4]float64       // the last liveRates
	sampled int                // how many samples there have been
	keys    []counter.KeyCount // the largest keys of keysOf, as they were when last looked for
	keysOf  *counter.Epoch
	keysDue time.Time // when they may be looked for again

	// The sums at the last sample; only run uses them.
	at   time.Time
	sums [3]uint64
}

func newLive(a *Admin) *live { return &live{admin: a, started: time.Now()} }

// run samples the rates until ctx ends.
func (l *live) run(ctx context.Context) {
	l.sample(time.Now())
	every(liveRate, ctx.Done(), func() { l.sample(time.Now()) })
}

// sample adds the rates since the last sample.
func (l *live) sample(now time.Time) {
	c := l.admin.server.cfg.Counter.Stats()
	sums := [3]uint64{c.Unique, c.Repeats, l.admin.server.refusals()}
	if !l.at.IsZero() {
		seconds := now.Sub(l.at).Seconds()
		rate := [4]float64{float64(now.Unix())}
		for i := range sums {
			rate[i+1] = float64(sums[i]-l.sums[i]) / seconds
		}
		l.mu.Lock()
		l.rates = append(l.rates[max(0, len(l.rates)-liveRates+1):], rate)
		l.sampled++
		l.mu.Unlock()
	}
	l.at, l.sums = now, sums
}

// largest returns the largest keys of the open epoch, as they were when last looked for: see
// liveKeys.
func (l *live) largest(now time.Time) []counter.KeyCount {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.admin.server.cfg.Counter.Last()
	if e == l.keysOf && now.Before(l.keysDue) {
		return l.keys
	}
	began := time.Now()
	l.keys, l.keysOf = e.Keys().Counts().Largest(maxShownKeys), e
	l.keysDue = now.Add(max(liveRate, liveKeysRest*time.Since(began)))
	return l.keys
}

// everything returns the answer to a page that has nothing yet.
func (l *live) everything(now time.Time) liveAnswer {
	a := l.admin
	cb := a.server.cfg.Callbacks.Stats()
	r := a.readiness()
	ids := a.server.cfg.Set.Stats()
	m := liveAnswer{
		recentWindows: a.recent(liveWindows),
		Time:          now.UnixMilli(), All: true, Version: a.cfg.Version, Started: l.started.UnixMilli(),
		Ready: r, Blocking: r.blocking, Failing: r.failing,
		RatesKept: liveRates, Sinks: append([]Sink{}, a.cfg.Records().Sinks...), // never null
		MaxIDs: ids.Fit, MaxIDsEstimated: ids.Estimated, IDBytes: ids.Bytes, MaxIDBytes: ids.MaxBytes, Resident: residentBytes(),
		Answers:   append(a.server.acceptResults(), a.server.otherRefusals()...),
		Callbacks: callbackResults(cb), CallbacksWaiting: cb.Waiting, CallbacksInFlight: cb.InFlight,
		BreakersOpen: cb.BreakersOpen, Connections: a.server.ln.open(), Batches: a.server.batches.answered.Load(),
	}
	keys := m.Open.largest // with those of earlier processes
	if keys == nil {
		keys = l.largest(now)
	}
	m.Keys = keyShares(keys[:min(liveKeys, len(keys))], m.Open.Unique)
	if a.cfg.Shared != nil {
		g := a.cfg.Shared()
		m.Shared = &liveGroup{g.Members, g.Leading}
	}
	if addr, ok := a.server.ln.Addr().(*net.TCPAddr); ok {
		m.PublicPort, m.PublicTLS = addr.Port, a.server.cfg.TLS != nil
	}
	return m
}

// answer returns everything, less the windows and the rates that a page has already. has is
// liveAnswer.Has of the page's last answer.
func (l *live) answer(now time.Time, has string) liveAnswer {
	m := l.everything(now)
	b, _ := json.Marshal(m.Windows) // never fails: all fields can be encoded
	windows := crc32.ChecksumIEEE(b)
	l.mu.Lock()
	m.Rates = slices.Clone(l.rates)
	sampled := l.sampled
	l.mu.Unlock()
	m.Has = fmt.Sprintf("%d-%d-%d", m.Started, sampled, windows)

	var started int64
	var theirSampled int
	var theirWindows uint32
	if n, _ := fmt.Sscanf(has, "%d-%d-%d", &started, &theirSampled, &theirWindows); n == 3 && started == m.Started && theirSampled <= sampled {
		m.All = false
		m.Rates = m.Rates[max(0, len(m.Rates)-(sampled-theirSampled)):]
		if theirWindows == windows {
			m.Windows = nil
		}
	}
	return m
}

// residentBytes returns the memory of the process that is in RAM, in bytes; 0 if the system
// does not report it.
func residentBytes() uint64 {
	b, err := os.ReadFile("/proc/self/statm") // pages: all, resident, shared, ...
	if err != nil {
		return 0
	}
	fields := bytes.Fields(b)
	if len(fields) < 2 {
		return 0
	}
	pages, _ := strconv.ParseUint(string(fields[1]), 10, 64) // 0 if it is no number
	return pages * uint64(os.Getpagesize())
}

// serve answers /api/live.
func (l *live) serve(w http.ResponseWriter, r *http.Request) {
	writeJSON(w, http.StatusOK, l.answer(time.Now(), r.URL.Query().Get("has")))
}
