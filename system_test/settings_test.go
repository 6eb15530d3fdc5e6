package system_test

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"verve/internal/testproc"
)

// TestBadSettingEndsTheProgram with one line and exit code 2; that each of them is
// named is for a test of package main.
func TestBadSettingEndsTheProgram(t *testing.T) {
	t.Parallel()
	for _, arg := range []string{"--window=61m", "--listen=nowhere", "--redis-url=redis://u:s3cret@h:99999", "--tls-cert-file=none", "--callback-secret-file=none"} {
		name, value, _ := strings.Cut(arg, "=")
		wantRefused(t, testproc.Verve(t, arg), arg, name, value[strings.LastIndexByte(value, '@')+1:], "from the command line")
	}
}

// wantRefused runs a start that can never work.
func wantRefused(t *testing.T, cmd *exec.Cmd, what string, parts ...string) {
	t.Helper()
	kill := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	cmd.Env = append(cmd.Env, "VERVE_LISTEN=127.0.0.1:0", "VERVE_ADMIN_LISTEN=127.0.0.1:0") // if it does serve
	out, err := cmd.CombinedOutput()
	if code := testproc.ExitCode(err); code != exitUsage {
		t.Errorf("%s: exit code %d, want %d\n%s", what, code, exitUsage, out)
	}
	if bytes.Count(out, []byte("\n")) != 1 || !bytes.HasSuffix(out, []byte("\n")) {
		t.Errorf("%s: want one line, got:\n%s", what, out)
	}
	for _, part := range parts {
		if !bytes.Contains(out, []byte(part)) {
			t.Errorf("%s: no %s in %s", what, part, out)
		}
	}
	if bytes.Contains(out, []byte("s3cret")) || bytes.Contains(out, []byte("s4cret")) {
		t.Errorf("%s: the line has the secret: %s", what, out)
	}
	if left, err := os.ReadDir(cmd.Dir); err != nil || len(left) != 0 {
		t.Errorf("%s: it left %v, %v", what, left, err)
	}
}

// TestBusyPortIsNoBadSetting: it may be free at the next try, so a service manager
// should try again.
func TestBusyPortIsNoBadSetting(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cmd := testproc.Verve(t, "--listen="+ln.Addr().String(), "--admin-listen=127.0.0.1:0")
	out, err := cmd.CombinedOutput()
	if code := testproc.ExitCode(err); code != exitFailed || bytes.Count(out, []byte("\n")) != 1 || !bytes.Contains(out, []byte("--listen")) || !bytes.Contains(out, []byte(ln.Addr().String())) {
		t.Errorf("exit code %d, want %d and one line with --listen and the address; got\n%s", code, exitFailed, out)
	}
	if left, err := os.ReadDir(cmd.Dir); err != nil || len(left) != 0 {
		t.Errorf("it left %v, %v", left, err)
	}
}

