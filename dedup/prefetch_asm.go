//go:build amd64 || arm64

package dedup

import "unsafe"

// prefetch asks the processor to load the cache line of p. It does not wait until the line is
// there, and does nothing if p is not mapped.
//
//go:noescape
func prefetch(p unsafe.Pointer)

// prefetchBoth does the same for the two cache lines from p on.
//
//go:noescape
func prefetchBoth(p unsafe.Pointer)
