//go:build !linux

package durable

import "os"

// Allocate gives an open file its size on the disk.
func Allocate(f *os.File, size int) error { return writeZeros(f, size) }