// TestUnknownVariablesStopTheStart, with a hint.
func TestUnknownVariablesStopTheStart(t *testing.T) {
	t.Parallel()
	for variable, hint := range map[string]string{
		"VERVE_WINDWO=2s":                     `did you mean "VERVE_WINDOW"?`,
		"VERVE_KAFKA_BROKER=kafka:9092":       `did you mean "VERVE_KAFKA_BROKERS"?`,
		"VERVE_REDIS_URLS=redis://:s3cret@h":  `did you mean "VERVE_REDIS_URL"?`,
		"VERVE_PORT=8080":                     "",
		"VERVE_SERVICE_HOST=nowhere":          "",
		"VERVE_SERVICE_PORT=http":             "",
		"VERVE_PORT_8080_TCP_PROTO=http":      "",
		"VERVE_SOMETHING_COMPLETELY_ELSE=yes": "",
		"VERVE_=x":                            "",
	} {
		cmd := testproc.Verve(t, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0")
		cmd.Env = append(cmd.Env, variable)
		name, _, _ := strings.Cut(variable, "=")
		wantRefused(t, cmd, variable, strconv.Quote(name), hint)
	}
}

// TestBadSettingsFiles: of the file itself, named with the source of its name.
func TestBadSettingsFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, c := range []struct{ text, want string }{
		{"windwo: 1m", `unknown key "windwo", did you mean "window"?`},
		{"config: x", `unknown key "config"`},
		{"version: true", `unknown key "version"`},
		{"follow: true", `unknown key "follow"`},
		{"a: b: c", "[1:"},
		{"- window", ""},
		{"window", ""},
		{"window: 1m\nwindow: 2m", `"window"`},
		{"window: 1m\n---\ngroup: a", "second document"},
		{"window: [1m]", "--window"},
		{"window: {a: 1m}", "--window"},
		{"window:", "--window"},
		{"kafka-brokers: [{a: 1}]", "--kafka-brokers"},
		{"kafka-brokers: [[a:1]]", "--kafka-brokers"},
		{"callback-allow: [\"a.lan:1,b.lan:2\"]", "--callback-allow"}, // one element, not two
	} {
		path := filepath.Join(dir, "settings.yaml")
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		wantRefused(t, testproc.Verve(t, "--config="+path), c.text, path, c.want)
	}
	for _, path := range []string{dir, filepath.Join(dir, "none")} {
		wantRefused(t, testproc.Verve(t, "--config="+path), path, "--config", path, "from the command line")
		cmd := testproc.Verve(t)
		cmd.Env = append(cmd.Env, "VERVE_CONFIG="+path)
		wantRefused(t, cmd, path, "--config", path, "from VERVE_CONFIG")
	}
}

// TestUnknownCommandsAndFlags have a hint, and a flag without its value is named.
func TestUnknownCommandsAndFlags(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args string
		want []string
	}{
		{"--windwo=1m", []string{"--windwo", `did you mean "--window"?`}},
		{"sevre", []string{"sevre", `did you mean "serve"?`}},
		{"help totls", []string{"totls", `did you mean "totals"?`}},
		{"x", []string{"the commands are serve, totals, healthcheck, version"}},
		{"totals --folow", []string{"--folow", `"--follow"`}},
		{"serve extra", []string{"extra"}},
		{"-x", []string{"-x"}},
		{"--window", []string{"--window", "the value is missing", "90s"}},
		{"--window --group=a", []string{"--window", "the value is missing"}},
		{"--config", []string{"--config", "the value is missing"}},
		{"--kafka-brokers", []string{"--kafka-brokers", "the value is missing"}},
		{"healthcheck --admin-listen=nowhere", []string{"--admin-listen", "nowhere"}},
		{"totals --kafka-brokers=nowhere", []string{"--kafka-brokers", "nowhere"}},
		{"totals --counts-file=-", []string{`--counts-file="-" (from the command line)`}},
		{"redis://u:s3cret@h", []string{"redis://hidden@h"}},
	} {
		wantRefused(t, testproc.Verve(t, strings.Fields(c.args)...), c.args, c.want...)
	}
	cmd := testproc.Verve(t, "--no\nsuch\tflag")
	wantRefused(t, cmd, "control characters")
}

// TestVersionAndHelpAlwaysWork, whatever the settings are.
func TestVersionAndHelpAlwaysWork(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]string{
		"--version": "verve ", "-v": "verve ", "version": "verve ",
		"help": "Usage: verve <command>", "--help": "Usage: verve <command>", "-h": "Usage: verve <command>", "help totals": "Usage: verve totals", "totals --help": "Usage: verve totals",
		"help healthcheck": "Usage: verve healthcheck", "help version": "Usage: verve version", "help serve": "Usage: verve serve",
	} {
		cmd := testproc.Verve(t, strings.Fields(args)...)
		cmd.Env = append(cmd.Env, "VERVE_WINDOW=fast", "VERVE_WINDWO=1m", "VERVE_CONFIG=/nonexistent")
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		if testproc.ExitCode(err) != 0 || !strings.Contains(stdout.String(), want) || stderr.Len() > 0 {
			t.Errorf("verve %s: exit code %d, stderr %q, stdout\n%s", args, testproc.ExitCode(err), stderr.String(), stdout.String())
		}
	}
}
