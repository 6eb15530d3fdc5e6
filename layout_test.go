package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"verve/internal/testproc"
)

// TestImportsPointOneWay checks the layout of DESIGN.md in every folder: packages import each
// other in one direction only, and each large library is imported in one place. Tests may
// import more, so only product files are read.
func TestImportsPointOneWay(t *testing.T) {
	allowed := map[string][]string{ // by folder: the packages of this module that it may import
		".":                  {"counter", "dedup", "dedup/redis", "internal/", "server", "server/callback", "stream"},
		"counter":            {},
		"dedup":              {"counter", "internal/"},
		"dedup/redis":        {"counter", "dedup", "internal/"},
		"internal":           {},
		"internal/explore":   {"internal/explore", "internal/explore/", "internal/testproc"}, // of tests
		"internal/epochtest": {"counter"},                                                    // of tests
		"internal/settest":   {"counter", "dedup", "internal/epochtest"},                     // of tests
		"server":             {"counter", "dedup", "internal/", "server/callback"},
		"server/callback":    {"internal/"},
		"stream":             {"counter", "internal/"},
		"bench":              {"bench", "counter", "dedup", "dedup/redis", "internal/", "stream"},
	}
	homes := map[string][]string{ // by library: the folders that may import it
		"github.com/valyala/fasthttp": {"server", "bench"},
		"github.com/redis/rueidis":    {"dedup/redis", "bench"},
		"github.com/twmb/franz-go":    {"stream", "bench"},
		"go.etcd.io/bbolt":            {"stream"},
		"github.com/alecthomas/kong":  {".", "bench"},
	}
	module := modulePath(t)
	testproc.ProductFiles(t, parser.ImportsOnly, func(path string, _ *token.FileSet, f *ast.File) {
		dir := filepath.ToSlash(filepath.Dir(path))
		room := dir // the nearest folder with a rule
		for allowed[room] == nil {
			if room == "." {
				t.Errorf("%s is in a folder that has no place in the layout", path)
				return
			}
			room = filepath.ToSlash(filepath.Dir(room))
			if room == "." {
				t.Errorf("%s is in a folder that has no place in the layout", path)
				return
			}
		}
		for _, spec := range f.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if ours, is := strings.CutPrefix(imported, module+"/"); is {
				fits := func(a string) bool {
					return ours == a || strings.HasSuffix(a, "/") && strings.HasPrefix(ours, a) ||
						a == "bench" && strings.HasPrefix(ours, "bench/")
				}
				if !slices.ContainsFunc(allowed[room], fits) {
					t.Errorf("%s imports %s", path, imported)
				}
			}
			for library, folders := range homes {
				within := func(home string) bool { return room == home || strings.HasPrefix(room, home+"/") }
				if strings.HasPrefix(imported, library) && !slices.ContainsFunc(folders, within) {
					t.Errorf("%s imports %s, whose home is %s", path, imported, folders[0])
				}
			}
			if room == "counter" && strings.Contains(imported, ".") {
				t.Errorf("%s imports %s: counter uses the standard library only", path, imported)
			}
		}
	})
}

// modulePath returns the path of this module, which make module can change.
func modulePath(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(b), "\n")
	path, ok := strings.CutPrefix(line, "module ")
	if !ok {
		t.Fatalf("go.mod begins with %q", line)
	}
	return path
}

// TestOnlyConfigReadsTheEnvironment: settings come from one place.
func TestOnlyConfigReadsTheEnvironment(t *testing.T) {
	testproc.ProductFiles(t, 0, func(path string, _ *token.FileSet, f *ast.File) {
		dir := filepath.ToSlash(filepath.Dir(path))
		if path == "config.go" || strings.HasPrefix(dir, "bench") || strings.HasPrefix(dir, "internal/explore") || dir == "internal/testproc" { // these are not part of the server
			return
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if call, ok := n.(*ast.SelectorExpr); ok {
				pkg, _ := call.X.(*ast.Ident)
				if pkg != nil && pkg.Name == "os" && (call.Sel.Name == "Getenv" || call.Sel.Name == "LookupEnv" || call.Sel.Name == "Args" && path != "main.go") {
					t.Errorf("%s uses os.%s", path, call.Sel.Name)
				}
			}
			return true
		})
	})
}

// TestFunctionsAreShort: a function has at most 80 lines, except for tables. The linter checks
// that none is too complex.
func TestFunctionsAreShort(t *testing.T) {
	const most = 80
	tables := []string{"writeMetrics"}                                               // a line for each entry
	ofTests := []string{"internal/explore", "internal/settest", "internal/testproc"} // folders of test code, whose functions may be long
	testproc.ProductFiles(t, 0, func(path string, fset *token.FileSet, f *ast.File) {
		if slices.ContainsFunc(ofTests, func(dir string) bool { return strings.HasPrefix(path, dir+"/") }) {
			return
		}
		for _, d := range f.Decls {
			if fn, is := d.(*ast.FuncDecl); is && !slices.Contains(tables, fn.Name.Name) {
				if n := fset.Position(fn.End()).Line - fset.Position(fn.Pos()).Line + 1; n > most {
					t.Errorf("%s: %s has %d lines, want %d at most", path, fn.Name.Name, n, most)
				}
			}
		}
	})
}

// TestRootIsShort: main.go and at most five more product files.
func TestRootIsShort(t *testing.T) {
	const most = 5
	var files []string
	testproc.ProductFiles(t, parser.PackageClauseOnly, func(path string, _ *token.FileSet, _ *ast.File) {
		if !strings.Contains(path, "/") && path != "main.go" {
			files = append(files, path)
		}
	})
	if len(files) > most {
		t.Errorf("beside main.go there are %q, want %d at most", files, most)
	}
}
