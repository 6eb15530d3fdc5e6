package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"verve/internal/testproc"
)

const (
	masterSet = "verve"

	// sentinelPatience is after what silence a Sentinel takes a master for dead.
	sentinelPatience = time.Second
)

// startSentinels makes a master with a replica, which want a password, and three
// Sentinels, which want none.
func startSentinels(t *testing.T, password string) (master, replica string, process *exec.Cmd, sentinels []string) {
	t.Helper()
	exe := testproc.Needs(t, "redis-server", "redis")
	testproc.Needs(t, "redis-cli", "redis")
	server := func(args ...string) (string, *exec.Cmd) {
		addr := testproc.FreeAddr(t)
		_, port, _ := net.SplitHostPort(addr)
		return addr, daemon(t, addr, exe, append([]string{"--bind", "127.0.0.1", "--port", port, "--save", "", "--dir", t.TempDir(), "--logfile", "log",
			"--requirepass", password, "--masterauth", password, "--repl-diskless-sync-delay", "0"}, args...)...)
	}
	master, process = server()
	host, port, _ := net.SplitHostPort(master)
	replica, _ = server("--replicaof", host, port)
	testproc.Until(t, "the replica follows", func() bool {
		return strings.Contains(redisCLI(t, master, "--no-auth-warning", "-a", password, "INFO", "replication"), "state=online")
	})
	for range 3 {
		addr, dir := testproc.FreeAddr(t), t.TempDir()
		_, sentinelPort, _ := net.SplitHostPort(addr)
		conf := filepath.Join(dir, "sentinel.conf") // it writes to it
		text := fmt.Sprintf("bind 127.0.0.1\nport %s\ndir %s\nlogfile log\nsentinel monitor %[3]s %s %s 2\nsentinel auth-pass %[3]s %[6]s\n"+
			"sentinel down-after-milliseconds %[3]s %[7]d\nsentinel failover-timeout %[3]s 5000\n",
			sentinelPort, dir, masterSet, host, port, password, sentinelPatience.Milliseconds())
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		daemon(t, addr, exe, conf, "--sentinel")
		sentinels = append(sentinels, addr)
	}
	testproc.Until(t, "the Sentinels know each other and the replica", func() bool {
		for _, s := range sentinels {
			state := strings.Fields(redisCLI(t, s, "SENTINEL", "MASTER", masterSet))
			field := func(name string) string {
				for i := 0; i+1 < len(state); i += 2 {
					if state[i] == name {
						return state[i+1]
					}
				}
				return ""
			}
			if field("num-slaves") != "1" || field("num-other-sentinels") != "2" || field("flags") != "master" {
				return false
			}
		}
		return true
	})
	return master, replica, process, sentinels
}

// TestSentinelChangesTheMaster: the instances find their Redis by its Sentinels,
// and find the next one when the master is killed, or when the Sentinels hand over
// to the replica while the old master still takes writes. Every window adds up or
// says that it does not, and the last ones do.
func TestSentinelChangesTheMaster(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds of real time")
	}
	t.Parallel() // they wait more than they work
	const password = "hunter2"
	for name, tt := range map[string]struct {
		change func(t *testing.T, process *exec.Cmd, sentinel string)
		quiet  time.Duration // without a failure, and it is over
	}{
		// What fails a second later is this machine's being busy.
		"killed": {func(_ *testing.T, process *exec.Cmd, _ string) { _ = process.Process.Kill() }, time.Second},
		// The old master is demoted seconds later.
		"handed over": {func(t *testing.T, _ *exec.Cmd, sentinel string) {
			host, port, _ := net.SplitHostPort(sentinel)
			if out, err := exec.Command("redis-cli", "-h", host, "-p", port, "SENTINEL", "FAILOVER", masterSet).CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		}, 5 * time.Second},
	} {
		if name == "handed over" && !testproc.Thorough() {
			continue
		}
		t.Run(name, func(t *testing.T) {
			_, replica, process, sentinels := startSentinels(t, password)
			url := func(sentinel string) string {
				return "redis-sentinel://:" + password + "@" + sentinel + "?master_set=" + masterSet
			}
			f := groupOf(t, 2, url(sentinels[0]), "1s", "--redis-url="+url(sentinels[1]), "--redis-url="+url(sentinels[2]))
			f.Duration, f.Rate, f.Pipeline, f.Connections = 3*time.Minute, 3000, 1, 64 // ended before
			f.AllowInexact, f.Verbose = true, true                                     // verbose: all windows are in the table
			sum, accepted := atAll(f, "unavailable"), atAll(f, "ok")
			ctx, end := context.WithCancel(t.Context())
			defer end()
			seen := make(chan outage, 1)
			go func() {
				defer end()
				awaitWindows(ctx, accepted, 3)
				before := sum()
				tt.change(t, process, sentinels[0])
				seen <- watchOutage(sum, before, func() bool { return strings.HasPrefix(redisRole(replica, password), "master") }, tt.quiet)
				awaitWindows(ctx, accepted, 4)
			}()
			v, err := run(ctx, f)
			if err != nil {
				t.Fatal(err)
			}
			end()
			o := <-seen
			t.Logf("%d answers: %d ok, %d failed, %d refused, p99 of those %.0f ms; the replica took over after %v; %d failed after the change, for %v; %d of %d windows say that they are not exact",
				v.Answers, v.Accepted, v.Repeated, v.Refused, v.RefusedP99, o.taken.Round(10*time.Millisecond), o.failed, o.lasted.Round(10*time.Millisecond), v.Inexact, v.Windows)
			if !v.Good || v.Windows < 6 {
				t.Errorf("%+v, %+v", v.Table, v.Faults)
			}
			if o.taken == 0 {
				t.Error("the replica did not become the master")
			}
			o.check(t, sentinelPatience, 8*time.Second+tt.quiet)
			// Losses show in the windows of the change; later ones are exact.
			for _, row := range v.Table[max(0, len(v.Table)-3):] {
				if row.Inexact {
					t.Errorf("a window long after the change is not exact: %+v", row)
				}
			}
		})
	}
}
