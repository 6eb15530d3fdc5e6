//go:build !unix

package stream

import "os"

// lockFile does nothing where there is no flock: a counts file is then for one
// process.
func lockFile(*os.File) error { return nil }

// syncDir does nothing where a directory cannot be synced.
func syncDir(string) error { return nil }
