package testproc

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Needs returns the path of a program. Without it the test is skipped, or fails if
// VERVE_TEST_REQUIRE names the requirement, as in CI.
func Needs(t testing.TB, program, requirement string) string {
	t.Helper()
	for _, dir := range []string{"", "/usr/sbin/"} { // not every user has it in PATH
		if path, err := exec.LookPath(dir + program); err == nil {
			return path
		}
	}
	Missing(t, requirement, "there is no "+program+" here")
	return ""
}

// Thorough reports whether VERVE_TEST_REQUIRE is set, as in CI. If it is not, a test that has
// many cases of one kind runs only some of them.
func Thorough() bool { return os.Getenv("VERVE_TEST_REQUIRE") != "" }

// Missing ends a test that lacks something: it is skipped, or fails if
// VERVE_TEST_REQUIRE names the requirement.
func Missing(t testing.TB, requirement, reason string) {
	t.Helper()
	if slices.Contains(strings.Split(os.Getenv("VERVE_TEST_REQUIRE"), ","), requirement) {
		t.Fatalf("VERVE_TEST_REQUIRE asks for %s: %s", requirement, reason)
	}
	t.Skip(reason)
}

// given has the addresses that FreeAddr has returned.
var given sync.Map

// FreeAddr returns an address of this machine that was free a moment ago, a different one each
// time. The port is below those that the kernel uses for outgoing connections, so that it is
// still free when a server is restarted.
func FreeAddr(t testing.TB) string {
	t.Helper()
	for range 1000 {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 20000+rand.IntN(10000)))
		if err != nil {
			continue
		}
		addr := l.Addr().String()
		_ = l.Close()
		if _, again := given.LoadOrStore(addr, true); !again {
			return addr
		}
	}
	t.Fatal("no port between 20000 and 30000 is free")
	return ""
}

// Setup is called from the TestMain of a package whose tests mostly wait. Tests that call
// t.Parallel then run two at a time for each core, and temporary folders are in memory.
func Setup() {
	// This comes before the flags are parsed, so a flag on the command line has precedence.
	_ = flag.Set("test.parallel", strconv.Itoa(2*runtime.GOMAXPROCS(0)))
	inMemory()
}

// inMemory puts the temporary folders of this process, and of processes that it starts, into
// memory if there is room for them: tests check only what the page cache keeps, and would wait
// for the disk for nothing.
func inMemory() {
	const dir, least = "/dev/shm", 4 << 20 // KiB
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 4 || f[1] != dir {
			continue
		}
		for o := range strings.SplitSeq(f[3], ",") {
			var size int
			if _, err := fmt.Sscanf(o, "size=%dk", &size); err == nil && size < least || o == "noexec" || o == "ro" {
				return // too small, as in a container, or not usable
			}
		}
		_ = os.Setenv("TMPDIR", dir) // it can fail only for invalid names
	}
}

// Until polls done until it returns true, and fails the test after a minute, which is longer
// than anything that tests wait for takes on a busy machine. what describes that in the
// failure.
func Until(t testing.TB, what string, done func() bool) {
	t.Helper()
	Within(t, time.Minute, what, done)
}

// Within is like Until, with another limit.
func Within(t testing.TB, limit time.Duration, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// Daemon runs the command until the end of the test, and returns when it listens on addr.
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

// ExitCode returns the exit code of a command that returned err; 0 if err is nil.
func ExitCode(err error) int {
	if exit, is := err.(*exec.ExitError); is {
		return exit.ExitCode()
	}
	return 0
}
