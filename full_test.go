//go:build unix

package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The verve that this process becomes may have an RLIMIT_FSIZE.
func init() {
	n, err := strconv.ParseUint(os.Getenv("VERVE_TEST_FILE_SIZE"), 10, 64)
	if err != nil {
		return
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
		panic(err)
	}
}

// TestFilesThatMayNotGrowStopTheStart with one line that says which.
func TestFilesThatMayNotGrowStopTheStart(t *testing.T) {
	for _, limit := range []int{1, 4 << 10} {
		cmd := verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json")
		cmd.Env = append(cmd.Env, fmt.Sprint("VERVE_TEST_FILE_SIZE=", limit))
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
		cmd := verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json")
		cmd.Env = append(cmd.Env, fmt.Sprint("VERVE_TEST_FILE_SIZE=", limit))
		v := startCmd(t, cmd)
		if status, body := v.get(v.public + "/api/verve/accept?id=1"); status != 503 || body != "failed" {
			t.Errorf("limit %d: got %d %s, want 503", limit, status, body)
		}
		if _, body := v.get(v.admin + "/readyz"); !strings.Contains(body, "file too large") {
			t.Errorf("limit %d: readyz does not give the reason: %s", limit, body)
		}
		if code := v.stop(); code != 0 {
			t.Errorf("limit %d: exit code %d\n%s", limit, code, strings.Join(v.lines, "\n"))
		}
	}
}

// TestCountsFileThatMayNotGrowIsSaid: the records wait, ids are answered.
func TestCountsFileThatMayNotGrowIsSaid(t *testing.T) {
	cmd := verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json", "--window=50ms", "--data-dir=none", "--counts-file=counts.jsonl", "--shutdown-timeout=1s")
	cmd.Env = append(cmd.Env, "VERVE_TEST_FILE_SIZE=1000")
	v := startCmd(t, cmd)
	v.until("file too large")
	deadline := time.Now().Add(30 * time.Second)
	for {
		status, body := v.get(v.admin + "/readyz")
		if status == 200 && strings.Contains(body, `"file":{"ok":false`) && strings.Contains(body, "file too large") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("readyz: %d %s", status, body)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if status, _ := v.get(v.public + "/api/verve/accept?id=1"); status != 200 {
		t.Errorf("got %d", status)
	}
	if code := v.stop(); code != 0 {
		t.Errorf("exit code %d\n%s", code, strings.Join(v.lines, "\n"))
	}
}
