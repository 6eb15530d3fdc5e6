package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	stdlog "log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"verve/counter"
	"verve/stream"
)

// TestMain lets this test binary run as a server that crashes.
func TestMain(m *testing.M) {
	if os.Getenv("VERVE_TEST_CRASH") == "1" {
		time.AfterFunc(time.Second, func() { panic("as the test wants it") })
		main()
	}
	os.Exit(m.Run())
}

// TestCrashIsNoBadSetting: after exit code 2 a service manager does not start the
// server again, so a crash must end in another way.
func TestCrashIsNoBadSetting(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0")
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "VERVE_TEST_CRASH=1")
	out, _ := cmd.CombinedOutput() // ProcessState has how it ended
	if code := cmd.ProcessState.ExitCode(); code == 0 || code == exitFailed || code == exitUsage {
		t.Errorf("%v, want an end by a signal; it printed\n%s", cmd.ProcessState, out)
	}
}

// TestLibrariesPrintNoLinesOfTheirOwn: what a library prints while the server runs is
// a line of the server's log.
func TestLibrariesPrintNoLinesOfTheirOwn(t *testing.T) {
	flags := stdlog.Flags()
	defer func() { stdlog.SetOutput(os.Stderr); stdlog.SetFlags(flags) }()
	var b bytes.Buffer
	logLibraries(zerolog.New(&b))
	stdlog.Printf("ERROR: metrics: cannot read %s", "/proc/self/io")
	var line struct{ Level, Message string }
	if err := json.Unmarshal(b.Bytes(), &line); err != nil || line.Level != "warn" || line.Message != "ERROR: metrics: cannot read /proc/self/io" {
		t.Errorf("the log has %q, %v, want the line as a warning", b.String(), err)
	}
}

// TestTheStartNamesWhereRecordsGo: in the line "listening", with any settings.
func TestTheStartNamesWhereRecordsGo(t *testing.T) {
	for _, c := range []struct {
		brokers []string
		file    string
		want    string
	}{
		{nil, "", "counts file data/counts.jsonl"},
		{nil, "/var/counts.jsonl", "counts file /var/counts.jsonl"},
		{nil, "-", "standard output"},
		{nil, "off", "nowhere: there are no brokers, and --counts-file is off"},
		{[]string{"a:9092", "b:9092"}, "", "topic t at a:9092,b:9092"},
		{[]string{"a:9092"}, "-", "topic t at a:9092 and standard output"},
	} {
		cfg := &config{DataDir: "data", KafkaBrokers: c.brokers, KafkaTopic: "t", CountsFile: c.file}
		if got := cfg.recordsGo(); got != c.want {
			t.Errorf("brokers %q, counts file %q: got %q, want %q", c.brokers, c.file, got, c.want)
		}
	}
}

// TestKeysThatWaitFollowTheMemoryLimit: the spool in memory gets the limit of the process.
func TestKeysThatWaitFollowTheMemoryLimit(t *testing.T) {
	var keys []counter.KeyCount
	for i := range 10_000 { // 200 KB
		keys = append(keys, counter.KeyCount{Key: fmt.Sprintf("campaign-%06d", i), Unique: 1})
	}
	for memory, want := range map[uint64]bool{1 << 20: false, 1 << 30: true} {
		cfg, _, err := parse([]string{"--data-dir=none", "--instance=a", "--counts-file=" + filepath.Join(t.TempDir(), "counts.jsonl")}, os.Stdout)
		if err != nil {
			t.Fatal(err)
		}
		p := &program{cfg: cfg, log: zerolog.Nop(), memory: memory}
		if err := p.openRecords(); err != nil {
			t.Fatal(err)
		}
		// Nothing is delivered: the stream does not run.
		publish := func(n int) error {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			start := time.Unix(int64(n)*60, 0).UTC()
			return p.stream.Publish(ctx, counter.Count{Start: start, Window: time.Minute, Unique: 10_000, Keys: counter.KeyCountsOf(keys...), SealedAt: start.Add(time.Minute)})
		}
		if err := publish(1); err != nil {
			t.Errorf("with %d bytes, the first record: %v", memory, err)
		}
		if err := publish(2); (err == nil) != want {
			t.Errorf("with %d bytes, the second record: %v; want it to be taken: %t", memory, err, want)
		}
		p.close()
	}
}

