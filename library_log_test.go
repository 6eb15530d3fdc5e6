package main

import (
	"bytes"
	"encoding/json"
	stdlog "log"
	"os"
	"strings"
	"testing"

	"github.com/rs/zerolog"
)

// TestLibrariesPrintNoLinesOfTheirOwn: a command writes nothing but its output, and
// what a library prints while the server runs is a line of the server's log.
func TestLibrariesPrintNoLinesOfTheirOwn(t *testing.T) {
	cmd := verve(t, "version")
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(stdout.String(), "verve ") || strings.Count(stdout.String(), "\n") != 1 || stderr.Len() > 0 {
		t.Errorf("verve version writes %q and to standard error %q, want one line and none", stdout.String(), stderr.String())
	}

	flags := stdlog.Flags()
	defer func() { stdlog.SetOutput(os.Stderr); stdlog.SetFlags(flags) }()
	var b bytes.Buffer
	logLibraries(zerolog.New(&b))
	stdlog.Printf("ERROR: metrics: cannot read %s", "/proc/self/io")
	var line struct{ Level, Message string }
	if err := json.Unmarshal(b.Bytes(), &line); err != nil || line.Level != "warn" || line.Message != "ERROR: metrics: cannot read /proc/self/io" {
		t.Errorf("the log has %q, %v, want the line as a warning", b.String(), err)
	}
}
