package server

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"verve/counter"
)

const (
	// liveTick is how often pages get a message: as often as a person can read a growing
	// number.
	liveTick = 250 * time.Millisecond

	// liveRate is how often the rates are sampled, and liveRates how many samples
	// are kept for a page that is opened later.
	liveRate  = time.Second
	liveRates = 120

	liveWindows = 60

	// liveMaxStreams bounds the pages open at once: each costs a goroutine and,
	// four times a second, 2 KB.
	liveMaxStreams = 32

	// liveTenure is how long a page is open at least before another may replace it.
	liveTenure = 5 * time.Second

	// A reader that is liveBacklog messages behind, or takes longer than liveWriteTimeout
	// for one, is dropped: its page connects again and gets everything anew.
	liveBacklog      = 8
	liveWriteTimeout = 5 * time.Second
)

// The page, in its parts. They are put together once, so that what is sent is
// one file that needs nothing else.
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
	policy, etag  string
}

// livePage puts the page together. Its policy lets run what is in it and
// nothing else: the scripts and styles are named by their digests.
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
		etag: `"` + base64.RawURLEncoding.EncodeToString(sum[:12]) + `"`,
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
	h.Set("Cache-Control", "no-cache") // kept, but asked about
	h.Set("Vary", "Accept-Encoding")
	h.Set("ETag", p.etag)
	if r.Header.Get("If-None-Match") == p.etag {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	body := p.body
	if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		h.Set("Content-Encoding", "gzip")
		body = p.gzipped
	}
	_, _ = w.Write(body) // a peer that is gone is nobody's error
}

