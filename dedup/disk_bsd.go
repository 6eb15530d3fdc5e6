//go:build unix && !linux

package dedup

import "time"

func touch([]byte) {}

// bootID is not known here: what survives a loss of power is taken as it is.
func bootID() uint32 { return 0 }

func bootTime() time.Time { return time.Time{} }
