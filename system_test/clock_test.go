//go:build unix

package system_test

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"verve/counter"
	"verve/internal/testproc"
	"verve/stream"
)

// pause returns when the process is stopped, until SIGCONT: some time after SIGSTOP was
// sent.
func pause(t *testing.T, v *testproc.Server) {
	t.Helper()
	v.Signal(syscall.SIGSTOP)
	var state syscall.WaitStatus
	if _, err := syscall.Wait4(v.Process.Pid, &state, syscall.WUNTRACED, nil); err != nil || !state.Stopped() {
		t.Fatalf("the process is not stopped: %v, %v", state, err)
	}
}

// TestStoppedProcessPublishesItsGap: after SIGSTOP over several windows and
// SIGCONT every window has its record, in order, those that nobody served are
// empty and not complete, and the sum is that of the answers.
func TestStoppedProcessPublishesItsGap(t *testing.T) {
	const window = 100 * time.Millisecond
	v := testproc.Start(t, "--window=100ms", "--window-header", "--max-clock-skew=300ms")
	answered := map[time.Time]int{}
	accept := func(from, to int) {
		for i := from; i < to; i++ {
			resp, err := http.Get(v.Public + "/api/verve/accept?id=" + fmt.Sprint(i))
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			at, err := time.Parse(time.RFC3339, resp.Header.Get("Verve-Window"))
			if err != nil || resp.StatusCode != 200 {
				t.Fatalf("id %d: status %d, window %v", i, resp.StatusCode, err)
			}
			answered[at]++
		}
	}
	accept(0, 50)
	pause(t, v)
	stopped := time.Now()
	time.Sleep(12 * window)
	resumed := time.Now()
	if err := v.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	accept(50, 100)
	v.Until("the process did not run")
	// The skipped windows are counted when they are published, behind the one that
	// was open.
	testproc.Until(t, "the metrics know of the pause", func() bool {
		_, page := v.Get(v.Admin + "/metrics")
		return !strings.Contains(page, "\nverve_process_pauses_total 0\n") && !strings.Contains(page, "\nverve_epochs_skipped_total 0\n")
	})
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d\n%s", code, v.Text())
	}
	got := testproc.Records(t, filepath.Join(v.Dir, "verve-data", "counts.jsonl"))
	for i, r := range got {
		if i > 0 && !r.Start.Equal(got[i-1].Start.Add(window)) {
			t.Errorf("the record of %v follows that of %v", r.Start, got[i-1].Start)
		}
		if r.Unique != answered[r.Start] {
			t.Errorf("%v: the record has %d, %d were answered", r.Start, r.Unique, answered[r.Start])
		}
		delete(answered, r.Start)
		if r.Start.After(stopped.Add(-window)) && r.Start.Before(resumed) && r.Complete {
			t.Errorf("%v is complete; the process was stopped from %v to %v", r.Start, stopped, resumed)
		}
	}
	if len(answered) > 0 {
		t.Errorf("no records of %v", answered)
	}
}

// TestClockBehindTheLastRecordIsNotReady: the data directory knows a window that
// the clock has not reached. Ids are counted there, and no load balancer sends
// more than it must.
func TestClockBehindTheLastRecordIsNotReady(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	spool, err := stream.OpenSpool(stream.SpoolConfig{Dir: dir, Group: "verve", Instance: "host-1"})
	if err != nil {
		t.Fatal(err)
	}
	records, err := stream.New(stream.Config{Scope: stream.ScopeInstance, CountsFile: filepath.Join(dir, "counts.jsonl")}, spool)
	if err != nil {
		t.Fatal(err)
	}
	ahead := time.Now().UTC().Truncate(time.Hour).Add(48 * time.Hour)
	if err := records.Publish(t.Context(), counter.Count{Start: ahead, Window: time.Hour, Unique: 1, Exact: true, SealedAt: ahead.Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	records.Close()
	if err := spool.Close(); err != nil {
		t.Fatal(err)
	}

	v := testproc.Start(t, "--window=1h", "--data-dir="+dir)
	if log := v.Text(); strings.Count(log, "not ready because of the clock") != 1 || !strings.Contains(log, ahead.Format(time.RFC3339)) {
		t.Errorf("the log:\n%s", log)
	}
	if status, body := v.Get(v.Admin + "/readyz"); status != 503 || !strings.Contains(body, `"clock":{"ok":false,"reason":"the clock is at`) {
		t.Errorf("readyz: %d %s", status, body)
	}
	for _, want := range []int{200, 409} {
		if status, _ := v.Get(v.Public + "/api/verve/accept?id=1"); status != want {
			t.Errorf("got %d, want %d", status, want)
		}
	}
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}

	v = testproc.Start(t, "--window=1h", "--data-dir="+dir, "--max-clock-skew=0") // nobody watches
	if status, body := v.Get(v.Admin + "/readyz"); status != 200 {
		t.Errorf("readyz: %d %s", status, body)
	}
	v.Stop()
}
