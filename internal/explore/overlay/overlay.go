// Package overlay compiles product files against explore/atomic and explore/sync.
//
// It writes copies of the files in which the imports, the pauses and a few constants are
// replaced, and makes go test compile the copies instead of the files (-overlay). The product
// files contain nothing for this purpose.
package overlay

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"verve/internal/testproc"
)

// Tag is the build tag of files with scenarios.
const Tag = "interleavings"

// Edit replaces a text that a file contains exactly once.
type Edit struct{ File, Old, New string }

// Config describes what is compiled and run, and in which form. Paths are relative to the
// module.
type Config struct {
	Test     string   // the folder whose tests are run
	Folders  []string // whose product files are rewritten
	Edits    []Edit   // made before that, to keep scenarios small
	Channels bool     // operations on channels and on the time are steps, too
	Run      string   // a regular expression for the tests; empty: all with Interleavings in their names
	Env      []string // added to the environment
	FailFast bool
}

// Test runs the scenarios of a package as a test of it.
func Test(t *testing.T, c Config) {
	t.Helper()
	out, err := Run(t.Context(), t.TempDir(), c)
	for line := range strings.Lines(string(out)) {
		if err != nil || strings.Contains(line, "explored ") || strings.HasPrefix(strings.TrimSpace(line), "---") {
			t.Log(strings.TrimRight(line, "\n"))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Run builds the tests of a package and runs those that Config names. It writes its files into
// dir, and returns the output of the tests.
func Run(ctx context.Context, dir string, c Config) ([]byte, error) {
	binary, out, err := Build(ctx, dir, c)
	if err != nil {
		return out, err
	}
	return RunBuilt(ctx, binary, c)
}

// Build compiles the tests of a package with rewritten files, which it writes into dir. It
// returns the path of the program, or an error and the output of the compiler.
func Build(ctx context.Context, dir string, c Config) (binary string, out []byte, err error) {
	root, err := testproc.ModuleRoot()
	if err != nil {
		return "", nil, err
	}
	overlay, err := write(dir, root, c)
	if err != nil {
		return "", nil, err
	}
	binary = filepath.Join(dir, "scenarios.test")
	// Linking is faster without the symbols, which only a debugger needs.
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-o", binary, "-overlay", overlay, "-tags", Tag, "-vet=off", "-ldflags=-s -w", "./"+c.Test)
	cmd.Dir = root
	out, err = cmd.CombinedOutput()
	return binary, out, err
}

// RunBuilt runs the tests of a program that Build has made.
func RunBuilt(ctx context.Context, binary string, c Config) ([]byte, error) {
	root, err := testproc.ModuleRoot()
	if err != nil {
		return nil, err
	}
	run := cmp.Or(c.Run, os.Getenv("VERVE_TEST_SCENARIO"), "Interleavings")
	cmd := exec.CommandContext(ctx, binary, "-test.timeout=60m", "-test.v", "-test.run", run)
	if c.FailFast {
		cmd.Args = append(cmd.Args, "-test.failfast")
	}
	cmd.Dir = filepath.Join(root, c.Test)
	cmd.Env = append(os.Environ(), c.Env...)
	return cmd.CombinedOutput()
}

// write writes the rewritten files and a list of them into dir, and returns the path of the
// list.
func write(dir, root string, c Config) (string, error) {
	replace := map[string]string{}
	unused := slices.Clone(c.Edits)
	for _, folder := range c.Folders {
		files, err := filepath.Glob(filepath.Join(root, folder, "*.go"))
		if err != nil {
			return "", err
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			name := filepath.ToSlash(filepath.Join(folder, filepath.Base(file)))
			source, err := os.ReadFile(file)
			if err != nil {
				return "", err
			}
			changed := source
			for _, e := range c.Edits {
				if e.File != name {
					continue
				}
				if n := bytes.Count(changed, []byte(e.Old)); n != 1 {
					return "", fmt.Errorf("%s has %q %d times, want once", name, e.Old, n)
				}
				changed = bytes.Replace(changed, []byte(e.Old), []byte(e.New), 1)
				unused = slices.DeleteFunc(unused, func(u Edit) bool { return u == e })
			}
			if changed, err = rewrite(name, changed, c.Channels); err != nil {
				return "", err
			}
			if bytes.Equal(changed, source) {
				continue
			}
			to := filepath.Join(dir, strings.ReplaceAll(name, "/", "-"))
			if err := os.WriteFile(to, changed, 0o644); err != nil {
				return "", err
			}
			replace[file] = to
		}
	}
	if len(unused) > 0 {
		return "", fmt.Errorf("no file %s in %v", unused[0].File, c.Folders)
	}
	// Other tests of the package may not compile with the replaced types.
	tests, err := filepath.Glob(filepath.Join(root, c.Test, "*_test.go"))
	if err != nil {
		return "", err
	}
	for _, file := range tests {
		source, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		if !bytes.Contains(source, []byte("//go:build "+Tag)) {
			replace[file] = "" // for the compiler the file does not exist
		}
	}
	list, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(dir, "overlay.json")
	return overlay, os.WriteFile(overlay, list, 0o644)
}

// exchanged maps an import of a file to the package that its copy imports instead, under the
// same name.
var exchanged = map[string]string{
	"sync":        "verve/internal/explore/sync",
	"sync/atomic": "verve/internal/explore/atomic",
}

// change replaces the text between two offsets.
type change struct {
	from, to int
	with     string
}

// rewrite returns the copy of a file, with the same lines:
//
//   - its atomics, mutexes and pools are those of package explore;
//   - time.Sleep and runtime.Gosched are explore.Pause;
//   - Add of an atomic whose result is not used is Tally;
//   - a plain store into a mapped chunk is an atomic one, that is, a step;
//   - with channels, what is done with those is done by package explore.
func rewrite(name string, source []byte, channels bool) ([]byte, error) {
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, name, source, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	offset := func(p token.Pos) int { return set.Position(p).Offset }
	text := func(n ast.Node) string { return string(source[offset(n.Pos()):offset(n.End())]) }
	var changes []change
	for _, spec := range file.Imports {
		path, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return nil, err
		}
		to := exchanged[path]
		if path == "time" && channels {
			to = "verve/internal/explore/time"
		}
		if to != "" {
			changes = append(changes, change{offset(spec.Path.Pos()), offset(spec.Path.End()), strconv.Quote(to)})
		}
	}
	if len(changes) == 0 && !channels {
		return source, nil
	}
	tail, imported := "", false
	if channels {
		found := channelChanges(file, offset, text)
		changes, imported = append(changes, found...), len(found) > 0
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CallExpr:
			called := text(n.Fun)
			if called != "time.Sleep" && called != "runtime.Gosched" {
				break
			}
			argument := "0"
			if len(n.Args) > 0 {
				argument = text(n.Args[0])
			}
			changes = append(changes, change{offset(n.Pos()), offset(n.End()), "explore.Pause(" + argument + ")"})
			if used := "\nvar _ = " + called; !strings.Contains(tail, used) {
				tail += used
			}
			return false
		case *ast.ExprStmt:
			if call, is := n.X.(*ast.CallExpr); is && len(call.Args) == 1 {
				if method, is := call.Fun.(*ast.SelectorExpr); is && method.Sel.Name == "Add" {
					changes = append(changes, change{offset(method.Sel.Pos()), offset(method.Sel.End()), "Tally"})
				}
			}
		case *ast.AssignStmt:
			if n.Tok != token.ASSIGN || !intoChunk(n.Lhs[0]) {
				break
			}
			var stores []string
			for i := range n.Lhs {
				stores = append(stores, fmt.Sprintf("atomic.StoreUint64(&%s, %s)", text(n.Lhs[i]), text(n.Rhs[i])))
			}
			changes = append(changes, change{offset(n.Pos()), offset(n.End()), strings.Join(stores, "; ")})
			return false
		}
		return true
	})
	if tail != "" || imported {
		end := offset(file.Name.End())
		changes = append(changes, change{end, end, `; import "verve/internal/explore"`})
	}
	slices.SortFunc(changes, func(a, b change) int { return b.from - a.from })
	out := slices.Clone(source)
	for _, c := range changes {
		out = slices.Replace(out, c.from, c.to, []byte(c.with)...)
	}
	return append(out, tail...), nil
}

