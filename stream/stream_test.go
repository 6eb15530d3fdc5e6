package stream

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"verve/counter"
	"verve/internal/testproc"
)

func TestMain(m *testing.M) {
	if spec := os.Getenv(childEnv); spec != "" {
		child(spec)
	}
	testproc.Setup()
	os.Exit(m.Run())
}

// origin is the first window of the tests. It is in the past of any run: a
// broker refuses timestamps that are an hour ahead of its clock.
var origin = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)

// window is the count of the i-th window; its value tells it from every other.
func window(i int) counter.Count {
	start := origin.Add(time.Duration(i) * time.Minute)
	return counter.Count{
		Start: start, Window: time.Minute, Unique: uint64(1000 + i), Repeats: 7,
		Complete: true, Exact: true, SealedAt: start.Add(time.Minute + 12345678*time.Nanosecond),
	}
}

func testSpool(t *testing.T, dir string) *Spool {
	t.Helper()
	sp, err := OpenSpool(SpoolConfig{Dir: dir, Group: "verve", Instance: "host-1"})
	if err != nil {
		t.Fatal(err)
	}
	return sp
}

// running is a Stream whose Run has been started.
type running struct {
	*Stream
	spool *Spool
	stop  func()
}

func start(t *testing.T, dir string, cfg Config) running {
	t.Helper()
	if cfg.Scope == "" {
		cfg.Scope = ScopeInstance
	}
	sp := testSpool(t, dir)
	s, err := New(cfg, sp)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	stopped := false
	r := running{s, sp, func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		<-done
		s.Close()
		sp.Close()
	}}
	t.Cleanup(r.stop)
	return r
}

func (r running) publish(t *testing.T, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if err := r.Publish(context.Background(), window(i)); err != nil {
			t.Fatalf("publish window %d: %v", i, err)
		}
	}
}

func (r running) flush(t *testing.T, within time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	if err := r.Flush(ctx); err != nil {
		t.Fatalf("%v; stats %+v", err, r.Stats())
	}
}

// wantWindows checks that the records are those of windows 0 to n-1, in order,
// numbered from 1, each once.
func wantWindows(t *testing.T, got []Record, n int) {
	t.Helper()
	for i, r := range got {
		w := window(i)
		if i >= n || !r.WindowStart.Equal(w.Start) || r.Unique != w.Unique || r.Seq != uint64(i+1) {
			t.Fatalf("record %d of %d is %s with unique %d, want window %d", i, len(got), r.Key(), r.Unique, i)
		}
	}
	if len(got) != n {
		t.Fatalf("%d records, want %d", len(got), n)
	}
}

func readCounts(t *testing.T, path string) []Record {
	t.Helper()
	var out []Record
	for r, err := range ReadFile(context.Background(), path, false) {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, r)
	}
	return out
}

func TestNewNamesTheBadSetting(t *testing.T) {
	sp := testSpool(t, "")
	for want, cfg := range map[string]Config{
		"scope":         {},
		"brokers":       {Scope: ScopeGroup, Kafka: KafkaConfig{Brokers: []string{"nowhere"}, Topic: "t"}},
		"topic":         {Scope: ScopeGroup, Kafka: KafkaConfig{Brokers: []string{"h:1"}, Topic: "a b"}},
		"sasl":          {Scope: ScopeGroup, Kafka: KafkaConfig{Brokers: []string{"h:1"}, Topic: "t", User: "u"}},
		"user":          {Scope: ScopeGroup, Kafka: KafkaConfig{Brokers: []string{"h:1"}, Topic: "t", SASL: "plain"}},
		"password-file": {Scope: ScopeGroup, Kafka: KafkaConfig{Brokers: []string{"h:1"}, Topic: "t", SASL: "plain", User: "u"}},
		"SCRAM-SHA-512": {Scope: ScopeGroup, Kafka: KafkaConfig{Brokers: []string{"h:1"}, Topic: "t", SASL: "gssapi", User: "u", PasswordFile: "p"}},
	} {
		if _, err := New(cfg, sp); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an error about %q", err, want)
		}
	}
	for _, cfg := range []SpoolConfig{{}, {Group: "a/b"}, {Group: "g", Instance: "a\nb"}, {Group: strings.Repeat("g", 250)}} {
		if sp, err := OpenSpool(cfg); err == nil {
			sp.Close()
			t.Errorf("%+v accepted", cfg)
		}
	}
}

// stuck is a sink that never comes back before its context ends.
type stuck struct{}

func (stuck) deliver(ctx context.Context, _ []spooled) (int, error) {
	<-ctx.Done()
	return 0, ctx.Err()
}

