//go:build unix && !interleavings

package dedup

import (
	"testing"

	"verve/internal/explore/overlay"
)

// TestInterleavings runs the scenarios of interleavings_test.go on the table, the
// cleaner and the journal as they are, in every order of their atomic steps.
func TestInterleavings(t *testing.T) {
	overlay.Test(t, overlay.Config{
		Test:    "dedup",
		Folders: []string{"counter", "dedup"},
		Edits:   overlay.Dedup,
	})
}