// liveMessage is one message to a page, without what the page has already.
type liveMessage struct {
	Time       int64     `json:"time"` // Unix ms; the page's own clock may be wrong
	All        bool      `json:"all,omitempty"`
	Group      string    `json:"group"`
	Instance   string    `json:"instance"`
	Version    string    `json:"version"`
	Started    int64     `json:"started"` // Unix ms
	PublicPort int       `json:"public_port,omitempty"`
	PublicTLS  bool      `json:"public_tls,omitempty"`
	Ready      readiness `json:"ready"`
	Open       window    `json:"open"`

	// Blocking are the checks because of which /readyz answers 503, Failing the
	// others that fail.
	Blocking []string `json:"blocking,omitempty"`
	Failing  []string `json:"failing,omitempty"`

	// Shared is there where the group counts as one.
	Shared *liveGroup `json:"shared,omitempty"`

	// Windows are all that are shown, the newest first; missing where none was
	// closed and none changed its state since the last message.
	Windows []window `json:"windows,omitempty"`

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
	Resident        uint64 `json:"resident_bytes,omitempty"` // memory of the process; 0 if the system does not tell

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

// live tells the pages that are open what happens.
type live struct {
	admin      *Admin
	tick       time.Duration
	maxStreams int
	tenure     time.Duration // of a stream, see liveTenure
	started    time.Time

	// mu guards what follows: a message goes to all streams or is part of the
	// first one of a stream that joins, so that none misses a sample.
	mu      sync.Mutex
	streams map[*liveStream]struct{}
	ended   bool
	rates   [][4]float64 // the last liveRates
	fresh   [][4]float64 // of them, those not yet in a message
	windows []byte       // the JSON of the windows last sent
	keys    []keyShare   // the largest keys of keysOf, looked for before keysDue
	keysOf  *counter.Epoch
	keysDue time.Time // when they are looked for again
	dropped uint64    // streams whose reader was too slow
	refused uint64    // streams over the limit

	resident atomic.Uint64 // memory of the process at the last sample

	// The sample before; only run uses it.
	sampled time.Time
	last    [3]uint64
}

// liveStream is one page. The channel is closed by whoever takes the stream out
// of live.streams.
type liveStream struct {
	messages chan []byte
	since    time.Time
}

// Messages to a page in the place of figures.
const (
	liveEnded = "The server is stopping."
	liveFull  = "Too many pages of this server are open."
)

func newLive(a *Admin) *live {
	return &live{admin: a, tick: liveTick, maxStreams: liveMaxStreams, tenure: liveTenure, started: time.Now(), streams: map[*liveStream]struct{}{}}
}

// run samples the rates and tells the pages until ctx ends.
func (l *live) run(ctx context.Context) {
	l.sample(time.Now())
	every(l.tick, ctx.Done(), func() {
		now := time.Now()
		if now.Sub(l.sampled) >= liveRate-l.tick/2 {
			l.sample(now)
		}
		l.broadcast(now)
	})
}

// sample adds the rates since the last sample.
func (l *live) sample(now time.Time) {
	c := l.admin.server.cfg.Counter.Stats()
	sums := [3]uint64{c.Unique, c.Repeats, l.admin.server.refusals()}
	if !l.sampled.IsZero() {
		seconds := now.Sub(l.sampled).Seconds()
		rate := [4]float64{float64(now.Unix())}
		for i := range sums {
			rate[i+1] = float64(sums[i]-l.last[i]) / seconds
		}
		l.mu.Lock()
		if len(l.rates) == liveRates {
			l.rates = append(l.rates[:0], l.rates[1:]...)
		}
		l.rates = append(l.rates, rate)
		l.fresh = append(l.fresh, rate)
		l.mu.Unlock()
	}
	l.sampled, l.last = now, sums
	l.resident.Store(residentBytes())
}

// broadcast tells all streams what is new, and drops those that are behind.
func (l *live) broadcast(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fresh := l.fresh
	l.fresh = nil
	if len(l.streams) == 0 {
		return
	}
	m := l.message(now)
	m.Rates = fresh
	windows, err := json.Marshal(m.Windows)
	if err == nil && bytes.Equal(windows, l.windows) {
		m.Windows = nil
	}
	l.windows = windows
	event := m.event()
	for s := range l.streams {
		select {
		case s.messages <- event:
		default:
			l.dropped++
			l.remove(s)
		}
	}
}

// largest returns the largest keys of the open epoch, as of some moment before now. l.mu is
// held.
func (l *live) largest(now time.Time) []keyShare {
	e := l.admin.server.cfg.Counter.Last()
	if e == l.keysOf && now.Before(l.keysDue) {
		return l.keys
	}
	began := time.Now()
	l.keys, l.keysOf = keyShares(e.Keys().Largest(liveKeys), e.Unique()), e
	l.keysDue = now.Add(max(liveRate, liveKeysRest*time.Since(began)))
	return l.keys
}

// message is everything but the rates. l.mu is held.
func (l *live) message(now time.Time) liveMessage {
	a := l.admin
	cb := a.server.callbacks.Stats()
	w := a.recent(liveWindows)
	r := a.readiness()
	ids := a.server.cfg.Set.Stats()
	m := liveMessage{
		Time: now.UnixMilli(), Group: w.Group, Instance: w.Instance, Version: a.cfg.Version,
		Started: l.started.UnixMilli(), Ready: r, Blocking: r.blocking, Failing: r.failing,
		Open: w.Open, Windows: w.Windows, RatesKept: liveRates, Sinks: append([]Sink{}, a.cfg.Records().Sinks...), // never null
		MaxIDs: ids.Fit, MaxIDsEstimated: ids.Estimated, IDBytes: ids.Bytes, MaxIDBytes: ids.MaxBytes, Resident: l.resident.Load(),
		Answers:   append(a.server.acceptResults(), a.server.otherRefusals()...),
		Callbacks: callbackResults(cb), CallbacksWaiting: cb.Waiting, CallbacksInFlight: cb.InFlight,
		BreakersOpen: cb.BreakersOpen, Connections: a.server.ln.open(), Batches: a.server.batches.answered.Load(),
		Keys: l.largest(now),
	}
	if a.cfg.Shared != nil {
		g := a.cfg.Shared()
		m.Shared = &liveGroup{g.Members, g.Leading}
	}
	if addr, ok := a.server.ln.Addr().(*net.TCPAddr); ok {
		m.PublicPort, m.PublicTLS = addr.Port, a.server.cfg.TLS != nil
	}
	return m
}

// residentBytes is the memory of the process that is in RAM; 0 if the system does
// not tell.
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

// event is m as a server-sent event.
func (m liveMessage) event() []byte {
	b, err := json.Marshal(m)
	if err != nil {
		b = fmt.Appendf(nil, "{%q:%q}", "error", err.Error())
	}
	return append(append([]byte("data: "), b...), "\n\n"...)
}

// join adds a stream, whose first message holds everything, or says why not.
func (l *live) join() (s *liveStream, refusal string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.ended:
		return nil, liveEnded
	case len(l.streams) >= l.maxStreams && !l.makeRoom():
		l.refused++
		return nil, liveFull
	}
	s = &liveStream{make(chan []byte, liveBacklog), time.Now()}
	m := l.message(time.Now())
	m.All = true
	// Those not yet broadcast are left to the next message.
	m.Rates = l.rates[:len(l.rates)-min(len(l.fresh), len(l.rates))]
	s.messages <- m.event()
	l.streams[s] = struct{}{}
	return s, ""
}

