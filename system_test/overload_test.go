package system_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"verve/internal/testproc"
)

func dialPublic(t *testing.T, v *testproc.Server) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(v.Public, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(time.Minute)) // a hang is a failure
	return c
}

// accept asks on a connection about an id.
func accept(c net.Conn, r *bufio.Reader, id string) (*http.Response, error) {
	if _, err := fmt.Fprintf(c, "GET /api/verve/accept?id=%s HTTP/1.1\r\nHost: x\r\n\r\n", id); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return nil, err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return resp, err
}

// resident is the physical memory of the process, in bytes; 0 where it is not told.
func resident(v *testproc.Server) uint64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", v.Process.Pid))
	if err != nil {
		return 0
	}
	fields := bytes.Fields(b)
	if len(fields) < 2 {
		return 0
	}
	pages, _ := strconv.ParseUint(string(fields[1]), 10, 64)
	return pages * uint64(os.Getpagesize())
}

// TestIdleConnectionsCostGoodClientsNothing: ten thousand connections that are
// silent, idle or dripping, and what a request takes beside them, against what one takes at
// a server without them. The two are asked in turn, as others are on the machine.
func TestIdleConnectionsCostGoodClientsNothing(t *testing.T) {
	const idle, dripping, requests = 10_000, 50, 4000
	start := func() *testproc.Server {
		return testproc.Start(t, "--window=1h", "--slow-timeout=10m", "--idle-timeout=10m", "--max-conns=65536")
	}
	crowded, quiet := start(), start()
	var crowd []net.Conn
	defer func() {
		for _, c := range crowd {
			_ = c.Close()
		}
	}()
	for i := range idle {
		c, err := net.Dial("tcp", strings.TrimPrefix(crowded.Public, "http://"))
		if err != nil {
			if i < 1000 {
				t.Fatal(err)
			}
			t.Logf("no more than %d connections here: %v", i, err)
			break
		}
		crowd = append(crowd, c)
		if i%2 == 0 {
			continue // silent
		}
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		if resp, err := accept(c, bufio.NewReaderSize(c, 512), fmt.Sprint("idle", i)); err != nil || resp.StatusCode != 200 {
			t.Fatalf("connection %d: got %v, %v", i, resp, err)
		}
	}
	stop := make(chan struct{})
	var drips sync.WaitGroup
	for _, c := range crowd[:dripping] {
		drips.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(20 * time.Millisecond): // the slowness under test
				}
				if _, err := c.Write([]byte("G")); err != nil {
					return
				}
			}
		})
	}
	type asked struct {
		conn   net.Conn
		answer *bufio.Reader
		took   []time.Duration
	}
	var both [2]asked
	for k, v := range []*testproc.Server{crowded, quiet} {
		c := dialPublic(t, v)
		defer c.Close()
		both[k] = asked{conn: c, answer: bufio.NewReader(c)}
	}
	for i := range 2 * requests {
		at := &both[i%2]
		began := time.Now()
		if resp, err := accept(at.conn, at.answer, fmt.Sprint(i)); err != nil || resp.StatusCode != 200 {
			t.Fatalf("got %v, %v", resp, err)
		}
		at.took = append(at.took, time.Since(began))
	}
	p := func(k, percent int) time.Duration {
		slices.Sort(both[k].took)
		return both[k].took[requests*percent/100]
	}
	memory := resident(crowded)
	close(stop)
	drips.Wait()
	t.Logf("%d connections: p50 %v, without them %v; p99 %v and %v; %d MiB resident", len(crowd), p(0, 50), p(1, 50), p(0, 99), p(1, 99), memory>>20)
	// A cost for each of the connections would be far more than that.
	if with, without := p(0, 50), p(1, 50); with > 2*without {
		t.Errorf("beside %d idle connections a request takes %v, without them %v", len(crowd), with, without)
	}
	for _, v := range []*testproc.Server{crowded, quiet} {
		if code := v.Stop(); code != 0 {
			t.Errorf("exit code %d", code)
		}
	}
}

