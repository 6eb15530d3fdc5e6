//go:build unix

package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestRunsAsAnyoneWithOneDirectory: as in its container, as a user who can write
// to nothing but the data directory.
func TestRunsAsAnyoneWithOneDirectory(t *testing.T) {
	const nobody = 65532
	dir, err := os.MkdirTemp("", "verve")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	data := filepath.Join(dir, "data")
	cmd := verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json", "--window=1h", "--data-dir="+data)
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 { // where the tests are not, they run as nobody in particular anyway
		exe, err := os.ReadFile(cmd.Path)
		if err != nil {
			t.Fatal(err)
		}
		cmd.Path = filepath.Join(dir, "verve")
		if err := os.WriteFile(cmd.Path, exe, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(data, nobody, nobody)); err != nil {
			t.Fatal(err)
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	cmd.Dir = "/"
	cmd.Env = append(cmd.Env, "HOME=/nonexistent", "TMPDIR=/nonexistent")
	v := startCmd(t, cmd)
	if status, _ := v.get(v.public + "/api/verve/accept?id=1"); status != 200 {
		t.Errorf("got %d", status)
	}
	if code := v.stop(); code != 0 {
		t.Errorf("exit code %d\n%s", code, strings.Join(v.lines, "\n"))
	}
	if got := records(t, filepath.Join(data, "counts.jsonl")); len(got) != 1 || got[0].Unique != 1 {
		t.Errorf("records: %+v", got)
	}
}
