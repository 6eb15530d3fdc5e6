package docs_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// unplain are patterns of sentences that readers have to read twice: a pronoun
// in the place of the actor, a genitive ahead of what it belongs to, a verb of
// speech for a state.
var unplain = []*regexp.Regexp{
	regexp.MustCompile(`(?i)\b(who|whose) (is|are|was|has|comes|brings|finds|keeps|leaves|serves|waits|reads|asks|needs)\b`),
	regexp.MustCompile(`(?:^|[.:;!?] )What (is|was|has|waits|comes|becomes)\b`),
	regexp.MustCompile(`(?i)\b(brings?|brought)\b`),
	regexp.MustCompile(`\b(is|are|was|were) away\b`),
	regexp.MustCompile(`(?:^|[.:;!?] )Of (them|these|those|an?|the|what|each|all)\b`),
	regexp.MustCompile(`\basked? for\b`),
	regexp.MustCompile(`\b(is|are|was|were|be|been) told\b`),
	regexp.MustCompile(`\b(so long as|no more than|sees? to it that|all the same)\b`),
}

// unplainForUsers are words that pages and strings do without: verbs of speech for
// what programs do, and pronouns for a process.
var unplainForUsers = []*regexp.Regexp{
	regexp.MustCompile(`(?i)\b(says?|said|tells?|told|hears?|heard|nobody|somebody|anybody|whoever|anew)\b`),
}

// forOperators are the files that operators read and edit, whose texts are alerts and the like.
var forOperators = map[string]bool{".yml": true, ".yaml": true, ".service": true, ".socket": true, ".cfg": true}

// TestTextsArePlain: what users read, and what the next author reads. Each hit
// names the place and the words.
func TestTextsArePlain(t *testing.T) {
	atRoot(t)
	all, comment := texts(t)
	for place, text := range all {
		flat := strings.Join(strings.Fields(text), " ")
		patterns := unplain
		if !comment[place] && !strings.Contains(place, "mutants") { // those quote the code
			patterns = append(slices.Clone(unplain), unplainForUsers...)
		}
		for _, pattern := range patterns {
			for _, at := range pattern.FindAllStringIndex(flat, -1) {
				around := flat[max(0, at[0]-40):min(len(flat), at[1]+40)]
				t.Errorf("%s: %q is hard to read: …%s…", place, flat[at[0]:at[1]], around)
			}
		}
	}
}

// texts returns the pages, and the comments, string literals and tags of every Go
// file, by their place.
func texts(t *testing.T) (all map[string]string, comment map[string]bool) {
	t.Helper()
	all, comment = pages(t), make(map[string]bool)
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "testdata" || d.Name() == "results" || strings.HasPrefix(d.Name(), ".") && path != "."):
			return fs.SkipDir
		case d.IsDir():
			return nil
		}
		switch filepath.Ext(path) {
		case ".go":
			goTexts(t, path, all, comment)
		case ".lua", ".js", ".html", ".yml", ".yaml", ".service", ".socket", ".cfg", ".s":
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if !strings.Contains(path, "uplot") {
				all[path], comment[path] = withoutMarks(string(b)), !forOperators[filepath.Ext(path)]
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all, comment
}

// withoutMarks joins the lines of a comment.
func withoutMarks(text string) string {
	return regexp.MustCompile(`(?m)^\s*(#|//|--)\s?`).ReplaceAllString(text, "")
}

func goTexts(t *testing.T, path string, all map[string]string, comment map[string]bool) {
	t.Helper()
	files := token.NewFileSet()
	f, err := parser.ParseFile(files, path, nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	name := regexp.MustCompile(`^[a-z]\w*`) // of what the comment is about
	for _, group := range f.Comments {
		place := files.Position(group.Pos()).String()
		comment[place] = true
		all[place] = name.ReplaceAllString(group.Text(), "")
	}
	if strings.HasSuffix(path, "_test.go") {
		return
	}
	ast.Inspect(f, func(n ast.Node) bool {
		if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
			if text, err := strconv.Unquote(lit.Value); err == nil {
				all[files.Position(lit.Pos()).String()] = text
			}
		}
		return true
	})
}
