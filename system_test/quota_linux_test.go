package system_test

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"verve/internal/testproc"
)

// quota is a directory of a Btrfs file system that a test may bound.
type quota struct {
	t       *testing.T
	at, dir string // where the file system is, and the directory in it
}

// newQuota mounts a file system of its own, which the kernel of a test machine has more
// often than quotas of users.
func newQuota(t *testing.T) *quota {
	mkfs, btrfs := testproc.Needs(t, "mkfs.btrfs", "btrfs"), testproc.Needs(t, "btrfs", "btrfs")
	at, image := t.TempDir(), filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 256<<20); err != nil {
		t.Fatal(err)
	}
	q := &quota{t, at, filepath.Join(at, "bounded")}
	q.run(mkfs, "-q", image)
	if out, err := exec.Command("mount", "-o", "loop", image, at).CombinedOutput(); err != nil {
		testproc.Missing(t, "btrfs", fmt.Sprintf("mounting is not allowed: %v, %s", err, out))
	}
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	q.run(btrfs, "quota", "enable", at)
	q.run(btrfs, "subvolume", "create", q.dir)
	return q
}

func (q *quota) run(name string, args ...string) {
	q.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		q.t.Fatalf("%s %v: %v, %s", name, args, err, out)
	}
}

func (q *quota) limit(size string) {
	q.t.Helper()
	q.run("btrfs", "qgroup", "limit", size, "0/256", q.at) // the number of the first subvolume
}

// words counts the verdicts on the ids from first to last, which are text, in batches.
func words(t *testing.T, v *testproc.Server, first, last int) map[string]int {
	t.Helper()
	const batch = 10_000
	n := map[string]int{}
	for ; first < last; first += batch {
		var ids strings.Builder
		for id := range batch {
			fmt.Fprintf(&ids, "an id of some text, and %d\n", first+id)
		}
		resp, err := http.Post(v.Public+"/api/verve/accept", "text/plain", strings.NewReader(ids.String()))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != 200 {
			_, ready := v.Get(v.Admin + "/readyz")
			t.Fatalf("from %d: got %d %q %.100s, %v\n%s\n%s", first, resp.StatusCode, resp.Header.Get("Verve-Reason"), body, err, ready, v.Text())
		}
		for _, word := range strings.Fields(string(body)) {
			n[word]++
		}
	}
	return n
}

// TestAQuotaIsAFullDisk: where there is no room left under it, new ids are full and
// repeats are still recognised, also after a kill; with room all goes on, and every ok is
// in a record.
func TestAQuotaIsAFullDisk(t *testing.T) {
	q := newQuota(t)
	// One segment fits, two do not. The rest is for what Btrfs itself reserves: where that is
	// refused, a store into a page that it has written before is a fault, and the journal fails.
	q.limit("7500k")
	dir := filepath.Join(q.dir, "data")
	args := []string{"--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json", "--window=1h", "--data-dir=" + dir}
	start := func() *testproc.Server { return testproc.StartCmd(t, testproc.Verve(t, args...)) }
	const ids = 400_000 // more than fit
	v := start()
	n := words(t, v, 0, ids)
	ok := n["ok"]
	if ok == 0 || n["full"] == 0 || ok+n["full"] != ids {
		t.Fatalf("got %v, want ok for those with room, and full for the others", n)
	}
	if status, body := v.Get(v.Admin + "/readyz"); status != 503 || !strings.Contains(body, "disk quota exceeded") {
		t.Errorf("got %d %s, want the quota as the reason", status, body)
	}
	if n := words(t, v, 0, 10_000); n["duplicate"] != 10_000 {
		t.Errorf("the first ids again: got %v, want repeats", n)
	}
	v.Kill()

	v = start()
	if n := words(t, v, 0, 10_000); n["duplicate"] != 10_000 {
		t.Errorf("after a kill, the first ids again: got %v, want repeats", n)
	}
	n = words(t, v, ids, ids+20_000)
	if n["full"] == 0 || n["ok"]+n["full"] != 20_000 {
		t.Errorf("after a kill, new ids: got %v, want full", n)
	}
	ok += n["ok"]

	q.limit("none")
	testproc.Until(t, "ids are counted again", func() bool {
		more := words(t, v, ids, ids+20_000)
		ok += more["ok"]
		return more["full"] == 0
	})
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d\n%s", code, v.Text())
	}
	sum := 0
	for _, r := range testproc.Records(t, filepath.Join(dir, "counts.jsonl")) {
		sum += r.Unique
		if !r.Exact {
			t.Errorf("%+v is not exact", r)
		}
	}
	if sum != ok {
		t.Errorf("the records add up to %d, want %d", sum, ok)
	}
}

// TestAStartFarOverItsQuotaLosesNothing: there is no room for what the file system needs to
// change what is there. That is no damage.
func TestAStartFarOverItsQuotaLosesNothing(t *testing.T) {
	q := newQuota(t)
	dir := filepath.Join(q.dir, "data")
	args := []string{"--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json", "--window=1h", "--data-dir=" + dir}
	v := testproc.StartCmd(t, testproc.Verve(t, args...))
	if n := words(t, v, 0, 100_000); n["ok"] != 100_000 {
		t.Fatalf("got %v", n)
	}
	v.Kill()
	unix.Sync()
	q.limit("1M")
	out, err := testproc.Verve(t, args...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "disk quota exceeded: ") {
		t.Errorf("the start over the quota: %v, %s; want the quota as the reason", err, out)
	}
	q.limit("none")
	v = testproc.StartCmd(t, testproc.Verve(t, args...))
	if n := words(t, v, 0, 100_000); n["duplicate"] != 100_000 {
		t.Errorf("with room, the same ids: got %v, want repeats", n)
	}
	v.Stop()
}

// TestAStartOverItsQuotaServes in a directory that holds nothing yet, and counts when
// there is room.
func TestAStartOverItsQuotaServes(t *testing.T) {
	q := newQuota(t)
	filler := filepath.Join(q.dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	unix.Sync() // the file system counts what has been written
	q.limit("100k")
	dir := filepath.Join(q.dir, "data")
	v := testproc.StartCmd(t, testproc.Verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json", "--window=100ms", "--data-dir="+dir))
	if status, body := v.Get(v.Public + "/api/verve/accept?id=1"); status != 503 || body != "failed" {
		t.Errorf("got %d %s, want 503", status, body)
	}
	if status, body := v.Get(v.Admin + "/readyz"); status != 503 || !strings.Contains(body, "disk quota exceeded") {
		t.Errorf("got %d %s, want the quota as the reason", status, body)
	}
	q.limit("none")
	testproc.Until(t, "an id is counted", func() bool {
		status, _ := v.Get(v.Public + "/api/verve/accept?id=1")
		return status == 200
	})
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d\n%s", code, v.Text())
	}
	sum := 0
	for _, r := range testproc.Records(t, filepath.Join(dir, "counts.jsonl")) {
		sum += r.Unique
	}
	if sum != 1 {
		t.Errorf("the records add up to %d, want 1", sum)
	}
}
