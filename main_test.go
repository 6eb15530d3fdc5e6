package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// TestMain lets the test binary be verve itself: what is tested is the program,
// with its signals and exit codes.
func TestMain(m *testing.M) {
	if os.Getenv("VERVE_TEST_BE_VERVE") == "1" {
		if os.Getenv("TEST_PANIC") != "" {
			time.AfterFunc(time.Second, func() { panic("as the test wants it") })
		}
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// verve returns the command, not yet started, in a directory of its own.
func verve(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, args...)
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "VERVE_TEST_BE_VERVE=1")
	return cmd
}

// instance is a verve that serves.
type instance struct {
	*exec.Cmd
	t             *testing.T
	public, admin string
	log           *bufio.Scanner
	lines         []string // of the log, as far as read
}

func start(t *testing.T, args ...string) *instance {
	t.Helper()
	cmd := verve(t, append([]string{"--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json"}, args...)...)
	return startCmd(t, cmd)
}

func startCmd(t *testing.T, cmd *exec.Cmd) *instance {
	t.Helper()
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	v := &instance{Cmd: cmd, t: t}
	v.begin(stderr)
	v.awaitListening()
	return v
}

// begin starts the process, whose log comes from stderr.
func (v *instance) begin(stderr io.Reader) {
	v.t.Helper()
	if err := v.Start(); err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { _ = v.Process.Kill() })
	if w, ok := v.Stderr.(*os.File); ok {
		_ = w.Close() // the process has it
	}
	v.log = bufio.NewScanner(stderr)
	v.log.Buffer(nil, 2<<20) // a line may be a dump of all goroutines
}

// awaitListening reads the log up to the addresses.
func (v *instance) awaitListening() {
	v.t.Helper()
	var listening struct{ Listen, Admin string }
	if err := json.Unmarshal([]byte(v.until(`"message":"listening"`)), &listening); err != nil {
		v.t.Fatal(err)
	}
	v.public, v.admin = "http://"+listening.Listen, "http://"+listening.Admin
}

// until reads the log up to a line that holds part.
func (v *instance) until(part string) string {
	v.t.Helper()
	for v.log.Scan() {
		v.lines = append(v.lines, v.log.Text())
		if strings.Contains(v.log.Text(), part) {
			return v.log.Text()
		}
	}
	v.t.Fatalf("the log ended without %s:\n%s", part, strings.Join(v.lines, "\n"))
	return ""
}

// stop sends SIGTERM and returns the exit code.
func (v *instance) stop() int {
	v.t.Helper()
	if err := v.Process.Signal(syscall.SIGTERM); err != nil {
		v.t.Fatal(err)
	}
	for v.log.Scan() { // to its end: a full pipe would hold the process
		v.lines = append(v.lines, v.log.Text())
	}
	var exit *exec.ExitError
	if err := v.Wait(); err != nil && !errors.As(err, &exit) {
		v.t.Fatal(err)
	}
	return v.ProcessState.ExitCode()
}

