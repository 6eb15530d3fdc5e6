package stream

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode"

	"verve/internal/setting"
)

// checkSettingName is checkName for a name in a setting. It also refuses space at the
// ends and invisible characters, because these are mistakes of the user.
func checkSettingName(name, value string) error {
	switch {
	case checkName(name, value) != nil:
		return setting.Errorf(name, "want a name of 1 to %d bytes in UTF-8, without slashes and control characters", maxName)
	case strings.TrimSpace(value) != value:
		return setting.Errorf(name, "there is space at its beginning or end")
	case strings.ContainsFunc(value, func(r rune) bool { return !unicode.IsPrint(r) }):
		return setting.Errorf(name, "it has a character that cannot be printed")
	}
	return nil
}

// checkDir refuses a path that is no directory and cannot become one.
func checkDir(name, path string) error {
	for {
		info, err := os.Stat(path)
		switch {
		case err == nil && info.IsDir():
			return nil
		case err == nil:
			return setting.Errorf(name, "%s is not a directory", path)
		case errors.Is(err, fs.ErrNotExist) && filepath.Dir(path) != path:
			path = filepath.Dir(path) // the rest of it will be made
		case errors.Is(err, fs.ErrPermission):
			return nil // the right may be granted before the file is needed
		default:
			return setting.Errorf(name, "%v", setting.Cause(err))
		}
	}
}

// Check returns an error, which names the setting, for a counts file that cannot be written
// to. It makes nothing.
func (cfg *Config) Check() error {
	if cfg.CountsFile == "" || cfg.CountsFile == "-" {
		return nil
	}
	if strings.HasSuffix(cfg.CountsFile, "/") {
		return setting.Errorf("counts-file", "want a file, not a directory")
	}
	if err := checkDir("counts-file", filepath.Dir(cfg.CountsFile)); err != nil {
		return err
	}
	for _, path := range cfg.CountsFiles() {
		switch info, err := os.Stat(path); {
		case err == nil && info.IsDir():
			return setting.Errorf("counts-file", "want a file, but %s is a directory", path)
		case err == nil && info.Mode()&os.ModeSocket != 0:
			return setting.Errorf("counts-file", "want a file, but %s is a socket", path)
		case err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission):
			return setting.Errorf("counts-file", "%s: %v", filepath.Base(path), setting.Cause(err))
		}
	}
	return nil
}

// CountsFiles returns the paths of the counts file and of the file of the lines by key next
// to it; none for standard output.
func (cfg *Config) CountsFiles() []string {
	if cfg.CountsFile == "" || cfg.CountsFile == "-" {
		return nil
	}
	return []string{cfg.CountsFile, keysFile(cfg.CountsFile)}
}

// checkBrokers refuses brokers that are not HOST:PORT. Messages name a broker by its place in
// the list, because the text there may be a password.
func checkBrokers(brokers []string) error {
	seen := make(map[string]bool)
	for i, b := range brokers {
		why := badBroker(b)
		if why == "" && seen[b] {
			why = "it is there twice"
		}
		seen[b] = true
		if why != "" && len(brokers) > 1 {
			why = "broker " + strconv.Itoa(i+1) + ": " + why
		}
		if why != "" {
			return setting.Errorf("kafka-brokers", "%s", why)
		}
	}
	return nil
}

// badBroker returns why a text cannot be a broker, or "".
func badBroker(b string) string {
	switch {
	case b == "":
		return "it is empty"
	case strings.ContainsAny(b, "\"'`"):
		return "there is a quote in it: env files keep the quotes around a value"
	case strings.ContainsFunc(b, unicode.IsSpace):
		return "there is space in it: brokers are separated by commas"
	case strings.Contains(b, "://"):
		return "want HOST:PORT without a scheme"
	case strings.Contains(b, "@"):
		return "want HOST:PORT without a user, which --kafka-user is for"
	}
	return setting.BadAddress(b, "")
}
