package setting

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
)

// Flag is what Sources need to know about a flag.
type Flag struct {
	Name, Env string // the name without the dashes; its environment variable, or empty
	Bool      bool   // needs no value
	List      bool   // takes several values
	Text      bool   // takes one text, which may look like a number
	File      bool   // is a key of the settings file
}

// Sources are what the values of settings are read from. The command line has precedence over
// the environment, and that over the settings file. An empty variable counts as not set. Only
// one goroutine may use them before ReadFile has returned; after that all methods are safe for
// concurrent use.
type Sources struct {
	flags     map[string]Flag
	args      []string
	variables map[string]string
	path      string // path of the settings file; "": there is none
	file      map[string]any
}

// New returns Sources with the command line and the environment of the program. Call ReadFile
// next, and then the checks.
func New(args, environ []string, flags []Flag) *Sources {
	s := &Sources{flags: make(map[string]Flag), args: args}
	known := make(map[string]bool)
	for _, f := range flags {
		s.flags[f.Name] = f
		if f.Env != "" {
			known[f.Env] = true
		}
	}
	s.variables = variables(environ, known)
	return s
}

// ReadFile reads the settings file, in YAML or JSON, whose path the setting called name has; it
// does nothing if that is not set. It returns an Error if the file cannot be read or parsed, if
// a key is not a flag, or if a value is not of a kind that a flag can have.
func (s *Sources) ReadFile(name string) error {
	s.path, _, _ = s.Lookup(name)
	if s.path == "" {
		return nil
	}
	b, err := ReadFile(s.path)
	if err != nil {
		return Errorf(name, "%v", Cause(err))
	}
	if !utf8.Valid(b) {
		return Errorf(name, "it is not in UTF-8")
	}
	if err := s.decode(b); err != nil {
		first, _, _ := strings.Cut(err.Error(), "\n")
		return Errorf(name, "%s", first)
	}
	var keys []string
	for _, f := range s.flags {
		if f.File {
			keys = append(keys, f.Name)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(s.file)) {
		if !slices.Contains(keys, key) {
			return Errorf(name, "unknown key %q%s", key, Nearest(key, keys))
		}
		if _, err := s.fileText(key); err != nil {
			return err
		}
	}
	return nil
}

// decode reads the only document of a settings file.
func (s *Sources) decode(b []byte) error {
	documents := yaml.NewDecoder(bytes.NewReader(b))
	for {
		var document map[string]any
		switch err := documents.Decode(&document); {
		case errors.Is(err, io.EOF):
			s.keepText(b)
			return nil
		case err != nil:
			return err
		case s.file != nil && document != nil:
			return errors.New("it has a second document, after a line ---")
		case document != nil:
			s.file = document
		}
	}
}

// keepText restores the text as it is written in the file for settings that are text: YAML
// reads 007 as the number 7, but as the name of an instance it is 007.
func (s *Sources) keepText(b []byte) {
	var nodes map[string]ast.Node
	if yaml.Unmarshal(b, &nodes) != nil {
		return // the values stay as decoded
	}
	for key, node := range nodes {
		if !s.flags[key].Text {
			continue
		}
		switch node.(type) {
		case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
			s.file[key] = node.GetToken().Value
		}
	}
}

// longestFile is far more bytes than a settings file, a secret or a chain of certificates has.
const longestFile = 4 << 20

// ReadFile reads a file that a setting names, without the byte order mark with which some
// editors begin a file. It returns an error for a file of more than 4 MiB: a device may never
// end, and would take all memory. Safe for concurrent use.
func ReadFile(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, longestFile+1))
	if err == nil && len(b) > longestFile {
		err = fmt.Errorf("it has more than %d MiB", longestFile>>20)
	}
	return bytes.TrimPrefix(b, []byte("\ufeff")), err
}

// Cause returns the cause in an error of a file, without the operation and the path; any other
// error as it is.
func Cause(err error) error {
	if path, ok := errors.AsType[*fs.PathError](err); ok {
		return path.Err
	}
	return err
}

