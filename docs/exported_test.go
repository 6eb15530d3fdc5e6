package docs_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"

	"verve/internal/testproc"
)

// TestExportedNamesAreDocumented: every exported type, function, method, constant
// and variable of a package, and every exported field of an exported struct, has a
// comment of its own or shares that of its group.
func TestExportedNamesAreDocumented(t *testing.T) {
	atRoot(t)
	testproc.ProductFiles(t, parser.ParseComments, func(path string, _ *token.FileSet, f *ast.File) {
		path = filepath.ToSlash(path)
		if f.Name.Name == "main" || strings.HasPrefix(path, "bench/") || strings.HasPrefix(path, "internal/explore/") {
			return
		}
		missing := func(name string) { t.Errorf("%s: %s.%s has no comment", path, f.Name.Name, name) }
		for _, decl := range f.Decls {
			switch d := decl.(type) {
			case *ast.FuncDecl:
				receiver := receiverOf(d)
				if d.Name.IsExported() && d.Doc == nil && (receiver == "" || ast.IsExported(receiver)) {
					missing(strings.TrimPrefix(receiver+"."+d.Name.Name, "."))
				}
			case *ast.GenDecl:
				if d.Tok != token.IMPORT {
					checkSpecs(d, missing)
				}
			}
		}
	})
}

// TestEveryPackageHasAComment: what it guarantees, who calls it, and what it hands on.
func TestEveryPackageHasAComment(t *testing.T) {
	atRoot(t)
	has := make(map[string]bool)
	testproc.ProductFiles(t, parser.ParseComments, func(path string, _ *token.FileSet, f *ast.File) {
		dir := filepath.ToSlash(filepath.Dir(path))
		has[dir] = has[dir] || f.Doc != nil
	})
	for dir, commented := range has {
		if !commented {
			t.Errorf("no file of %s has a package comment", dir)
		}
	}
}

// receiverOf returns the name of the type that a method belongs to.
func receiverOf(d *ast.FuncDecl) string {
	if d.Recv == nil {
		return ""
	}
	t := d.Recv.List[0].Type
	for {
		switch x := t.(type) {
		case *ast.StarExpr:
			t = x.X
		case *ast.IndexExpr:
			t = x.X
		case *ast.Ident:
			return x.Name
		default:
			return ""
		}
	}
}

// checkSpecs reports the exported names of a declaration that have no comment.
func checkSpecs(d *ast.GenDecl, missing func(name string)) {
	for _, spec := range d.Specs {
		switch s := spec.(type) {
		case *ast.TypeSpec:
			if !s.Name.IsExported() {
				continue
			}
			if d.Doc == nil && s.Doc == nil && s.Comment == nil {
				missing(s.Name.Name)
			}
			if body, ok := s.Type.(*ast.StructType); ok {
				checkFields(s.Name.Name, body.Fields.List, missing)
			}
			if body, ok := s.Type.(*ast.InterfaceType); ok {
				checkFields(s.Name.Name, body.Methods.List, missing)
			}
		case *ast.ValueSpec:
			for _, name := range s.Names {
				if name.IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil {
					missing(name.Name)
				}
			}
		}
	}
}

// maxGap is the distance between the end of a line and the first field on the next.
const maxGap = 2

// checkFields reports exported fields without a comment. One above a field also
// covers those on the lines right below it, as in a group of a struct.
func checkFields(of string, fields []*ast.Field, missing func(name string)) {
	covered, next := false, token.NoPos // by the comment above the fields before
	for _, field := range fields {
		covered = field.Doc != nil || covered && field.Pos() <= next+maxGap
		next = field.End()
		if field.Comment != nil {
			next = field.Comment.End()
		}
		for _, name := range field.Names {
			if name.IsExported() && !covered && field.Comment == nil {
				missing(of + "." + name.Name)
			}
		}
	}
}
