//go:build !linux

package dedup

// mapMemory is the plain fallback: it takes memory from the Go heap and touches each page once.
func mapMemory(size uint64, populate int) ([]byte, error) {
	b := make([]byte, size)
	if populate > 0 {
		for i := 0; i < len(b); i += 4096 {
			b[i] = 0
		}
	}
	return b, nil
}

// populateMemory does nothing: memory that requests are using cannot be touched as in
// mapMemory.
func populateMemory([]byte, int) {}

func unmapMemory([]byte) {}
