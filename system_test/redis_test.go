package system_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"verve/internal/testproc"
)

// member starts an instance of a group.
func member(t *testing.T, name, dir, redis string, args ...string) *testproc.Server {
	t.Helper()
	v := testproc.Start(t, append([]string{
		"--dedup=redis", "--redis-url=redis://" + redis, "--instance=" + name, "--data-dir=" + filepath.Join(dir, name),
	}, args...)...)
	return v
}

// groupRecords are the lines of all counts files below dir, by their window.
func groupRecords(t *testing.T, dir string) map[time.Time][]testproc.Record {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*", "counts.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	out := map[time.Time][]testproc.Record{}
	for _, f := range files {
		for _, r := range testproc.Records(t, f) {
			out[r.Start] = append(out[r.Start], r)
		}
	}
	return out
}

// wantOnce fails for a window that has two records, or one that is not of the
// group, and returns the sum.
func wantOnce(t *testing.T, windows map[time.Time][]testproc.Record) (sum int) {
	t.Helper()
	for start, rs := range windows {
		if len(rs) != 1 {
			t.Errorf("window %v has %d records: %+v", start, len(rs), rs)
		}
		for _, r := range rs {
			if r.Instance != "" || r.Seq != 0 {
				t.Errorf("record of an instance: %+v", r)
			}
			sum += r.Unique
		}
	}
	return sum
}

// TestFromAGroupToMemoryWithinAWindow: this process does not know the ids that the group
// has, so the record of the running window is not exact, also over a kill; and the log
// names the group that may have windows left.
func TestFromAGroupToMemoryWithinAWindow(t *testing.T) {
	redis := testproc.StartRedis(t, "--maxmemory-policy", "noeviction")
	for _, killed := range []bool{false, true} {
		dir := t.TempDir()
		v := member(t, "a", dir, redis.Addr, "--window=1h", "--shutdown-timeout=1s", fmt.Sprintf("--group=killed-%t", killed))
		ask := func() {
			t.Helper()
			testproc.Until(t, "the id is answered", func() bool { // Redis may be too slow on a busy machine
				status, body := v.Get(v.Public + "/api/verve/accept?id=1")
				if status != 200 && status != 503 {
					t.Fatalf("got %d %s, want 200", status, body)
				}
				return status == 200
			})
		}
		ask()
		if killed {
			v.Kill()
		} else {
			v.Stop()
		}
		memory := []string{"--window=1h", "--data-dir=" + filepath.Join(dir, "a")}
		v = testproc.Start(t, memory...)
		if !strings.Contains(v.Text(), fmt.Sprintf("group killed-%t in Redis at %s", killed, redis.Addr)) {
			t.Errorf("the log does not name the group:\n%s", v.Text())
		}
		ask()
		if killed {
			v.Kill()
			v = testproc.Start(t, memory...)
		}
		v.Stop()
		exact := true
		all := testproc.Records(t, filepath.Join(dir, "a", "counts.jsonl"))
		for _, r := range all {
			exact = exact && r.Exact
		}
		if exact {
			t.Errorf("killed %t: an id got ok twice, and all records are exact: %+v", killed, all)
		}
	}
}

// TestFromDamagedIdsToAGroup: a process that joins a group reports that the ids which the one
// before kept for itself are damaged, and their window gets a record that is not exact.
func TestFromDamagedIdsToAGroup(t *testing.T) {
	redis := testproc.StartRedis(t, "--maxmemory-policy", "noeviction")
	dir := t.TempDir()
	data := filepath.Join(dir, "a")
	v := testproc.Start(t, "--instance=a", "--data-dir="+data, "--window=1s")
	judged(t, v, "1")
	v.Kill()
	if err := os.WriteFile(filepath.Join(data, "epochs", "state"), make([]byte, 1<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second) // the window of the kill is over
	v = member(t, "a", dir, redis.Addr, "--window=1s")
	if !strings.Contains(v.Text(), "epochs.damaged-") {
		t.Errorf("the log does not name what was set aside:\n%s", v.Text())
	}
	v.Stop()
	inexact := 0
	for _, r := range testproc.Records(t, filepath.Join(data, "counts.jsonl")) {
		if r.Instance == "a" && !r.Exact {
			inexact++
		}
	}
	if inexact != 1 {
		t.Errorf("%d records are not exact; want one, for the damaged ids", inexact)
	}
}

// judged asks about an id until it is ok, or a repeat, in a window: on a busy machine Redis
// may take too long for one, which then counts nothing.
func judged(t *testing.T, v *testproc.Server, id string) (ok bool, window string) {
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		resp, err := http.Get(v.Public + "/api/verve/accept?id=" + id)
		if err != nil {
			t.Error(err)
			return false, ""
		}
		_ = resp.Body.Close()
		if resp.StatusCode == 200 || resp.StatusCode == 409 {
			return resp.StatusCode == 200, resp.Header.Get("Verve-Window")
		}
	}
	t.Errorf("id %s is not judged", id)
	return false, ""
}

