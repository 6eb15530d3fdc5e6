package docs_test

import (
	"go/ast"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"verve/internal/testproc"
)

// pages are what users read.
func pages(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	texts := make(map[string]string)
	for _, file := range append(files, "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "DESIGN.md", "bench/README.md") {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		texts[file] = string(b)
	}
	return texts
}

func TestMain(m *testing.M) { testproc.Main(m) }

// atRoot runs the test at the root: pages are named as from there. In TestMain, before go test
// notes which files a test reads, this made it show old results for pages that had changed.
func atRoot(t *testing.T) {
	t.Helper()
	t.Chdir("..")
}

func help(t *testing.T, args ...string) string {
	t.Helper()
	out, err := testproc.Verve(t, append(args, "--help")...).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

var flagName = regexp.MustCompile(`--([a-z][a-z0-9-]+)`)

// TestSettingsPageHasEverySetting, and no other.
func TestSettingsPageHasEverySetting(t *testing.T) {
	atRoot(t)
	page := pages(t)["docs/settings.md"]
	_, table, ok := strings.Cut(page, "\n| flag |")
	if !ok {
		t.Fatal("there is no table of settings")
	}
	table, _, _ = strings.Cut(table, "\n\n")
	printed, err := testproc.Verve(t, "--print-config").Output()
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, m := range regexp.MustCompile(`(?m)^(?:# )?([a-z][a-z0-9-]*): `).FindAllSubmatch(printed, -1) {
		have = append(have, string(m[1]))
	}
	for _, name := range have {
		if !strings.Contains(table, "`--"+name+"`") {
			t.Errorf("--%s is not in the table of settings", name)
		}
	}
	for _, m := range flagName.FindAllStringSubmatch(table, -1) {
		if !slices.Contains(have, m[1]) {
			t.Errorf("--%s is in the table of settings and there is no such flag", m[1])
		}
	}
}

// TestPagesNameWhatThereIs: flags in code spans, metrics, and files that are
// linked to.
func TestPagesNameWhatThereIs(t *testing.T) {
	atRoot(t)
	// An unreachable Redis has metrics, too.
	v := testproc.Start(t, "--window=1h", "--dedup=redis", "--redis-url=redis://127.0.0.1:1")
	_, metrics := v.Get(v.Admin + "/metrics")
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	source, err := os.ReadFile("server/metrics.go") // for those of other settings
	if err != nil {
		t.Fatal(err)
	}
	flags := help(t) + help(t, "totals")
	span := regexp.MustCompile("`(--[a-z][^`]*)`")
	metric := regexp.MustCompile(`\bverve_[a-z_]+\b`)
	link := regexp.MustCompile(`\]\(([^)#]+)(#[^)]*)?\)`)
	for file, text := range pages(t) {
		for _, m := range span.FindAllStringSubmatch(text, -1) {
			for _, f := range flagName.FindAllStringSubmatch(m[1], -1) {
				if !strings.Contains(flags, "--"+f[1]) && !slices.Contains(otherFlags, f[1]) {
					t.Errorf("%s: there is no --%s", file, f[1])
				}
			}
		}
		for _, name := range metric.FindAllString(text, -1) {
			family := regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
			there := strings.Contains(metrics, "# TYPE "+name+" ") || strings.Contains(metrics, "# TYPE "+family+" ") ||
				strings.Contains(string(source), `"`+name+`"`) || slices.Contains(otherMetrics, name)
			if !there {
				t.Errorf("%s: there is no metric %s", file, name)
			}
		}
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(file), m[1])); err != nil {
				t.Errorf("%s: the link to %s leads nowhere", file, m[1])
			}
		}
	}
}

