package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// redisServer is a real Redis of a test.
type redisServer struct {
	*exec.Cmd
	t    *testing.T
	addr string
	dir  string
	args []string
}

// needs skips a test that needs a program that is not here, or fails it where
// VERVE_TEST_REQUIRE names what it belongs to.
func needs(t *testing.T, program, requirement string) string {
	t.Helper()
	for _, dir := range []string{"", "/usr/sbin/"} { // not in everybody's PATH
		if path, err := exec.LookPath(dir + program); err == nil {
			return path
		}
	}
	if slices.Contains(strings.Split(os.Getenv("VERVE_TEST_REQUIRE"), ","), requirement) {
		t.Fatalf("VERVE_TEST_REQUIRE asks for %s, and there is no %s", requirement, program)
	}
	t.Skipf("no %s here", program)
	return ""
}

func startRedis(t *testing.T, args ...string) *redisServer {
	t.Helper()
	needs(t, "redis-server", "redis")
	r := &redisServer{t: t, addr: freeAddr(t), dir: t.TempDir(), args: args}
	r.start()
	t.Cleanup(r.kill)
	return r
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (r *redisServer) start() {
	r.t.Helper()
	host, port, err := net.SplitHostPort(r.addr)
	if err != nil {
		r.t.Fatal(err)
	}
	r.Cmd = exec.Command("redis-server", append([]string{
		"--bind", host, "--port", port, "--save", "", "--dir", r.dir, "--logfile", filepath.Join(r.dir, "log"),
	}, r.args...)...)
	if err := r.Start(); err != nil {
		r.t.Fatal(err)
	}
	within(r.t, 20*time.Second, "redis-server answers", func() bool {
		return strings.HasPrefix(ask(r.addr, "PING"), "+") || strings.HasPrefix(ask(r.addr, "PING"), "-NOAUTH")
	})
}

func (r *redisServer) kill() {
	if r.Process != nil {
		_ = r.Process.Kill()
		_ = r.Wait()
		r.Process = nil
	}
}

// ask sends a command and returns what comes first, as it comes.
func ask(addr string, command ...string) string {
	c, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return ""
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := fmt.Fprintf(c, "%s\r\n", strings.Join(command, " ")); err != nil {
		return ""
	}
	b := make([]byte, 1<<16)
	n, _ := c.Read(b) // an empty answer says it
	return string(b[:n])
}

// within polls for what other processes bring about.
func within(t *testing.T, limit time.Duration, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// member starts an instance of a group.
func member(t *testing.T, name, dir, redis string, args ...string) *instance {
	t.Helper()
	v := start(t, append([]string{
		"--dedup=redis", "--redis-url=redis://" + redis, "--instance=" + name, "--data-dir=" + filepath.Join(dir, name),
	}, args...)...)
	return v
}

// groupRecords are the lines of all counts files below dir, by their window.
func groupRecords(t *testing.T, dir string) map[time.Time][]recordLine {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*", "counts.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	out := map[time.Time][]recordLine{}
	for _, f := range files {
		for _, r := range records(t, f) {
			out[r.Start] = append(out[r.Start], r)
		}
	}
	return out
}

// wantOnce fails for a window that has two records, or one that is not of the
// group, and returns the sum.
func wantOnce(t *testing.T, windows map[time.Time][]recordLine) (sum int) {
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

// TestTwoInstancesCountAsOne: of two requests for one id at two instances at the
// same moment one is ok; the group's window has one record, published although
// both stop within it.
func TestTwoInstancesCountAsOne(t *testing.T) {
	redis, dir := startRedis(t), t.TempDir()
	a, b := member(t, "a", dir, redis.addr, "--window=3s"), member(t, "b", dir, redis.addr, "--window=3s")
	const ids = 200
	var ok, failed int
	for i := range ids {
		var answers [2]string
		var both sync.WaitGroup
		for k, v := range []*instance{a, b} {
			both.Go(func() { _, answers[k] = v.get(v.public + "/api/verve/accept?id=n" + strconv.Itoa(i)) })
		}
		both.Wait()
		for _, answer := range answers {
			switch answer {
			case "ok":
				ok++
			case "failed":
				failed++
			}
		}
	}
	// The requests of one id may fall into two windows.
	if ok+failed != 2*ids || ok < ids || ok > ids+2 {
		t.Errorf("%d were ok and %d failed of %d ids sent twice", ok, failed, ids)
	}
	var stopping sync.WaitGroup
	for _, v := range []*instance{a, b} {
		stopping.Go(func() {
			if code := v.stop(); code != 0 {
				t.Errorf("exit code %d\n%s", code, strings.Join(v.lines, "\n"))
			}
		})
	}
	stopping.Wait()
	if sum := wantOnce(t, groupRecords(t, dir)); sum != ok {
		t.Errorf("the records add up to %d, and %d were ok\n%s\n%s", sum, ok, strings.Join(a.lines, "\n"), strings.Join(b.lines, "\n"))
	}
}

// TestWindowOfDeadInstancesIsPublished: every instance is killed in the middle of
// a window. One that starts later, with nothing of theirs, goes on with the ids
// if the window still runs, and publishes it.
func TestWindowOfDeadInstancesIsPublished(t *testing.T) {
	redis, dir := startRedis(t), t.TempDir()
	const window, ids = 4 * time.Second, 100
	time.Sleep(time.Until(time.Now().Truncate(window).Add(window))) // at its start
	accept := func(v *instance, want string) {
		t.Helper()
		for i := range ids {
			if _, got := v.get(v.public + "/api/verve/accept?id=" + strconv.Itoa(i)); got != want {
				t.Fatalf("id %d: got %q, want %q", i, got, want)
			}
		}
	}
	a, b := member(t, "a", dir, redis.addr, "--window=4s"), member(t, "b", dir, redis.addr, "--window=4s")
	began := time.Now().Truncate(window).UTC()
	accept(a, "ok")
	accept(b, "failed")
	for _, v := range []*instance{a, b} {
		if err := v.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = v.Wait() // killed
	}
	c := member(t, "c", dir, redis.addr, "--window=4s")
	if time.Now().Truncate(window).Equal(began) {
		if _, got := c.get(c.public + "/api/verve/accept?id=7"); got != "failed" && time.Now().Truncate(window).Equal(began) {
			t.Errorf("an id that was ok is %q at another instance", got)
		}
	}
	within(t, 30*time.Second, "the window is published", func() bool {
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
	if status, body := c.get(c.admin + "/readyz"); status != 200 || !strings.Contains(body, `"redis":{"ok":true}`) {
		t.Errorf("readyz is %d %s", status, body)
	}
	redis.kill()
	within(t, 20*time.Second, "not ready without Redis", func() bool {
		status, body := c.get(c.admin + "/readyz")
		return status == 503 && strings.Contains(body, `"redis":{"ok":false,"reason":"`)
	})
	redis.start()
	within(t, 20*time.Second, "ready again", func() bool {
		status, _ := c.get(c.admin + "/readyz")
		return status == 200
	})
	if code := c.stop(); code != 0 {
		t.Errorf("exit code %d\n%s", code, strings.Join(c.lines, "\n"))
	}
}

// TestAnotherWindowInAGroup: an instance that comes with another --window is not
// ready and takes no ids, the others are undisturbed, and both log the two. When the
// others are gone it goes on by itself. No two records have one window start.
func TestAnotherWindowInAGroup(t *testing.T) {
	redis := startRedis(t)
	dir := t.TempDir()
	a := member(t, "a", dir, redis.addr, "--window=1s")
	ok := 0
	accept := func(v *instance, id string, want int) bool {
		status, body := v.get(v.public + "/api/verve/accept?id=" + id)
		if status == 200 {
			ok++
		}
		if want != 0 && status != want {
			t.Errorf("id %s: got %d %s, want %d", id, status, body, want)
		}
		return status == 200
	}
	accept(a, "1", 200)
	b := member(t, "b", dir, redis.addr, "--window=3s")
	within(t, 10*time.Second, "b is not ready, and says why", func() bool {
		status, body := b.get(b.admin + "/readyz")
		return status == 503 && strings.Contains(body, "--window=1s") && strings.Contains(body, "--window=3s")
	})
	for i := range 40 {
		accept(b, fmt.Sprint("b", i), 503)
		accept(a, fmt.Sprint("a", i), 200)
		if status, body := a.get(a.admin + "/readyz"); status != 200 {
			t.Errorf("a is not ready: %s", body)
		}
		time.Sleep(100 * time.Millisecond)
	}
	for v, part := range map[*instance]string{a: "that instance refuses ids", b: "this instance refuses ids"} {
		log := strings.Join(v.lines, "\n") // the line may come before that the start ends with
		if !strings.Contains(log, part) {
			log = v.until(part)
		}
		if !strings.Contains(log, "--window=1s") || !strings.Contains(log, "--window=3s") {
			t.Errorf("the log: %s", log)
		}
	}
	if code := a.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	within(t, 20*time.Second, "b takes ids", func() bool { return accept(b, "2", 0) })
	// All stop; the next one has longer windows, and is ready at once.
	if code := b.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	c := member(t, "c", dir, redis.addr, "--window=1h")
	within(t, 3*time.Second, "c is ready", func() bool {
		status, _ := c.get(c.admin + "/readyz")
		return status == 200
	})
	accept(c, "3", 200)
	if code := c.stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if sum := wantOnce(t, groupRecords(t, dir)); sum != ok {
		t.Errorf("the records add up to %d, %d were answered", sum, ok)
	}
}

// TestRedisPasswordIsNotShown: a wrong URL stops the start with one line that
// names the setting, and neither it nor the log tells the password.
func TestRedisPasswordIsNotShown(t *testing.T) {
	for _, url := range []string{"redis://u:hunter2@", "http://u:hunter2@h:1", "redis://u:hunter2@h:port", "redis-sentinel://u:hunter2@h:1"} {
		out, err := verve(t, "--dedup=redis", "--redis-url="+url, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0").CombinedOutput()
		if err == nil || !strings.Contains(string(out), "--redis-url") || strings.Count(string(out), "\n") != 1 {
			t.Errorf("%s: %v\n%s", url, err, out)
		}
		if strings.Contains(string(out), "hunter2") {
			t.Errorf("%s: the password is in\n%s", url, out)
		}
	}
	if out, err := verve(t, "--redis-fail=ajar").CombinedOutput(); err == nil || !strings.Contains(string(out), "--redis-fail") {
		t.Errorf("--redis-fail=ajar: %v\n%s", err, out)
	}
}
