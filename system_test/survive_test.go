package system_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"verve/internal/testproc"
)

// TestKilledServerGoesOn: after a kill -9 the ids of the running window are
// still refused, and its records add up to the answers.
func TestKilledServerGoesOn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const lives, each = 4, 20
	accept := func(v *testproc.Server, id string, want int) {
		t.Helper()
		if status, body := v.Get(v.Public + "/api/verve/accept?id=" + id); status != want {
			t.Errorf("id %s: got %d %s, want %d", id, status, body, want)
		}
	}
	for life := range lives {
		v := testproc.Start(t, "--window=1h", "--data-dir="+dir)
		for i := range (life + 1) * each {
			want := 409
			if i >= life*each {
				want = 200
			}
			accept(v, fmt.Sprint(i), want)
			accept(v, fmt.Sprint("text-", i), want)
		}
		if life == lives-1 {
			if code := v.Stop(); code != 0 {
				t.Errorf("exit code %d\n%s", code, v.Text())
			}
			break
		}
		v.Kill()
	}
	sum := 0
	for i, r := range testproc.Records(t, filepath.Join(dir, "counts.jsonl")) {
		if sum += r.Unique; r.Seq != i+1 || r.Complete {
			t.Errorf("record %d: %+v", i, r)
		}
	}
	if want := 2 * lives * each; sum != want {
		t.Errorf("the records add up to %d, want %d", sum, want)
	}
}

// TestCallbacksCountTheWholeWindow: the count of the open window does not begin again where the
// server was started again, after a kill and after a stop, in callbacks and in what is shown.
func TestCallbacksCountTheWholeWindow(t *testing.T) {
	t.Parallel()
	got := make(chan uint64, 1)
	receiver := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var body struct{ Unique uint64 }
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			t.Error(err)
		}
		got <- body.Unique
	}))
	defer receiver.Close()
	dir := t.TempDir()
	for life := range uint64(3) {
		v := testproc.Start(t, "--window=1h", "--data-dir="+dir, "--callback-allow="+strings.TrimPrefix(receiver.URL, "http://"))
		if status, _ := v.Get(fmt.Sprintf("%s/api/verve/accept?id=%d&endpoint=%s/", v.Public, life, receiver.URL)); status != 200 {
			t.Errorf("life %d: status %d", life, status)
		}
		if n := <-got; n != life+1 {
			t.Errorf("life %d: the callback has %d unique ids, want %d", life, n, life+1)
		}
		testproc.Until(t, "the open window is shown with all of them", func() bool { // a kill's are published after the start
			_, metrics := v.Get(v.Admin + "/metrics")
			return strings.Contains(metrics, fmt.Sprintf("\nverve_unique_ids %d\n", life+1)) && strings.Contains(metrics, "\nverve_last_window_unique_ids 0\n")
		})
		if life == 0 {
			v.Kill()
		} else if code := v.Stop(); code != 0 {
			t.Errorf("exit code %d\n%s", code, v.Text())
		}
	}
}

// TestWithoutADiskTheFirstWindowPromisesNothing: ids that a killed process has answered are
// not known to the next one, so its record of their window is not exact.
func TestWithoutADiskTheFirstWindowPromisesNothing(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "counts.jsonl")
	for life := range 2 {
		v := testproc.Start(t, "--window=1h", "--data-dir=none", "--counts-file="+file)
		if status, body := v.Get(v.Public + "/api/verve/accept?id=42"); status != 200 {
			t.Errorf("life %d: got %d %s, want 200", life, status, body)
		}
		if life == 0 {
			v.Kill()
			continue
		}
		if code := v.Stop(); code != 0 {
			t.Errorf("exit code %d\n%s", code, v.Text())
		}
	}
	if r := testproc.Records(t, file); len(r) != 1 || r[0].Unique != 1 || r[0].Exact {
		t.Errorf("records %+v, want one with exact:false", r)
	}
}

