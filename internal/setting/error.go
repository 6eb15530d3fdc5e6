// Package setting has what the program's settings have in common: where a value
// comes from (command line, environment, file), and an error that names the
// setting, for the packages whose Config refuses a value.
//
// It reads no flag and no variable by itself: config.go passes them in.
package setting

import (
	"fmt"
	"time"
)

// Error reports that a value of a setting cannot work. The packages return it
// from the checks of their Config; config.go adds the value and its source.
type Error struct {
	Name string // as the flag is called, without dashes
	Why  string // one line; it never quotes a value that may be a secret
}

// Error returns the name and the reason, without the value.
func (e *Error) Error() string { return e.Name + ": " + e.Why }

// Errorf makes an Error about the setting called name.
func Errorf(name, format string, args ...any) error {
	return &Error{Name: name, Why: fmt.Sprintf(format, args...)}
}

// CheckTimeout holds the bounds of every timeout; 0 stands for a default. In a
// shorter one nothing can happen, and a longer one is none.
func CheckTimeout(name string, d time.Duration) error {
	const least, most = time.Millisecond, 24 * time.Hour
	if d != 0 && (d < least || d > most) {
		return Errorf(name, "want %v to %v", least, most)
	}
	return nil
}