// TestOverloadIsShedAndPasses: three times the connections that are allowed; all others
// are refused with Retry-After, memory does not grow, and there is room when the crowd
// has gone.
func TestOverloadIsShedAndPasses(t *testing.T) {
	const limit = 200
	v := testproc.Start(t, "--window=1h", fmt.Sprint("--max-conns=", limit))
	var holding []net.Conn
	for i := range limit {
		c := dialPublic(t, v)
		defer c.Close()
		if resp, err := accept(c, bufio.NewReader(c), fmt.Sprint("holds", i)); err != nil || resp.StatusCode != 200 {
			t.Fatalf("connection %d: got %v, %v", i, resp, err)
		}
		holding = append(holding, c)
	}
	before := resident(v)
	var most, shed, other atomic.Uint64
	var crowd sync.WaitGroup
	for w := range 2 * limit {
		crowd.Go(func() {
			for i := range 10 {
				c, err := net.Dial("tcp", strings.TrimPrefix(v.Public, "http://"))
				if err != nil {
					t.Error(err)
					return
				}
				_ = c.SetDeadline(time.Now().Add(time.Minute))
				resp, err := accept(c, bufio.NewReader(c), fmt.Sprintf("crowd-%d-%d", w, i))
				switch {
				case err != nil:
					other.Add(1)
				case resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || !resp.Close:
					t.Errorf("got %v", resp)
				default:
					shed.Add(1)
				}
				_ = c.Close()
				most.Store(max(most.Load(), resident(v)))
			}
		})
	}
	crowd.Wait()
	// A reset may overtake the answer where more are turned away than are read on.
	if s, o := shed.Load(), other.Load(); o > s/10 {
		t.Errorf("%d were answered 503, %d were not answered", s, o)
	}
	if m := most.Load(); m > before+64<<20 {
		t.Errorf("resident memory went from %d to %d MiB", before>>20, m>>20)
	}
	for _, c := range holding {
		_ = c.Close()
	}
	began := time.Now()
	testproc.Until(t, "there is room after the crowd has left", func() bool {
		c := dialPublic(t, v)
		defer c.Close()
		resp, err := accept(c, bufio.NewReader(c), "after")
		return err == nil && resp.StatusCode == 200
	})
	t.Logf("%d shed, %d reset, room again after %v, %d to %d MiB", shed.Load(), other.Load(), time.Since(began), before>>20, most.Load()>>20)
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	got := testproc.Records(t, v.Dir+"/verve-data/counts.jsonl")
	if len(got) != 1 || got[0].Unique != limit+1 {
		t.Errorf("records: %+v, want %d ids: those turned away have counted nothing", got, limit+1)
	}
}

// startWithin starts a server that may open so many files.
func startWithin(t *testing.T, files int, args ...string) *testproc.Server {
	t.Helper()
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip("no shell to set a limit with")
	}
	cmd := testproc.Verve(t, append([]string{"--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json", "--window=1h"}, args...)...)
	cmd.Path, cmd.Args = sh, append([]string{sh, "-c", fmt.Sprintf(`ulimit -n %d && exec "$0" "$@"`, files)}, cmd.Args...)
	return testproc.StartCmd(t, cmd)
}

// TestMoreConnectionsThanDescriptors: open ones are served, and new ones when the others
// have gone.
func TestMoreConnectionsThanDescriptors(t *testing.T) {
	const files = 200
	for _, args := range [][]string{nil, {"--max-conns=150"}, {"--max-conns=10000"}} {
		v := startWithin(t, files, args...)
		first := dialPublic(t, v)
		defer first.Close()
		r := bufio.NewReader(first)
		if resp, err := accept(first, r, "first"); err != nil || resp.StatusCode != 200 {
			t.Fatalf("%v: got %v, %v", args, resp, err)
		}
		var crowd []net.Conn
		for range 2 * files {
			crowd = append(crowd, dialPublic(t, v))
		}
		if resp, err := accept(first, r, "second"); err != nil || resp.StatusCode != 200 {
			t.Errorf("%v: the connection that was there: got %v, %v", args, resp, err)
		}
		if code, body := v.Get(v.Admin + "/readyz"); code != 200 {
			t.Errorf("%v: /readyz: got %d %s", args, code, body)
		}
		for _, c := range crowd {
			_ = c.Close()
		}
		for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
			c := dialPublic(t, v)
			resp, err := accept(c, bufio.NewReader(c), "third")
			_ = c.Close()
			if err == nil && resp.StatusCode != 503 {
				break
			}
			if time.Since(start) > time.Minute {
				t.Fatalf("%v: when the others have gone: got %v, %v", args, resp, err)
			}
		}
		if code := v.Stop(); code != 0 {
			t.Errorf("%v: exit code %d", args, code)
		}
		lowered := strings.Contains(v.Text(), `"reason":"the process may open 200 files (ulimit -n), and keeps`)
		if lowered != (len(args) > 0) {
			t.Errorf("%v: a line says that --max-conns is lowered: %v", args, lowered)
		}
	}
}

// TestIdleConnectionCostsLessThan8KiB, whether it has sent a request or not.
func TestIdleConnectionCostsLessThan8KiB(t *testing.T) {
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		t.Skip("the race detector takes memory of its own")
	}
	const conns, each = 2000, 8 << 10
	v := testproc.Start(t, "--window=1h", "--slow-timeout=10m", "--idle-timeout=10m", "--expect-ids=10000")
	before := resident(v)
	if before == 0 {
		t.Skip("the system does not tell how much memory a process has")
	}
	for i := range conns {
		c := dialPublic(t, v)
		defer c.Close()
		if i%2 == 0 {
			continue
		}
		if resp, err := accept(c, bufio.NewReaderSize(c, 512), fmt.Sprint(i)); err != nil || resp.StatusCode != 200 {
			t.Fatalf("connection %d: got %v, %v", i, resp, err)
		}
	}
	for start := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		got := (int64(resident(v)) - int64(before)) / conns
		if got < each {
			t.Logf("%d bytes a connection after %v", got, time.Since(start))
			break
		}
		if time.Since(start) > time.Minute {
			t.Fatalf("%d bytes a connection, want less than %d", got, each)
		}
	}
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
