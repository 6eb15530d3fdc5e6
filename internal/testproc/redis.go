package testproc

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Redis is a real Redis server for a test, on a port of its own. It saves nothing to disk
// unless its arguments ask it to.
type Redis struct {
	Addr string // HOST:PORT
	Dir  string // the directory of its data

	t    testing.TB
	args []string
	cmd  *exec.Cmd
}

// StartRedis starts a Redis that runs until the end of the test, or skips the test.
func StartRedis(t testing.TB, args ...string) *Redis {
	t.Helper()
	Needs(t, "redis-server", "redis")
	r := &Redis{Addr: FreeAddr(t), Dir: t.TempDir(), t: t, args: args}
	r.Start()
	t.Cleanup(r.Kill)
	return r
}

// Start starts the server, also after a Kill, and waits until it answers.
func (r *Redis) Start() {
	r.t.Helper()
	host, port, err := net.SplitHostPort(r.Addr)
	if err != nil {
		r.t.Fatal(err)
	}
	log := filepath.Join(r.Dir, "log")
	r.cmd = exec.Command("redis-server", append([]string{
		"--bind", host, "--port", port, "--save", "", "--dir", r.Dir, "--enable-debug-command", "yes", "--logfile", log,
	}, r.args...)...)
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		answer := r.ping()
		if answer != "" && !strings.Contains(answer, "LOADING") {
			return
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(log) // without the log only the answer is reported
			r.t.Fatalf("redis-server does not answer: %q\n%s", answer, text)
		}
	}
}

// ping returns the answer to a PING, which may be an error; "" if there is no answer.
func (r *Redis) ping() string {
	c, err := net.DialTimeout("tcp", r.Addr, time.Second)
	if err != nil {
		return ""
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Second))
	if _, err := fmt.Fprint(c, "PING\r\n"); err != nil {
		return ""
	}
	var b [128]byte
	n, _ := c.Read(b[:]) // after an error the answer is empty
	return string(b[:n])
}

// Process returns the process of the server.
func (r *Redis) Process() *os.Process { return r.cmd.Process }

// Kill ends the server at once. A second call does nothing.
func (r *Redis) Kill() {
	if r.cmd != nil {
		_ = r.cmd.Process.Kill()
		_ = r.cmd.Wait() // killed
		r.cmd = nil
	}
}
