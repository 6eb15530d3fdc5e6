//go:build !linux

package dedup

// mapMemory is the plain fallback: memory from the Go heap, touched once.
func mapMemory(size uint64, populate int) ([]byte, error) {
	b := make([]byte, size)
	if populate > 0 {
		for i := 0; i < len(b); i += 4096 {
			b[i] = 0
		}
	}
	return b, nil
}

// populateMemory does nothing: what is in use cannot be touched as above.
func populateMemory([]byte, int) {}

func unmapMemory([]byte) {}
