package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"verve/counter"
	"verve/dedup"
	"verve/internal/setting"
)

const (
	defaultWindows = 60   // of /api/windows
	maxWindows     = 1440 // a day of minutes

	adminHeaderTimeout = 5 * time.Second
	adminReadTimeout   = 10 * time.Second
	adminWriteTimeout  = 10 * time.Second // profiles have their own
	adminIdleTimeout   = time.Minute
	adminMaxHeader     = 16 << 10

	// adminGrace is how long answers under way may take when all else has stopped.
	adminGrace = 500 * time.Millisecond

	// maxProfiles bounds how many profiles are made at once: for some of them the request
	// sets how long that takes.
	maxProfiles = 8
)

// Records is what the admin listener shows about the delivery of records.
type Records struct {
	Published      uint64    // acknowledged by every sink
	Pending        int       // in the spool
	Oldest         time.Time // when the oldest of them was sealed; zero without one
	Poison         int       // dead letters: records that a sink will never take
	Conflicts      uint64    // keys found with another value
	AppendFailures uint64    // tries to make a record durable that failed
	Blocked        string    // why records cannot be made durable now; empty if they can
	Sinks          []Sink    // each sink, by its name
}

// Sink is where records are delivered to.
type Sink struct {
	Name    string `json:"name"`   // "kafka", "file"
	Target  string `json:"target"` // the topic and its brokers, or the path of the file
	Failing string `json:"-"`      // why it does not take records now; empty if it does
}

// AdminConfig of an Admin. Required are Listener, Server, Times, Records, Delivered, Group and
// Instance.
type AdminConfig struct {
	Listener  net.Listener                       // that it serves
	Server    *Server                            // the public listener to report about
	Times     *Times                             // filled by other parts
	Records   func() Records                     // the state of delivery; called for each page, concurrently
	Delivered func(windowStart time.Time) string // "spooled", "delivered", or "" if unknown
	Group     string                             // --group
	Instance  string                             // --instance
	Version   string                             // of the program; may be empty

	// LogDropped is how many lines of the log were dropped. Optional.
	LogDropped func() uint64

	// Shared returns the state of the group's Redis, and Sealed the count of a window
	// that was just closed in the whole group, if it is known. Both are nil if ids are in
	// memory.
	Shared func() dedup.GroupStats
	Sealed func(counter.Span) (counter.Count, bool) // see Shared

	// History is the path of the file that keeps the last windows for the next start.
	// Empty: they are only in memory.
	History string

	// Token is required of every request but probes, as a bearer token or, for
	// browsers, as the password of any user. Empty: none is required.
	Token string
}

// Admin serves health, readiness, metrics, windows, profiles and the live page, on a
// listener of its own. All methods are safe for concurrent use; Serve is called once, and
// returns after Shutdown.
type Admin struct {
	cfg     AdminConfig
	server  *Server
	http    http.Server
	live    *live
	history *history
	conns   *connLimit
	ln      *patientListener

	profiles chan struct{} // one for each that is being made

	stopping atomic.Bool
}

