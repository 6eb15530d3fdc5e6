//go:build linux

package system_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"verve/internal/testproc"
)

// TestInterruptedCallsAreRepeated: signals may interrupt the system calls that keep
// ids and records, at the start and while running. Every second one is, first the
// odd ones and then the even ones: ids are answered, counted and found again.
func TestInterruptedCallsAreRepeated(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		if slices.Contains(strings.Split(os.Getenv("VERVE_TEST_REQUIRE"), ","), "strace") {
			t.Fatalf("VERVE_TEST_REQUIRE asks for strace: %v", err)
		}
		t.Skip("no strace to interrupt system calls with")
	}
	for _, call := range []string{"fallocate", "flock", "fsync", "msync", "fdatasync", "madvise", "openat", "ftruncate", "renameat"} {
		for first := 1; first <= 2; first++ {
			t.Run(fmt.Sprint(call, " from ", first), func(t *testing.T) {
				t.Parallel()
				interruptEverySecond(t, strace, call, first)
			})
		}
	}
}

func interruptEverySecond(t *testing.T, strace, call string, first int) {
	dir := t.TempDir()
	for life := range 2 {
		cmd := testproc.Verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json", "--window=1s", "--data-dir="+dir)
		cmd.Args = append([]string{
			strace, "-D", "-f", "-qq", "-o", filepath.Join(t.TempDir(), "trace"), "-e", "trace=" + call,
			"-e", fmt.Sprintf("inject=%s:error=EINTR:when=%d+2", call, first), cmd.Path,
		}, cmd.Args[1:]...)
		cmd.Path = strace
		v := testproc.StartCmd(t, cmd)
		for window := range 2 {
			for i := range 3 {
				id := fmt.Sprintf("%s-%d-%d-%d", call, life, window, i)
				if status, body := v.Get(v.Public + "/api/verve/accept?id=" + id); status != 200 {
					t.Errorf("id %s: got %d %s, want 200", id, status, body)
				}
			}
			v.Until(`"message":"window published"`)
		}
		if code := v.Stop(); code != 0 {
			t.Errorf("exit code %d\n%s", code, v.Text())
		}
		for _, line := range v.Lines {
			if strings.Contains(line, `"level":"error"`) {
				t.Errorf("%s", line)
			}
		}
	}
	sum := 0
	for _, r := range testproc.Records(t, filepath.Join(dir, "counts.jsonl")) {
		sum += r.Unique
	}
	if sum != 12 {
		t.Errorf("the records add up to %d, want 12", sum)
	}
}

// TestCountsWaitForRoomForTheSpool: a server that was started without room publishes
// every window when there is some, and counts ids again.
func TestCountsWaitForRoomForTheSpool(t *testing.T) {
	cmd := limited(t, 8192, "--window=100ms")
	v := testproc.StartCmd(t, cmd)
	v.Until("record is not in the spool yet")
	unlimited := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	if err := unix.Prlimit(v.Process.Pid, unix.RLIMIT_FSIZE, &unlimited, nil); err != nil {
		t.Fatal(err)
	}
	v.Until(`"message":"window published"`)
	testproc.Until(t, "an id is counted", func() bool {
		status, _ := v.Get(v.Public + "/api/verve/accept?id=1")
		return status == 200
	})
	if status, body := v.Get(v.Admin + "/readyz"); status != 200 {
		t.Errorf("got %d %s, want ready", status, body)
	}
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d\n%s", code, v.Text())
	}
	sum := 0
	var last time.Time
	for i, r := range testproc.Records(t, filepath.Join(cmd.Dir, "verve-data", "counts.jsonl")) {
		sum += r.Unique
		if r.Seq != i+1 || i > 0 && r.Start.Sub(last) != 100*time.Millisecond {
			t.Errorf("record %d has seq %d and starts at %v, after %v: one is missing", i+1, r.Seq, r.Start, last)
		}
		last = r.Start
	}
	if sum != 1 {
		t.Errorf("the records add up to %d, want 1", sum)
	}
}
