package testproc

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// program is the server as its users run it, built by the first test that needs it.
var program struct {
	once sync.Once
	dir  string
	err  error
}

// Main is for the TestMain of a package that starts the program: it calls Setup and runs the
// tests.
func Main(m *testing.M) {
	Setup()
	code := m.Run()
	if program.dir != "" {
		_ = os.RemoveAll(program.dir)
	}
	os.Exit(code)
}

// Program builds the program if that was not done yet, and returns its path.
func Program(t testing.TB) string {
	t.Helper()
	program.once.Do(func() { program.dir, program.err = build() })
	if program.err != nil {
		t.Fatal(program.err)
	}
	return filepath.Join(program.dir, "verve")
}

func build() (dir string, err error) {
	root, err := ModuleRoot()
	if err != nil {
		return "", err
	}
	if err := dependOnSource(root); err != nil {
		return "", err
	}
	if dir, err = os.MkdirTemp("", "verve-program-"); err != nil {
		return "", err
	}
	args := []string{"build", "-ldflags=-w", "-o", filepath.Join(dir, "verve")}
	if raceDetector() {
		args = append(args, "-race")
	}
	cmd := exec.Command("go", append(args, ".")...)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return dir, errors.Join(err, errors.New(string(out)))
	}
	return dir, os.Chmod(dir, 0o755) // a test runs it as another user
}

// raceDetector reports whether this test was built with -race.
func raceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// ModuleRoot returns the folder with go.mod, which is the working directory or a folder above
// it.
func ModuleRoot() (string, error) {
	dir, err := os.Getwd()
	for err == nil {
		if _, missing := os.Stat(filepath.Join(dir, "go.mod")); missing == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("no go.mod above the working directory")
		}
		dir = filepath.Dir(dir)
	}
	return "", err
}

// dependOnSource lists the folders of the program's source, because go test caches the result
// of a test until a file changes in a folder that the test has listed.
func dependOnSource(root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && path != root &&
			(strings.HasPrefix(d.Name(), ".") || d.Name() == "bench" || d.Name() == "docs" || d.Name() == "testdata") {
			return fs.SkipDir
		}
		return err
	})
}

// wholeHour has the tests that have called awaitHour.
var wholeHour sync.Map

// awaitHour makes a test wait for the next hour if the present one is nearly over, so that a
// window with --window=1h does not turn during the test. Otherwise it returns at once.
func awaitHour(t testing.TB) {
	const longest = 2 * time.Minute // how long such a test takes on a busy machine, at most
	if _, again := wholeHour.LoadOrStore(t, true); again {
		return
	}
	if left := time.Until(time.Now().Truncate(time.Hour).Add(time.Hour)); left < longest {
		time.Sleep(left)
	}
}

// Verve returns the command that runs the program, not started yet, in a directory of its own.
func Verve(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	if slices.Contains(args, "--window=1h") {
		awaitHour(t)
	}
	cmd := exec.CommandContext(t.Context(), Program(t), args...)
	cmd.Dir = t.TempDir()
	cmd.Env = os.Environ()
	return cmd
}

// Server is a running server. Only one goroutine may use it, except for Get.
type Server struct {
	*exec.Cmd
	Public, Admin string         // URLs
	Log           *bufio.Scanner // reads the log from standard error
	Lines         []string       // the lines of the log that were read so far

	t testing.TB
}

// onFreePorts are the flags that the server of every test gets.
var onFreePorts = []string{"--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0", "--log-format=json"}

// Start starts a server on free ports, and returns when it listens.
func Start(t testing.TB, args ...string) *Server {
	t.Helper()
	return StartCmd(t, Verve(t, append(slices.Clone(onFreePorts), args...)...))
}

// StartCmd is Start for a command that Verve returned.
func StartCmd(t testing.TB, cmd *exec.Cmd) *Server {
	t.Helper()
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	v := &Server{Cmd: cmd, t: t}
	v.Begin(stderr)
	v.AwaitListening()
	return v
}

// Unstarted returns a server that is not started, and the pipe into which it will log.
func Unstarted(t testing.TB, args ...string) (v *Server, stderr *os.File) {
	t.Helper()
	cmd := Verve(t, append(slices.Clone(onFreePorts), args...)...)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = w
	t.Cleanup(func() { _ = r.Close() })
	return &Server{Cmd: cmd, t: t}, r
}