// TestTwoInstancesCountAsOne: of two requests for one id at two instances at the
// same moment one is ok; the group's window has one record, published although
// both stop within it.
func TestTwoInstancesCountAsOne(t *testing.T) {
	t.Parallel()
	redis, dir := testproc.StartRedis(t), t.TempDir()
	a, b := member(t, "a", dir, redis.Addr, "--window=3s", "--window-header"), member(t, "b", dir, redis.Addr, "--window=3s", "--window-header")
	sum := 0
	for i := range 200 {
		var ok [2]bool
		var window [2]string
		var both sync.WaitGroup
		for k, v := range []*testproc.Server{a, b} {
			both.Go(func() { ok[k], window[k] = judged(t, v, "n"+strconv.Itoa(i)) })
		}
		both.Wait()
		got, want := 0, 1
		for _, is := range ok {
			if is {
				got++
			}
		}
		if window[0] != window[1] { // it turned
			want = 2
		}
		if got != want {
			t.Errorf("id %d: ok %v in the windows %v", i, ok, window)
		}
		sum += got
	}
	var stopping sync.WaitGroup
	for _, v := range []*testproc.Server{a, b} {
		stopping.Go(func() {
			if code := v.Stop(); code != 0 {
				t.Errorf("exit code %d\n%s", code, v.Text())
			}
		})
	}
	stopping.Wait()
	if got := wantOnce(t, groupRecords(t, dir)); got != sum {
		t.Errorf("the records add up to %d, and %d were ok\n%s\n%s", got, sum, a.Text(), b.Text())
	}
}

// TestWindowOfDeadInstancesIsPublished: every instance is killed in the middle of
// a window. One that starts later, with nothing of theirs, goes on with the ids
// if the window still runs, and publishes it.
func TestWindowOfDeadInstancesIsPublished(t *testing.T) {
	t.Parallel()
	redis := testproc.StartRedis(t)
	const window, ids = 4 * time.Second, 100
	var dir string
	var began time.Time
	var c *testproc.Server
	testproc.Until(t, "all are killed in the window in which they began", func() bool {
		dir = t.TempDir()
		group := "--group=" + filepath.Base(dir)
		time.Sleep(time.Until(time.Now().Truncate(window).Add(window))) // at its start, so that none before is being published at the kill
		a, b := member(t, "a", dir, redis.Addr, "--window=4s", group), member(t, "b", dir, redis.Addr, "--window=4s", group)
		began = time.Now().Truncate(window).UTC()
		ok, repeats := 0, 0
		for i := range ids {
			if is, _ := judged(t, a, strconv.Itoa(i)); is {
				ok++
			}
		}
		for i := range ids {
			if is, _ := judged(t, b, strconv.Itoa(i)); !is {
				repeats++
			}
		}
		for _, v := range []*testproc.Server{a, b} {
			v.Kill()
		}
		if !time.Now().Truncate(window).Equal(began) {
			return false // on a busy machine
		}
		if ok != ids || repeats != ids {
			t.Fatalf("%d were ok and %d repeats of %d ids", ok, repeats, ids)
		}
		c = member(t, "c", dir, redis.Addr, "--window=4s", group)
		return true
	})
	if time.Now().Truncate(window).Equal(began) {
		if is, _ := judged(t, c, "7"); is && time.Now().Truncate(window).Equal(began) {
			t.Error("an id that was ok is so again at another instance")
		}
	}
	testproc.Until(t, "the window is published", func() bool {
		if _, err := os.Stat(filepath.Join(dir, "c", "counts.jsonl")); err != nil {
			return false
		}
		return len(groupRecords(t, dir)[began]) > 0
	})
	windows := groupRecords(t, dir)
	wantOnce(t, windows)
	if rs := windows[began]; len(rs) != 1 || rs[0].Unique != ids || rs[0].Complete {
		t.Errorf("got %+v, want one record of %d ids, not complete", rs, ids)
	}
	testproc.Until(t, "ready with Redis", func() bool {
		status, body := c.Get(c.Admin + "/readyz")
		return status == 200 && strings.Contains(body, `"redis":{"ok":true}`)
	})
	redis.Kill()
	testproc.Until(t, "not ready without Redis", func() bool {
		status, body := c.Get(c.Admin + "/readyz")
		return status == 503 && strings.Contains(body, `"redis":{"ok":false,"reason":"`)
	})
	redis.Start()
	testproc.Until(t, "ready again", func() bool {
		status, _ := c.Get(c.Admin + "/readyz")
		return status == 200
	})
	if code := c.Stop(); code != 0 {
		t.Errorf("exit code %d\n%s", code, c.Text())
	}
}

