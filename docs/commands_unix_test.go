//go:build unix

package docs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"verve/internal/testproc"
)

const (
	health = "http://127.0.0.1:8081/healthz" // of a server, by its defaults
	poll   = 50 * time.Millisecond
)

// TestCommandsOfThePages runs the commands that the documentation tells its readers to
// run, in the order of the pages that VERVE_TEST_DOCS names, in the root of a copy of
// the tree: .ci/run docs.
//
// Every block fenced as sh is run by bash and must succeed. A mark before it,
// which readers do not see, says otherwise:
//
//	<!-- run: server -->        in the background, until the next server or the
//	                            end of the page; it must be alive soon, and stop
//	                            in order at an interrupt
//	<!-- run: exits 1 -->       it must fail like that
//	<!-- run: not, REASON -->   it is not run
//	<!-- run: file NAME -->     before a block of another language: it is
//	                            written to that file
//
// A command with a comment "# prints TEXT" at its end must print that, where …
// stands for anything. What a page leaves behind is removed after it.
func TestCommandsOfThePages(t *testing.T) {
	atRoot(t)
	named := strings.Fields(os.Getenv("VERVE_TEST_DOCS"))
	if len(named) == 0 {
		t.Skip("VERVE_TEST_DOCS names no pages; .ci/run docs runs their commands")
	}
	ctx, stop := signal.NotifyContext(t.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	for _, page := range named {
		t.Run(page, func(t *testing.T) {
			if err := run(ctx, t, page, 3*time.Minute); err != nil {
				t.Errorf("%s:%v", page, err)
			}
		})
	}
}

// run runs a page.
func run(ctx context.Context, t *testing.T, page string, limit time.Duration) (err error) {
	b, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	blocks, err := parse(string(b))
	if err != nil {
		return err
	}
	before, err := filepath.Glob("*")
	if err != nil {
		return err
	}
	// The pages share a broker: the records of each are an instance's of its own.
	if err := os.Setenv("VERVE_INSTANCE", strings.NewReplacer("/", "-").Replace(page)); err != nil {
		return err
	}
	var up *server
	defer func() {
		err = errors.Join(err, up.stop(limit), removeBut(before))
	}()
	for _, b := range blocks {
		from := time.Now()
		did := "ran"
		switch b.kind {
		case isNotRun:
			did = "not run: " + b.reason
		case isFile:
			did = "wrote " + b.name
			err = write(b)
		case serves:
			did = "serves"
			if err = up.stop(limit); err == nil {
				up, err = serve(ctx, b.text, limit)
			}
		case runs:
			err = execute(ctx, b, limit)
		}
		if err != nil {
			return fmt.Errorf("%d: %w", b.line, err)
		}
		t.Logf("%s:%d: %s, %.1fs", page, b.line, did, time.Since(from).Seconds())
	}
	return nil
}

func write(b block) error {
	if err := os.MkdirAll(filepath.Dir(b.name), 0o755); err != nil {
		return err
	}
	return os.WriteFile(b.name, []byte(b.text), 0o644)
}

// removeBut removes what is in the directory beside the names.
func removeBut(names []string) error {
	kept := make(map[string]bool)
	for _, n := range names {
		kept[n] = true
	}
	now, err := filepath.Glob("*")
	for _, n := range now {
		if !kept[n] {
			err = errors.Join(err, os.RemoveAll(n))
		}
	}
	return err
}

// bash is a script in a process group of its own, which is ended as a whole.
func bash(ctx context.Context, text string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", text)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// execute runs a block to its end.
func execute(ctx context.Context, b block, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	text, wants := script(b.text)
	cmd := bash(ctx, text)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	parts, plain := printed(stdout.String())
	output := "\n" + indent(plain+stderr.String())
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("did not end in %v%s", limit, output)
	case err != nil && !errors.As(err, &exit):
		return err
	case cmd.ProcessState.ExitCode() != b.exit:
		return fmt.Errorf("exit code %d, want %d%s", cmd.ProcessState.ExitCode(), b.exit, output)
	}
	for i, w := range wants {
		if i >= len(parts) || !matches(parts[i], w.want) {
			return fmt.Errorf("line %d does not print %q%s", b.line+w.line, w.want, output)
		}
	}
	return nil
}

func indent(text string) string {
	return "    " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n    ")
}

// server is a block that runs until it is stopped.
type server struct {
	text  string
	cmd   *exec.Cmd
	log   *testproc.Buffer
	ended chan error
}

// serve starts a server and waits until it is alive.
func serve(ctx context.Context, text string, limit time.Duration) (*server, error) {
	s := &server{text: text, cmd: bash(ctx, text), log: new(testproc.Buffer), ended: make(chan error, 1)}
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	if alive(ctx) {
		return nil, errors.New("another server answers at " + health)
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { s.ended <- s.cmd.Wait() }()
	for deadline := time.Now().Add(limit); !alive(ctx); {
		select {
		case err := <-s.ended:
			return nil, fmt.Errorf("the server ended, %v\n%s", err, indent(s.log.String()))
		case <-time.After(poll):
		}
		if time.Now().After(deadline) {
			_ = s.cmd.Cancel() // it says so itself
			return nil, fmt.Errorf("nothing at %s in %v\n%s", health, limit, indent(s.log.String()))
		}
	}
	return s, nil
}

func alive(ctx context.Context) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, health, nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	_ = resp.Body.Close() // only the status is of interest
	return resp.StatusCode == http.StatusOK
}

// stop interrupts the server as ^C does, and waits for its end. A nil server
// has ended.
func (s *server) stop(limit time.Duration) error {
	if s == nil {
		return nil
	}
	if err := syscall.Kill(-s.cmd.Process.Pid, syscall.SIGINT); err != nil {
		return err
	}
	select {
	case err := <-s.ended:
		// After an interrupt go run fails whatever the program did, and says in a
		// line of its own if that failed too.
		if err != nil && (!strings.HasPrefix(s.text, "go run ") || strings.Contains(s.log.String(), "\nexit status ")) {
			return fmt.Errorf("the server did not stop in order: %w\n%s", err, indent(s.log.String()))
		}
		return nil
	case <-time.After(limit):
		_ = s.cmd.Cancel() // it says so itself
		return fmt.Errorf("the server did not stop in %v\n%s", limit, indent(s.log.String()))
	}
}

func TestBlocksMustDoAsThePageSays(t *testing.T) {
	atRoot(t)
	if _, err := exec.LookPath("bash"); err != nil {
		t.Skip("there is no bash here")
	}
	for _, c := range []struct {
		text string
		exit int
		want string // in the error, empty for none
	}{
		{"true", 0, ""},
		{"false\ntrue", 0, "exit code 1, want 0"},
		{"false | cat", 0, "exit code 1, want 0"},
		{"exit 3", 3, ""},
		{"true", 1, "exit code 0, want 1"},
		{"echo ok # prints ok", 0, ""},
		{"echo not ok # prints ok", 0, `line 7 does not print "ok"`},
		{"true # prints ok", 0, `does not print "ok"`},
		{"echo a\necho \\\n  b # prints b\necho c # prints c", 0, ""},
		{"echo a\necho \\\n  b # prints c", 0, "line 8 does not print"},
		{`echo '{"unique":12,"seq":1}' # prints {"unique":…}`, 0, ""},
		{`echo '{"unique":12,"seq":1}' # prints …"seq":2…`, 0, "does not print"},
		{"sleep 60", 0, "did not end"},
	} {
		limit := time.Minute
		if c.want == "did not end" {
			limit = 100 * time.Millisecond
		}
		err := execute(t.Context(), block{line: 7, exit: c.exit, text: c.text}, limit)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%q: got %v, want %q", c.text, err, c.want)
		}
	}
}
