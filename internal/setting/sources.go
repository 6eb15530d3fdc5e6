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

// Flag is what Sources need to know of a flag.
type Flag struct {
	Name, Env string // without the dashes; its variable, or empty
	Bool      bool   // needs no value
	List      bool   // takes several values
	Text      bool   // takes one text, which may look like a number
	File      bool   // is a key of the settings file
}

// Sources are what the settings are read from: the command line over the
// environment over the settings file. A variable that is empty is not set.
type Sources struct {
	flags     map[string]Flag
	args      []string
	variables map[string]string
	path      string // of the settings file; "": there is none
	file      map[string]any
}

// New takes what was given to the program. ReadFile and Check come next.
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

// ReadFile reads the settings file that the flag called name points to, in YAML or
// JSON, and refuses keys that are no flags and values of another kind.
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

// decode reads the one document of a settings file.
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
			return errors.New("there is a second document in it, behind a line ---")
		case document != nil:
			s.file = document
		}
	}
}

// keepText puts back what is written in the file for settings that are text: YAML takes
// 007 for the number 7, which as the name of an instance it is not.
func (s *Sources) keepText(b []byte) {
	var nodes map[string]ast.Node
	if yaml.Unmarshal(b, &nodes) != nil {
		return // the values stay
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

// longestFile is far above a file of settings, a secret or a chain of certificates.
const longestFile = 4 << 20

// ReadFile reads a file that a setting names, without the mark U+FEFF that some editors begin
// a file with. It refuses what never ends, as a device, before it takes all memory.
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

// Cause is err without the path and the operation of a file's error.
func Cause(err error) error {
	if path, ok := errors.AsType[*fs.PathError](err); ok {
		return path.Err
	}
	return err
}

// CheckVariables refuses a variable that looks like a setting and is none.
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

// CheckText refuses a value that is not in UTF-8: the parser of the command line would put
// other characters in its place, and with them the name of another file, or of another instance.
func (s *Sources) CheckText() error {
	for _, name := range slices.Sorted(maps.Keys(s.flags)) {
		if text, _, ok := s.Lookup(name); ok && !utf8.ValidString(text) {
			return Errorf(name, "it is not in UTF-8")
		}
	}
	return nil
}

// Source is where a value comes from.
type Source struct {
	Name   string // the flag, the variable, the file, or "default"
	Phrase string // the same as it stands in a sentence
}

// Lookup returns the text that sets the flag called name and where it stands; of a
// flag that is repeated the last one. A list has its values joined by commas. Not
// ok: nothing sets it, or it stands on the command line without a value.
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

// argument looks for the flag on the command line.
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

// fileText is the value of a key as it would stand on the command line.
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
		if isList { // a comma within a value does not end it
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