// NewAdmin makes the admin server. It reads cfg.History. The caller must Serve it.
func NewAdmin(cfg AdminConfig) *Admin {
	a := &Admin{
		cfg: cfg, server: cfg.Server, ln: newPatientListener(cfg.Listener, "admin", cfg.Server.cfg.Log), profiles: make(chan struct{}, maxProfiles),
		conns: &connLimit{max: cfg.Server.cfg.limits.MaxAdmin, conns: map[net.Conn]time.Time{}},
	}
	a.live = newLive(a)
	a.history = openHistory(cfg.History, cfg.Group, cfg.Instance, cfg.Server.cfg.Log)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", a.healthz)
	mux.HandleFunc("GET /readyz", a.readyz)
	mux.HandleFunc("GET /metrics", a.metrics)
	mux.HandleFunc("GET /api/windows", a.windows)
	mux.HandleFunc("GET /api/windows/{window_start}/keys", a.keys)
	mux.HandleFunc("GET /api/live", a.live.serve)
	mux.HandleFunc("GET /debug/pprof/", a.profile(pprof.Index))
	mux.HandleFunc("GET /debug/pprof/cmdline", a.profile(commandName))
	mux.HandleFunc("GET /debug/pprof/profile", a.profile(pprof.Profile))
	mux.HandleFunc("GET /debug/pprof/symbol", a.profile(pprof.Symbol))
	mux.HandleFunc("GET /debug/pprof/trace", a.profile(pprof.Trace))
	mux.HandleFunc("GET /{$}", a.index)
	a.http = http.Server{
		Handler:           unstored(bodiless(guarded(cfg.Token, mux))),
		ConnState:         a.conns.changed,
		MaxHeaderBytes:    adminMaxHeader,
		ReadHeaderTimeout: adminHeaderTimeout,
		ReadTimeout:       adminReadTimeout,
		WriteTimeout:      adminWriteTimeout,
		IdleTimeout:       adminIdleTimeout,
	}
	return a
}

// CheckToken refuses a token that no client could send; none is fine. Its errors
// do not quote the token.
func CheckToken(token []byte) error {
	for _, b := range token {
		if b <= ' ' || b >= 0x7f {
			return setting.Errorf("admin-token-file", "want printable ASCII without space, as from: openssl rand -hex 32")
		}
	}
	return nil
}

// unstored forbids caches to keep an answer, because each is about this moment. Without it they
// might keep a 404 (RFC 9110, section 15.1). The live page sets another rule.
func unstored(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		next.ServeHTTP(w, r)
	})
}

// bodiless refuses a request with a body, which no route uses, and closes the connection: net/http
// would skip what is wrong in chunks. It does not wait for the body.
func bodiless(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 {
			w.Header().Set("Connection", "close")
			_ = http.NewResponseController(w).SetReadDeadline(time.Now()) // otherwise net/http reads the rest first
			http.Error(w, "a request here has no body", http.StatusBadRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// profile answers with a profile. The request may set how long that takes: pprof
// sets the deadline of the write, and net/http clears that of the read.
func (a *Admin) profile(make http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case a.profiles <- struct{}{}:
			defer func() { <-a.profiles }()
		default:
			w.Header().Set("Retry-After", retryAfter)
			http.Error(w, "too many profiles are running", http.StatusServiceUnavailable)
			return
		}
		make(w, r)
	}
}

// commandName is the command line of net/http/pprof without its arguments: one of them may
// have a password.
func commandName(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(w, "verve") // the client may be gone
}

// tokenless is set in the context of a request that came without the token.
type tokenless struct{}

// guarded answers 401 to requests without the token. Probes and load balancers have none:
// they learn whether the process is alive and ready, but not the reasons.
func guarded(token string, next http.Handler) http.Handler {
	if token == "" {
		return next
	}
	want := sha256.Sum256([]byte(token))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		scheme, given, _ := strings.Cut(r.Header.Get("Authorization"), " ")
		given = strings.TrimLeft(given, " ") // any number of them is one (RFC 9110, section 11.4)
		if !strings.EqualFold(scheme, "bearer") {
			spaced := http.Request{Header: http.Header{"Authorization": {scheme + " " + given}}}
			_, given, _ = spaced.BasicAuth()
		}
		// The hashes have the same length, so the time of the comparison reveals nothing.
		got := sha256.Sum256([]byte(given))
		switch {
		case subtle.ConstantTimeCompare(got[:], want[:]) == 1:
			next.ServeHTTP(w, r)
			return
		case r.URL.Path == "/healthz", r.URL.Path == "/readyz":
			next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), tokenless{}, true)))
			return
		}
		w.Header()["Www-Authenticate"] = []string{`Bearer realm="verve"`, `Basic realm="verve", charset="UTF-8"`}
		http.Error(w, "admin token required", http.StatusUnauthorized)
	})
}