// channelChanges returns the changes for the operations on channels in a file. It does not
// support a case that assigns the received value, nor a range over a channel.
func channelChanges(file *ast.File, offset func(token.Pos) int, text func(ast.Node) string) (changes []change) {
	change := func(from, to token.Pos, with string) {
		changes = append(changes, change{offset(from), offset(to), with})
	}
	done := map[ast.Node]bool{} // the operations in cases, which are already changed
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.SelectStmt:
			cases, number, otherwise := "", 0, false
			for _, clause := range n.Body.List {
				c := clause.(*ast.CommClause)
				switch comm := c.Comm.(type) {
				case nil:
					otherwise = true
					continue
				case *ast.SendStmt:
					cases += fmt.Sprintf(", explore.Sending(%s, %s)", text(comm.Chan), text(comm.Value))
				case *ast.ExprStmt:
					cases += fmt.Sprintf(", explore.Receiving(%s)", text(comm.X.(*ast.UnaryExpr).X))
				}
				change(c.Pos(), c.Colon, fmt.Sprintf("case %d", number))
				done[c.Comm] = true
				number++
			}
			change(n.Pos(), n.Body.Lbrace, fmt.Sprintf("switch explore.Select(%v%s) ", otherwise, cases))
		case *ast.SendStmt:
			if !done[n] {
				change(n.Pos(), n.End(), fmt.Sprintf("explore.Send(%s, %s)", text(n.Chan), text(n.Value)))
			}
			return false
		case *ast.ExprStmt:
			return !done[n]
		case *ast.UnaryExpr:
			if n.Op == token.ARROW {
				change(n.Pos(), n.X.Pos(), "explore.Receive(")
				change(n.End(), n.End(), ")")
			}
		case *ast.CallExpr:
			if text(n.Fun) == "close" {
				change(n.Fun.Pos(), n.Fun.End(), "explore.Close")
			}
		}
		return true
	})
	return changes
}

