//go:build unix

package system_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"verve/internal/testproc"
)

// documented is a signal, and what docs/operations.md says that it does.
type documented struct {
	syscall.Signal
	name                 string
	insist, dump, silent bool
}

// documentedSignals reads the table of docs/operations.md: the signals that stop the
// server, and those that do nothing. A test of package main holds the table against
// the source. SIGHUP stops a server at a terminal; those here are at none.
func documentedSignals(t *testing.T) (stop, ignored []documented) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "docs", "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range regexp.MustCompile("(?m)^\\| (`SIG[^|]*) \\| ([^|]*) \\|").FindAllStringSubmatch(string(text), -1) {
		for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
			s := documented{Signal: unix.SignalNum(name[1]), name: name[1]}
			if name[1] == haltSignal.name {
				s.Signal = haltSignal.Signal
			}
			s.insist, s.dump = strings.Contains(row[2], "a second one"), strings.Contains(row[2], "goroutine")
			line := strings.Contains(row[2], "with a line in the log")
			switch {
			case s.Signal == 0: // of another system
			case strings.Contains(row[2], "stops in order") && s.Signal != syscall.SIGHUP:
				stop = append(stop, s)
			case line || strings.Contains(row[2], "ignored"):
				s.silent = !line
				ignored = append(ignored, s)
			}
		}
	}
	if runtime.GOOS == "linux" { // where 32 to 34 belong to the threads of the C library
		for n := syscall.Signal(35); n <= 64; n++ {
			if n != haltSignal.Signal {
				ignored = append(ignored, documented{Signal: n, name: fmt.Sprint("SIGRTMIN+", int(n)-34)})
			}
		}
	}
	return stop, ignored
}

// haltSignal has no name in package unix.
var haltSignal = documented{Signal: 34 + 3, name: "SIGRTMIN+3"}

// wantOneRecord checks that the open window was published with its ids.
func wantOneRecord(t *testing.T, v *testproc.Server, unique int) {
	t.Helper()
	got := testproc.Records(t, filepath.Join(v.Dir, "verve-data", "counts.jsonl"))
	if len(got) != 1 || got[0].Unique != unique || got[0].Complete {
		t.Errorf("records %+v, want one with %d ids, not complete", got, unique)
	}
}

// TestSignalsStopInOrder: each of those that stop, sent to a server with ids in its
// open window, ends it with exit code 0 and the window's record.
func TestSignalsStopInOrder(t *testing.T) {
	t.Parallel()
	stop, _ := documentedSignals(t)
	if len(stop) < 8 {
		t.Fatalf("only %v stop", stop)
	}
	for _, s := range stop {
		t.Run(s.name, func(t *testing.T) {
			v := testproc.Start(t, "--window=1h")
			v.Get(v.Public + "/api/verve/accept?id=1")
			v.Signal(s.Signal)
			if code := v.Ended(); code != 0 {
				t.Fatalf("exit code %d (%v)", code, v.ProcessState)
			}
			wantOneRecord(t, v, 1)
			dumps := strings.Count(v.Text(), `"goroutines":"goroutine `)
			if want := s.dump; want != (dumps == 1) {
				t.Errorf("%d dumps, want one: %v", dumps, want)
			}
		})
	}
}

// TestOtherSignalsAreIgnored: while the server runs, and while it stops.
func TestOtherSignalsAreIgnored(t *testing.T) {
	t.Parallel()
	_, ignored := documentedSignals(t)
	if len(ignored) < 10 {
		t.Fatalf("only %v are ignored", ignored)
	}
	// Nobody takes the record: the stop lasts until the second SIGTERM.
	v := testproc.Start(t, "--window=1h", "--kafka-brokers=127.0.0.1:9", "--shutdown-timeout=1h")
	v.Get(v.Public + "/api/verve/accept?id=1")
	for i, s := range ignored {
		v.Signal(s.Signal)
		if !s.silent {
			v.Until(fmt.Sprintf(`"signal":%q`, s.name))
		}
		if status, body := v.Get(v.Public + fmt.Sprint("/api/verve/accept?id=after-", i)); status != 200 {
			t.Fatalf("after %s: %d %s", s.name, status, body)
		}
	}
	v.Signal(syscall.SIGTERM)
	v.AwaitStopping()
	stop, _ := documentedSignals(t)
	for _, s := range append(ignored, stop...) {
		if s.insist {
			continue
		}
		v.Signal(s.Signal)
		if status, body := v.Get(v.Admin + "/readyz"); status != 503 || !strings.Contains(body, "shutting down") {
			t.Fatalf("while stopping, after %s: %d %s", s.name, status, body)
		}
	}
	if code := v.StopAtOnce(); code != exitFailed {
		t.Errorf("exit code %d after a second SIGTERM", code)
	}
}