// Serve answers until Shutdown.
func (a *Admin) Serve() error {
	ctx, stop := context.WithCancel(context.Background())
	var sampling sync.WaitGroup
	sampling.Go(func() { a.live.run(ctx) })
	defer sampling.Wait()
	defer stop()
	if err := a.http.Serve(a.ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// WindowClosed adds the count of a published epoch to the windows that are shown, and writes it
// into the file for the next start.
func (a *Admin) WindowClosed(c counter.Count) {
	w := window{
		Start: c.Start, MS: c.Window.Milliseconds(), Unique: c.Unique, Duplicates: c.Repeats,
		Complete: c.Complete, Exact: c.Exact, Keys: c.Keys.Len(),
	}
	keys := c.Keys
	if a.cfg.Sealed != nil {
		if g, ok := a.cfg.Sealed(c.Span()); ok {
			w.WholeGroup = &groupWindow{g.Unique, g.Keys.Len(), g.Complete, g.Exact}
			if g.Keys.Len() > 0 {
				keys = g.Keys
			}
		}
	}
	w.largest = keys.Largest(maxShownKeys)
	w.cut = !w.Start.Before(a.server.cfg.Counter.Last().Start()) // no later epoch has been opened
	a.history.add(w)
}

// NotReady makes /readyz answer 503 from now on: the first thing at a stop.
func (a *Admin) NotReady() { a.stopping.Store(true) }

// Shutdown ends the listener. Answers under way have adminGrace, or until ctx ends.
func (a *Admin) Shutdown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, adminGrace)
	defer cancel()
	if err := a.http.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return a.http.Close() // connections that are left would delay the end of the process
}

func (a *Admin) healthz(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain")
	_, _ = w.Write(bodyOK) // the client may be gone
}

// check is the state of one dependency.
type check struct {
	OK     bool   `json:"ok"`
	Reason string `json:"reason,omitempty"`
}

// readiness is the answer of /readyz.
type readiness struct {
	Ready     bool             `json:"ready"`
	Checks    map[string]check `json:"checks"`
	Pending   int              `json:"records_pending"`
	OldestAge float64          `json:"records_oldest_age_seconds"`

	// Names of the checks that fail, sorted: those that make this instance not
	// ready, and the others.
	blocking, failing []string
}

// add adds the outcome of a check; reason is empty if it succeeded. needed: if it failed, the
// instance is not ready.
func (r *readiness) add(name, reason string, needed bool) {
	r.Checks[name] = check{reason == "", reason}
	switch {
	case reason == "":
	case needed:
		r.Ready = false
		r.blocking = append(r.blocking, name)
	default:
		r.failing = append(r.failing, name)
	}
}

// readyz answers whether requests should be sent here, and why not.
func (a *Admin) readyz(w http.ResponseWriter, req *http.Request) {
	r := a.readiness()
	status := http.StatusOK
	if !r.Ready {
		status = http.StatusServiceUnavailable
	}
	if req.Context().Value(tokenless{}) != nil {
		writeJSON(w, status, map[string]bool{"ready": r.Ready})
		return
	}
	writeJSON(w, status, r)
}

