package redis

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"verve/dedup"
	"verve/internal/settest"
	"verve/internal/testproc"
)

// TestSentinelMayHaveAPasswordOfItsOwn: the Sentinel asks for one, the master for
// another, and ids are answered. With the master's for both they are not.
func TestSentinelMayHaveAPasswordOfItsOwn(t *testing.T) {
	master := startRedis(t, "--requirepass", "the-masters")
	host, port, err := net.SplitHostPort(master.Addr)
	if err != nil {
		t.Fatal(err)
	}
	addr, dir := testproc.FreeAddr(t), t.TempDir()
	_, sentinelPort, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "sentinel.conf") // the Sentinel writes to it
	text := fmt.Sprintf("bind 127.0.0.1\nport %s\ndir %s\nlogfile log\nrequirepass the-sentinels\nsentinel monitor m %s %s 1\nsentinel auth-pass m the-masters\n",
		sentinelPort, dir, host, port)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("redis-server", conf, "--sentinel")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	testproc.Until(t, "the Sentinel listens", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	by := func(c *Config) {
		patient(c)
		c.URLs = []string{"redis-sentinel://:the-masters@" + addr + "?master_set=m"}
	}
	r := newRedis(t, addr, by, func(c *Config) { c.SentinelPassword = "the-sentinels" })
	e := settest.NewEpochs(t, r)
	e.Want(t, r, 0, "1", dedup.Unique)

	wrong := newRedisAway(t, addr, by)
	testproc.Until(t, "the password is refused", func() bool {
		ready, reason := wrong.Health()
		return !ready && reason == "Redis, or its Sentinel, refuses the user or the password"
	})
	if _, err := New(Config{URLs: []string{"redis://" + master.Addr}, Group: "g", Window: r.cfg.Window, Local: new(dedup.Memory), SentinelPassword: "x"}); err == nil {
		t.Error("a Sentinel's password without a Sentinel is taken")
	}
}
