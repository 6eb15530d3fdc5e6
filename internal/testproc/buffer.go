// Package testproc has what the tests of several packages share: processes, such as the server
// and Redis, and the output of processes.
package testproc

import (
	"bytes"
	"sync"
)

// Buffer holds output that can be read while it is written. Safe for concurrent use.
type Buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write appends p. It never fails.
func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// String returns what was written so far.
func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
