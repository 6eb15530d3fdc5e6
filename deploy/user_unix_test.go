//go:build unix

package deploy_test

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"verve/internal/testproc"
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
	cmd := testproc.Verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json", "--window=1h", "--data-dir="+data)
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 { // where the tests are not, they run as nobody in particular anyway
		if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(data, nobody, nobody)); err != nil {
			t.Fatal(err)
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	cmd.Dir = "/"
	cmd.Env = append(cmd.Env, "HOME=/nonexistent", "TMPDIR=/nonexistent")
	v := testproc.StartCmd(t, cmd)
	if status, _ := v.Get(v.Public + "/api/verve/accept?id=1"); status != 200 {
		t.Errorf("got %d", status)
	}
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d\n%s", code, v.Text())
	}
	if got := testproc.Records(t, filepath.Join(data, "counts.jsonl")); len(got) != 1 || got[0].Unique != 1 {
		t.Errorf("records: %+v", got)
	}
}
