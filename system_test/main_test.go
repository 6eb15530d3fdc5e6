package system_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"verve/internal/testproc"
)

// The exit codes of the program.
const (
	exitFailed = 1
	exitUsage  = 2
)

func TestMain(m *testing.M) {
	// The servers begin with the default of every signal, also where nohup started the tests.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	testproc.Main(m)
}

// TestFirstMinute is the README's: the first lines say how to try it, and what
// they say works.
func TestFirstMinute(t *testing.T) {
	t.Parallel()
	v := testproc.Start(t, "--window=1h")
	var urls []string
	for range 2 {
		line := v.Until(`"message":"try: curl`)
		m := regexp.MustCompile(`curl '([^']+)'`).FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("no curl command in %s", line)
		}
		urls = append(urls, m[1])
	}
	for _, url := range urls {
		if status, body := v.Get(url); status != 200 || body != "ok" {
			t.Errorf("%s: first got %d %q", url, status, body)
		}
		if status, body := v.Get(url); status != 409 || body != "failed" {
			t.Errorf("%s: again got %d %q", url, status, body)
		}
	}
	health := testproc.Verve(t, "healthcheck", "--admin-listen="+strings.TrimPrefix(v.Admin, "http://"))
	if out, err := health.CombinedOutput(); err != nil {
		t.Errorf("healthcheck: %v %s", err, out)
	}
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d after SIGTERM\n%s", code, v.Text())
	}
	got := testproc.Records(t, filepath.Join(v.Dir, "verve-data", "counts.jsonl"))
	if len(got) != 1 || got[0].Unique != 2 || got[0].Complete || got[0].Seq != 1 {
		t.Errorf("records: %+v, want one with 2 ids, not complete", got)
	}
	health = testproc.Verve(t, "healthcheck", "--admin-listen="+strings.TrimPrefix(v.Admin, "http://"))
	if err := health.Run(); err == nil || health.ProcessState.ExitCode() != 1 {
		t.Errorf("healthcheck of a stopped server: %v", err)
	}
}

