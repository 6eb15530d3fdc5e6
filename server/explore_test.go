//go:build !interleavings

package server

import (
	"testing"

	"verve/internal/explore/overlay"
)

// TestInterleavings runs the scenarios of interleavings_test.go on a connection as it
// is, in every order of its atomic steps.
func TestInterleavings(t *testing.T) {
	overlay.Test(t, overlay.Config{
		Test:    "server",
		Folders: []string{"counter", "server", "server/callback"},
		Edits:   overlay.Server,
	})
}