// readiness checks every dependency. A sink that fails is shown, but the instance is
// still ready: ids are answered without it, and their records wait in the spool. The
// instance is not ready if it cannot answer ids or write the spool, or if its clock cannot
// be trusted: other instances would count the ids in other windows.
func (a *Admin) readiness() readiness {
	rec := a.cfg.Records()
	r := readiness{Ready: true, Checks: map[string]check{}, Pending: rec.Pending, OldestAge: age(rec.Oldest)}
	problem := a.server.ln.problem()
	if a.stopping.Load() {
		problem = "shutting down"
	}
	r.add("server", problem, true)
	r.add("clock", a.server.cfg.Counter.Stats().Clock.Problem, true)
	r.add("dedup", a.server.cfg.Set.Stats().Problem, true)
	r.add("spool", rec.Blocked, true)
	for _, k := range rec.Sinks {
		r.add(k.Name, k.Failing, false)
	}
	if p := a.ln.problem(); p != "" {
		r.add("admin", p, false) // this very request was accepted
	}
	if a.cfg.Shared != nil { // Ready is set if ids are answered without Redis
		g := a.cfg.Shared()
		r.add("redis", g.Away, !g.Ready)
		r.Ready = r.Ready && g.Ready
	}
	// If ids are refused because of Redis, both checks have the same fault: it is named once.
	if r.Checks["dedup"] == r.Checks["redis"] {
		r.blocking = slices.DeleteFunc(r.blocking, func(name string) bool { return name == "dedup" && slices.Contains(r.blocking, "redis") })
	}
	slices.Sort(r.blocking)
	slices.Sort(r.failing)
	return r
}

// windows lists the open epoch and the last closed ones, the newest first.
func (a *Admin) windows(w http.ResponseWriter, r *http.Request) {
	limit, ok := limitOf(w, r, defaultWindows, maxWindows)
	if !ok {
		return
	}
	writeJSON(w, http.StatusOK, a.recent(limit))
}

// recentWindows is the answer of /api/windows.
type recentWindows struct {
	Group    string   `json:"group"`
	Instance string   `json:"instance"`
	Open     window   `json:"open"`
	Windows  []window `json:"windows"`
}

func (a *Admin) recent(limit int) recentWindows {
	closed := a.history.last(limit + 1) // read before Counter.Last, so the open epoch of now is not among them
	out := recentWindows{Group: a.cfg.Group, Instance: a.cfg.Instance, Open: openWindow(a.server.cfg.Counter.Last())}
	if part, ok := a.earlierPart(&out.Open, closed); ok {
		if part.hasKeys() {
			out.Open.largest = a.live.largest(time.Now())
		}
		out.Open.include(part)
		closed = closed[1:]
	}
	out.Windows = closed[:min(limit, len(closed))]
	if a.cfg.Shared != nil {
		out.Open.WholeGroup = &groupWindow{Unique: out.Open.Unique, Exact: out.Open.Exact}
		if g := a.cfg.Shared(); g.Start.Equal(out.Open.Start) { // else the epoch is being turned
			out.Open.WholeGroup.Unique = max(g.Unique, out.Open.Unique)
		}
	}
	for i := range out.Windows {
		out.Windows[i].State = a.state(&out.Windows[i])
	}
	return out
}

// openWindow is what this process has counted in the open window.
func openWindow(e *counter.Epoch) window {
	return window{
		Start: e.Start(), MS: e.Window().Milliseconds(),
		Unique: e.Unique(), Duplicates: e.Repeats(), Keys: e.Keys().Len(), Exact: e.Exact(), State: "open",
	}
}

// earlierPart returns what earlier processes have counted in the open window, if any have: the
// newest of the closed windows is then a part of the open one.
func (a *Admin) earlierPart(open *window, closed []window) (part window, ok bool) {
	if len(closed) == 0 || !a.server.cfg.Counter.Taking() || !closed[0].same(open) {
		return part, false
	}
	return closed[0], true
}

// state returns the state of a closed window's record. The spool does not have the records
// of an earlier process that were delivered. In a group another instance may have the others.
func (a *Admin) state(w *window) string {
	state := a.cfg.Delivered(w.Start)
	switch {
	case w.restored && a.cfg.Shared == nil && state == "":
		return "delivered"
	case state == "", w.restored && a.cfg.Shared != nil && state == "delivered":
		return "sealed"
	}
	return state
}

func (a *Admin) metrics(w http.ResponseWriter, _ *http.Request) {
	var page bytes.Buffer
	a.writeMetrics(&page)
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	_, _ = w.Write(page.Bytes())
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n'))
}
