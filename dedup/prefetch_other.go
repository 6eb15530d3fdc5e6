//go:build !amd64 && !arm64

package dedup

import "unsafe"

// prefetch does nothing: Go has no such instruction for this processor.
func prefetch(unsafe.Pointer) {}

func prefetchBoth(unsafe.Pointer) {}
