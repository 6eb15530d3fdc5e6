//go:build unix

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// testSignals are those that act on a server by the table. On Linux 32 to 34 belong
// to the threads of the C library.
func testSignals() (stop, ignored []syscall.Signal) {
	last := syscall.Signal(31)
	if runtime.GOOS == "linux" {
		last = lastSignal
	}
	for n := syscall.Signal(1); n <= last; n++ {
		switch {
		case slices.Contains(signalsLeft, signalName(n)), n >= 32 && n <= 34:
		case actOf(n).stop && n != syscall.SIGHUP: // the tests run at a terminal or at none
			stop = append(stop, n)
		default:
			ignored = append(ignored, n)
		}
	}
	return stop, ignored
}

// begin starts a server that is at no terminal.
func begin(t *testing.T, args ...string) *instance {
	t.Helper()
	v := start(t, args...)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the log:\n%s", strings.Join(v.lines, "\n"))
		}
	})
	return v
}

func (v *instance) signal(s syscall.Signal) {
	v.t.Helper()
	if err := v.Process.Signal(s); err != nil {
		v.t.Fatalf("%s: %v", signalName(s), err)
	}
}

// ended reads the log to its end and returns the exit code.
func (v *instance) ended() int {
	v.t.Helper()
	for v.log.Scan() {
		v.lines = append(v.lines, v.log.Text())
	}
	_ = v.Wait() // the exit code says it
	return v.ProcessState.ExitCode()
}

// wantOneRecord checks that the open window was published with its ids.
func (v *instance) wantOneRecord(unique int) {
	v.t.Helper()
	got := records(v.t, filepath.Join(v.Dir, "verve-data", "counts.jsonl"))
	if len(got) != 1 || got[0].Unique != unique || got[0].Complete {
		v.t.Errorf("records %+v, want one with %d ids, not complete", got, unique)
	}
}

// TestSignalsStopInOrder: each of those that stop, sent to a server with ids in its
// open window, ends it with exit code 0 and the window's record.
func TestSignalsStopInOrder(t *testing.T) {
	stop, _ := testSignals()
	if len(stop) < 8 {
		t.Fatalf("only %v stop", stop)
	}
	for _, s := range stop {
		t.Run(signalName(s), func(t *testing.T) {
			v := begin(t, "--window=1h")
			v.get(v.public + "/api/verve/accept?id=1")
			v.signal(s)
			if code := v.ended(); code != 0 {
				t.Fatalf("exit code %d (%v)", code, v.ProcessState)
			}
			v.wantOneRecord(1)
			dumps := strings.Count(strings.Join(v.lines, "\n"), `"goroutines":"goroutine `)
			if want := actOf(s).dump; want != (dumps == 1) {
				t.Errorf("%d dumps, want one: %v", dumps, want)
			}
		})
	}
}

// TestOtherSignalsAreIgnored: while the server runs, and while it stops.
func TestOtherSignalsAreIgnored(t *testing.T) {
	_, ignored := testSignals()
	if len(ignored) < 10 {
		t.Fatalf("only %v are ignored", ignored)
	}
	// Nobody takes the record: the stop lasts until the second SIGTERM.
	v := begin(t, "--window=1h", "--kafka-brokers=127.0.0.1:9", "--shutdown-timeout=1h")
	v.get(v.public + "/api/verve/accept?id=1")
	for i, s := range ignored {
		v.signal(s)
		if !actOf(s).silent {
			v.until(fmt.Sprintf(`"signal":%q`, signalName(s)))
		}
		if status, body := v.get(v.public + fmt.Sprint("/api/verve/accept?id=after-", i)); status != 200 {
			t.Fatalf("after %s: %d %s", signalName(s), status, body)
		}
	}
	v.signal(syscall.SIGTERM)
	v.until(`"message":"stopping"`)
	stop, _ := testSignals()
	for _, s := range append(ignored, stop...) {
		if actOf(s).insist {
			continue
		}
		v.signal(s)
		if status, body := v.get(v.admin + "/readyz"); status != 503 || !strings.Contains(body, "shutting down") {
			t.Fatalf("while stopping, after %s: %d %s", signalName(s), status, body)
		}
	}
	if code := v.signalUntilEnd(); code != exitFailed {
		t.Errorf("exit code %d after a second SIGTERM", code)
	}
}

