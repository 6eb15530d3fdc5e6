//go:build unix

package system_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"verve/internal/testproc"
)

// handOver makes cmd one that systemd starts with sockets: their descriptors from
// 3 on, and LISTEN_PID of the process itself, which only a shell knows in time.
func handOver(t *testing.T, cmd *exec.Cmd, names string, sockets ...interface{ File() (*os.File, error) }) {
	t.Helper()
	for _, s := range sockets {
		f, err := s.File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	cmd.Args = append([]string{"sh", "-c", `LISTEN_PID=$$ exec "$@"`, "sh", cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
	cmd.Env = append(cmd.Env, fmt.Sprint("LISTEN_FDS=", len(sockets)))
	if names != "" {
		cmd.Env = append(cmd.Env, "LISTEN_FDNAMES="+names)
	}
}

func listenTCP(t *testing.T) *net.TCPListener {
	t.Helper()
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// caller sends ids to a server that is restarted, each on a new connection or all
// on one while that lasts.
type caller struct {
	addr  string
	keep  bool
	conn  net.Conn
	r     *bufio.Reader
	count *atomic.Int64 // of answers ok
}

// accept sends id and wants ok. A kept connection may end without an answer, and
// then the id must not have counted: it is sent again, on a new connection.
func (c *caller) accept(id string) error {
	for {
		kept := c.conn != nil
		if !kept {
			conn, err := net.Dial("tcp", c.addr)
			if err != nil {
				return fmt.Errorf("refused: %w", err)
			}
			_ = conn.SetDeadline(time.Now().Add(time.Minute))
			c.conn, c.r = conn, bufio.NewReader(conn)
		}
		_, err := fmt.Fprintf(c.conn, "GET /api/verve/accept?id=%s HTTP/1.1\r\nHost: x\r\n\r\n", id)
		var resp *http.Response
		if err == nil {
			resp, err = http.ReadResponse(c.r, nil)
		}
		if err != nil {
			_ = c.conn.Close()
			c.conn = nil
			if kept {
				continue
			}
			return fmt.Errorf("no answer: %w", err)
		}
		body, _ := io.ReadAll(resp.Body)
		if string(body) != "ok" {
			return fmt.Errorf("%d %s %s", resp.StatusCode, body, resp.Header.Get("Verve-Reason"))
		}
		c.count.Add(1)
		if !c.keep || resp.Close {
			_ = c.conn.Close()
			c.conn = nil
		}
		return nil
	}
}

// TestRestartsRefuseNobody: a supervisor, as systemd, holds the sockets over a
// hundred restarts under load. Every connection is taken, every id on a new one is
// answered ok, and the records add up to the answers.
func TestRestartsRefuseNobody(t *testing.T) {
	t.Parallel()
	restarts := 20
	if testproc.Thorough() {
		restarts = 100
	}
	public, admin, dir := listenTCP(t), listenTCP(t), t.TempDir()
	startNext := func() *testproc.Server {
		cmd := testproc.Verve(t, "--listen=127.0.0.1:1", "--admin-listen=127.0.0.1:1", "--window=1h", "--expect-ids=1000", "--log-format=json", "--data-dir="+dir)
		handOver(t, cmd, "public:admin", public, admin)
		return testproc.StartCmd(t, cmd)
	}
	v := startNext()
	var counted atomic.Int64
	over := make(chan struct{})
	var callers sync.WaitGroup
	for i := range 4 {
		c := caller{addr: public.Addr().String(), keep: i == 0, count: &counted}
		callers.Go(func() {
			pace := time.NewTicker(2 * time.Millisecond)
			defer pace.Stop()
			for k := 0; ; k++ {
				select {
				case <-over:
					return
				case <-pace.C:
				}
				if err := c.accept(fmt.Sprintf("%d-%d", i, k)); err != nil {
					t.Errorf("caller %d, id %d: %v", i, k, err)
					return
				}
			}
		})
	}
	for range restarts {
		for before := counted.Load(); counted.Load() < before+40 && !t.Failed(); {
			time.Sleep(time.Millisecond) // until it has answered some
		}
		if code := v.Stop(); code != 0 {
			t.Errorf("exit code %d\n%s", code, v.Text())
		}
		if t.Failed() {
			break
		}
		v = startNext()
	}
	close(over)
	callers.Wait()
	if code := v.Stop(); code != 0 && !t.Failed() {
		t.Errorf("exit code %d", code)
	}
	sum := int64(0)
	for _, r := range testproc.Records(t, filepath.Join(dir, "counts.jsonl")) {
		sum += int64(r.Unique)
	}
	if sum != counted.Load() {
		t.Errorf("the records add up to %d, want the %d that were answered ok", sum, counted.Load())
	}
	t.Logf("%d restarts, %d ids answered ok, none refused", restarts, counted.Load())
}

// TestHandedOverSocketsAreUsed by their names, or without names in the order
// public, admin; an address takes the place of what is not handed over.
func TestHandedOverSocketsAreUsed(t *testing.T) {
	t.Parallel()
	public, admin := listenTCP(t), listenTCP(t)
	for _, test := range []struct {
		name, names   string
		sockets       []interface{ File() (*os.File, error) }
		public, admin string
	}{
		{"both by name", "admin:public", []interface{ File() (*os.File, error) }{admin, public}, public.Addr().String(), admin.Addr().String()},
		{"both without names", "", []interface{ File() (*os.File, error) }{public, admin}, public.Addr().String(), admin.Addr().String()},
		{"admin alone", "admin", []interface{ File() (*os.File, error) }{admin}, "", admin.Addr().String()},
		{"public alone", "public", []interface{ File() (*os.File, error) }{public}, public.Addr().String(), ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			cmd := testproc.Verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json", "--window=1h", "--data-dir=none", "--counts-file=off")
			handOver(t, cmd, test.names, test.sockets...)
			v := testproc.StartCmd(t, cmd)
			if got := strings.TrimPrefix(v.Public, "http://"); test.public != "" && got != test.public {
				t.Errorf("public at %s, want %s", got, test.public)
			}
			if got := strings.TrimPrefix(v.Admin, "http://"); test.admin != "" && got != test.admin {
				t.Errorf("admin at %s, want %s", got, test.admin)
			}
			if status, body := v.Get(v.Public + "/api/verve/accept?id=1"); status != 200 {
				t.Errorf("got %d %s", status, body)
			}
			if status, body := v.Get(v.Admin + "/readyz"); status != 200 {
				t.Errorf("readyz: got %d %s", status, body)
			}
			if code := v.Stop(); code != 0 {
				t.Errorf("exit code %d", code)
			}
		})
	}
}

// TestSocketsOfAnotherProcessAreIgnored, as the protocol says.
func TestSocketsOfAnotherProcessAreIgnored(t *testing.T) {
	t.Parallel()
	cmd := testproc.Verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json", "--window=1h", "--data-dir=none", "--counts-file=off")
	cmd.Env = append(cmd.Env, "LISTEN_PID=1", "LISTEN_FDS=7", "LISTEN_FDNAMES=strange")
	v := testproc.StartCmd(t, cmd)
	if status, _ := v.Get(v.Public + "/api/verve/accept?id=1"); status != 200 {
		t.Errorf("got %d", status)
	}
}

// TestBadSocketsStopTheStart before anything on disk is touched.
func TestBadSocketsStopTheStart(t *testing.T) {
	t.Parallel()
	ln := listenTCP(t)
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	path := filepath.Join(t.TempDir(), "s")
	local, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	connected, err := net.DialTCP("tcp", nil, ln.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer connected.Close()
	type file = interface{ File() (*os.File, error) }
	for _, test := range []struct {
		name, names string
		sockets     []file
		want        string
	}{
		{"unknown name", "verve.socket", []file{ln}, `"verve.socket"`},
		{"one name twice", "public:public", []file{ln, ln}, `two sockets have the name "public"`},
		{"a third without a name", "", []file{ln, listenTCP(t), listenTCP(t)}, "socket 3 of 3"},
		{"datagrams", "public", []file{udp}, "the public socket"},
		{"a Unix socket", "admin", []file{local}, "the admin socket is not a listening TCP socket"},
		{"a connection", "public", []file{connected}, "the public socket is not a listening TCP socket"},
	} {
		t.Run(test.name, func(t *testing.T) {
			cmd := testproc.Verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0")
			handOver(t, cmd, test.names, test.sockets...)
			out, _ := cmd.CombinedOutput() // the exit code is looked at
			if code := cmd.ProcessState.ExitCode(); code != exitUsage || bytes.Count(out, []byte("\n")) != 1 || !strings.Contains(string(out), test.want) {
				t.Errorf("exit %d, want %d and one line with %s; got\n%s", code, exitUsage, test.want, out)
			}
			if _, err := os.Stat(filepath.Join(cmd.Dir, "verve-data")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the data directory was made: %v", err)
			}
		})
	}
}

// serviceManager listens as systemd does for notifications, each of which next returns.
func serviceManager(t *testing.T) (path string, next func() string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = manager.Close() })
	return path, func() string {
		t.Helper()
		var b [128]byte
		_ = manager.SetReadDeadline(time.Now().Add(time.Minute))
		n, err := manager.Read(b[:])
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
}

// TestServiceManagerIsNotified: ready, alive again and again, stopping.
func TestServiceManagerIsNotified(t *testing.T) {
	t.Parallel()
	path, next := serviceManager(t)
	cmd := testproc.Verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json", "--window=1h")
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+path, "WATCHDOG_USEC=100000")
	v := testproc.StartCmd(t, cmd)
	if got := next(); got != "READY=1" {
		t.Errorf("first %q, want READY=1", got)
	}
	for range 3 {
		if got := next(); got != "WATCHDOG=1" {
			t.Errorf("got %q, want WATCHDOG=1", got)
		}
	}
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	got := next()
	for got == "WATCHDOG=1" {
		got = next()
	}
	if got != "STOPPING=1" {
		t.Errorf("at the stop %q, want STOPPING=1", got)
	}
}

// TestShutdownDelayCountsOn: after SIGTERM the server is not ready, and still
// counts, while each answer closes its connection. Then it stops in order.
func TestShutdownDelayCountsOn(t *testing.T) {
	t.Parallel()
	// Longer than a busy machine takes for three requests.
	v := testproc.Start(t, "--window=1h", "--shutdown-delay=10s")
	host := strings.TrimPrefix(v.Public, "http://")
	var counted atomic.Int64
	kept := caller{addr: host, keep: true, count: &counted}
	for i := range 3 { // the last ones by the fast path
		if err := kept.accept(fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	v.Until("counting on for the shutdown delay")
	if status, _ := v.Get(v.Admin + "/readyz"); status != 503 {
		t.Errorf("readyz: got %d, want 503", status)
	}
	before := kept.conn
	if err := kept.accept("kept"); err != nil {
		t.Errorf("on a kept connection: %v", err)
	}
	if before == nil || kept.conn != nil {
		t.Error("the answer did not close its connection, or was on another one")
	}
	if err := kept.accept("new"); err != nil {
		t.Errorf("on a new connection: %v", err)
	}
	for v.Log.Scan() {
	}
	if err := v.Wait(); err != nil {
		t.Error(err)
	}
	if got := testproc.Records(t, filepath.Join(v.Dir, "verve-data", "counts.jsonl")); len(got) != 1 || got[0].Unique != 5 {
		t.Errorf("records: %+v, want one with 5 ids", got)
	}
}

// TestSecondSignalCutsTheShutdownDelay short.
func TestSecondSignalCutsTheShutdownDelay(t *testing.T) {
	t.Parallel()
	v := testproc.Start(t, "--window=1h", "--shutdown-delay=1h")
	if code := v.StopAtOnce(); code != exitFailed {
		t.Errorf("exit code %d, want %d", code, exitFailed)
	}
}
