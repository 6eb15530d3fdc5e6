package system_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"verve/internal/testproc"

	"golang.org/x/sys/unix"
)

// smallPipe is one that a few lines fill.
func smallPipe(t *testing.T, r *os.File) {
	t.Helper()
	if _, err := unix.FcntlInt(r.Fd(), unix.F_SETPIPE_SZ, 4096); err != nil {
		t.Fatal(err)
	}
}

// exited waits for the end of the process, whose log nobody reads.
func exited(v *testproc.Server) int {
	hung := time.AfterFunc(time.Minute, func() { _ = v.Process.Kill() })
	defer hung.Stop()
	_ = v.Wait() // the exit code says it
	return v.ProcessState.ExitCode()
}

// TestStalledLogStopsNothing: nobody reads the log any more, and records go on, ids
// are answered, and the first SIGTERM stops in order. The timeout is too long to be
// what ends it.
func TestStalledLogStopsNothing(t *testing.T) {
	t.Parallel()
	v, stderr := testproc.Unstarted(t, "--window=50ms", "--shutdown-timeout=1h")
	smallPipe(t, stderr)
	v.Begin(stderr)
	v.AwaitListening() // and reads no further
	awaitRecords(t, v, 100)
	for _, want := range []int{200, 409} {
		if status, body := v.Get(v.Public + "/api/verve/accept?id=1"); status != want && status != 200 { // the window may turn
			t.Errorf("got %d %s, want %d", status, body, want)
		}
	}
	v.Signal(syscall.SIGTERM)
	if code := exited(v); code != 0 {
		t.Errorf("exit code %d", code)
	}
	sum := 0
	for i, r := range testproc.Records(t, filepath.Join(v.Dir, "verve-data", "counts.jsonl")) {
		if sum += r.Unique; r.Seq != i+1 {
			t.Errorf("record %d: %+v", i+1, r)
		}
	}
	if sum != 1 && sum != 2 {
		t.Errorf("the records have %d ids, want 1 or 2", sum)
	}
}

// TestSecondSignalWithAStalledLog: a stop that waits for a broker can be cut short
// although "stopping" was not written.
func TestSecondSignalWithAStalledLog(t *testing.T) {
	t.Parallel()
	v, stderr := testproc.Unstarted(t, "--window=50ms", "--kafka-brokers=127.0.0.1:9", "--counts-file=verve-data/counts.jsonl", "--shutdown-timeout=1h")
	smallPipe(t, stderr)
	v.Begin(stderr)
	v.AwaitListening()
	awaitRecords(t, v, 40)
	v.Signal(syscall.SIGTERM)
	testproc.Until(t, "the server is stopping", func() bool {
		status, body := v.Get(v.Admin + "/readyz")
		return status == 503 && strings.Contains(body, "shutting down")
	})
	ended := make(chan struct{})
	go func() {
		for {
			_ = v.Process.Signal(syscall.SIGTERM) // may have ended
			select {
			case <-ended:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	code := exited(v)
	close(ended)
	if code != exitFailed {
		t.Errorf("exit code %d, want %d", code, exitFailed)
	}
}

// TestDroppedLinesAreReported when the reader of the log is back.
func TestDroppedLinesAreReported(t *testing.T) {
	t.Parallel()
	v, stderr := testproc.Unstarted(t, "--window=50ms", "--log-level=debug")
	smallPipe(t, stderr)
	v.Begin(stderr)
	v.AwaitListening()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		if _, page := v.Get(v.Admin + "/metrics"); !strings.Contains(page, "\nverve_log_lines_dropped_total 0\n") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no lines are dropped")
		}
		// Each is logged: quicker than waiting for windows.
		for range 20 {
			v.Signal(syscall.SIGUSR1)
		}
		time.Sleep(5 * time.Millisecond)
	}
	var report struct{ Dropped int }
	if err := json.Unmarshal([]byte(v.Until(`"dropped":`)), &report); err != nil || report.Dropped < 1 {
		t.Errorf("%+v, %v", report, err)
	}
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestStalledStandardOutput: with --counts-file=- a reader that stalls does not stop
// counting, shows on /readyz, does not hold up the stop, and misses nothing.
func TestStalledStandardOutput(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	serve := func() (*testproc.Server, *os.File) {
		v, stderr := testproc.Unstarted(t, "--window=50ms", "--counts-file=-", "--data-dir="+dir, "--shutdown-timeout=200ms")
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		smallPipe(t, r)
		v.Stdout = w
		v.Begin(stderr)
		_ = w.Close()
		v.AwaitListening()
		go func() { // the log has its reader
			for v.Log.Scan() {
			}
		}()
		return v, r
	}
	await := func(v *testproc.Server, want string) {
		t.Helper()
		testproc.Until(t, "readyz has "+want, func() bool {
			_, body := v.Get(v.Admin + "/readyz")
			return strings.Contains(body, want)
		})
	}
	var text bytes.Buffer
	v, stdout := serve()
	await(v, `"file":{"ok":false,"reason":"a write has not returned`)
	if status, body := v.Get(v.Public + "/api/verve/accept?id=1"); status != 200 {
		t.Errorf("got %d %s", status, body)
	}
	v.Signal(syscall.SIGTERM)
	if code := exited(v); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if _, err := text.ReadFrom(stdout); err != nil { // what the pipe holds
		t.Fatal(err)
	}

	// The reader of the next process goes away.
	v, stdout = serve()
	lines := bufio.NewReader(stdout)
	for range 50 {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			t.Fatal(err)
		}
		text.Write(line)
	}
	pause(t, v) // so that the pipe can be emptied before it is closed
	drain(t, stdout, lines, &text)
	_ = stdout.Close()
	v.Signal(syscall.SIGCONT)
	await(v, `broken pipe`)
	v.Signal(syscall.SIGTERM)
	if code := exited(v); code != 0 {
		t.Errorf("exit code %d", code)
	}

	// The third one delivers what is left.
	v, stdout = serve()
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = text.ReadFrom(stdout)
	}()
	await(v, `"file":{"ok":true}`)
	v.Signal(syscall.SIGTERM)
	if code := exited(v); code != 0 {
		t.Errorf("exit code %d", code)
	}
	<-read
	sum, last := 0, 0
	for line := range bytes.Lines(text.Bytes()) {
		var r testproc.Record
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if r.Seq != last+1 {
			t.Errorf("record %d follows %d", r.Seq, last)
		}
		sum, last = sum+r.Unique, r.Seq
	}
	if sum != 1 {
		t.Errorf("the records have %d ids, want 1", sum)
	}
}

