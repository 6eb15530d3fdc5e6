package testproc

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// Needs returns the path of a program. Without it the test is skipped, or fails if
// VERVE_TEST_REQUIRE names the requirement, as in CI.
func Needs(t testing.TB, program, requirement string) string {
	t.Helper()
	for _, dir := range []string{"", "/usr/sbin/"} { // not in everybody's PATH
		if path, err := exec.LookPath(dir + program); err == nil {
			return path
		}
	}
	Missing(t, requirement, "there is no "+program+" here")
	return ""
}

// Missing ends a test that lacks something: it is skipped, or fails if
// VERVE_TEST_REQUIRE names the requirement.
func Missing(t testing.TB, requirement, reason string) {
	t.Helper()
	if slices.Contains(strings.Split(os.Getenv("VERVE_TEST_REQUIRE"), ","), requirement) {
		t.Fatalf("VERVE_TEST_REQUIRE asks for %s: %s", requirement, reason)
	}
	t.Skip(reason)
}

// FreeAddr is an address of this machine that was free a moment ago. The port lies
// below those that the kernel gives to outgoing connections, so that a server that
// is restarted finds it free again.
func FreeAddr(t testing.TB) string {
	t.Helper()
	for range 1000 {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 20000+rand.IntN(10000)))
		if err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal("no port between 20000 and 30000 is free")
	return ""
}

// Until polls for what other processes or goroutines do. A minute is longer than
// any of that takes on a busy machine.
func Until(t testing.TB, what string, done func() bool) {
	t.Helper()
	Within(t, time.Minute, what, done)
}

// Within is Until with another limit.
func Within(t testing.TB, limit time.Duration, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// Daemon runs the command until the end of the test, and returns when it listens.
func Daemon(t testing.TB, addr string, cmd *exec.Cmd) {
	t.Helper()
	if cmd.Stderr == nil {
		cmd.Stderr = os.Stderr
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
	})
	Until(t, cmd.Path+" listens", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
}

// ExitCode is the exit code of a command that returned err; 0 if there was none.
func ExitCode(err error) int {
	if exit, is := err.(*exec.ExitError); is {
		return exit.ExitCode()
	}
	return 0
}