// Begin starts the process. stderr is where its log is read.
func (v *Server) Begin(stderr io.Reader) {
	v.t.Helper()
	if err := v.Cmd.Start(); err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { _ = v.Process.Kill() })
	if w, ok := v.Stderr.(*os.File); ok {
		_ = w.Close() // the process has its own copy
	}
	v.Log = bufio.NewScanner(stderr)
	v.Log.Buffer(nil, 2<<20) // a line may be a dump of all goroutines
}

// AwaitListening reads the log up to the line with the addresses, and sets Public and Admin.
func (v *Server) AwaitListening() {
	v.t.Helper()
	var listening struct{ Listen, Admin string }
	if err := json.Unmarshal([]byte(v.Until(`"message":"listening"`)), &listening); err != nil {
		v.t.Fatal(err)
	}
	v.Public, v.Admin = "http://"+listening.Listen, "http://"+listening.Admin
}

// Until reads the log up to a line that contains part, and returns that line.
func (v *Server) Until(part string) string {
	v.t.Helper()
	for v.Log.Scan() {
		v.Lines = append(v.Lines, v.Log.Text())
		if strings.Contains(v.Log.Text(), part) {
			return v.Log.Text()
		}
	}
	v.t.Fatalf("the log ended without %s:\n%s", part, v.Text())
	return ""
}

// AwaitStopping is called after a signal to stop. It reads the log up to the line about it, and
// returns when /readyz shows it, too, which is a moment later.
func (v *Server) AwaitStopping() {
	v.t.Helper()
	v.Until(`"message":"stopping"`)
	Until(v.t, "readyz is 503 by the stop", func() bool {
		status, body := v.Get(v.Admin + "/readyz")
		return status == 503 && strings.Contains(body, "shutting down")
	})
}

// Text returns the log as far as it was read.
func (v *Server) Text() string { return strings.Join(v.Lines, "\n") }

// Signal sends s to the process.
func (v *Server) Signal(s os.Signal) {
	v.t.Helper()
	if err := v.Process.Signal(s); err != nil {
		v.t.Fatalf("%v: %v", s, err)
	}
}

// Kill ends the process at once, as kill -9 does.
func (v *Server) Kill() {
	v.t.Helper()
	if err := v.Process.Kill(); err != nil {
		v.t.Fatal(err)
	}
	_ = v.Wait() // killed
}

// Stop sends SIGTERM, waits for the end of the process, and returns the exit code.
func (v *Server) Stop() int {
	v.t.Helper()
	v.Signal(syscall.SIGTERM)
	return v.Ended()
}

// Ended reads the log to its end and returns the exit code; -1 if a signal ended the process.
func (v *Server) Ended() int {
	v.t.Helper()
	for v.Log.Scan() { // to its end, because a full pipe would block the process
		v.Lines = append(v.Lines, v.Log.Text())
	}
	_ = v.Wait() // the exit code reports it
	return v.ProcessState.ExitCode()
}

// StopAtOnce sends SIGTERM again and again until the process has ended, because a repeat that
// comes too soon does not count as a second signal. It returns the exit code.
func (v *Server) StopAtOnce() int {
	v.t.Helper()
	ended := make(chan int)
	go func() { ended <- v.Ended() }()
	for {
		_ = v.Process.Signal(syscall.SIGTERM) // may have ended
		select {
		case code := <-ended:
			return code
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Get returns the status and the body of a page. Safe for concurrent use.
func (v *Server) Get(url string) (int, string) {
	v.t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		v.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		v.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// Record is a line of a counts file.
type Record struct {
	// The fields of the contract.
	Start    time.Time `json:"window_start"`
	MS       int64     `json:"window_ms"`
	Unique   int       `json:"unique"`
	Instance string    `json:"instance"`
	Seq      int       `json:"seq"`
	Complete bool      `json:"complete"`
	Exact    bool      `json:"exact"`
}

// Records returns the records in a counts file.
func Records(t testing.TB, file string) (out []Record) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for l := range bytes.Lines(b) {
		var r Record
		if err := json.Unmarshal(l, &r); err != nil {
			t.Fatalf("%s: %v", l, err)
		}
		out = append(out, r)
	}
	return out
}