// intoChunk reports whether an expression is a word of the chunk of a cursor
// (dedup/segment.go).
func intoChunk(e ast.Expr) bool {
	index, is := e.(*ast.IndexExpr)
	if !is {
		return false
	}
	of, is := index.X.(*ast.SelectorExpr)
	return is && of.Sel.Name == "chunk"
}

// Counter makes the scenarios of counter smaller: two stripes instead of 32 equal ones, few
// epochs that may wait, and a first table of keys with room for one key.
var Counter = []Edit{
	{"counter/keys.go", "firstKeys = 1 << 10", "firstKeys = 2"},
	{"counter/epoch.go", "stripeCount = 32", "stripeCount = 2"},
	{"counter/counter.go", "maxWaiting = 2048", "maxWaiting = 2"},
}

// Dedup makes the scenarios of dedup smaller and deterministic: tables of one bucket; every new
// id is sampled, except those with bit 50; always the same secret; chunks of a few records; few
// slots; and no syncing, because no scenario loses power.
var Dedup = append(slices.Clone(Counter),
	Edit{"dedup/table.go", "minBuckets = 1 << tagBits", "minBuckets = 1"},
	Edit{"dedup/table.go", "sampleEvery = 64", "sampleEvery = 1"},
	Edit{"dedup/table.go", "return x*golden>>(64-6) == 0", "return x>>50&1 == 0 || golden == 0"},
	Edit{"dedup/memory.go", "tightBelow = 1 << 16", "tightBelow = 2"},
	Edit{"dedup/key.go", "rand.Read(b)", "_ = rand.Read; for i := range b { b[i] = byte(i*89 + 7) }"},
	Edit{"dedup/segment.go", "chunkWords = 64", "chunkWords = 5"},
	Edit{"dedup/journal.go", "\t\tf.Sync,\n", ""},
	Edit{"dedup/journal.go", "slotCount  = 1024", "slotCount  = 16"},
	Edit{"dedup/journal.go", "maxSegments = 4096", "maxSegments = 8"},
	Edit{"dedup/journal.go", "return durable.SyncDir(filepath.Dir(j.Dir))", "return nil"},
	Edit{"dedup/journal.go", "return durable.SyncDir(j.Dir) }", "return nil }"},
	Edit{"dedup/recall.go", "time.Since(j.newest.end())", "time.Duration(-1)"}, // the last epoch goes on
)

// Server makes the scenarios of server deterministic: there are no goroutines except those of
// the scenario, and it is always the same second.
var Server = append(slices.Clone(Counter),
	Edit{"server/conn.go", "\t\tgo func() {\n\t\t\tlinger(c.raw)\n\t\t\tc.remove()", "\t\tfunc() {\n\t\t\tlinger(c.raw)\n\t\t\tc.remove()"},
	Edit{"server/fast.go", "second := now.Unix()", "second := 0 * now.Unix()"},
)
