//go:build !linux

package durable

import "os"

// Allocate gives f, an open and empty file, size bytes on the disk.
func Allocate(f *os.File, size int) error { return writeZeros(f, size) }
