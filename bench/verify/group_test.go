package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"verve/internal/testproc"
)

// daemon runs a program until the end of the test, and waits until it listens.
func daemon(t *testing.T, addr, program string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(program, args...)
	testproc.Daemon(t, addr, cmd)
	return cmd
}

func TestMain(m *testing.M) { testproc.Main(m) }

// groupOf makes the flags of a run over n instances that share a Redis: its
// address, or the URL by which it is found.
func groupOf(t *testing.T, n int, redis, window string, more ...string) *flags {
	t.Helper()
	server, dir := testproc.Program(t), t.TempDir()
	if !strings.Contains(redis, "://") {
		redis = "redis://" + redis
	}
	f := &flags{
		Connections: 4 * n, Pipeline: 4, IDs: idsUUID, DuplicateStatus: 409, Repeats: 0.2,
		Timeout: time.Minute, Wait: time.Minute, StopLimit: 2 * time.Minute,
		SpawnLog: filepath.Join(dir, "servers.log"), MinAnswers: 1000,
	}
	for i := range n {
		listen, data := testproc.FreeAddr(t), filepath.Join(dir, fmt.Sprint("data-", i))
		f.URL = append(f.URL, "http://"+listen)
		f.CountsFile = append(f.CountsFile, filepath.Join(data, "counts.jsonl"))
		f.Spawn = append(f.Spawn, strings.Join(append([]string{
			server, "--listen=" + listen, "--admin-listen=" + testproc.FreeAddr(t), "--window-header", "--shutdown-timeout=1m", "--window=" + window,
			"--data-dir=" + data, "--instance=i" + fmt.Sprint(i), "--dedup=redis", "--redis-url=" + redis,
		}, more...), " "))
	}
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(f.SpawnLog)
			t.Logf("the servers said:\n%s", b[max(0, len(b)-20000):])
		}
	})
	return f
}

func wantGood(t *testing.T, f *flags, kills, windows int) {
	t.Helper()
	v, err := run(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d answers, %d ok, %d failed, %d refused, %d kills, %d windows", v.Answers, v.Accepted, v.Repeated, v.Refused, v.Kills, v.Windows)
	if !v.Good || v.Kills != kills || v.Windows < windows {
		t.Errorf("got good=%t, %d kills, %d windows, %+v, %+v; want %d kills, at least %d windows, and every one to add up",
			v.Good, v.Kills, v.Windows, v.Table, v.Faults, kills, windows)
	}
}

// TestKilledInstancesLoseNothing: instances of a group are killed in the middle of
// windows under load and started again; every window is published once, and its
// sum is right.
func TestKilledInstancesLoseNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds of real time")
	}
	t.Parallel() // they wait more than they work
	f := groupOf(t, 2, testproc.StartRedis(t).Addr, "300ms")
	f.Duration, f.Rate, f.Signal, f.KillEvery, f.Kills = 2*time.Minute, 6000, "KILL", "200ms-1500ms", 4
	wantGood(t, f, 8, 3)
}

// TestInstancesThatStopLoseNothing: the same with SIGTERM, which counts nothing
// that was not answered.
func TestInstancesThatStopLoseNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds of real time")
	}
	t.Parallel() // they wait more than they work
	f := groupOf(t, 2, testproc.StartRedis(t).Addr, "300ms")
	f.Duration, f.Rate, f.Signal, f.KillEvery, f.Kills = 2*time.Minute, 6000, "TERM", "200ms-1500ms", 3
	wantGood(t, f, 6, 3)
}

// TestBatchesOfAGroupAddUp: the ids of batches at two instances, one of which is killed
// again and again, are counted once each.
func TestBatchesOfAGroupAddUp(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds of real time")
	}
	t.Parallel() // they wait more than they work
	f := groupOf(t, 2, testproc.StartRedis(t).Addr, "300ms")
	f.Duration, f.Batch, f.Pipeline, f.Connections, f.Rate = 2*time.Minute, 200, 1, 4, 20_000
	f.Signal, f.KillEvery, f.Kills = "KILL", "300ms-1500ms", 3
	wantGood(t, f, 6, 3)
}

// TestFiveInstancesOverManyWindows publish each of them once, with the sum of all.
func TestFiveInstancesOverManyWindows(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds of real time")
	}
	t.Parallel() // they wait more than they work
	// The stop has time: on a busy machine the group is behind at the end, and for each window
	// an instance reports all that are not published.
	f := groupOf(t, 5, testproc.StartRedis(t).Addr, "100ms", "--shutdown-timeout=3m")
	f.Duration, f.Rate, f.Requests, f.StopLimit = 2*time.Minute, 4000, 20_000, 4*time.Minute // at that rate 50 windows
	wantGood(t, f, 0, 30)
}

// TestLoadBalancerBeforeTheGroup: two instances behind nginx answer as one.
func TestLoadBalancerBeforeTheGroup(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds of real time")
	}
	t.Parallel() // they wait more than they work
	nginx := testproc.Needs(t, "nginx", "nginx")
	f := groupOf(t, 2, testproc.StartRedis(t).Addr, "1s")
	dir, front := t.TempDir(), testproc.FreeAddr(t)
	conf := filepath.Join(dir, "nginx.conf")
	servers := ""
	for _, url := range f.URL {
		servers += "server " + strings.TrimPrefix(url, "http://") + ";\n"
	}
	// As docs/instances.md says: a request that may have been counted is not sent
	// to another instance, which would answer that it was.
	if err := os.WriteFile(conf, []byte(`daemon off; master_process off; pid `+dir+`/pid; error_log `+dir+`/error.log;
events {}
http {
  access_log off;
  client_body_temp_path `+dir+`/a; proxy_temp_path `+dir+`/b; fastcgi_temp_path `+dir+`/c; uwsgi_temp_path `+dir+`/d; scgi_temp_path `+dir+`/e;
  upstream verve { `+servers+` keepalive 32; }
  server {
    listen `+front+`;
    location / {
      proxy_pass http://verve;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $http_host;
      proxy_next_upstream off;
    }
  }
}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	instances := f.URL
	f.URL = []string{"http://" + front}
	f.Duration, f.Rate, f.Requests, f.Pipeline = 2*time.Minute, 6000, 54_000, 1 // at that rate 9 windows, or some less on a busy machine
	// Not started by the driver: the balancer must find them there.
	spawns := f.Spawn
	f.Spawn = nil
	for i, command := range spawns {
		addr := strings.TrimPrefix(instances[i], "http://")
		parts := strings.Fields(command)
		daemon(t, addr, parts[0], parts[1:]...)
	}
	daemon(t, front, nginx, "-c", conf)
	wantGood(t, f, 0, 5)
}
