//go:build unix

package system_test

import (
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
	if err := testproc.LimitFileSize(n); err != nil {
		panic(err)
	}
	panic(syscall.Exec(os.Args[0], os.Args, os.Environ()))
}

// TestStartWithoutRoomServes: whatever there is no room for, ids or records, the
// server runs, refuses ids as full, and says why.
func TestStartWithoutRoomServes(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		limit   int
		records bool // find room
	}{{1, false}, {4 << 10, false}, {20 << 10, false}, {64 << 10, true}, {80 << 10, true}, {1 << 20, true}} {
		v := testproc.StartCmd(t, limited(t, tt.limit, "--shutdown-timeout=200ms"))
		if status, body := v.Get(v.Public + "/api/verve/accept?id=1"); status != 503 || body != "failed" {
			t.Errorf("limit %d: got %d %s, want 503", tt.limit, status, body)
		}
		for _, check := range []string{`"dedup":{"ok":false,`, fmt.Sprintf(`"spool":{"ok":%t`, tt.records)} {
			if _, body := v.Get(v.Admin + "/readyz"); !strings.Contains(body, check) || !strings.Contains(body, "file too large") {
				t.Errorf("limit %d: readyz has no %s, or no reason: %s", tt.limit, check, body)
			}
		}
		want := 1 // the record of the last window is lost
		if tt.records {
			want = 0
		}
		if code := v.Stop(); code != want {
			t.Errorf("limit %d: got exit code %d, want %d\n%s", tt.limit, code, want, v.Text())
		}
	}
}

// TestCountsFileThatMayNotGrowIsSaid: the records wait, ids are answered.
func TestCountsFileThatMayNotGrowIsSaid(t *testing.T) {
	t.Parallel()
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
