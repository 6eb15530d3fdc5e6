//go:build unix

package system_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"verve/internal/testproc"
)

// limited is verve with an RLIMIT_FSIZE: this test sets the limit, and becomes verve.
func limited(t *testing.T, bytes int, args ...string) *exec.Cmd {
	t.Helper()
	cmd := testproc.Verve(t, append([]string{"--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json"}, args...)...)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Args[0], cmd.Path = cmd.Path, exe
	cmd.Env = append(cmd.Env, fmt.Sprint("VERVE_TEST_FILE_SIZE=", bytes))
	return cmd
}

func init() {
	n, err := strconv.ParseUint(os.Getenv("VERVE_TEST_FILE_SIZE"), 10, 64)
	if err != nil {
		return
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
		panic(err)
	}
	panic(syscall.Exec(os.Args[0], os.Args, os.Environ()))
}

// TestFilesThatMayNotGrowStopTheStart with one line that says which.
func TestFilesThatMayNotGrowStopTheStart(t *testing.T) {
	for _, limit := range []int{1, 4 << 10} {
		cmd := limited(t, limit)
		out, err := cmd.CombinedOutput()
		if err == nil || cmd.ProcessState.ExitCode() != 1 || bytes.Count(out, []byte("\n")) != 1 || !bytes.Contains(out, []byte("file too large")) {
			t.Errorf("limit %d: %v, exit code %d:\n%s", limit, err, cmd.ProcessState.ExitCode(), out)
		}
	}
}

// TestStartWithoutRoomForIdsServes: where records find room and ids do not, the
// server runs and refuses ids as full.
func TestStartWithoutRoomForIdsServes(t *testing.T) {
	for _, limit := range []int{80 << 10, 1 << 20} {
		v := testproc.StartCmd(t, limited(t, limit))
		if status, body := v.Get(v.Public + "/api/verve/accept?id=1"); status != 503 || body != "failed" {
			t.Errorf("limit %d: got %d %s, want 503", limit, status, body)
		}
		if _, body := v.Get(v.Admin + "/readyz"); !strings.Contains(body, "file too large") {
			t.Errorf("limit %d: readyz does not give the reason: %s", limit, body)
		}
		if code := v.Stop(); code != 0 {
			t.Errorf("limit %d: exit code %d\n%s", limit, code, v.Text())
		}
	}
}

// TestCountsFileThatMayNotGrowIsSaid: the records wait, ids are answered.
func TestCountsFileThatMayNotGrowIsSaid(t *testing.T) {
	v := testproc.StartCmd(t, limited(t, 1000, "--window=50ms", "--data-dir=none", "--counts-file=counts.jsonl", "--shutdown-timeout=1s"))
	v.Until("file too large")
	testproc.Until(t, "readyz gives the reason, and is ready", func() bool {
		status, body := v.Get(v.Admin + "/readyz")
		return status == 200 && strings.Contains(body, `"file":{"ok":false`) && strings.Contains(body, "file too large")
	})
	if status, _ := v.Get(v.Public + "/api/verve/accept?id=1"); status != 200 {
		t.Errorf("got %d", status)
	}
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d\n%s", code, v.Text())
	}
}