func TestPublishIsNotSlowedByASink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sp := testSpool(t, t.TempDir())
		s, err := New(Config{Scope: ScopeInstance}, sp)
		if err != nil {
			t.Fatal(err)
		}
		s.sinks = []*worker{{sink: stuck{}, name: "stuck", stream: s}}
		if err := sp.attach([]string{"stuck"}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.Run(ctx) }()
		before := time.Now()
		for i := range 10 {
			if err := s.Publish(ctx, window(i)); err != nil {
				t.Fatal(err)
			}
		}
		if waited := time.Since(before); waited != 0 { // the bubble's clock
			t.Errorf("Publish waited %s", waited)
		}
		if got := s.spool.Delivered(window(9).Start); got != StateSpooled {
			t.Errorf("state %q, want %q", got, StateSpooled)
		}
		fctx, fcancel := context.WithTimeout(ctx, time.Second)
		defer fcancel()
		if err := s.Flush(fctx); err == nil || !strings.Contains(err.Error(), "10 records not delivered") {
			t.Errorf("flush: %v", err)
		}
		cancel()
		<-done
		s.Close()
		if err := sp.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestPublishLogsTheKeyOfEachRecord(t *testing.T) {
	var out bytes.Buffer
	s := start(t, "", Config{Log: zerolog.New(&out)})
	s.publish(t, 0, 1)
	var line map[string]any
	if err := json.Unmarshal(out.Bytes(), &line); err != nil {
		t.Fatalf("%v in %s", err, out.String())
	}
	got := fmt.Sprintln(line["level"], line["key"], line["unique"])
	if want := "debug verve/2026-11-01T00:00:00Z/host-1/1 1000\n"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	// Without a sink the line is all there is.
	if st := s.Stats(); st.Pending != 0 || st.Published != 1 {
		t.Errorf("stats %+v", st)
	}
	if got := s.spool.Delivered(window(5).Start); got != "" {
		t.Errorf("a window without a record is %q", got)
	}
	if got := s.spool.Delivered(window(0).Start); got != StateDelivered {
		t.Errorf("state %q", got)
	}
}

func TestPublishRetriesWhileTheSpoolIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sp, err := OpenSpool(SpoolConfig{Group: "g", Instance: "i"})
		if err != nil {
			t.Fatal(err)
		}
		sp.limit = 2
		path := filepath.Join(t.TempDir(), "counts.jsonl")
		s, err := New(Config{Scope: ScopeInstance, CountsFile: path}, sp)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 2 {
			if err := s.Publish(t.Context(), window(i)); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := s.Publish(ctx, window(2)); err == nil || !strings.Contains(err.Error(), "full") {
			t.Errorf("publish into a full spool: %v", err)
		}
		if st := s.Stats(); st.AppendError == "" || st.AppendFailures < 10 || st.Pending != 2 {
			t.Errorf("stats %+v", st)
		}
		rctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.Run(rctx) }()
		if err := s.Publish(t.Context(), window(2)); err != nil {
			t.Error(err)
		}
		if err := s.Flush(t.Context()); err != nil {
			t.Error(err)
		}
		if st := s.Stats(); st.AppendError != "" || firstError(st) != "" || st.Published != 3 {
			t.Errorf("stats %+v", st)
		}
		stop()
		<-done
		wantWindows(t, readCounts(t, path), 3)
	})
}

func TestWindowOlderThanTheLastIsRefusedAtOnce(t *testing.T) {
	s := start(t, t.TempDir(), Config{})
	s.publish(t, 5, 6)
	if err := s.Publish(t.Context(), window(4)); err == nil {
		t.Error("an older window was published")
	}
	if err := s.Publish(t.Context(), counter.Count{Start: window(9).Start}); err == nil {
		t.Error("a window without a length was published")
	}
	// A restart within the window publishes what is new in it.
	s.publish(t, 5, 6)
	if at, unique := lastWindow(s.spool); !at.Equal(window(5).Start) || unique != 2*window(5).Unique {
		t.Errorf("last window %s with %d", at, unique)
	}
}

func TestEachSinkHasItsOwnPlace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "counts.jsonl")
	// The file cannot be opened; standard output can.
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	s := start(t, dir, Config{CountsFile: path})
	good := &worker{sink: newFileSink("-", &out, 0, s.step), name: "good", stream: s.Stream}
	if err := s.spool.attach([]string{"file", "good"}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); good.run(ctx) }()
	s.publish(t, 0, 3)
	for {
		_, changed := s.spool.watch()
		s.spool.mu.Lock()
		delivered := s.spool.cursors["good"]
		s.spool.mu.Unlock()
		if delivered == 3 {
			break
		}
		<-changed
	}
	if st := s.Stats(); st.Pending != 3 || st.Published != 0 {
		t.Errorf("stats %+v", st)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	s.flush(t, time.Minute)
	cancel()
	<-done
	wantWindows(t, readCounts(t, path), 3)
	if st := s.Stats(); st.Pending != 0 || st.Published != 3 {
		t.Errorf("stats %+v", st)
	}
	if n := strings.Count(out.String(), "\n"); n != 3 {
		t.Errorf("%d lines on the other sink", n)
	}
}

// firstError is the reason to show first: what keeps records from the spool, else
// what keeps the first failing sink. Empty when nothing fails.
func firstError(s Stats) string {
	if s.AppendError != "" {
		return s.AppendError
	}
	for _, k := range s.Sinks {
		if k.Failing != "" {
			return k.Name + ": " + k.Failing
		}
	}
	return ""
}

// lastWindow returns the start of the last window that this instance has appended a
// record for, and the sum of its records.
func lastWindow(s *Spool) (time.Time, uint64) {
	p := s.Published()[s.Identity()]
	return p.Last, p.Unique
}
