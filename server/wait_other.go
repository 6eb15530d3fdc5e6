//go:build !linux

package server

// edgeTriggered: not known of this system.
const edgeTriggered = false

// waitAndRead is for systems of which that is known.
func (*fastPath) waitAndRead(*conn, []byte) (have int, done bool, err error) {
	panic("server: this system may not wake a reader that has not looked")
}