// TestSignalsDuringTheStart: those that are ignored do not end a start that waits,
// here for a file of its data directory; one that stops takes effect when the start
// is over.
func TestSignalsDuringTheStart(t *testing.T) {
	t.Parallel()
	waiting := func(t *testing.T, args ...string) (*testproc.Server, *os.File) {
		t.Helper()
		v, stderr := testproc.Unstarted(t, append([]string{"--window=1h"}, args...)...)
		mark := filepath.Join(v.Dir, "verve-data", "spool.mark")
		if err := os.Mkdir(filepath.Dir(mark), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mkfifo(mark, 0o600); err != nil {
			t.Fatal(err)
		}
		v.Begin(stderr)
		w, err := os.OpenFile(mark, os.O_WRONLY, 0) // returns when the server reads it
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = w.Close() })
		return v, w
	}
	t.Run("goes on", func(t *testing.T) {
		v, mark := waiting(t)
		_, ignored := documentedSignals(t)
		for _, s := range ignored {
			v.Signal(s.Signal)
			if !s.silent {
				v.Until(fmt.Sprintf(`"signal":%q`, s.name))
			}
		}
		v.Signal(syscall.SIGTERM)
		v.Until(`"message":"stopping"`)
		_ = mark.Close()
		if code := v.Ended(); code != 0 {
			t.Errorf("exit code %d\n%s", code, v.Text())
		}
		wantOneRecord(t, v, 0)
	})
	t.Run("never ends", func(t *testing.T) {
		v, _ := waiting(t, "--shutdown-timeout=10ms")
		v.Signal(syscall.SIGTERM)
		if code := v.Ended(); code != exitFailed || !strings.Contains(v.Text(), "the start was not finished in time") {
			t.Errorf("exit code %d\n%s", code, v.Text())
		}
	})
}

// TestTotalsIntoAClosedPipeEndsQuietly, as every filter does.
func TestTotalsIntoAClosedPipeEndsQuietly(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	v := testproc.Start(t, "--window=1h", "--data-dir="+dir)
	v.Stop()
	totals := testproc.Verve(t, "totals", "--data-dir="+dir)
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

// TestTotalsThatASignalEndsHaveNoSums of a part: they would look as those of all. With --follow
// they stop in order, and at once with a second signal.
func TestTotalsThatASignalEndsHaveNoSums(t *testing.T) {
	t.Parallel()
	for _, follow := range []bool{false, true} {
		file := filepath.Join(t.TempDir(), "counts.jsonl")
		if err := syscall.Mkfifo(file, 0o600); err != nil {
			t.Fatal(err)
		}
		totals := testproc.Verve(t, "totals", "--counts-file="+file, "--follow="+strconv.FormatBool(follow))
		var stdout, stderr bytes.Buffer
		totals.Stdout, totals.Stderr = &stdout, &stderr
		if err := totals.Start(); err != nil {
			t.Fatal(err)
		}
		w, err := os.OpenFile(file, os.O_WRONLY, 0) // returns when it reads
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		if _, err := w.WriteString(countsLine(1, 5, "a", 1)); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- totals.Wait() }()
		signals := time.NewTicker(100 * time.Millisecond)
		defer signals.Stop()
		for sent, over := 0, false; !over; {
			select {
			case <-ended:
				over = true
			case <-signals.C:
				if sent++; sent > 300 {
					_ = totals.Process.Kill()
				}
				_ = totals.Process.Signal(syscall.SIGTERM)
			}
		}
		status := totals.ProcessState.Sys().(syscall.WaitStatus)
		if !status.Signaled() || status.Signal() != syscall.SIGTERM || stdout.Len() > 0 && !follow {
			t.Errorf("follow %t: %v: %q, %q", follow, totals.ProcessState, stdout.String(), stderr.String())
		}
	}
}

// TestReaderOfTheLogGoesAway: the server runs on, and stops in order.
func TestReaderOfTheLogGoesAway(t *testing.T) {
	t.Parallel()
	v, stderr := testproc.Unstarted(t, "--window=50ms")
	v.Begin(stderr)
	v.AwaitListening()
	_ = stderr.Close()
	awaitRecords(t, v, 20)
	if status, body := v.Get(v.Public + "/api/verve/accept?id=1"); status != 200 {
		t.Errorf("got %d %s", status, body)
	}
	testproc.Until(t, "dropped lines are counted", func() bool {
		_, page := v.Get(v.Admin + "/metrics")
		return !strings.Contains(page, "\nverve_log_lines_dropped_total 0\n")
	})
	v.Signal(syscall.SIGTERM)
	if code := v.Ended(); code != 0 {
		t.Errorf("exit code %d (%v)", code, v.ProcessState)
	}
}

// awaitRecords waits until the counts file has n records.
func awaitRecords(t *testing.T, v *testproc.Server, n int) {
	t.Helper()
	testproc.Until(t, fmt.Sprint(n, " records"), func() bool {
		b, err := os.ReadFile(filepath.Join(v.Dir, "verve-data", "counts.jsonl"))
		return err == nil && strings.Count(string(b), "\n") >= n
	})
}
