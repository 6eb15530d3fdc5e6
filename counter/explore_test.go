//go:build !interleavings

package counter

import (
	"testing"

	"verve/internal/explore/overlay"
)

// TestInterleavings runs the scenarios of interleavings_test.go on epoch.go,
// counter.go and closer.go as they are, in every order of their atomic steps.
func TestInterleavings(t *testing.T) {
	overlay.Test(t, overlay.Config{
		Test:    "counter",
		Folders: []string{"counter"},
		Edits:   overlay.Counter,
	})
}