// TestStopNamesTheStepThatFailed: the last of them that writes a file is not called a part
// that did not end.
func TestStopNamesTheStepThatFailed(t *testing.T) {
	t.Parallel()
	v := testproc.Start(t, "--window=1h")
	file := filepath.Join(v.Dir, "verve-data", "last-use.json")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(file, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if text := v.Text(); !strings.Contains(text, "could not be noted in last-use.json") || strings.Contains(text, "did not end in time") {
		t.Errorf("want the step by its name, got\n%s", text)
	}
}

// TestRestartKeepsNameAndSequence: the data directory, not the host, is the
// instance; its records are numbered without a gap.
func TestRestartKeepsNameAndSequence(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for i := range 3 {
		args := []string{"--window=1h", "--data-dir=" + dir}
		if i == 0 {
			args = append(args, "--instance=first-name")
		}
		v := testproc.Start(t, args...)
		v.Get(v.Public + "/api/verve/accept?id=" + fmt.Sprint(i))
		if code := v.Stop(); code != 0 {
			t.Fatalf("exit code %d\n%s", code, v.Text())
		}
	}
	got := testproc.Records(t, filepath.Join(dir, "counts.jsonl"))
	if len(got) != 3 {
		t.Fatalf("got %d records, want 3", len(got))
	}
	for i, r := range got {
		if r.Seq != i+1 || r.Instance != "first-name" || r.Unique != 1 {
			t.Errorf("record %d: %+v", i, r)
		}
	}
	totals := testproc.Verve(t, "totals", "--data-dir="+dir)
	out, err := totals.Output()
	if err != nil || bytes.Count(out, []byte("\n")) > 2 || !bytes.Contains(out, []byte(`"records":`)) {
		t.Errorf("totals: %v\n%s", err, out)
	}
}

func TestSecondProcessDoesNotTouchTheDataDirectory(t *testing.T) {
	t.Parallel()
	v := testproc.Start(t, "--window=1h")
	second := testproc.Verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--data-dir="+filepath.Join(v.Dir, "verve-data"))
	out, err := second.CombinedOutput()
	if err == nil || second.ProcessState.ExitCode() != 1 || bytes.Count(out, []byte("\n")) != 1 {
		t.Errorf("got %v, exit %d:\n%s", err, second.ProcessState.ExitCode(), out)
	}
	if first := fmt.Sprintf("in use by process %d\n", v.Process.Pid); !bytes.Contains(out, []byte(first)) {
		t.Errorf("want %q; got %s", first, out)
	}
	if code := v.Stop(); code != 0 {
		t.Errorf("the first: exit code %d", code)
	}
}

// TestCommandsWriteNothingButTheirOutput, whatever libraries print.
func TestCommandsWriteNothingButTheirOutput(t *testing.T) {
	t.Parallel()
	cmd := testproc.Verve(t, "version")
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(stdout.String(), "verve ") || strings.Count(stdout.String(), "\n") != 1 || stderr.Len() > 0 {
		t.Errorf("verve version writes %q and to standard error %q, want one line and none", stdout.String(), stderr.String())
	}
}

// TestEachWindowIsOneLine of the log, with what matters of it.
func TestEachWindowIsOneLine(t *testing.T) {
	t.Parallel()
	v := testproc.Start(t, "--window=200ms")
	for range 3 {
		v.Get(v.Public + "/api/verve/accept?id=1")
	}
	var windows []string
	var sum uint64
	for len(windows) < 4 || sum < 3 {
		line := v.Until(`"message":"window published"`)
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
		if w.Waiting == nil || *w.Waiting > len(windows) || w.Took == nil || *w.Took < 0 || !w.Exact || w.Complete != (w.Late != nil) ||
			w.PerSecond != float64(w.Unique+w.Duplicates)*5 {
			t.Errorf("the line says %s", line)
		}
		sum += w.Unique + w.Duplicates
		windows = append(windows, w.Start)
	}
	for _, start := range windows {
		if n := strings.Count(v.Text(), `"window_start":"`+start+`"`); n != 1 {
			t.Errorf("%d lines name the window %s, want 1", n, start)
		}
	}
	if sum != 3 {
		t.Errorf("the lines tell of %d requests, want 3", sum)
	}
	v.Stop()
}

// TestHelpNamesEverySetting with its environment variable.
func TestHelpNamesEverySetting(t *testing.T) {
	t.Parallel()
	out, err := testproc.Verve(t, "--help").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"--window", "VERVE_WINDOW", "--kafka-brokers", "VERVE_CALLBACK_ALLOW", "totals", "healthcheck", "version"} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("no %s in\n%s", want, out)
		}
	}
	out, err = testproc.Verve(t, "version").Output()
	if err != nil || !strings.HasPrefix(string(out), "verve ") {
		t.Errorf("version: %v %s", err, out)
	}
}

// TestSecondSignalStopsAtOnce: a stop that waits for a broker can be cut short.
func TestSecondSignalStopsAtOnce(t *testing.T) {
	t.Parallel()
	v := testproc.Start(t, "--window=1h", "--kafka-brokers=127.0.0.1:9", "--shutdown-timeout=1h")
	v.Get(v.Public + "/api/verve/accept?id=1")
	if err := v.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	v.AwaitStopping()
	if code := v.StopAtOnce(); code != exitFailed {
		t.Errorf("exit code %d, want %d", code, exitFailed)
	}
	// The record is in the spool: the next start delivers it.
	next := testproc.Start(t, "--window=1h", "--data-dir="+filepath.Join(v.Dir, "verve-data"), "--counts-file="+filepath.Join(v.Dir, "late.jsonl"))
	if code := next.Stop(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	got := testproc.Records(t, filepath.Join(v.Dir, "late.jsonl"))
	if len(got) != 2 || got[0].Unique != 1 || got[1].Unique != 0 {
		t.Errorf("records: %+v", got)
	}
}