// makeRoom ends the stream whose reader is the furthest behind, else the one that has
// been open the longest, if that is liveTenure: pages that do not read lock no other
// out, and a page that was ended connects again. l.mu is held.
func (l *live) makeRoom() bool {
	var slowest, oldest *liveStream
	behind := 1 // one message may be on its way
	for s := range l.streams {
		if n := len(s.messages); n > behind {
			slowest, behind = s, n
		}
		if oldest == nil || s.since.Before(oldest.since) {
			oldest = s
		}
	}
	switch {
	case slowest != nil:
		l.dropped++
		l.remove(slowest)
		return true
	case oldest != nil && time.Since(oldest.since) > l.tenure:
		l.refused++
		l.remove(oldest)
		return true
	}
	return false
}

// leave ends a stream, if nothing else has. slow: its reader took too long for a message.
func (l *live) leave(s *liveStream, slow bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.streams[s]; !ok {
		return
	}
	if slow {
		l.dropped++
	}
	l.remove(s)
}

// remove ends a stream of l.streams. l.mu is held.
func (l *live) remove(s *liveStream) {
	delete(l.streams, s)
	close(s.messages)
}

// end ends all streams; no other may join.
func (l *live) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	for s := range l.streams {
		l.remove(s)
	}
}

// stats returns the streams open, and those dropped and refused so far.
func (l *live) stats() (open int, dropped, refused uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.streams), l.dropped, l.refused
}

// stream answers server-sent events until the reader goes, falls behind, or the
// server stops.
func (l *live) stream(w http.ResponseWriter, r *http.Request) {
	s, refusal := l.join()
	if s == nil {
		w.Header().Set("Retry-After", retryAfter)
		http.Error(w, refusal, http.StatusServiceUnavailable)
		return
	}
	slow := false
	defer func() { l.leave(s, slow) }()
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no") // nginx would hold it back
	control := http.NewResponseController(w)
	send := func(event []byte) error {
		// Without a deadline (no such writer outside of tests) it is the backlog
		// that ends a slow reader.
		_ = control.SetWriteDeadline(time.Now().Add(liveWriteTimeout))
		if _, err := w.Write(event); err != nil {
			return err
		}
		return control.Flush()
	}
	for {
		select {
		case <-r.Context().Done():
			return
		case event, ok := <-s.messages:
			if !ok {
				l.mu.Lock()
				ended := l.ended
				l.mu.Unlock()
				if ended {
					_ = send([]byte("event: end\ndata: " + liveEnded + "\n\n"))
				}
				return
			}
			if err := send(event); err != nil {
				slow = errors.Is(err, os.ErrDeadlineExceeded)
				return
			}
		}
	}
}
