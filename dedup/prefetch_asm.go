//go:build amd64 || arm64

package dedup

import "unsafe"

// prefetch asks the processor to bring the cache line of p near. It does not
// wait for it, and does nothing where p is not mapped.
//
//go:noescape
func prefetch(p unsafe.Pointer)
