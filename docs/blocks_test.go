package docs_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// kind says what is done with a block.
type kind int

const (
	runs     kind = iota // to its end
	serves               // in the background, until the next one or the end of the file
	isFile               // it is written to a file for the blocks that follow
	isNotRun             // for a reason
)

// block is a fenced block that something is done with.
type block struct {
	line   int // of its first line
	kind   kind
	exit   int    // wanted exit code
	name   string // of the file
	reason string // for not running it
	text   string
}

const fence = "```"

// shells are the other names that readers know a shell block by. They are
// refused, so that no command is left out by its colouring.
var shells = map[string]bool{"bash": true, "shell": true, "console": true, "zsh": true, "": true}

// parse returns the blocks of a page: those of sh, and those that a mark makes
// a file.
func parse(page string) (blocks []block, err error) {
	var mark string // not yet followed by its block
	var open *block // inside a fence
	var text strings.Builder
	fail := func(line int, format string, args ...any) error {
		return fmt.Errorf("line %d: %s", line, fmt.Sprintf(format, args...))
	}
	n := 0
	for line := range strings.Lines(page) {
		n++
		trimmed := strings.TrimSpace(line)
		switch {
		case open != nil && trimmed == fence:
			open.text = text.String()
			if open.line > 0 {
				blocks = append(blocks, *open)
			}
			open, mark = nil, ""
		case open != nil:
			text.WriteString(line)
		case strings.HasPrefix(trimmed, fence):
			language := strings.TrimPrefix(trimmed, fence)
			if shells[language] && !strings.HasPrefix(mark, "file ") {
				return nil, fail(n, "%s%s: a block needs a language, and commands are sh", fence, language)
			}
			text.Reset()
			open = &block{}
			if language != "sh" && mark == "" {
				continue
			}
			b, err := read(mark)
			if err != nil {
				return nil, fail(n, "%v", err)
			}
			if language != "sh" && b.kind != isFile {
				return nil, fail(n, "mark %q does not fit a block of %s", mark, language)
			}
			b.line = n + 1
			open = &b
		case strings.HasPrefix(trimmed, "<!-- run:"):
			if mark != "" {
				return nil, fail(n, "no block follows the mark %q", mark)
			}
			mark = strings.TrimSpace(strings.TrimSuffix(strings.TrimPrefix(trimmed, "<!-- run:"), "-->"))
		case trimmed != "" && mark != "":
			return nil, fail(n, "no block follows the mark %q", mark)
		}
	}
	if open != nil || mark != "" {
		return nil, fail(n, "the page ends inside a block or after a mark")
	}
	return blocks, nil
}

// read returns a block as its mark describes it.
func read(mark string) (block, error) {
	word, rest, _ := strings.Cut(mark, " ")
	switch {
	case mark == "":
		return block{kind: runs}, nil
	case mark == "server":
		return block{kind: serves}, nil
	case word == "file" && filepath.IsLocal(rest):
		return block{kind: isFile, name: rest}, nil
	case word == "not," && rest != "":
		return block{kind: isNotRun, reason: rest}, nil
	case word == "exits":
		code, err := strconv.Atoi(rest)
		return block{kind: runs, exit: code}, err
	}
	return block{}, errors.New("unknown mark " + strconv.Quote(mark))
}

const (
	prints   = "# prints "
	anything = "…" // in what is to be printed: anything
)

// expectation is what a command of a block is to print.
type expectation struct {
	line int // in the block, from 0
	want string
}

// script returns the block as a script that marks in its output where the
// commands with an expectation begin and end.
func script(text string) (string, []expectation) {
	var out strings.Builder
	var wants []expectation
	lines := strings.SplitAfter(text, "\n")
	for i := 0; i < len(lines); i++ {
		first := i
		for i+1 < len(lines) && strings.HasSuffix(strings.TrimSpace(lines[i]), `\`) {
			i++
		}
		command := strings.Join(lines[first:i+1], "")
		_, want, ok := strings.Cut(lines[i], prints)
		if !ok {
			out.WriteString(command)
			continue
		}
		fmt.Fprintf(&out, "printf '\\n\\001\\n'\n%s\nprintf '\\n\\002\\n'\n", strings.TrimSuffix(command, "\n"))
		wants = append(wants, expectation{first, strings.TrimSpace(want)})
	}
	return out.String(), wants
}

// printed returns what the commands with an expectation printed, and the output
// without the marks.
func printed(output string) (parts []string, plain string) {
	const begin, end = "\n\x01\n", "\n\x02\n"
	plain = strings.NewReplacer(begin, "", end, "\n").Replace(output)
	for {
		_, after, ok := strings.Cut(output, begin)
		if !ok {
			return parts, plain
		}
		part, rest, _ := strings.Cut(after, end)
		parts = append(parts, strings.TrimSpace(part))
		output = rest
	}
}

// matches reports whether got is want, where anything stands for anything.
func matches(got, want string) bool {
	pieces := strings.Split(want, anything)
	if len(pieces) == 1 {
		return got == want
	}
	if !strings.HasPrefix(got, pieces[0]) {
		return false
	}
	got = got[len(pieces[0]):]
	for _, p := range pieces[1 : len(pieces)-1] {
		_, rest, ok := strings.Cut(got, p)
		if !ok {
			return false
		}
		got = rest
	}
	return strings.HasSuffix(got, pieces[len(pieces)-1])
}

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
package docs_test
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
		{line: 15, kind: isFile, name: "cmd/main.go", text: "package docs_test\n"},
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

// TestPagesCanBeRead is what can be checked where the commands are not run.
func TestPagesCanBeRead(t *testing.T) {
	atRoot(t)
	for page, text := range pages(t) {
		if _, err := parse(text); err != nil && page != "DESIGN.md" && page != "CHANGELOG.md" && page != "SECURITY.md" {
			t.Errorf("%s: %v", page, err)
		}
	}
}