// drain takes what is in a pipe that nobody writes to at the moment.
func drain(t *testing.T, r *os.File, buffered *bufio.Reader, text *bytes.Buffer) {
	t.Helper()
	n, err := unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, buffered.Buffered()+n)
	for have := 0; have < len(b); {
		n, err := buffered.Read(b[have:])
		if have += n; err != nil {
			t.Fatal(err)
		}
	}
	text.Write(b)
}

// TestClosedTerminalStopsInOrder: the server in the foreground of a terminal that is
// closed publishes its window.
func TestClosedTerminalStopsInOrder(t *testing.T) {
	t.Parallel()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no terminals here: %v", err)
	}
	defer master.Close()
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	slave, err := unix.IoctlRetInt(int(master.Fd()), unix.TIOCGPTPEER)
	if err != nil {
		t.Skipf("no terminals here: %v", err)
	}
	terminal := os.NewFile(uintptr(slave), "terminal")
	v, stderr := testproc.Unstarted(t, "--window=1h")
	v.Stdin = terminal
	v.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
	v.Begin(stderr)
	_ = terminal.Close()
	v.AwaitListening()
	v.Get(v.Public + "/api/verve/accept?id=1")
	_ = master.Close()
	if code := v.Ended(); code != 0 {
		t.Errorf("exit code %d (%v)", code, v.ProcessState)
	}
	wantOneRecord(t, v, 1)
}

// TestStopIsNotifiedHoweverQuickItIs: the service manager is slow to read, and the
// server has nothing else left to do.
func TestStopIsNotifiedHoweverQuickItIs(t *testing.T) {
	t.Parallel()
	path, next := serviceManager(t)
	cmd := testproc.Verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json", "--window=1h", "--shutdown-timeout=1m")
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+path)
	v := testproc.StartCmd(t, cmd)
	if got := next(); got != "READY=1" {
		t.Fatalf("first %q, want READY=1", got)
	}
	other, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other)
	for err == nil { // until there is no room
		err = unix.Sendto(other, []byte("FILLED"), unix.MSG_DONTWAIT, &unix.SockaddrUnix{Name: path})
	}
	if !errors.Is(err, unix.EAGAIN) {
		t.Fatal(err)
	}
	v.Signal(syscall.SIGTERM)
	awaitRecords(t, v, 1)
	got := next()
	for got == "FILLED" {
		got = next()
	}
	if got != "STOPPING=1" {
		t.Errorf("at the stop %q, want STOPPING=1", got)
	}
	if code := v.Ended(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestOutputThatIsNotWrittenIsAFailure: whoever keeps the output of a command in a file must
// learn that the disk is full.
func TestOutputThatIsNotWrittenIsAFailure(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "counts.jsonl")
	if err := os.WriteFile(file, []byte(countsLine(1, 5, "a", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"totals", "--counts-file=" + file}, {"totals", "--by-key", "--counts-file=" + file}, {"totals", "--follow", "--counts-file=" + file},
		{"version"}, {"--version"}, {"--help"}, {"help", "totals"}, {"--print-config"},
	} {
		full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		var stderr bytes.Buffer
		cmd := testproc.Verve(t, args...)
		cmd.Stdout, cmd.Stderr = full, &stderr
		kill := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
		if code := testproc.ExitCode(cmd.Run()); code != exitFailed || !strings.Contains(stderr.String(), "no space left") {
			t.Errorf("%q: exit code %d and %q", args, code, &stderr)
		}
		kill.Stop()
		full.Close()
	}
}