// TestAnotherWindowInAGroup: an instance that comes with another --window is not
// ready and takes no ids, the others are undisturbed, and both log the two. When the
// others are gone it goes on by itself. No two records have one window start.
func TestAnotherWindowInAGroup(t *testing.T) {
	t.Parallel()
	redis := testproc.StartRedis(t)
	dir := t.TempDir()
	a := member(t, "a", dir, redis.Addr, "--window=1s")
	ok := 0
	accept := func(v *testproc.Server, id string, want int) bool {
		status, body := v.Get(v.Public + "/api/verve/accept?id=" + id)
		if status == 200 {
			ok++
		}
		if want != 0 && status != want {
			t.Errorf("id %s: got %d %s, want %d", id, status, body, want)
		}
		return status == 200
	}
	// On a busy machine Redis may take too long for an id. That is not for long.
	takes := func(v *testproc.Server, id string) {
		t.Helper()
		defer func() {
			if t.Failed() {
				v.StopAtOnce()
				t.Log(v.Text())
			}
		}()
		testproc.Until(t, id+" is taken", func() bool { return accept(v, id, 0) })
	}
	takes(a, "1")
	b := member(t, "b", dir, redis.Addr, "--window=3s")
	testproc.Until(t, "b is not ready, and says why", func() bool {
		status, body := b.Get(b.Admin + "/readyz")
		return status == 503 && strings.Contains(body, "--window=1s") && strings.Contains(body, "--window=3s")
	})
	for i := range 40 {
		accept(b, fmt.Sprint("b", i), 503)
		takes(a, fmt.Sprint("a", i))
		if status, body := a.Get(a.Admin + "/readyz"); status != 200 && strings.Contains(body, "--window") {
			t.Errorf("a is not ready: %s", body)
		}
		time.Sleep(100 * time.Millisecond)
	}
	for v, part := range map[*testproc.Server]string{a: "that instance refuses ids", b: "this instance refuses ids"} {
		log := v.Text() // the line may come before that the start ends with
		if !strings.Contains(log, part) {
			log = v.Until(part)
		}
		if !strings.Contains(log, "--window=1s") || !strings.Contains(log, "--window=3s") {
			t.Errorf("the log: %s", log)
		}
	}
	if code := a.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	takes(b, "2")
	// All stop; the next one has longer windows, and is ready at once.
	if code := b.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	c := member(t, "c", dir, redis.Addr, "--window=1h")
	testproc.Within(t, atOnce, "c is ready", func() bool {
		status, _ := c.Get(c.Admin + "/readyz")
		return status == 200
	})
	takes(c, "3")
	if code := c.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if sum := wantOnce(t, groupRecords(t, dir)); sum != ok {
		t.Errorf("the records add up to %d, %d were answered", sum, ok)
	}
}

// TestRedisPasswordIsNotShown: a wrong URL stops the start with one line that
// names the setting, and neither it nor the log tells the password.
func TestRedisPasswordIsNotShown(t *testing.T) {
	t.Parallel()
	for _, url := range []string{"redis://u:hunter2@", "http://u:hunter2@h:1", "redis://u:hunter2@h:port", "redis-sentinel://u:hunter2@h:1"} {
		out, err := testproc.Verve(t, "--dedup=redis", "--redis-url="+url, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0").CombinedOutput()
		if err == nil || !strings.Contains(string(out), "--redis-url") || strings.Count(string(out), "\n") != 1 {
			t.Errorf("%s: %v\n%s", url, err, out)
		}
		if strings.Contains(string(out), "hunter2") {
			t.Errorf("%s: the password is in\n%s", url, out)
		}
	}
	if out, err := testproc.Verve(t, "--redis-fail=ajar").CombinedOutput(); err == nil || !strings.Contains(string(out), "--redis-fail") {
		t.Errorf("--redis-fail=ajar: %v\n%s", err, out)
	}
}