// CheckVariables returns an error if a variable looks like a setting but is none.
func (s *Sources) CheckVariables() error {
	var known []string
	for _, f := range s.flags {
		known = append(known, f.Env)
	}
	for _, name := range slices.Sorted(maps.Keys(s.variables)) {
		if !slices.Contains(known, name) {
			return fmt.Errorf("environment: unknown variable %q%s", name, Nearest(name, known))
		}
	}
	return nil
}

// CheckText returns an Error if a value is not in UTF-8: the parser of the command line would
// replace the wrong bytes, and so the value could name another file or another instance.
func (s *Sources) CheckText() error {
	for _, name := range slices.Sorted(maps.Keys(s.flags)) {
		if text, _, ok := s.Lookup(name); ok && !utf8.ValidString(text) {
			return Errorf(name, "it is not in UTF-8")
		}
	}
	return nil
}

// Source tells where a value comes from, in two forms.
type Source struct {
	Name   string // the flag, the variable, the path of the file, or "default"
	Phrase string // the same for use in a sentence, such as "from the command line"
}

// Lookup returns the text that sets the flag called name, and where it comes from. If a flag is
// repeated on the command line, the last one counts; the values of a list are joined by commas.
// ok is false if nothing sets the flag, or if it has no valid value in the source that sets it.
func (s *Sources) Lookup(name string) (text string, from Source, ok bool) {
	if text, given, ok := s.argument(name); given {
		return text, Source{"--" + name, "from the command line"}, ok
	}
	if v, ok := s.variables[s.flags[name].Env]; ok {
		return v, Source{s.flags[name].Env, "from " + s.flags[name].Env}, true
	}
	if _, ok := s.file[name]; ok {
		text, err := s.fileText(name)
		return text, Source{s.path, fmt.Sprintf("from %s, key %s", s.path, name)}, err == nil
	}
	return "", Source{"default", "the default"}, false
}

// argument looks for the flag called name on the command line. given: it is there; ok: it has a
// value.
func (s *Sources) argument(name string) (text string, given, ok bool) {
	var all []string
	for i := 0; i < len(s.args) && s.args[i] != "--"; i++ {
		flag, value, joined := strings.Cut(s.args[i], "=")
		if !strings.HasPrefix(flag, "--") {
			continue
		}
		this := flag == "--"+name
		given = given || this
		if !joined && !s.flags[flag[2:]].Bool {
			if i+1 == len(s.args) || strings.HasPrefix(s.args[i+1], "--") {
				continue // the value is missing
			}
			i++
			value = s.args[i]
		}
		if this {
			all = append(all, value)
		}
	}
	if len(all) == 0 {
		return "", given, false
	}
	if s.flags[name].List {
		return strings.Join(all, ","), given, true
	}
	return all[len(all)-1], given, true
}

// fileText returns the value of a key in the settings file as it would be written on the
// command line.
func (s *Sources) fileText(key string) (string, error) {
	list, isList := s.file[key].([]any)
	if !isList {
		list = []any{s.file[key]}
	} else if !s.flags[key].List {
		return "", Errorf(key, "want one value, not a list")
	}
	parts := make([]string, len(list))
	for i, v := range list {
		text, err := scalarText(v)
		if err != nil {
			return "", Errorf(key, "%v", err)
		}
		if isList { // escaped, because a comma ends an element of a list
			text = strings.ReplaceAll(text, ",", `\,`)
		}
		parts[i] = text
	}
	return strings.Join(parts, ","), nil
}

func scalarText(v any) (string, error) {
	switch v := v.(type) {
	case nil:
		return "", errors.New("the key has no value")
	case float64:
		if v == math.Trunc(v) && math.Abs(v) < 1<<53 {
			return fmt.Sprint(int64(v)), nil
		}
		return fmt.Sprint(v), nil
	case string, bool, int64, uint64:
		return fmt.Sprint(v), nil
	}
	return "", errors.New("want text, a number, true or false")
}
