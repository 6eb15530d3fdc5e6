//go:build linux

package system_test

import (
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
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
	t.Parallel()
	strace := testproc.Needs(t, "strace", "strace")
	for _, call := range []string{"fallocate", "flock", "fsync", "msync", "fdatasync", "madvise", "openat", "ftruncate", "renameat"} {
		for first := 1; first <= 2 && (first == 1 || testproc.Thorough()); first++ {
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
		v := testproc.StartCmd(t, injected(t, strace, cmd, call, fmt.Sprintf("EINTR:when=%d+2", first)))
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

// injected is cmd under strace, where a system call on the paths, or on anything if
// there are none, ends in an error.
func injected(t *testing.T, strace string, cmd *exec.Cmd, call, err string, paths ...string) *exec.Cmd {
	// Where the tracer is not there within three seconds, SIGALRM would end the command.
	args := []string{"sh", "-c", `trap "" ALRM; exec "$@"`, "sh", strace, "-D", "-f", "-qq", "-o", filepath.Join(t.TempDir(), "trace"), "-e", "trace=" + call, "-e", "inject=" + call + ":error=" + err}
	for _, path := range paths {
		args = append(args, "-P", path)
	}
	cmd.Args = append(append(args, cmd.Path), cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	return cmd
}

// TestFileSystemsWithoutACall: what a file system does not have is done without, as
// long as ids are safe over a kill. Where they are not, the log says so, and where
// records are not, the server does not start.
func TestFileSystemsWithoutACall(t *testing.T) {
	t.Parallel()
	strace := testproc.Needs(t, "strace", "strace")
	for _, tt := range []struct {
		call    string
		errors  []string
		paths   []string // in the data directory
		keeps   bool     // ids over a kill
		refuses string   // in the line of a process that does not start
	}{
		{call: "fallocate", errors: []string{"EOPNOTSUPP", "ENOSYS", "EINVAL"}, keeps: true},
		{call: "fsync", errors: []string{"EOPNOTSUPP", "ENOSYS", "EINVAL"}, paths: []string{"", "epochs"}, keeps: true},
		{call: "flock", errors: []string{"EOPNOTSUPP", "ENOSYS", "ENOLCK"}, paths: []string{"epochs/lock"}, keeps: true},
		{call: "mmap", errors: []string{"EOPNOTSUPP", "ENODEV", "EINVAL"}, paths: []string{"epochs/state"}},
		{call: "msync", errors: []string{"ENOSYS", "EINVAL"}},
		{call: "flock", errors: []string{"ENOSYS", "ENOLCK"}, paths: []string{"spool.db"}, refuses: "locks (flock)"},
	} {
		for _, e := range tt.errors {
			t.Run(fmt.Sprint(tt.call, " of ", tt.paths, " ends in ", e), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				args := []string{"--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json", "--window=1h", "--data-dir=" + dir}
				var paths []string
				for _, path := range tt.paths {
					paths = append(paths, filepath.Join(dir, path))
				}
				cmd := injected(t, strace, testproc.Verve(t, args...), tt.call, e, paths...)
				if tt.refuses != "" {
					if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), tt.refuses) {
						t.Errorf("exit code %d, %s; want 1, and %q", cmd.ProcessState.ExitCode(), out, tt.refuses)
					}
					return
				}
				v := testproc.StartCmd(t, cmd)
				if status, body := v.Get(v.Public + "/api/verve/accept?id=1"); status != 200 {
					t.Errorf("got %d %s, want 200", status, body)
				}
				if warned := strings.Contains(v.Text(), "ids are kept in memory only"); warned == tt.keeps {
					t.Errorf("a warning that ids are in memory only: %t, want %t\n%s", warned, !tt.keeps, v.Text())
				}
				v.Kill()
				if !tt.keeps {
					return
				}
				v = testproc.StartCmd(t, testproc.Verve(t, args...))
				if status, body := v.Get(v.Public + "/api/verve/accept?id=1"); status != 409 {
					t.Errorf("after a kill: got %d %s, want 409", status, body)
				}
			})
		}
	}
}

// TestCountsWaitForRoomForTheSpool: a server that was started without room publishes
// every window when there is some, and counts ids again.
func TestCountsWaitForRoomForTheSpool(t *testing.T) {
	t.Parallel()
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

// TestNoRoomUnderAQuotaIsAFullDisk: whatever there is no room for, ids or records, the
// server runs and gives the reason. Ids without room are full; those with room are
// counted, and their record waits for room.
func TestNoRoomUnderAQuotaIsAFullDisk(t *testing.T) {
	t.Parallel()
	strace := testproc.Needs(t, "strace", "strace")
	for _, tt := range []struct {
		call, path, check string
		status            int
	}{{"fallocate", "", `"dedup":{"ok":false,`, 503}, {"pwrite64", "spool.db", `"spool":{"ok":false,`, 200}} {
		t.Run(tt.call, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			cmd := testproc.Verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json", "--shutdown-timeout=200ms", "--data-dir="+dir)
			var paths []string
			if tt.path != "" {
				paths = []string{filepath.Join(dir, tt.path)}
			}
			v := testproc.StartCmd(t, injected(t, strace, cmd, tt.call, "EDQUOT", paths...))
			resp, err := http.Get(v.Public + "/api/verve/accept?id=1")
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if why := resp.Header.Get("Verve-Reason"); resp.StatusCode != tt.status || (why == "full") != (tt.status == 503) {
				t.Errorf("got %d %s, want %d", resp.StatusCode, why, tt.status)
			}
			if _, body := v.Get(v.Admin + "/readyz"); !strings.Contains(body, tt.check) || !strings.Contains(body, "disk quota exceeded") {
				t.Errorf("readyz has no %s, or no reason: %s", tt.check, body)
			}
		})
	}
}