// TestEveryAlertHasItsPlaceInOperations: an operator finds there what to do.
func TestEveryAlertHasItsPlaceInOperations(t *testing.T) {
	atRoot(t)
	rules, err := os.ReadFile("deploy/prometheus/verve.rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	operations := pages(t)["docs/operations.md"]
	alerts := regexp.MustCompile(`- alert: (\w+)`).FindAllSubmatch(rules, -1)
	if len(alerts) == 0 {
		t.Fatal("no alerts")
	}
	for _, m := range alerts {
		if !strings.Contains(operations, "`"+string(m[1])+"`") {
			t.Errorf("%s is not in docs/operations.md", m[1])
		}
	}
	// Its own headings are where it sends the reader.
	anchors := make(map[string]bool)
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(operations, -1) {
		kept := regexp.MustCompile(`[^a-z0-9 -]`).ReplaceAllString(strings.ToLower(m[1]), "")
		anchors[strings.ReplaceAll(kept, " ", "-")] = true
	}
	for _, m := range regexp.MustCompile(`\]\(#([^)]+)\)`).FindAllStringSubmatch(operations, -1) {
		if !anchors[m[1]] {
			t.Errorf("docs/operations.md has no heading for #%s", m[1])
		}
	}
}

// TestPagesHaveOneVersion: of the changelog's newest entry, the HTTP interface and
// the image that the manifests name.
func TestPagesHaveOneVersion(t *testing.T) {
	atRoot(t)
	found := make(map[string]string)
	for file, version := range map[string]string{
		"CHANGELOG.md":      `(?m)^## \[(\d\S*)\]|It becomes (\d+\.\d+\.\d+)\.`,
		"docs/openapi.yaml": `(?m)^  version: (\S+)$`,
		"deploy/kubernetes/base/kustomization.yaml": `(?m)^ +newTag: (\S+)`,
	} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		m := regexp.MustCompile(version).FindStringSubmatch(string(b))
		if m == nil {
			t.Fatalf("%s names no version", file)
		}
		found[file] = strings.Join(m[1:], "")
	}
	for file, version := range found {
		if version != found["CHANGELOG.md"] {
			t.Errorf("%s has version %s, CHANGELOG.md has %s", file, version, found["CHANGELOG.md"])
		}
	}
}

// TestEveryPictureIsShown: by a page, or it is in the way.
func TestEveryPictureIsShown(t *testing.T) {
	atRoot(t)
	pictures, err := filepath.Glob("docs/*.png")
	if err != nil || len(pictures) == 0 {
		t.Fatalf("no pictures: %v", err)
	}
	for _, picture := range pictures {
		shown := false
		for _, text := range pages(t) {
			shown = shown || strings.Contains(text, filepath.Base(picture))
		}
		if !shown {
			t.Errorf("no page shows %s", picture)
		}
	}
}

// What belongs to others: flags of go test and curl, and metrics of the k6 scripts.
var (
	otherFlags   = []string{"profile", "retry", "retry-all-errors"}
	otherMetrics = []string{"verve_ok", "verve_duplicate", "verve_wrong_answer"}
)

// TestReadmeCanBeReadAtOnce: what does not fit goes to docs/.
func TestReadmeCanBeReadAtOnce(t *testing.T) {
	atRoot(t)
	const most = 1800
	if n := len(strings.Fields(pages(t)["README.md"])); n > most {
		t.Errorf("README.md has %d words, want %d at most", n, most)
	}
}

