package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestEveryCommandIsRunOrHasAReason(t *testing.T) {
	page := strings.ReplaceAll(`# Page
'''sh
echo a
'''
<!-- run: not, no Docker here -->

'''sh
docker ps
'''
'''json
{"not": "a command"}
'''
<!-- run: file cmd/main.go -->
'''go
package main
'''
<!-- run: server -->
'''sh
go run .
'''
<!-- run: exits 2 -->
'''sh
exit 2
'''
`, "'''", fence)
	got, err := parse(page)
	if err != nil {
		t.Fatal(err)
	}
	want := []block{
		{line: 3, kind: runs, text: "echo a\n"},
		{line: 8, kind: isNotRun, reason: "no Docker here", text: "docker ps\n"},
		{line: 15, kind: isFile, name: "cmd/main.go", text: "package main\n"},
		{line: 19, kind: serves, text: "go run .\n"},
		{line: 23, kind: runs, exit: 2, text: "exit 2\n"},
	}
	if len(got) != len(want) {
		t.Fatalf("got %+v", got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("got %+v, want %+v", got[i], want[i])
		}
	}
}

func TestNothingIsLeftOutByMistake(t *testing.T) {
	for _, c := range []struct{ name, page string }{
		{"another name for a shell", "```bash\nls\n```\n"},
		{"no language", "```\nls\n```\n"},
		{"no reason", "<!-- run: not -->\n```sh\nls\n```\n"},
		{"unknown mark", "<!-- run: maybe -->\n```sh\nls\n```\n"},
		{"mark without a block", "<!-- run: server -->\ntext\n"},
		{"mark at the end", "<!-- run: server -->\n"},
		{"two marks", "<!-- run: server -->\n<!-- run: server -->\n```sh\nls\n```\n"},
		{"block without an end", "```sh\nls\n"},
		{"server that is no command", "<!-- run: server -->\n```go\nls\n```\n"},
		{"file elsewhere", "<!-- run: file ../a -->\n```go\nls\n```\n"},
	} {
		if blocks, err := parse(c.page); err == nil {
			t.Errorf("%s: got %+v", c.name, blocks)
		}
	}
}

func TestBlocksMustDoAsThePageSays(t *testing.T) {
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

// TestPagesCanBeRead is what can be checked where the commands are not run.
func TestPagesCanBeRead(t *testing.T) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range append(pages, "../../README.md", "../../CONTRIBUTING.md", "../README.md") {
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parse(string(b)); err != nil {
			t.Errorf("%s: %v", page, err)
		}
	}
}
