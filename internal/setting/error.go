// Package setting has what all settings of the program need: Sources, which find the value of a
// setting and where it comes from (command line, environment, file), and Error, which names the
// setting and is returned by the packages whose Config refuses a value.
//
// It does not read the command line or the environment by itself: config.go passes them in.
package setting

import (
	"fmt"
	"time"
)

// Error reports that a value of a setting cannot work. The packages return it
// from the checks of their Config; config.go adds the value and its source.
type Error struct {
	Name string // the name of the flag, without the dashes
	Why  string // one line, which never quotes a value that may be a secret
}

// Error returns the name and the reason, without the value.
func (e *Error) Error() string { return e.Name + ": " + e.Why }

// Errorf returns an *Error about the setting called name.
func Errorf(name, format string, args ...any) error {
	return &Error{Name: name, Why: fmt.Sprintf(format, args...)}
}

// CheckTimeout returns an error if d is out of the bounds that hold for every timeout. 0 is
// allowed, and means a default. Within less than the lower bound nothing can be finished, and
// more than the upper bound is like no timeout.
func CheckTimeout(name string, d time.Duration) error {
	const least, most = time.Millisecond, 24 * time.Hour
	if d != 0 && (d < least || d > most) {
		return Errorf(name, "want %v to %v", least, most)
	}
	return nil
}