// TestDamagedEpochsAreSetAside: the server starts, and says what it could not
// use.
func TestDamagedEpochsAreSetAside(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	v := testproc.Start(t, "--window=1h", "--data-dir="+dir)
	if code := v.Stop(); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	if err := os.Truncate(filepath.Join(dir, "epochs", "state"), 100); err != nil {
		t.Fatal(err)
	}
	v = testproc.Start(t, "--window=1h", "--data-dir="+dir)
	aside, err := filepath.Glob(filepath.Join(dir, "epochs.damaged-*"))
	if log := v.Text(); err != nil || len(aside) != 1 || !strings.Contains(log, aside[0]) {
		t.Errorf("set aside: %v, %v; the log:\n%s", aside, err, log)
	}
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// atOnce is how long a busy machine may take for what waits for no window. Those that the
// tests use it beside are much longer.
const atOnce = 30 * time.Second

// TestAnotherWindowIsServedAtOnce: on a data directory that was used with another
// --window, longer or shorter, the server is ready at once, ids are counted in windows
// that have their time, and the labels increase.
func TestAnotherWindowIsServedAtOnce(t *testing.T) {
	dir := t.TempDir()
	ok := 0
	for life, window := range []string{"2s", "1h", "1m", "50ms", "1h", "777ms", "10m"} {
		v := testproc.Start(t, "--window="+window, "--data-dir="+dir, "--window-header")
		testproc.Within(t, atOnce, "ready with --window="+window, func() bool {
			status, _ := v.Get(v.Admin + "/readyz")
			return status == 200
		})
		for i := range 20 {
			resp, err := http.Get(v.Public + fmt.Sprintf("/api/verve/accept?id=%d-%d", life, i))
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			at, err := time.Parse(time.RFC3339, resp.Header.Get("Verve-Window"))
			if err != nil || resp.StatusCode != 200 || at.After(time.Now()) {
				t.Errorf("--window=%s: status %d in the window of %v (%v)", window, resp.StatusCode, at, err)
			}
			ok++
		}
		if life%2 == 0 {
			if code := v.Stop(); code != 0 {
				t.Errorf("--window=%s: exit code %d", window, code)
			}
		} else {
			v.Kill()
		}
		if log := v.Text(); strings.Contains(log, "clock") {
			t.Errorf("--window=%s: the log: %s", window, log)
		}
	}
	var last testproc.Record
	for _, r := range testproc.Records(t, filepath.Join(dir, "counts.jsonl")) {
		if r.Start.Before(last.Start) || r.Start.Equal(last.Start) && r.MS != last.MS || r.Start.UnixMilli()%r.MS != 0 {
			t.Errorf("the window %v of %d ms follows %v of %d", r.Start, r.MS, last.Start, last.MS)
		}
		ok -= r.Unique
		last = r
	}
	if ok != 0 {
		t.Errorf("the records lack %d of the answers", ok)
	}
}

// shownWindow is a window of /api/windows.
type shownWindow struct {
	Start      time.Time `json:"window_start"`
	Unique     int       `json:"unique"`
	Duplicates int       `json:"duplicates"`
	State      string    `json:"state"`
}

func shownWindows(t *testing.T, v *testproc.Server) (out []shownWindow) {
	t.Helper()
	var answer struct{ Windows []shownWindow }
	_, body := v.Get(v.Admin + "/api/windows?limit=60")
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		t.Fatalf("%v in %s", err, body)
	}
	return answer.Windows
}

// TestWindowsAreShownAfterARestart, also after a kill -9, with their counts and
// the state of their records, wherever those go.
func TestWindowsAreShownAfterARestart(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, flag, state string }{
		{"counts file", "--log-level=info", "delivered"},
		{"a broker that is down", "--kafka-brokers=127.0.0.1:9", "spooled"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			v := testproc.Start(t, "--window=500ms", "--data-dir="+dir, c.flag)
			counted := func() (n int) {
				for _, w := range shownWindows(t, v) {
					if w.Unique > 0 && w.State == c.state {
						n++
					}
				}
				return n
			}
			testproc.Until(t, "three windows with ids", func() bool {
				for i := range 5 {
					v.Get(fmt.Sprint(v.Public, "/api/verve/accept?id=", i))
				}
				return counted() >= 3
			})
			before := shownWindows(t, v)
			v.Kill()
			v = testproc.Start(t, "--window=500ms", "--data-dir="+dir, c.flag)
			for _, w := range before {
				w.State = c.state // that of the last ones may be known a moment later
				testproc.Until(t, fmt.Sprintf("%+v is shown", w), func() bool {
					return slices.Contains(shownWindows(t, v), w)
				})
			}
			v.StopAtOnce()
		})
	}
}
