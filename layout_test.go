package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestImportsPointOneWay holds the layout of DESIGN.md: the packages know each
// other in one direction, and each large library has one home.
func TestImportsPointOneWay(t *testing.T) {
	allowed := map[string][]string{ // of this module's packages
		"counter": {},
		"dedup":   {"verve/counter"},
		"server":  {"verve/counter", "verve/dedup"},
		"stream":  {"verve/counter"},
		".":       {"verve/counter", "verve/dedup", "verve/server", "verve/stream"},
	}
	homes := map[string]string{
		"github.com/valyala/fasthttp": "server",
		"github.com/redis/rueidis":    "dedup",
		"github.com/twmb/franz-go":    "stream",
		"go.etcd.io/bbolt":            "stream",
		"github.com/alecthomas/kong":  ".",
	}
	for dir, ours := range allowed {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: no files, %v", dir, err)
		}
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
			if err != nil {
				t.Fatal(err)
			}
			for _, spec := range f.Imports {
				path, err := strconv.Unquote(spec.Path.Value)
				if err != nil {
					t.Fatal(err)
				}
				if strings.HasPrefix(path, "verve/") && !slices.Contains(ours, path) {
					t.Errorf("%s imports %s", file, path)
				}
				for library, home := range homes {
					if strings.HasPrefix(path, library) && dir != home {
						t.Errorf("%s imports %s, whose home is %s", file, path, home)
					}
				}
				if dir == "counter" && strings.Contains(path, ".") {
					t.Errorf("%s imports %s: counter uses the standard library only", file, path)
				}
			}
		}
	}
}

// TestOnlyConfigReadsTheEnvironment: settings come from one place.
func TestOnlyConfigReadsTheEnvironment(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (path == "bench" || strings.HasPrefix(d.Name(), ".") && path != ".") {
			return fs.SkipDir
		}
		if filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") || path == "config.go" {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
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
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