// TestDesignHasARowForEveryFile of the product, and none for a file that is gone.
func TestDesignHasARowForEveryFile(t *testing.T) {
	atRoot(t)
	rows := make(map[string]bool)
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+\\.(?:go|lua|s|js))` \\|").FindAllStringSubmatch(pages(t)["DESIGN.md"], -1) {
		if rows[m[1]] {
			t.Errorf("%s has two rows", m[1])
		}
		rows[m[1]] = true
	}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		path = filepath.ToSlash(path)
		switch {
		case err != nil:
			return err
		case d.IsDir() && (strings.HasPrefix(d.Name(), ".") && path != "." || d.Name() == "testdata" || path == "server/live/browser"):
			return fs.SkipDir
		case d.IsDir() || strings.HasSuffix(path, "_test.go"):
			return nil
		case !slices.Contains([]string{".go", ".lua", ".s", ".js"}, filepath.Ext(path)):
			return nil
		case !rows[path]:
			t.Errorf("%s has no row in DESIGN.md", path)
		}
		delete(rows, path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for path := range rows {
		t.Errorf("DESIGN.md has a row for %s, which is not there", path)
	}
}

// TestDesignHasARowForEveryLock: the order of the locks names each mutex of the
// product, as a reader finds it in the code.
func TestDesignHasARowForEveryLock(t *testing.T) {
	atRoot(t)
	_, locks, _ := strings.Cut(pages(t)["DESIGN.md"], "\n## Locks\n")
	locks, _, _ = strings.Cut(locks, "\n## ")
	testproc.ProductFiles(t, 0, func(path string, _ *token.FileSet, f *ast.File) {
		if strings.HasPrefix(path, "bench") || strings.HasPrefix(path, filepath.Join("internal", "explore")) {
			return
		}
		ast.Inspect(f, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok {
				return true
			}
			s, ok := spec.Type.(*ast.StructType)
			if !ok {
				return true
			}
			for _, field := range s.Fields.List {
				kind, ok := field.Type.(*ast.SelectorExpr)
				if !ok || len(field.Names) == 0 || !strings.HasSuffix(kind.Sel.Name, "Mutex") {
					continue
				}
				name := f.Name.Name + "." + spec.Name.Name + "." + field.Names[0].Name
				if !strings.Contains(locks, "`"+name+"`") {
					t.Errorf("%s: the lock %s is not in DESIGN.md, Locks", path, name)
				}
			}
			return true
		})
	})
	// What a row may then take is a lock that has a row, too.
	table := regexp.MustCompile("(?m)^\\| `([\\w.]+)`.*\\|([^|]*)\\|$").FindAllStringSubmatch(locks, -1)
	for _, row := range table {
		for _, m := range regexp.MustCompile("`([\\w.]+)`").FindAllStringSubmatch(row[2], -1) {
			name := m[1]
			hasRow := func(other []string) bool { return other[1] == name || strings.HasSuffix(other[1], "."+name) }
			if regexp.MustCompile(`^\w+\.(mu|\w*ing|attempts)$|\.mu$`).MatchString(name) && !slices.ContainsFunc(table, hasRow) {
				t.Errorf("DESIGN.md, Locks: %s may take %s, which has no row", row[1], name)
			}
		}
	}
	if len(table) == 0 {
		t.Error("DESIGN.md, Locks: no table was found")
	}
}

// TestDesignNamesWhatThereIs: a function, a type or a file that is gone, or has another name
// now, is the first sign of a page that is not true any more.
func TestDesignNamesWhatThereIs(t *testing.T) {
	atRoot(t)
	word := regexp.MustCompile(`[A-Za-z_]\w*`)
	files, words := make(map[string]bool), make(map[string]bool)
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && strings.HasPrefix(d.Name(), ".") && path != ".":
			return fs.SkipDir
		case d.IsDir():
			return nil
		}
		files[filepath.ToSlash(path)], files[d.Name()] = true, true
		if slices.Contains([]string{".go", ".lua", ".js", ".s", ".html", ".mod"}, filepath.Ext(path)) {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for _, w := range word.FindAllString(string(b), -1) {
				words[w] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	file := regexp.MustCompile(`^[\w./-]+\.(go|lua|js|s|tsv)$`)
	name := regexp.MustCompile(`^\w+(\.\w+)*$`)
	outside := []string{"RawConn.Read", "UNSTEADY", "vX.Y.Z"} // of Go, of .ci/run, and a form
	for _, page := range []string{"DESIGN.md", "CONTRIBUTING.md"} {
		text := regexp.MustCompile("(?s)```.*?```").ReplaceAllString(pages(t)[page], "")
		for _, m := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(text, -1) {
			switch {
			case slices.Contains(outside, m[1]):
			case file.MatchString(m[1]):
				if !files[m[1]] {
					t.Errorf("%s: there is no file %s", page, m[1])
				}
			case name.MatchString(m[1]):
				for _, w := range word.FindAllString(m[1], -1) {
					if !words[w] && !files[m[1]] {
						t.Errorf("%s: %s names %s, which is nowhere in the code", page, m[1], w)
					}
				}
			}
		}
	}
}

// TestDesignListsItsSections, in their order.
func TestDesignListsItsSections(t *testing.T) {
	atRoot(t)
	page := pages(t)["DESIGN.md"]
	var listed, there []string
	for _, m := range regexp.MustCompile(`(?m)^\d+\. \[([^\]]+)\]\(#`).FindAllStringSubmatch(page, -1) {
		listed = append(listed, m[1])
	}
	for _, m := range regexp.MustCompile(`(?m)^## (.+)$`).FindAllStringSubmatch(page, -1) {
		there = append(there, m[1])
	}
	if len(there) < 2 || !slices.Equal(listed, there[1:]) { // the first is about the page
		t.Errorf("DESIGN.md lists the sections %q, and has %q", listed, there)
	}
}
