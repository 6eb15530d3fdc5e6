//go:build !interleavings

package callback

import (
	"testing"

	"verve/internal/explore/overlay"
)

// TestInterleavings runs the scenarios of interleavings_test.go on callback.go,
// destination.go and post.go as they are, in every order of their steps.
func TestInterleavings(t *testing.T) {
	overlay.Test(t, overlay.Config{
		Test:     "server/callback",
		Folders:  []string{"server/callback"},
		Channels: true,
	})
}