// signalUntilEnd repeats SIGTERM until the log ends, as a first repeat can come
// too soon to be taken for a second signal.
func (v *instance) signalUntilEnd() int {
	v.t.Helper()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for v.log.Scan() {
		}
	}()
	for {
		_ = v.Process.Signal(syscall.SIGTERM) // may have ended
		select {
		case <-ended:
			_ = v.Wait() // the exit code says it
			return v.ProcessState.ExitCode()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (v *instance) get(url string) (int, string) {
	v.t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		v.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		v.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

type recordLine struct {
	Start    time.Time `json:"window_start"`
	MS       int64     `json:"window_ms"`
	Unique   int       `json:"unique"`
	Instance string    `json:"instance"`
	Seq      int       `json:"seq"`
	Complete bool      `json:"complete"`
}

func records(t *testing.T, file string) (out []recordLine) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for l := range bytes.Lines(b) {
		var r recordLine
		if err := json.Unmarshal(l, &r); err != nil {
			t.Fatalf("%s: %v", l, err)
		}
		out = append(out, r)
	}
	return out
}

// TestFirstMinute is the README's: the first lines say how to try it, and what
// they say works.
func TestFirstMinute(t *testing.T) {
	v := start(t, "--window=1h")
	var urls []string
	for range 2 {
		line := v.until(`"message":"try: curl`)
		m := regexp.MustCompile(`curl '([^']+)'`).FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("no curl command in %s", line)
		}
		urls = append(urls, m[1])
	}
	for _, url := range urls {
		if status, body := v.get(url); status != 200 || body != "ok" {
			t.Errorf("%s: first got %d %q", url, status, body)
		}
		if status, body := v.get(url); status != 409 || body != "failed" {
			t.Errorf("%s: again got %d %q", url, status, body)
		}
	}
	health := verve(t, "healthcheck", "--admin-listen="+strings.TrimPrefix(v.admin, "http://"))
	if out, err := health.CombinedOutput(); err != nil {
		t.Errorf("healthcheck: %v %s", err, out)
	}
	if code := v.stop(); code != 0 {
		t.Errorf("exit code %d after SIGTERM\n%s", code, strings.Join(v.lines, "\n"))
	}
	got := records(t, filepath.Join(v.Dir, "verve-data", "counts.jsonl"))
	if len(got) != 1 || got[0].Unique != 2 || got[0].Complete || got[0].Seq != 1 {
		t.Errorf("records: %+v, want one with 2 ids, not complete", got)
	}
	health = verve(t, "healthcheck", "--admin-listen="+strings.TrimPrefix(v.admin, "http://"))
	if err := health.Run(); err == nil || health.ProcessState.ExitCode() != 1 {
		t.Errorf("healthcheck of a stopped server: %v", err)
	}
}

// TestRestartKeepsNameAndSequence: the data directory, not the host, is the
// instance; its records are numbered without a gap.
func TestRestartKeepsNameAndSequence(t *testing.T) {
	dir := t.TempDir()
	for i := range 3 {
		args := []string{"--window=1h", "--data-dir=" + dir}
		if i == 0 {
			args = append(args, "--instance=first-name")
		}
		v := start(t, args...)
		v.get(v.public + "/api/verve/accept?id=" + fmt.Sprint(i))
		if code := v.stop(); code != 0 {
			t.Fatalf("exit code %d\n%s", code, strings.Join(v.lines, "\n"))
		}
	}
	got := records(t, filepath.Join(dir, "counts.jsonl"))
	if len(got) != 3 {
		t.Fatalf("got %d records, want 3", len(got))
	}
	for i, r := range got {
		if r.Seq != i+1 || r.Instance != "first-name" || r.Unique != 1 {
			t.Errorf("record %d: %+v", i, r)
		}
	}
	totals := verve(t, "totals", "--data-dir="+dir)
	out, err := totals.Output()
	if err != nil || bytes.Count(out, []byte("\n")) > 2 || !bytes.Contains(out, []byte(`"records":`)) {
		t.Errorf("totals: %v\n%s", err, out)
	}
}

func TestSecondProcessDoesNotTouchTheDataDirectory(t *testing.T) {
	v := start(t, "--window=1h")
	second := verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--data-dir="+filepath.Join(v.Dir, "verve-data"))
	out, err := second.CombinedOutput()
	if err == nil || second.ProcessState.ExitCode() != 1 || bytes.Count(out, []byte("\n")) != 1 {
		t.Errorf("got %v, exit %d:\n%s", err, second.ProcessState.ExitCode(), out)
	}
	if first := fmt.Sprintf("in use by process %d\n", v.Process.Pid); !bytes.Contains(out, []byte(first)) {
		t.Errorf("want %q; got %s", first, out)
	}
	if code := v.stop(); code != 0 {
		t.Errorf("the first: exit code %d", code)
	}
}

// TestLibrariesPrintNoLinesOfTheirOwn: a command writes nothing but its output, and
// what a library prints while the server runs is a line of the server's log.
func TestLibrariesPrintNoLinesOfTheirOwn(t *testing.T) {
	cmd := verve(t, "version")
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(stdout.String(), "verve ") || strings.Count(stdout.String(), "\n") != 1 || stderr.Len() > 0 {
		t.Errorf("verve version writes %q and to standard error %q, want one line and none", stdout.String(), stderr.String())
	}

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

// TestFlagOverEnvironmentOverFile holds the order of the settings' sources.
func TestFlagOverEnvironmentOverFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "settings.json")
	if err := os.WriteFile(path, []byte(`{"window": "3s", "group": "file", "instance": "file", "max-ids": 5, "callback-allow": ["a.example.com:1", "b.example.com:2"]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("VERVE_CONFIG", path)
	t.Setenv("VERVE_GROUP", "env")
	t.Setenv("VERVE_INSTANCE", "env")
	c, command, err := parse([]string{"--instance=flag"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprint(command, " ", c.Window, c.Group, c.Instance, c.MaxIDs, c.CallbackAllow, c.KafkaTopic)
	if want := "serve 3senvflag5 [a.example.com:1 b.example.com:2]verve.unique-ids"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestEachWindowIsOneLine of the log, with what matters of it.
func TestEachWindowIsOneLine(t *testing.T) {
	v := start(t, "--window=200ms")
	for range 3 {
		v.get(v.public + "/api/verve/accept?id=1")
	}
	var windows []string
	var sum uint64
	for len(windows) < 4 {
		line := v.until(`"message":"window published"`)
		var w struct {
			Start      string `json:"window_start"`
			Unique     uint64
			Duplicates uint64
			PerSecond  float64 `json:"per_second"`
			Complete   bool
			Exact      bool
			Waiting    *int     `json:"earlier_pending"`
			Late       *float64 `json:"late_ms"`
			Took       *float64 `json:"took_ms"`
		}
		if err := json.Unmarshal([]byte(line), &w); err != nil {
			t.Fatal(err)
		}
		if w.Waiting == nil || *w.Waiting != 0 || w.Took == nil || *w.Took < 0 || !w.Exact || w.Complete != (w.Late != nil) ||
			w.PerSecond != float64(w.Unique+w.Duplicates)*5 {
			t.Errorf("the line says %s", line)
		}
		sum += w.Unique + w.Duplicates
		windows = append(windows, w.Start)
	}
	for _, start := range windows {
		if n := strings.Count(strings.Join(v.lines, "\n"), `"window_start":"`+start+`"`); n != 1 {
			t.Errorf("%d lines name the window %s, want 1", n, start)
		}
	}
	if sum != 3 {
		t.Errorf("the lines tell of %d requests, want 3", sum)
	}
	v.stop()
}

// TestHelpNamesEverySetting with its environment variable.
func TestHelpNamesEverySetting(t *testing.T) {
	out, err := verve(t, "--help").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"--window", "VERVE_WINDOW", "--kafka-brokers", "VERVE_CALLBACK_ALLOW", "totals", "healthcheck", "version"} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("no %s in\n%s", want, out)
		}
	}
	out, err = verve(t, "version").Output()
	if err != nil || !strings.HasPrefix(string(out), "verve ") {
		t.Errorf("version: %v %s", err, out)
	}
}

// TestSecondSignalStopsAtOnce: a stop that waits for a broker can be cut short.
func TestSecondSignalStopsAtOnce(t *testing.T) {
	v := start(t, "--window=1h", "--kafka-brokers=127.0.0.1:9", "--shutdown-timeout=1h")
	v.get(v.public + "/api/verve/accept?id=1")
	if err := v.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	v.until(`"message":"stopping"`)
	if status, body := v.get(v.admin + "/readyz"); status != 503 || !strings.Contains(body, "shutting down") {
		t.Errorf("while stopping, readyz is %d %s", status, body)
	}
	if code := v.signalUntilEnd(); code != exitFailed {
		t.Errorf("exit code %d, want %d", code, exitFailed)
	}
	// The record is in the spool: the next start delivers it.
	next := start(t, "--window=1h", "--data-dir="+filepath.Join(v.Dir, "verve-data"), "--counts-file="+filepath.Join(v.Dir, "late.jsonl"))
	if code := next.stop(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	got := records(t, filepath.Join(v.Dir, "late.jsonl"))
	if len(got) != 2 || got[0].Unique != 1 || got[1].Unique != 0 {
		t.Errorf("records: %+v", got)
	}
}

// FuzzSettings: whatever is in a --config file is taken or refused with one line,
// and what is taken is printed as a file with the same effect.
func FuzzSettings(f *testing.F) {
	for _, s := range []string{
		"", "window: 2s", "group: x\nkafka-brokers: [a:1, b:2]\n", `{"window": "3s", "max-ids": 5}`, "callback-allow:\n  - a.lan:1\n  - 10.0.0.0/8:2\n",
		"window: 1e3", "a: b: c", "max-ids: -1", "max-ids: 18446744073709551615", "callback-rate: .nan", "group: {a: b}", "group: &a [*a]", "window: !!binary eA==", "listen: :0\nwindow-header: yes",
		"group: \"\\u0000\"", "instance: ' x '", "kafka-brokers: \"a,b\"", "callback-allow: [\"a,b:1\"]", "log-level: debug # x", "group: # nothing",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		path := filepath.Join(t.TempDir(), "settings.yaml")
		read := func(text []byte) (*config, error) {
			if err := os.WriteFile(path, text, 0o600); err != nil {
				t.Fatal(err)
			}
			c, _, err := parse([]string{"--config=" + path}, io.Discard)
			return c, err
		}
		first, err := read(file)
		if err != nil {
			var usage usageError
			if !errors.As(err, &usage) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("%q: %T %v", file, err, err)
			}
			return
		}
		var printed, again bytes.Buffer
		if err := first.print(&printed); err != nil {
			t.Fatalf("%q: %v", file, err)
		}
		if strings.Contains(printed.String(), "hidden@") {
			return // not meant to be read back
		}
		second, err := read(printed.Bytes())
		if err != nil {
			t.Fatalf("%q is printed as\n%s\nwhich is refused: %v", file, printed.String(), err)
		}
		if err := second.print(&again); err != nil {
			t.Fatal(err)
		}
		values := func(b *bytes.Buffer) string {
			return regexp.MustCompile(`(?m) +# \S+$`).ReplaceAllString(b.String(), "") // the sources differ
		}
		if values(&printed) != values(&again) {
			t.Fatalf("%q is printed as\n%s\nand read back as\n%s", file, printed.String(), again.String())
		}
	})
}