// TestSignalsDuringTheStart: those that are ignored do not end a start that waits,
// here for a file of its data directory; one that stops takes effect when the start
// is over.
func TestSignalsDuringTheStart(t *testing.T) {
	waiting := func(t *testing.T, args ...string) (*instance, *os.File) {
		t.Helper()
		v, stderr := unstarted(t, append([]string{"--window=1h"}, args...)...)
		mark := filepath.Join(v.Dir, "verve-data", "spool.mark")
		if err := os.Mkdir(filepath.Dir(mark), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mkfifo(mark, 0o600); err != nil {
			t.Fatal(err)
		}
		v.begin(stderr)
		w, err := os.OpenFile(mark, os.O_WRONLY, 0) // returns when the server reads it
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = w.Close() })
		return v, w
	}
	t.Run("goes on", func(t *testing.T) {
		v, mark := waiting(t)
		_, ignored := testSignals()
		for _, s := range ignored {
			v.signal(s)
			if !actOf(s).silent {
				v.until(fmt.Sprintf(`"signal":%q`, signalName(s)))
			}
		}
		v.signal(syscall.SIGTERM)
		v.until(`"message":"stopping"`)
		_ = mark.Close()
		if code := v.ended(); code != 0 {
			t.Errorf("exit code %d\n%s", code, strings.Join(v.lines, "\n"))
		}
		v.wantOneRecord(0)
	})
	t.Run("never ends", func(t *testing.T) {
		v, _ := waiting(t, "--shutdown-timeout=10ms")
		v.signal(syscall.SIGTERM)
		if code := v.ended(); code != exitFailed || !strings.Contains(strings.Join(v.lines, "\n"), "the start was not finished in time") {
			t.Errorf("exit code %d\n%s", code, strings.Join(v.lines, "\n"))
		}
	})
}

// TestTotalsIntoAClosedPipeEndsQuietly, as every filter does.
func TestTotalsIntoAClosedPipeEndsQuietly(t *testing.T) {
	dir := t.TempDir()
	v := start(t, "--window=1h", "--data-dir="+dir)
	v.stop()
	totals := verve(t, "totals", "--data-dir="+dir)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	totals.Stdout, totals.Stderr = w, &said
	_ = r.Close()
	_ = totals.Run() // the state says it
	_ = w.Close()
	if status := totals.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != syscall.SIGPIPE || said.Len() > 0 {
		t.Errorf("%v: %q", totals.ProcessState, said.String())
	}
}

// TestReaderOfTheLogGoesAway: the server runs on, and stops in order.
func TestReaderOfTheLogGoesAway(t *testing.T) {
	v, stderr := unstarted(t, "--window=50ms")
	v.begin(stderr)
	v.awaitListening()
	_ = stderr.Close()
	v.awaitRecords(20)
	if status, body := v.get(v.public + "/api/verve/accept?id=1"); status != 200 {
		t.Errorf("got %d %s", status, body)
	}
	if _, page := v.get(v.admin + "/metrics"); strings.Contains(page, "\nverve_log_lines_dropped_total 0\n") {
		t.Error("no dropped lines are counted")
	}
	v.signal(syscall.SIGTERM)
	if code := v.ended(); code != 0 {
		t.Errorf("exit code %d (%v)", code, v.ProcessState)
	}
}

// unstarted is a server that logs into a pipe of the test's own.
func unstarted(t *testing.T, args ...string) (v *instance, stderr *os.File) {
	t.Helper()
	cmd := verve(t, append([]string{"--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json"}, args...)...)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = w
	t.Cleanup(func() { _ = r.Close() })
	return &instance{Cmd: cmd, t: t}, r
}

// awaitRecords waits until the counts file has n records.
func (v *instance) awaitRecords(n int) {
	v.t.Helper()
	file := filepath.Join(v.Dir, "verve-data", "counts.jsonl")
	deadline := time.Now().Add(time.Minute)
	for have := 0; have < n; time.Sleep(20 * time.Millisecond) {
		if b, err := os.ReadFile(file); err == nil {
			have = strings.Count(string(b), "\n")
		}
		if time.Now().After(deadline) {
			v.t.Fatalf("%d records after a minute, want %d", have, n)
		}
	}
}

// TestSignalTableIsDocumented: the table of docs/operations.md says of each signal
// what signalActs does with it.
func TestSignalTableIsDocumented(t *testing.T) {
	text, err := os.ReadFile("docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	effects := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| (`SIG[^|]*) \\| ([^|]*) \\|").FindAllStringSubmatch(string(text), -1) {
		for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
			effects[name[1]] = row[2]
		}
	}
	for _, name := range signalsLeft {
		if effect, ok := effects[name]; name != "SIGINFO" && (!ok || strings.Contains(effect, "stops")) { // which is BSD's
			t.Errorf("%s: documented as %q", name, effect)
		}
	}
	stop, ignored := testSignals()
	for _, s := range append(stop, ignored...) {
		name, act := signalName(s), actOf(s)
		effect, ok := effects[name]
		if !ok && s >= realTimeMin {
			continue // "the other real-time signals"
		}
		stops := strings.Contains(effect, "stops in order") && s != syscall.SIGHUP
		if !ok || stops != slices.Contains(stop, s) || act.insist != strings.Contains(effect, "a second one") ||
			act.dump != strings.Contains(effect, "goroutine") || act.silent == strings.Contains(effect, "with a line in the log") && !stops {
			t.Errorf("%s: %+v is documented as %q", name, act, effect)
		}
	}
}