// TestTotalsAreATableOnATerminal: its columns are aligned, also in rows that are printed later.
func TestTotalsAreATableOnATerminal(t *testing.T) {
	var out bytes.Buffer
	p := newTotalsPrinter(&out, true, false)
	at := time.Date(2026, 11, 22, 6, 36, 0, 0, time.UTC)
	whole := stream.WindowTotal{Group: "verve", Start: at, Window: time.Minute, Unique: 48211, Records: 2, Complete: true, Exact: true}
	part := stream.WindowTotal{Group: "verve", Start: at.Add(time.Minute), Window: time.Minute, Unique: 7, Records: 12}
	p.print(whole, nil)
	p.flush()
	p.print(part, nil)
	p.flush()
	want := "" +
		"WINDOW                GROUP           UNIQUE  RECORDS  NOTE\n" +
		"2026-11-22T06:36:00Z  verve            48211        2  \n" +
		"2026-11-22T06:37:00Z  verve                7       12  partial, not exact\n"
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}

	out.Reset()
	p = newTotalsPrinter(&out, true, true)
	p.print(whole, &stream.KeyTotal{Key: "campaign-7", Unique: 48000, Records: 2})
	p.print(whole, &stream.KeyTotal{Unique: 211, Records: 2})
	p.flush()
	p.print(part, &stream.KeyTotal{Key: "campaign-7", Unique: 7, Records: 1})
	p.flush()
	want = "" +
		"WINDOW                GROUP     KEY                         UNIQUE  RECORDS  NOTE\n" +
		"2026-11-22T06:36:00Z  verve     campaign-7                   48000        2  \n" +
		"2026-11-22T06:36:00Z  verve     (no key)                       211        2  \n" +
		"2026-11-22T06:37:00Z  verve     campaign-7                       7        1  partial, not exact\n"
	if out.String() != want {
		t.Errorf("by key: got\n%s\nwant\n%s", out.String(), want)
	}
}

// TestKeysCannotControlATerminal: a key may have any character except control bytes, and some
// other characters control a terminal, too.
func TestKeysCannotControlATerminal(t *testing.T) {
	const key, shown = "a\u009b2J\u202eé\ufeff", `a\u009b2J\u202eé\ufeff`
	var out bytes.Buffer
	p := newTotalsPrinter(&out, true, true)
	p.print(stream.WindowTotal{Group: "verve", Unique: 1, Records: 1}, &stream.KeyTotal{Key: key, Unique: 1, Records: 1})
	p.flush()
	r := totalsReport{err: &out}
	r.complain("repeat: %s is there twice", key)
	if n := strings.Count(out.String(), shown); n != 2 || strings.Contains(out.String(), "\u009b") {
		t.Errorf("want %s twice, got\n%q", shown, out.String())
	}
}

// TestWhatIsDoneIsNoTimeout: a stop whose time is over does not log a finished step as
// unfinished.
func TestWhatIsDoneIsNoTimeout(t *testing.T) {
	over, cancel := context.WithCancel(t.Context())
	cancel()
	done := make(chan struct{})
	if await(over, done) == nil {
		t.Error("what is not done is no failure")
	}
	close(done)
	for range 100 { // a select with two ready cases chooses one at random
		if err := await(over, done); err != nil {
			t.Fatal(err)
		}
	}
}

// TestHealthcheckDialsWhateverTheServerListensOn: --admin-listen may have the name of a port,
// and the zone of an address, which no URL may.
func TestHealthcheckDialsWhateverTheServerListensOn(t *testing.T) {
	for _, address := range []string{"127.0.0.1:gopher", "[fe80::1%lo]:gopher"} {
		if err := checkAddress("admin-listen", address); err != nil {
			t.Fatal(err)
		}
		if err := healthcheck(address); err == nil || !strings.Contains(err.Error(), "dial tcp") { // nothing listens there
			t.Errorf("%s: %v, want an attempt to dial it", address, err)
		}
	}
}
